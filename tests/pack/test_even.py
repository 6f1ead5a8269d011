"""Evenly full packs: every example once, within the capacity, nearly as few packs as can be, and steps that are alike."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.pack.bins import plan_packs, shuffled
from instil.pack.even import even_packs

small = settings(max_examples=60, deadline=None, derandomize=True)


def lognormal(n: int, cap: int, seed: int = 0) -> np.ndarray:
    """Lengths as conversations have them."""
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.8, n).astype(np.int64), 8, cap)


@small
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 5))
def test_every_example_is_in_exactly_one_pack(lengths: list[int], capacity: int, seed: int) -> None:
    """None is lost, none is there twice; a pack is within the capacity unless a single example is longer."""
    packs = even_packs(np.array(lengths), capacity, shuffled(len(lengths), (seed, 0)))
    assert Counter(int(i) for pack in packs for i in pack) == Counter(range(len(lengths)))
    assert all(len(pack) for pack in packs)
    for pack in packs:
        assert sum(lengths[i] for i in pack) <= capacity or len(pack) == 1


@small
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60))
def test_packs_are_as_few_as_best_fits_or_nearly_the_least(lengths: list[int], capacity: int) -> None:
    """At most those of best-fit-decreasing, or 1% (rounded up) above what the tokens need at least."""
    array, order = np.array(lengths), np.arange(len(lengths))
    fitting = sum(n for n in lengths if n <= capacity)
    long = sum(n > capacity for n in lengths)
    most = max(len(plan_packs(array, capacity, order)), long + int(np.ceil(-(-fitting // capacity) * 1.01)))
    assert len(even_packs(array, capacity, order)) <= most


@pytest.mark.parametrize(("n", "capacity"), [(20_000, 2048), (6000, 8192), (5000, 1024)])
def test_packs_of_conversations_are_full(n: int, capacity: int) -> None:
    """At least 99.5% of the positions are tokens, whatever the capacity; and no pack is the rest of all others."""
    lengths = lognormal(n, 600)
    packs = even_packs(lengths, capacity, np.arange(n))
    assert lengths.sum() / (len(packs) * capacity) >= 0.995
    assert min(int(lengths[pack].sum()) for pack in packs) >= 0.9 * capacity


def test_packs_are_alike_where_those_of_best_fit_are_not() -> None:
    """Best fit leaves the short examples to the last packs; evenly dealt, none has twice the examples of another."""
    lengths = lognormal(6000, 600)
    even, greedy = ([len(pack) for pack in make(lengths, 4096, np.arange(6000))] for make in (even_packs, plan_packs))
    assert max(even) < 2 * min(even)
    assert max(greedy) > 2 * min(greedy), "the oracle must see packs that are not alike"


def test_a_plan_is_a_pure_function_in_which_the_order_decides() -> None:
    """The same arguments give the same packs and are not changed; another order brings others together."""
    lengths, order = np.array([5, 7] * 40), shuffled(80, (3, 4))
    before = lengths.copy(), order.copy()
    first, second = ([p.tolist() for p in even_packs(lengths, 24, order)] for _ in range(2))
    assert first == second
    assert (lengths == before[0]).all()
    assert (order == before[1]).all()
    assert {frozenset(p) for p in first} != {
        frozenset(p.tolist()) for p in even_packs(lengths, 24, shuffled(80, (3, 5)))
    }
