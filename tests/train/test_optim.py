"""MasterAdamW: who is whose master, who decays, and that its state can be put back. Its sums are proved in proofs/."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from architectures import architecture
from instil.pack.tree import build_pack
from instil.train.optim import MasterAdamW
from instil.train.step import step
from instil.types import Batch

BF16, FP32 = torch.bfloat16, torch.float32


def batch_of(examples: Any) -> Batch:
    packs = tuple(build_pack([example], [i]) for i, example in enumerate(examples))
    return Batch(0, 0, packs, float(sum(p.weight.sum() for p in packs)))


def test_float32_parameters_are_their_own_masters(tiny: Any) -> None:
    """No second copy of the weights."""
    net = tiny()
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.0)
    assert all(optimizer.masters[n] is p for n, p in net.named_parameters())


def test_bf16_parameters_are_rounded_copies_of_their_masters(tiny: Any) -> None:
    """Masters are the float32 values that were loaded, buffers stay float32."""
    net = tiny()
    loaded = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = MasterAdamW(net, dtype=BF16, weight_decay=0.0)
    for name, parameter in net.named_parameters():
        assert torch.equal(optimizer.masters[name], loaded[name])
        assert torch.equal(parameter, loaded[name].bfloat16())
    assert {b.dtype for b in net.buffers()} == {FP32}


def test_a_tied_weight_has_one_master(tiny: Any) -> None:
    """Embedding and head are one parameter with the sum of both gradients."""
    net = tiny("llama-tied")
    optimizer = MasterAdamW(net, dtype=BF16, weight_decay=0.0)
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert not [name for name in optimizer.masters if "lm_head" in name]


def test_frozen_parameters_have_no_master(tiny: Any) -> None:
    """Nor are they changed."""
    net = tiny()
    net.model.embed_tokens.weight.requires_grad_(False)
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.1)
    assert "model.embed_tokens.weight" not in optimizer.masters


def test_matrices_decay_and_vectors_do_not(tiny: Any) -> None:
    """Norms and biases are vectors."""
    net = tiny("qwen2")
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.2)
    decay = {id(p): group["weight_decay"] for group in optimizer.adamw.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        assert decay[id(parameter)] == (0.0 if "norm" in name or name.endswith("bias") else 0.2), name
    assert len(decay) == len(list(net.parameters()))


def test_the_biases_of_experts_do_not_decay() -> None:
    """gpt-oss stacks them to matrices [experts, width]; of its experts the weights decay and nothing else."""
    net = architecture("gpt-oss, window and sinks")
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.2)
    decay = {id(p): group["weight_decay"] for group in optimizer.adamw.param_groups for p in group["params"]}
    found = {n.rsplit(".", 1)[-1]: decay[id(p)] for n, p in net.named_parameters() if ".experts." in n}
    assert found == {"gate_up_proj": 0.2, "gate_up_proj_bias": 0.0, "down_proj": 0.2, "down_proj_bias": 0.0}


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_state_can_be_put_back(dtype: torch.dtype, tiny: Any, some_examples: Any) -> None:
    """Three updates, or two, then a fresh model and optimizer with that state and one more: the same to the bit."""
    batch = batch_of(some_examples(3))

    def fresh() -> tuple[Any, MasterAdamW]:
        net = tiny("llama-tied")
        return net, MasterAdamW(net, dtype=dtype, weight_decay=0.1)

    net, optimizer = fresh()
    for _ in range(2):
        step(net, optimizer, batch, lr=0.01, clip_norm=1.0)
    weights = {n: m.detach().clone() for n, m in optimizer.masters.items()}
    state = {n: t.clone() for n, t in optimizer.state().items()}
    step(net, optimizer, batch, lr=0.01, clip_norm=1.0)

    again, other = fresh()
    other.load_masters(weights)
    other.load_state(state)
    step(again, other, batch, lr=0.01, clip_norm=1.0)
    for (name, a), (_, b) in zip(net.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(m, other.masters[n]) for n, m in optimizer.masters.items())
    assert optimizer.state().keys() == other.state().keys()
    assert all(torch.equal(t, other.state()[n]) for n, t in optimizer.state().items())


def test_state_loaded_is_a_copy(tiny: Any, some_examples: Any) -> None:
    """Going on does not write into what was loaded."""
    net = tiny()
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.0)
    step(net, optimizer, batch_of(some_examples(2)), lr=0.01, clip_norm=0.0)
    state = {n: t.clone() for n, t in optimizer.state().items()}
    kept = {n: t.clone() for n, t in state.items()}
    optimizer.load_state(state)
    step(net, optimizer, batch_of(some_examples(2)), lr=0.01, clip_norm=0.0)
    assert all(torch.equal(t, kept[n]) for n, t in state.items())


def test_before_the_first_update_there_is_no_state(tiny: Any) -> None:
    """A run stopped before it can be saved too."""
    assert MasterAdamW(tiny(), dtype=BF16, weight_decay=0.0).state() == {}
