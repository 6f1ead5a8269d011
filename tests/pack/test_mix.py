"""A mix deals every source evenly over the epochs, hits the shares that were asked for, and is nothing where none is asked."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.errors import UsageError
from instil.pack.loader import Loader
from instil.pack.mix import Mix, Mixed, epoch_examples, least_examples, passes, realised
from instil.pack.plan import StepPlan, epoch_packs, plan_steps
from instil.pack.prefixes import Prefixes

small = settings(max_examples=60, deadline=None, derandomize=True)
# (target tokens, source) of each example, three sources; and the sources' repeats as exact tenths
some_sources = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 2)), min_size=1, max_size=40)
tenths = st.lists(st.integers(0, 35), min_size=3, max_size=3).filter(any)


def arrays(examples: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([t for t, _ in examples]), np.array([s for _, s in examples])


def conversations(n: int, seed: int) -> np.ndarray:
    """Target tokens as answers have them: a few hundred, some very long."""
    return np.clip(np.random.default_rng(seed).lognormal(4, 1, n).astype(np.int64), 1, 2000)


# ── how often ────────────────────────────────────────────────────────────────────────────────────────────────────────


@small
@given(some_sources, tenths, st.integers(0, 3), st.integers(1, 12))
def test_over_the_epochs_every_example_is_used_as_often_as_asked(
    examples: list[tuple[int, int]], repeats: list[int], seed: int, epochs: int
) -> None:
    """After each of k epochs, an example of a source of repeat r has been used floor or ceil of k * r times."""
    tokens, source = arrays(examples)
    mix = Mix(repeats=tuple(r / 10 for r in repeats))
    used: Counter[int] = Counter()
    for epoch in range(epochs):
        used.update(epoch_examples(tokens, source, mix, seed, epoch).tolist())
        for i, s in enumerate(source.tolist()):
            exact = Fraction(repeats[s], 10) * (epoch + 1)
            assert exact.__floor__() <= used[i] <= exact.__ceil__()


@pytest.mark.parametrize("times", [3, 7, 49])
def test_n_epochs_of_an_nth_are_one_pass(times: int) -> None:
    """Though 1/n is no exact number, no example is left for another epoch, and none comes twice."""
    tokens = conversations(98, 0)
    mix = Mix(repeats=(1 / times,))
    used = [epoch_examples(tokens, np.zeros(98, np.int64), mix, 0, epoch) for epoch in range(2 * times)]
    for half in (used[:times], used[times:]):
        assert sorted(np.concatenate(half).tolist()) == list(range(98))


@small
@given(some_sources, tenths, st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_has_the_whole_copies_and_a_part(
    examples: list[tuple[int, int]], repeats: list[int], seed: int, epoch: int
) -> None:
    """In any one epoch, an example is used floor(r) or ceil(r) times."""
    tokens, source = arrays(examples)
    mix = Mix(repeats=tuple(r / 10 for r in repeats))
    used = Counter(epoch_examples(tokens, source, mix, seed, epoch).tolist())
    for i, s in enumerate(source.tolist()):
        assert repeats[s] // 10 <= used[i] <= -(-repeats[s] // 10)


def test_a_half_and_two_and_a_half_by_hand() -> None:
    """Ten examples of ten tokens at 0.5 and four at 2.5: five and ten a epoch, all of them after two."""
    tokens, source = np.full(14, 10), np.array([0] * 10 + [1] * 4)
    mix = Mix(repeats=(0.5, 2.5))
    first, second = (epoch_examples(tokens, source, mix, 7, epoch).tolist() for epoch in (0, 1))
    for epoch in (first, second):
        assert sum(i < 10 for i in epoch) == 5
        assert sorted(Counter(i for i in epoch if i >= 10).values()) == [2, 2, 3, 3]
    assert Counter(first + second) == Counter([*range(10), *[10, 11, 12, 13] * 5])


def test_a_fraction_goes_on_where_the_last_epoch_ended() -> None:
    """At 0.25, four epochs see four disjoint quarters; the fifth begins again."""
    tokens, source = np.full(40, 3), np.zeros(40, np.int64)
    epochs = [epoch_examples(tokens, source, Mix(repeats=(0.25,)), 0, k).tolist() for k in range(5)]
    assert [len(e) for e in epochs] == [10] * 5
    assert sorted(i for epoch in epochs[:4] for i in epoch) == list(range(40))
    assert epochs[4] == epochs[0]


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    """Asked again, in any order, it is the same; another seed chooses others."""
    tokens, source = conversations(300, 0), np.arange(300) % 2
    mix = Mix(weights=(1.0, 3.0))
    before = tokens.copy(), source.copy()
    found = {k: epoch_examples(tokens, source, mix, 5, k).tolist() for k in (3, 0, 2, 1)}
    assert all(epoch_examples(tokens, source, mix, 5, k).tolist() == found[k] for k in range(4))
    assert found[0] != found[1]
    assert epoch_examples(tokens, source, mix, 6, 0).tolist() != found[0]
    assert (tokens == before[0]).all()
    assert (source == before[1]).all()


# ── shares ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 8.0), (70.0, 25.0, 5.0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_shares_of_an_epoch_are_those_asked_for(weights: tuple[float, ...], seed: int) -> None:
    """Within 0.005 of the target tokens, in every epoch, also for long-tailed lengths; and the epoch keeps its size."""
    tokens, source = conversations(9000, seed), np.repeat([0, 1, 2], [6000, 2000, 1000])
    for epoch in range(4):
        chosen = epoch_examples(tokens, source, Mix(weights=weights), seed, epoch)
        of_epoch = sum(tokens[i] for i in chosen.tolist())
        for s in range(3):
            share = sum(int(tokens[i]) for i in chosen.tolist() if source[i] == s) / of_epoch
            assert abs(share - weights[s] / sum(weights)) < 0.005
        assert of_epoch == pytest.approx(tokens.sum(), rel=0.005)


@small
@given(some_sources, st.lists(st.integers(1, 9), min_size=3, max_size=3), st.integers(0, 3), st.integers(0, 5))
def test_a_weighted_source_is_within_an_example_of_its_tokens(
    examples: list[tuple[int, int]], weights: list[int], seed: int, epoch: int
) -> None:
    """Any weights: the tokens of a source are those asked for up to its longest example."""
    present = sorted({s for _, s in examples})
    examples = [(t, present.index(s)) for t, s in examples]
    tokens, source = arrays(examples)
    weights = weights[: len(present)]
    chosen = epoch_examples(tokens, source, Mix(weights=tuple(map(float, weights))), seed, epoch)
    for s, weight in enumerate(weights):
        found = sum(int(tokens[i]) for i in chosen.tolist() if source[i] == s)
        longest = max(t for t, of in examples if of == s)
        assert abs(found - Fraction(weight, sum(weights)) * sum(t for t, _ in examples)) <= longest


def test_the_realised_mix_is_counted() -> None:
    """Two of source 0, one of source 2 twice: what is reported is what a hand count gives."""
    tokens, source = np.array([5, 10, 20, 15]), np.array([0, 0, 1, 2])
    found = realised(np.array([0, 1, 3, 3]), source, tokens, 4)
    assert [(m.source, m.examples, m.target_tokens) for m in found] == [(0, 2, 15), (1, 0, 0), (2, 2, 30), (3, 0, 0)]
    assert [m.share for m in found] == pytest.approx([1 / 3, 0, 2 / 3, 0])


def test_weights_become_passes() -> None:
    """Equal shares of 90 and 10 tokens: five ninths of the first source, five times the second."""
    tokens, source = np.array([30, 30, 30, 10]), np.array([0, 0, 0, 1])
    assert passes(tokens, source, Mix(weights=(2.0, 2.0))) == pytest.approx([5 / 9, 5])


def test_a_weight_for_nothing_is_refused() -> None:
    """A source none of whose rows is left cannot have its share; the error names it."""
    with pytest.raises(UsageError, match=r"data.train\[1\]: has a weight of 0.3") as refused:
        epoch_examples(np.array([4, 4]), np.array([0, 0]), Mix(weights=(0.7, 0.3)), 0, 0)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "numbers", [{}, {"repeats": (1.0,), "weights": (1.0,)}, {"repeats": (-1.0,)}, {"weights": (0.0, 0.0)},
                {"repeats": (float("nan"),)}],
)  # fmt: skip
def test_a_mix_that_means_nothing_is_refused(numbers: dict[str, Any]) -> None:
    """Neither or both of the two, or no usable number."""
    with pytest.raises(ValueError):
        Mix(**numbers)


# ── into packs and steps ─────────────────────────────────────────────────────────────────────────────────────────────


@small
@given(some_sources, st.integers(0, 3), st.integers(0, 3))
def test_repeats_of_one_change_nothing(examples: list[tuple[int, int]], seed: int, epoch: int) -> None:
    """An epoch of every source once is, to the order of its packs, the epoch without a mix."""
    tokens, source = arrays(examples)
    chosen = epoch_examples(tokens, source, Mix(repeats=(1.0, 1.0, 1.0)), seed, epoch)
    assert chosen.tolist() == list(range(len(tokens)))
    prefixes = Prefixes.none(tokens)
    plan = plan_steps(prefixes, 4, 60)
    plain, mixed = (
        [[pack.tolist() for pack in step] for step in epoch_packs(prefixes, plan, seed, epoch, c)]
        for c in (None, chosen)
    )
    assert mixed == plain


@small
@given(
    some_sources, tenths, st.integers(1, 20), st.integers(1, 120), st.integers(0, 3), st.booleans()
)  # fmt: skip
def test_no_step_of_a_mixed_run_is_empty(
    examples: list[tuple[int, int]], repeats: list[int], batch: int, limit: int, seed: int, weighted: bool
) -> None:
    """Epochs differ in size, the steps of an epoch do not: each has its examples, and all of them are dealt."""
    tokens, source = arrays(examples)
    present = sorted(set(source.tolist()))
    source = np.array([present.index(s) for s in source.tolist()])
    numbers = tuple(r / 10 for r in repeats[: len(present)])
    if not any(numbers):
        return
    mix = Mix(weights=numbers) if weighted else Mix(repeats=numbers)
    least = least_examples(tokens, source, mix, seed, 6)
    epochs = [epoch_examples(tokens, source, mix, seed, k) for k in range(6)]
    assert least == min(map(len, epochs))
    if not least:
        return
    prefixes = Prefixes.none(tokens)
    plan = plan_steps(prefixes, batch, limit, chosen=epochs[0], most_steps=least)
    for k, chosen in enumerate(epochs):
        steps = epoch_packs(prefixes, plan, seed, k, chosen)
        assert len(steps) == plan.steps_per_epoch
        assert all(steps)
        assert Counter(int(i) for packs in steps for pack in packs for i in pack) == Counter(chosen.tolist())
        for pack in (pack for packs in steps for pack in packs):
            assert tokens[pack].sum() <= plan.capacity_tokens or len(pack) == 1


def test_more_steps_than_examples_are_refused() -> None:
    """A plan that was made without the smallest epoch is a bug of ours, and says so."""
    with pytest.raises(ValueError, match="3 steps need as many examples, and the epoch has 2"):
        epoch_packs(Prefixes.none(np.full(4, 10)), StepPlan(10, 4, 3, 1.3, 10), 0, 0, np.array([1, 2]))


def test_a_loader_trains_on_the_mix(some_examples: Any) -> None:
    """Its batches hold every example as often as the epochs' choice says, and weigh what they hold."""
    examples = some_examples(30, weighted=True)
    tokens = np.array([int((e.weights > 0).sum()) for e in examples])
    prefixes = Prefixes.of(examples)
    mixed = Mixed(tokens, np.arange(30) % 3, Mix(repeats=(0.5, 1.0, 2.5)))
    chosen = [epoch_examples(tokens, mixed.source, mixed.mix, 4, k) for k in range(3)]
    plan = plan_steps(prefixes, 4, 40, chosen=chosen[0], most_steps=min(map(len, chosen)))
    loader = Loader(examples, prefixes, plan, 4, mixed)
    for k in (2, 0, 1):
        batches = [loader.batch(k * plan.steps_per_epoch + i) for i in range(plan.steps_per_epoch)]
        inside = [i for b in batches for p in b.packs for i in p.examples]
        assert Counter(inside) == Counter(chosen[k].tolist())
        weight = sum(float(examples[i].weights.sum()) for i in inside)
        assert sum(b.weight_sum for b in batches) == pytest.approx(weight)
