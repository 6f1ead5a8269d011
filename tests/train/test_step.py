"""A step: the loss and norm it reports are true, long gradients are shortened, and what is not finite is not applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from instil.errors import DivergedError
from instil.pack.tree import build_pack
from instil.train.optim import MasterAdamW
from instil.train.step import step
from instil.types import Batch, Example

FP32, BF16 = torch.float32, torch.bfloat16


def batch_of(examples: list[Example], number: int = 3) -> Batch:
    packs = tuple(build_pack([example], [i]) for i, example in enumerate(examples))
    return Batch(number, 0, packs, float(sum(p.weight.sum() for p in packs)))


def test_what_a_step_reports(tiny: Any, some_examples: Any, textbook: Any) -> None:
    """Loss, gradient norm and accuracy are the textbook's, one by one; counts are those of the examples."""
    net, examples = tiny(), some_examples(5, weighted=True)
    loss, gradients = textbook(net, examples)
    right = 0
    for e in examples:
        tokens = torch.tensor([[*e.prompt_tokens.tolist(), *e.answer_tokens.tolist()]])
        net.set_attn_implementation("eager")
        first = net(input_ids=tokens).logits[0].argmax(-1)[len(e.prompt_tokens) - 1 : -1]
        right += int(((first == tokens[0, len(e.prompt_tokens) :]) & (torch.tensor(e.weights) > 0)).sum())
    net.set_attn_implementation("instil_loop")
    stats = step(net, MasterAdamW(net, dtype=FP32, weight_decay=0.0), batch_of(examples), lr=0.0, clip_norm=0.0)
    targets = sum(int((e.weights > 0).sum()) for e in examples)
    assert stats.loss == pytest.approx(loss, rel=1e-6)
    assert stats.grad_norm == pytest.approx(sum(float(g.square().sum()) for g in gradients.values()) ** 0.5, rel=1e-5)
    assert stats.accuracy == right / targets
    assert stats.target_tokens == targets
    assert stats.computed_tokens == sum(e.length_tokens for e in examples)


def test_accuracy_is_one_when_every_target_is_the_first_choice(tiny: Any, make_example: Any) -> None:
    """The model's own greedy answer."""
    net = tiny()
    net.set_attn_implementation("eager")
    tokens = [5, 9]
    for _ in range(4):
        tokens.append(int(net(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    net.set_attn_implementation("instil_loop")
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.0)
    batch = batch_of([make_example(tokens[:2], tokens[2:])])
    assert step(net, optimizer, batch, lr=0.0, clip_norm=0.0).accuracy == 1.0


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_steps_lower_the_loss(dtype: torch.dtype, tiny: Any, some_examples: Any) -> None:
    """On the same batch, again and again, to less than half."""
    net = tiny()
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.0)
    batch = batch_of(some_examples(4))
    losses = [step(net, optimizer, batch, lr=0.01, clip_norm=1.0).loss for _ in range(12)]
    assert losses[-1] < losses[0] / 2


def gradients_after(tiny: Any, examples: list[Example], clip_norm: float, dtype: torch.dtype) -> tuple[float, Any]:
    """The norm a step reports, and the gradients it applied."""
    net = tiny()
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.0)
    stats = step(net, optimizer, batch_of(examples), lr=0.0, clip_norm=clip_norm)
    return stats.grad_norm, torch.cat([m.grad.flatten() for m in optimizer.masters.values()])


@pytest.mark.parametrize("share", [0.25, 0.9])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_long_gradient_is_shortened_to_clip_norm(
    dtype: torch.dtype, share: float, tiny: Any, some_examples: Any
) -> None:
    """The direction stays, the norm becomes clip_norm; the norm reported is the one before."""
    examples = some_examples(4)
    norm, plain = gradients_after(tiny, examples, 0.0, dtype)
    reported, clipped = gradients_after(tiny, examples, norm * share, dtype)
    assert reported == norm
    assert float(plain.norm()) == pytest.approx(norm, rel=1e-5)
    assert float(clipped.norm()) == pytest.approx(norm * share, rel=1e-5)
    torch.testing.assert_close(clipped / share, plain, rtol=1e-5, atol=1e-7)


def test_a_short_gradient_is_left_as_it_is(tiny: Any, some_examples: Any) -> None:
    """A limit above the norm changes nothing, nor does 0, which means never."""
    examples = some_examples(4)
    norm, plain = gradients_after(tiny, examples, 0.0, FP32)
    assert torch.equal(gradients_after(tiny, examples, norm * 2, FP32)[1], plain)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_loss_that_is_not_finite_is_not_applied(
    poison: float, dtype: torch.dtype, tiny: Any, some_examples: Any
) -> None:
    """Exit code 6, the step, loss, norm and rate in the line, and weights and optimizer state as they were."""
    net = tiny()
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.1)
    batch = batch_of(some_examples(4))
    step(net, optimizer, batch, lr=0.01, clip_norm=1.0)
    optimizer.masters["lm_head.weight"].data[3, 3] = poison
    optimizer.load_masters({n: m.detach().clone() for n, m in optimizer.masters.items()})
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    state = {n: t.clone() for n, t in optimizer.state().items()}
    with pytest.raises(DivergedError) as caught:
        step(net, optimizer, batch, lr=0.01, clip_norm=1.0)
    (line,) = caught.value.lines()
    assert caught.value.exit_code == 6
    assert line.startswith("step 4: ")
    assert "rate 0.01" in line
    assert "the update was not applied" in line
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in net.named_parameters())
    assert all(torch.equal(t, state[n]) for n, t in optimizer.state().items())


def test_a_gradient_that_overflows_is_not_applied(tiny: Any, some_examples: Any) -> None:
    """Also where the loss is finite and only the gradient is not."""
    net = tiny()
    optimizer = MasterAdamW(net, dtype=FP32, weight_decay=0.0)
    net.model.embed_tokens.weight.register_hook(lambda grad: grad * float("inf"))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(DivergedError, match=r"gradient norm (inf|nan)"):
        step(net, optimizer, batch_of(some_examples(2)), lr=0.01, clip_norm=1.0)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_a_step_after_a_refused_one_is_clean(tiny: Any, some_examples: Any) -> None:
    """The poisoned gradients are not added to the next."""
    good, bad = batch_of(some_examples(3)), batch_of(some_examples(2, seed=9))

    def run(poisoned: bool) -> torch.Tensor:
        net = tiny()
        optimizer = MasterAdamW(net, dtype=BF16, weight_decay=0.0)
        if poisoned:
            hook = net.lm_head.weight.register_hook(lambda grad: grad * float("nan"))
            with pytest.raises(DivergedError):
                step(net, optimizer, bad, lr=0.01, clip_norm=1.0)
            hook.remove()
        step(net, optimizer, good, lr=0.01, clip_norm=1.0)
        return torch.cat([m.flatten() for m in optimizer.masters.values()])

    assert torch.equal(run(True), run(False))
