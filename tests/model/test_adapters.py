"""An adapter starts as no change, trains alone, and is on disk what peft itself reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from architectures import architecture
from instil.errors import UsageError
from instil.model.adapters import add_lora, merged, save_adapter
from instil.model.attention import attention
from instil.model.head import head_of
from instil.model.load import hidden_states, load_model
from instil.pack.tree import build_pack
from instil.train.optim import MasterAdamW
from instil.train.step import step
from instil.types import Batch

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class Section:
    """The configuration's section `adapter`."""

    rank: int
    alpha: float | None
    targets: list[str]


def lora(net: Any, targets: Sequence[str] = (), rank: int = 4, seed: int = 0) -> PeftModel:
    return add_lora(net, Section(rank, 8.0, list(targets)), "org/base", seed)


def logits(net: Any, tokens: Sequence[int] = (5, 3, 8, 1)) -> torch.Tensor:
    """The model's own, with its own attention."""
    with torch.no_grad(), attention(net, "sdpa"):
        return net(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def batch_of(examples: Any) -> Batch:
    pack = build_pack(examples, range(len(examples)))
    return Batch(0, 0, (pack,), float(pack.weight.sum()))


def trained(net: Any, examples: Any, updates: int = 3) -> MasterAdamW:
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    for _ in range(updates):
        step(net, optimizer, batch_of(examples), lr=0.02, clip_norm=0.0)
    return optimizer


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen3"])
def test_an_adapter_starts_as_no_change(kind: str, tiny: Any, some_examples: Any) -> None:
    """B = 0: logits are equal to the bit, in packs as well."""
    net = tiny(kind)
    pack = build_pack(some_examples(3), range(3))
    before = logits(net), hidden_states(net, pack).detach()
    lora(net)
    assert torch.equal(logits(net), before[0])
    assert torch.equal(hidden_states(net, pack).detach(), before[1])


def test_every_linear_layer_but_the_head_is_adapted(tiny: Any) -> None:
    """Unless targets are named."""
    net = tiny()
    lora(net)
    adapted = {n.rsplit(".lora_A", 1)[0] for n, p in net.named_parameters() if p.requires_grad and "lora_A" in n}
    places = {"self_attn": ALL[:4], "mlp": ALL[4:]}
    assert adapted == {
        f"model.layers.{i}.{place}.{t}" for i in (0, 1) for place, names in places.items() for t in names
    }


def test_only_the_targets_named_are_adapted(tiny: Any) -> None:
    """And their matrices have the rank asked for."""
    net = tiny()
    lora(net, ["q_proj", "v_proj"], rank=3)
    trainable = {n: tuple(p.shape) for n, p in net.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2
    assert all(".q_proj." in n or ".v_proj." in n for n in trainable)
    assert all(3 in shape for shape in trainable.values())


def test_only_the_adapter_trains(tiny: Any, some_examples: Any) -> None:
    """After three steps the base model is the same to the bit, each of the adapter's matrices has moved."""
    net = tiny()
    lora(net)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = trained(net, some_examples(4))
    assert set(optimizer.masters) == {n for n in before if ".lora_A." in n or ".lora_B." in n}
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora_" not in name), name


def test_training_through_the_adapter_lowers_the_loss(tiny: Any, some_examples: Any) -> None:
    """The gradient through both matrices points down."""
    net = tiny()
    lora(net)
    examples = some_examples(4)
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    losses = [step(net, optimizer, batch_of(examples), lr=0.02, clip_norm=1.0).loss for _ in range(8)]
    assert losses[-1] < 0.8 * losses[0]


def test_adapters_of_one_seed_are_equal(tiny: Any) -> None:
    """Another seed gives another A."""
    found = []
    for seed in (1, 1, 2):
        net = tiny()
        lora(net, seed=seed)
        found.append(torch.cat([p.flatten() for n, p in net.named_parameters() if "lora_A" in n]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_unknown_target_is_named_with_those_there_are(tiny: Any) -> None:
    """Exit code 2, before anything is changed."""
    net = tiny()
    with pytest.raises(UsageError) as caught:
        lora(net, ["q_proj", "query"])
    (line,) = caught.value.lines()
    assert line.startswith("adapter.targets: ")
    assert "'query'" in line
    assert all(name in line for name in ALL)
    assert not any("lora" in n for n, _ in net.named_parameters())


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("beside", [(), ("{one}",)])
def test_the_head_is_no_target(kind: str, beside: tuple[str, ...], tiny: Any) -> None:
    """Our head reads the base weight (model/head.py), so an adapter there would never learn: it is refused by name."""
    net = tiny(kind)
    one = "c_attn" if kind == "gpt2" else "q_proj"
    with pytest.raises(UsageError) as caught:
        lora(net, [*(each.format(one=one) for each in beside), "lm_head"])
    (line,) = caught.value.lines()
    head, _, known = line.partition("; use some of: ")
    assert head == "adapter.targets: 'lm_head' is the head, which adapters leave as it is"
    assert one in known
    assert "lm_head" not in known


def test_gpt2s_layers_can_be_named(tiny: Any, some_examples: Any) -> None:
    """They are linear layers under another name (Conv1D), and their adapters learn."""
    net = tiny("gpt2")
    lora(net, ["c_attn"])
    optimizer = trained(net, some_examples(4))
    adapted = {name.split(".lora_")[0] for name in optimizer.masters}
    assert adapted == {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}
    assert all(float(m.detach().norm()) > 0 for m in optimizer.masters.values())


def test_a_router_that_is_more_than_a_linear_layer_is_left_alone(some_examples: Any) -> None:
    """Phi-3.5-MoE's is a subclass that returns a tuple, which no adapter can be added to; the other layers learn."""
    net = architecture("Phi-3.5-MoE, window")
    lora(net)
    optimizer = trained(net, some_examples(4))
    assert not [name for name in optimizer.masters if "router" in name]
    assert {name.split(".")[-4] for name in optimizer.masters if ".lora_B." in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert all(float(m.detach().norm()) > 0 for m in optimizer.masters.values())


def test_a_model_without_linear_layers_is_answered_with_full_tuning() -> None:
    """Nothing could be adapted; the setting that helps is named."""
    net: Any = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)})
    net.get_output_embeddings = lambda: net["lm_head"]
    with pytest.raises(UsageError, match=r"adapter\.rank: the model has no linear layers .*; set it to 0"):
        lora(net)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
def test_a_saved_adapter_is_what_peft_reads(saved: Any, tmp_path: Path, some_examples: Any) -> None:
    """peft's own PeftModel.from_pretrained on the untouched base gives the trained logits to the bit."""
    base = saved("llama")
    net = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    adapted = lora(net)
    start = logits(net)
    trained(net, some_examples(4))
    save_adapter(adapted, tmp_path / "adapter")
    files = {f.name for f in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not [f for f in files if f.endswith((".bin", ".pt", ".pkl"))]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, "org/base")
    fresh = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(fresh(input_ids=torch.tensor([[5, 3, 8, 1]])).logits[0].detach(), logits(net))
    assert not torch.equal(logits(net), start)


def test_a_saved_adapter_names_layers_as_servers_do(tiny: Any, tmp_path: Path) -> None:
    """By the last part of their names, not module by module."""
    save_adapter(lora(tiny()), tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == sorted(ALL)


def test_alpha_is_twice_the_rank_unless_said(tiny: Any) -> None:
    """So that the usual scale is 2, whatever the rank."""
    assert add_lora(tiny(), Section(6, None, []), "b", 0).peft_config["default"].lora_alpha == 12
    assert add_lora(tiny(), Section(6, 3.0, []), "b", 0).peft_config["default"].lora_alpha == 3


def test_merging_adds_alpha_over_rank_times_b_a(tiny: Any, some_examples: Any) -> None:
    """W + (8 / 4) B A, written out, is in the merged weights, and the merged model has the adapted one's logits."""
    net = tiny()
    adapted = lora(net)
    trained(net, some_examples(4))
    layer: Any = net.model.layers[1].mlp.up_proj
    expected = layer.base_layer.weight + 2.0 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    before = logits(net)
    plain = merged(adapted)
    torch.testing.assert_close(plain.model.layers[1].mlp.up_proj.weight, expected, rtol=1e-6, atol=1e-7)
    assert not any("lora" in n for n, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), before, rtol=1e-5, atol=1e-5)
    assert head_of(plain).weight is plain.lm_head.weight


def test_a_bf16_adapter_has_float32_masters(tiny: Any, some_examples: Any) -> None:
    """Copies in bf16, as the base; masters of the adapter only."""
    net = tiny().bfloat16()
    lora(net)
    optimizer = MasterAdamW(net, dtype=torch.bfloat16, weight_decay=0.0)
    step(net, optimizer, batch_of(some_examples(4)), lr=0.01, clip_norm=1.0)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert {m.dtype for m in optimizer.masters.values()} == {torch.float32}
    assert all("lora_" in name for name in optimizer.masters)
