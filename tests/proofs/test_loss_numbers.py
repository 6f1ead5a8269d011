"""The numbers of the chapter, worked out by hand, come out of the library: losses, gradients, shares, seconds, tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from instil.model.head import CHUNK_BYTES, Head, Triples, weighted_nll
from instil.pack.bins import plan_packs
from instil.pack.loader import Loader
from instil.pack.plan import plan_steps
from instil.pack.prefixes import Prefixes
from instil.pack.tree import build_pack
from instil.types import Batch, Example, Pack

Nll = Callable[[Tensor, Head, Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, head: Head, at: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return weighted_nll(hidden, head, Triples.of(*(x.numpy() for x in (at, target, weight)))).nll


# --- the loss of one token


def check_hand_numbers(nll: Nll) -> None:
    """A head whose softmax is (0.6, 0.3, 0.1): -log 0.6 = 0.5108, and 2 * 0.5108 + 0.5 * -log 0.1 = 2.1729."""
    head = Head(torch.log(torch.tensor([[0.6], [0.3], [0.1]])), None)
    hidden = torch.tensor([[0.0], [1.0]])  # row 0 predicts uniformly, row 1 predicts (0.6, 0.3, 0.1)
    once = nll(hidden, head, torch.tensor([1]), torch.tensor([0]), torch.ones(1))
    assert float(once) == pytest.approx(0.5108, abs=5e-5)
    assert float(once) == pytest.approx(0.510825623766, abs=1e-7)
    twice = nll(hidden, head, torch.tensor([1, 1]), torch.tensor([0, 2]), torch.tensor([2.0, 0.5]))
    assert float(twice) == pytest.approx(2 * 0.510825624 + 0.5 * 2.302585093, abs=1e-6)


def test_a_target_of_probability_06_costs_05108_nats() -> None:
    """-log 0.6 = 0.5108."""
    check_hand_numbers(ours)


@pytest.mark.parametrize(
    "broken",
    [
        lambda h, head, at, t, w: ours(h, head, at, t, w) / math.log(2),  # bits
        lambda h, head, at, t, w: ours(h, head, at, t, w) / w.sum() * len(w),  # a mean where a sum is due
        lambda h, head, at, t, w: ours(h, head, at - 1, t, w),  # the position of the target, not the one before it
        lambda h, head, at, t, w: ours(h, head, at, t, torch.ones_like(w)),  # weights forgotten
    ],
    ids=["bits", "mean", "off-by-one", "unweighted"],
)
def test_a_wrong_loss_fails_the_hand_numbers(broken: Nll) -> None:
    """The same numbers catch other units, a mean, a shifted position and forgotten weights."""
    with pytest.raises(AssertionError):
        check_hand_numbers(broken)


# --- its gradient


def softmax64(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss64(
    logits: np.ndarray, at: list[int], target: list[int], weight: list[float], scale: float, cap: float
) -> float:
    """The textbook loss in float64."""
    z = logits * scale
    z = cap * np.tanh(z / cap) if cap else z
    return sum(-w * math.log(softmax64(z[a])[t]) for a, t, w in zip(at, target, weight, strict=True))


def differences64(loss: Callable[[np.ndarray], float], x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Central finite differences of a scalar function of a matrix."""
    found = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += eps
        down[index] -= eps
        found[index] = (loss(up) - loss(down)) / (2 * eps)
    return found


AT, TARGET, WEIGHT = [1, 1, 3, 4], [2, 5, 0, 6], [1.0, 0.5, 2.0, 1.0]  # position 1 is a branch point: two triples


def check_logit_gradient(nll: Nll) -> None:
    """With the identity as head, hidden states are logits: d loss / d logits = w (p - onehot), and 0 elsewhere."""
    torch.manual_seed(3)
    logits = torch.randn(6, 7, requires_grad=True)
    head = Head(torch.eye(7), None)
    nll(logits, head, torch.tensor(AT), torch.tensor(TARGET), torch.tensor(WEIGHT)).backward()
    found = logits.grad
    assert found is not None
    z = logits.detach().double().numpy()
    expected = np.zeros_like(z)
    for a, t, w in zip(AT, TARGET, WEIGHT, strict=True):
        expected[a] += w * (softmax64(z[a]) - np.eye(7)[t])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
    by_differences = differences64(lambda x: loss64(x, AT, TARGET, WEIGHT, 1.0, 0.0), z)
    np.testing.assert_allclose(found.numpy(), by_differences, rtol=1e-5, atol=1e-6)
    for elsewhere in (0, 2, 5):
        assert torch.equal(found[elsewhere], torch.zeros(7)), f"position {elsewhere} is no target and has a gradient"


def test_the_gradient_at_a_target_is_p_minus_onehot() -> None:
    """d loss / d logits = weight * (p - onehot) at targets, exactly 0 elsewhere, and finite differences agree."""
    check_logit_gradient(ours)


@pytest.mark.parametrize(
    "broken",
    [
        lambda h, head, at, t, w: -ours(h, head, at, t, w),
        lambda h, head, at, t, w: ours(h, head, at + 1, t, w),
        lambda h, head, at, t, w: ours(h, head, at, t, torch.ones_like(w)),
        lambda h, head, at, t, w: (
            ours(h, head, at, t, w) + 1e-3 * torch.nn.functional.cross_entropy(h[:1], torch.zeros(1).long())
        ),
    ],
    ids=["uphill", "shifted", "unweighted", "a-prompt-token-too"],
)
def test_a_wrong_gradient_is_caught(broken: Nll) -> None:
    """The same check catches a wrong sign, a shifted position, forgotten weights and a loss on one prompt token."""
    with pytest.raises(AssertionError):
        check_logit_gradient(broken)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.25, 0.0), (1.0, 2.0), (0.5, 3.0)])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 4 * 7 * 2])
def test_the_heads_gradients_are_those_of_finite_differences(
    scale: float, cap: float, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states, weight and bias, with the logits scaled and capped, in one chunk of triples or in several."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", chunk_bytes)
    torch.manual_seed(4)
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((6, 5), (7, 5), (7,)))
    nll = ours(hidden, Head(weight, bias, scale, cap), torch.tensor(AT), torch.tensor(TARGET), torch.tensor(WEIGHT))
    (nll / 3).backward()
    h, w, b = (x.detach().double().numpy() for x in (hidden, weight, bias))

    def loss(h: np.ndarray = h, w: np.ndarray = w, b: np.ndarray = b) -> float:
        return loss64(h @ w.T + b.reshape(-1), AT, TARGET, WEIGHT, scale, cap) / 3

    assert float(nll.detach()) / 3 == pytest.approx(loss(), rel=1e-6)
    for tensor, differences in (
        (hidden, differences64(lambda x: loss(h=x), h)),
        (weight, differences64(lambda x: loss(w=x), w)),
        (bias, differences64(lambda x: loss(b=x), b)),
    ):
        np.testing.assert_allclose(tensor.grad.numpy(), differences, rtol=1e-5, atol=2e-6)


def test_right_counts_first_choices() -> None:
    """`right` is the number of targets that are the model's first choice: here two of three."""
    hidden = torch.eye(4)
    triples = Triples.of(np.array([0, 1, 2]), np.array([0, 1, 3]), np.ones(3, np.float32))
    found = weighted_nll(hidden, Head(torch.eye(4), None), triples)
    assert int(found.right) == 2


# --- how much of the computation is useful


def check_useful_shares(useful: Callable[[list[Example]], tuple[float, float]], make_example: Any) -> None:
    """Four conversations of 100, 80, 70 and 50 tokens, of which 60, 50, 45 and 35 are the answer: 190 of 300.

    Padded to the longest they are 4 x 100 = 400 positions: 47.5% useful. Packed they are 300: 63.3%.
    """
    whole = [(40, 60), (30, 50), (25, 45), (15, 35)]
    padded, packed = useful([make_example([i] * p, [9] * a) for i, (p, a) in enumerate(whole)])  # nothing in common
    assert padded == pytest.approx(0.475, abs=1e-12)
    assert packed == pytest.approx(190 / 300, abs=1e-12)
    assert round(100 * packed, 1) == 63.3


def shares(examples: list[Example], build: Callable[..., Pack] = build_pack) -> tuple[float, float]:
    """Through our counts. A pack leaves out each example's last token, which is predicted and never computed: + 1 each."""
    pack = build(examples, range(len(examples)))
    batch = Batch(0, 0, (pack,), float(pack.weight.sum()))
    laid_out = batch.computed_tokens + len(pack.examples)
    longest = int(pack.positions.max()) + 1 + 1
    return batch.target_tokens / (longest * len(examples)), batch.target_tokens / laid_out


def test_useful_share_is_47_percent_padded_and_63_percent_packed(make_example: Any) -> None:
    """190 answer tokens of 400 padded positions are 47.5%, of 300 packed ones 63.3% (of the 296 we compute, 64.2%)."""
    check_useful_shares(shares, make_example)


def test_padding_in_a_pack_is_caught(make_example: Any) -> None:
    """The same numbers catch a pack that carries a single token of padding."""

    def padded(examples: list[Example], indices: range) -> Pack:
        pack = build_pack(examples, indices)
        return replace(pack, tokens=np.append(pack.tokens, np.int32(0)))

    with pytest.raises(AssertionError):
        check_useful_shares(lambda examples: shares(examples, padded), make_example)


def test_prompts_as_targets_are_caught(make_example: Any) -> None:
    """The same numbers catch examples whose prompts are targets too."""

    def unrestricted(examples: list[Example]) -> tuple[float, float]:
        whole = [np.concatenate([e.prompt_tokens, e.answer_tokens]) for e in examples]
        return shares([make_example(tokens[:1], tokens[1:]) for tokens in whole])

    with pytest.raises(AssertionError):
        check_useful_shares(unrestricted, make_example)


def check_epoch_seconds(plan: Callable[..., list[np.ndarray]]) -> None:
    """10,000 x (50 + 100) tokens at 8M tokens/s: 1.5M tokens, 0.1875 s, 1M answer tokens, 5.33M useful tokens/s."""
    prompt, answer = 50, 100
    lengths = np.full(10_000, prompt + answer)
    packs = plan(lengths, 1500, np.arange(10_000))
    assert {int(lengths[pack].sum()) for pack in packs} == {1500}
    seconds = sum(int(lengths[pack].sum()) for pack in packs) / 8e6
    assert seconds == 0.1875
    assert sum(len(pack) for pack in packs) * answer / seconds == pytest.approx(5.3333e6, rel=1e-4)


def test_an_epoch_of_ten_thousand_takes_01875_seconds() -> None:
    """1.5M tokens in 1000 full packs at 8M tokens/s take 0.1875 s, which is 5.33M useful tokens/s."""
    check_epoch_seconds(plan_packs)


@pytest.mark.parametrize("fault", [lambda packs: packs[:-1], lambda packs: [*packs, packs[0]]], ids=["lost", "twice"])
def test_a_pack_lost_or_planned_twice_is_caught(fault: Callable[..., Any]) -> None:
    """The same seconds catch a plan that leaves a pack out or repeats one."""
    with pytest.raises(AssertionError):
        check_epoch_seconds(lambda *arguments: fault(plan_packs(*arguments)))


# --- how many targets a run trains on


def check_target_tokens(loader: Loader, epochs: int) -> None:
    """100 examples x 3 epochs x 200 answer tokens = 60,000 target tokens."""
    steps = epochs * loader.plan.steps_per_epoch
    assert sum(loader.batch(k).target_tokens for k in range(steps)) == 60_000
    assert sum(loader.batch(k).weight_sum for k in range(steps)) == 60_000.0


def run_of(examples: list[Example]) -> Loader:
    prefixes = Prefixes.of(examples)
    return Loader(examples, prefixes, plan_steps(prefixes, 7, 1000), seed=5)


def test_three_epochs_of_a_hundred_have_sixty_thousand_targets(some_examples: Any) -> None:
    """Every answer token is a target once an epoch, whatever the packs and steps."""
    check_target_tokens(run_of(some_examples(lengths=[(1 + i % 90, 200) for i in range(100)])), epochs=3)


def test_a_lost_or_shortened_answer_is_caught(some_examples: Any) -> None:
    """The same count catches a dropped example, and answers cut by their last token."""
    lengths = [(1 + i % 90, 200) for i in range(100)]
    with pytest.raises(AssertionError):
        check_target_tokens(run_of(some_examples(lengths=lengths[:-1])), epochs=3)
    with pytest.raises(AssertionError):
        check_target_tokens(run_of(some_examples(lengths=[(p, a - 1) for p, a in lengths])), epochs=3)


class Forgetful(Loader):
    """Leaves out the last pack of each epoch."""

    def batch(self, step: int) -> Batch:
        whole = super().batch(step)
        last = (step + 1) % self.plan.steps_per_epoch == 0
        return replace(whole, packs=whole.packs[:-1]) if last else whole


def test_a_loader_that_forgets_a_pack_is_caught(some_examples: Any) -> None:
    """The same count catches a loader that leaves out one pack an epoch."""
    whole = run_of(some_examples(lengths=[(1 + i % 90, 200) for i in range(100)]))
    with pytest.raises(AssertionError):
        check_target_tokens(Forgetful(whole.examples, whole.prefixes, whole.plan, whole.seed), epochs=3)
