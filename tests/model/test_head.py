"""The head's logits and loss are the model's own, whatever scales, caps or biases them, and only where targets are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from instil.model.attention import attention
from instil.model.head import CHUNK_BYTES, Head, Triples, head_of, weighted_nll
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


AT, TARGET, COUNTED = np.array([0, 2, 2, 4]), np.array([1, 10, 3, 0]), np.array([1.0, 2.0, 0.5, 1.0], np.float32)


def triples() -> Triples:
    """Four, with a position that carries two."""
    return Triples.of(AT, TARGET, COUNTED)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_chunks_of_triples_add_up(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients do not depend on how many rows of logits exist at one time."""
    hidden, weight, bias = torch.randn(5, 6), torch.randn(11, 6), torch.randn(11)

    def run() -> tuple[torch.Tensor, ...]:
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        found = weighted_nll(h, Head(w, b, 0.5, 4.0), triples())
        (found.nll * 3).backward()
        return found.nll.detach(), found.right, h.grad, w.grad, b.grad

    whole = run()
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 11 * rows)
    for found, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_exist_for_a_chunk_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 targets over a vocabulary of 5,000 would be 20 MB of logits; in chunks of 1 MB no tensor is larger."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1 << 20)
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
        every = Triples.of(np.arange(1000), np.zeros(1000, np.int32), np.ones(1000, np.float32))
        weighted_nll(hidden, Head(weight, None), every).nll.backward()
    assert 0 < largest <= 1 << 20


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_only_what_trains_gets_a_gradient(frozen: str) -> None:
    """A frozen head costs no gradient of the head, and an evaluation none at all."""
    hidden = torch.randn(5, 6, requires_grad=frozen == "weight")
    weight = torch.randn(11, 6, requires_grad=frozen == "hidden")
    found = weighted_nll(hidden, Head(weight, None), triples())
    assert found.nll.requires_grad is (frozen != "both")
    if frozen != "both":
        found.nll.backward()
    assert (hidden.grad is None) is (frozen != "weight")
    assert (weight.grad is None) is (frozen != "hidden")


def test_bf16_logits_are_summed_in_float32() -> None:
    """Loss of bf16 states is a float32 number near the float64 one; gradients come back in bf16."""
    hidden = torch.randn(5, 64).bfloat16().requires_grad_()
    weight = (torch.randn(11, 64) / 8).bfloat16().requires_grad_()
    found = weighted_nll(hidden, Head(weight, None), triples())
    found.nll.backward()
    log_p = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
    expected = -(torch.tensor(COUNTED).double() * log_p[AT, TARGET]).sum()
    assert found.nll.dtype == torch.float32
    assert float(found.nll.detach()) == pytest.approx(float(expected), rel=0.01)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert hidden.grad.abs().sum() > 0


def test_chunks_of_bf16_add_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,000 chunks of one row: in bfloat16 a sum stops growing at 256 times its terms; in float32 the gradient of the head
    is that of float64 but for the rounding of its terms."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 11)
    n = 2000
    hidden = (1 + torch.randn(n, 6) / 4).bfloat16()
    weight = (torch.randn(11, 6) / 8).bfloat16().requires_grad_()
    target = np.arange(n, dtype=np.int32) % 3
    every = Triples.of(np.arange(n, dtype=np.int32), target, np.ones(n, np.float32))
    weighted_nll(hidden, Head(weight, None), every).nll.backward()
    other = weight.detach().double().requires_grad_()
    torch.nn.functional.cross_entropy(
        hidden.double() @ other.T, torch.from_numpy(target).long(), reduction="sum"
    ).backward()
    assert float((weight.grad.double() - other.grad).norm() / other.grad.norm()) < 0.01


def test_no_targets_cost_nothing() -> None:
    """A pack whose answers all have weight 0 has loss 0 and gradient 0."""
    hidden = torch.randn(5, 6, requires_grad=True)
    none = np.zeros(0, np.int32)
    found = weighted_nll(hidden, Head(torch.randn(11, 6), None), Triples.of(none, none, none.astype(np.float32)))
    found.nll.backward()
    assert float(found.nll.detach()) == 0.0
    assert not hidden.grad.any()


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.5, 2.0)])
def test_entropy_is_that_of_the_softmax(rows: int, scale: float, cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted as the targets are, a position with two of them twice; the oracle is torch's own distribution."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 11 * rows)
    head, hidden = Head(torch.randn(11, 6), torch.randn(11), scale, cap), torch.randn(5, 6)
    expected = torch.distributions.Categorical(logits=head.logits(hidden[AT]).double()).entropy()
    found = weighted_nll(hidden, head, triples())
    assert float(found.entropy) == pytest.approx(float((expected * torch.tensor(COUNTED)).sum()), rel=1e-5)
    assert not found.entropy.requires_grad


def test_a_position_is_projected_once() -> None:
    """A hundred answers that branch at one position cost one row of logits, and learn what a hundred rows would."""
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def watch(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(x))
        return linear(x, *rest)

    hidden, weight = torch.randn(3, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    target = np.arange(100, dtype=np.int32) % 7
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", watch)
        found = weighted_nll(
            hidden, Head(weight, None), Triples.of(np.ones(100, np.int32), target, np.ones(100, np.float32))
        )
    found.nll.backward()
    other = weight.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(
        (hidden[1] @ other.T).expand(100, -1), torch.tensor(target).long(), reduction="sum"
    ).backward()
    assert rows == [1]
    torch.testing.assert_close(weight.grad, other.grad, rtol=1e-12, atol=1e-12)
