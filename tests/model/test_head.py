"""The head's logits and loss are the model's own, whatever scales, caps or biases them, and only where targets are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instil.model.attention import attention
from instil.model.head import Head, head_of, weighted_nll
from instil.model.load import hidden_states
from instil.pack.tree import build_pack


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama-tied", {}),
        ("gpt2", {}),
        ("granite", {"logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 3.0}),
    ],
)
def test_logits_are_the_models_own(kind: str, changes: dict[str, Any], tiny: Any, some_examples: Any) -> None:
    """Divided, multiplied or soft-capped as the model's configuration says; the oracle is the model itself."""
    net = tiny(kind, **changes)
    (example,) = some_examples(lengths=[(6, 4)])
    pack = build_pack([example], [0])
    with torch.no_grad():
        found = head_of(net).logits(hidden_states(net, pack))
        with attention(net, "eager"):
            own = net(input_ids=torch.tensor(pack.tokens)[None].long(), use_cache=False).logits[0]
    torch.testing.assert_close(found, own.float(), rtol=1e-5, atol=1e-5)


def test_a_head_has_the_models_weight_and_not_a_copy(tiny: Any) -> None:
    """A tied head's gradient reaches the embedding."""
    net = tiny("llama-tied")
    assert head_of(net).weight is net.get_input_embeddings().weight


def triples(n: int = 5, vocabulary: int = 11) -> tuple[torch.Tensor, ...]:
    """at, target and weight, with a position that carries two."""
    return torch.tensor([0, 2, 2, 4]), torch.tensor([1, 10, 3, 0]), torch.tensor([1.0, 2.0, 0.5, 1.0])


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_chunks_of_triples_add_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients do not depend on how many rows of logits exist at one time."""
    hidden, weight, bias = torch.randn(5, 6), torch.randn(11, 6), torch.randn(11)

    def run() -> tuple[torch.Tensor, ...]:
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        found = weighted_nll(h, Head(w, b, 0.5, 4.0), *triples())
        (found.nll * 3).backward()
        return found.nll.detach(), found.right, h.grad, w.grad, b.grad

    whole = run()
    monkeypatch.setattr("instil.model.head.CHUNK_BYTES", 4 * 11 * rows)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_exist_for_a_chunk_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 targets over a vocabulary of 5,000 would be 20 MB of logits; in chunks of 1 MB no tensor is larger."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr("instil.model.head.CHUNK_BYTES", 1 << 20)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel() * t.element_size())
            return out

    hidden, weight = torch.randn(1000, 4, requires_grad=True), torch.randn(5000, 4, requires_grad=True)
    with Watch():
        weighted_nll(
            hidden, Head(weight, None), torch.arange(1000), torch.zeros(1000).long(), torch.ones(1000)
        ).nll.backward()
    assert 0 < largest <= 1 << 20


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_trains_gets_a_gradient(frozen: str) -> None:
    """A frozen head costs no gradient of the head, and an evaluation none at all."""
    hidden = torch.randn(5, 6, requires_grad=frozen == "weight")
    weight = torch.randn(11, 6, requires_grad=frozen == "hidden")
    found = weighted_nll(hidden, Head(weight, None), *triples())
    assert found.nll.requires_grad is (frozen != "both")
    if frozen != "both":
        found.nll.backward()
    assert (hidden.grad is None) is (frozen != "weight")
    assert (weight.grad is None) is (frozen != "hidden")


def test_bf16_logits_are_summed_in_float32() -> None:
    """Loss of bf16 states is a float32 number near the float64 one; gradients come back in bf16."""
    hidden = torch.randn(5, 64).bfloat16().requires_grad_()
    weight = (torch.randn(11, 64) / 8).bfloat16().requires_grad_()
    at, target, counted = triples()
    found = weighted_nll(hidden, Head(weight, None), at, target, counted)
    found.nll.backward()
    log_p = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
    expected = -(counted.double() * log_p[at, target]).sum()
    assert found.nll.dtype == torch.float32
    assert float(found.nll.detach()) == pytest.approx(float(expected), rel=0.01)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert hidden.grad.abs().sum() > 0


def test_no_targets_cost_nothing() -> None:
    """A pack whose answers all have weight 0 has loss 0 and gradient 0."""
    hidden = torch.randn(5, 6, requires_grad=True)
    none = torch.zeros(0).long()
    found = weighted_nll(hidden, Head(torch.randn(11, 6), None), none, none, torch.zeros(0))
    found.nll.backward()
    assert float(found.nll.detach()) == 0.0
    assert not hidden.grad.any()
