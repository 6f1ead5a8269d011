"""Every example is in exactly one pack, packs are full, and which step sees what is a pure function of the seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.pack.bins import plan_packs, shuffled
from instil.pack.plan import StepPlan, _dealt, computed_tokens, epoch_packs, packs_in_order, plan_steps
from instil.pack.prefixes import Prefixes
from instil.pack.tree import build_pack
from instil.types import Example

small = settings(max_examples=60, deadline=None, derandomize=True)
length_lists = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def lognormal(n: int, cap: int, seed: int = 0) -> np.ndarray:
    """Lengths as conversations have them."""
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.8, n).astype(np.int64), 8, cap)


def textbook_best_fit(lengths: list[int], capacity: int) -> int:
    """The number of bins of best-fit-decreasing as in the textbook: one item after another, longest first."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(max(0, capacity - length))
    return len(rooms)


@small
@given(length_lists, st.integers(1, 60), st.integers(0, 5))
def test_every_example_is_in_exactly_one_pack(lengths: list[int], capacity: int, seed: int) -> None:
    """None is lost, none is trained on twice, and a pack is within the capacity unless a single example is longer."""
    packs = plan_packs(np.array(lengths), capacity, shuffled(len(lengths), (seed, 0)))
    assert Counter(int(i) for pack in packs for i in pack) == Counter(range(len(lengths)))
    for pack in packs:
        used = sum(lengths[i] for i in pack)
        assert used <= capacity or len(pack) == 1


@small
@given(length_lists, st.integers(1, 60))
def test_packs_are_as_many_as_the_textbooks(lengths: list[int], capacity: int) -> None:
    """The plan on the histogram is best-fit-decreasing, item by item."""
    packs = plan_packs(np.array(lengths), capacity, np.arange(len(lengths)))
    assert len(packs) == textbook_best_fit(lengths, capacity)


def test_packs_of_many_lengths_are_as_many_as_the_textbooks() -> None:
    """Also for 3,000 lengths that repeat often."""
    lengths = lognormal(3000, 900) // 10 + 1
    assert len(plan_packs(lengths, 200, np.arange(3000))) == textbook_best_fit(lengths.tolist(), 200)


@pytest.mark.parametrize("seed", range(3))
def test_packs_are_999_permille_full(seed: int) -> None:
    """At least 99.9% of the positions of 20,000 conversations are tokens, not padding."""
    lengths = lognormal(20_000, 600, seed)
    packs = plan_packs(lengths, 2048, np.arange(20_000))
    assert lengths.sum() / (len(packs) * 2048) >= 0.999


@pytest.mark.parametrize("seed", range(3))
def test_no_pack_could_be_saved(seed: int) -> None:
    """6,000 conversations take the least number of packs that can hold their tokens."""
    lengths = lognormal(6000, 1500, seed)
    assert len(plan_packs(lengths, 8192, np.arange(6000))) == -(-int(lengths.sum()) // 8192)


def test_an_example_longer_than_the_capacity_is_alone() -> None:
    """It is trained on, in a pack of its own; the others are not touched by it."""
    packs = plan_packs(np.array([3, 50, 4, 60, 3]), 10, np.arange(5))
    assert sorted(sorted(pack.tolist()) for pack in packs) == [[0, 2, 4], [1], [3]]


def test_a_plan_by_hand() -> None:
    """Lengths 7 6 5 4 3 3 2 in packs of 10: 7+3, 6+4, 5+3+2."""
    lengths = np.array([3, 7, 4, 2, 6, 5, 3])
    packs = plan_packs(lengths, 10, np.arange(7))
    assert sorted(sorted(lengths[pack].tolist()) for pack in packs) == [[2, 3, 5], [3, 7], [4, 6]]


def test_the_order_decides_who_shares_a_pack() -> None:
    """Equal lengths are interchangeable, and a different order interchanges them."""
    lengths = np.full(40, 5)
    packs = [{frozenset(p.tolist()) for p in plan_packs(lengths, 10, shuffled(40, (1, e)))} for e in range(2)]
    assert packs[0] != packs[1]


def test_a_plan_is_a_pure_function() -> None:
    """The same arguments give the same plan, and are not changed."""
    lengths, order = lognormal(500, 900), shuffled(500, (3, 4))
    before = lengths.copy(), order.copy()
    first, second = (plan_packs(lengths, 2000, order) for _ in range(2))
    assert [p.tolist() for p in first] == [p.tolist() for p in second]
    assert (lengths == before[0]).all()
    assert (order == before[1]).all()


def test_a_capacity_below_one_token_is_refused() -> None:
    """A pack holds something."""
    with pytest.raises(ValueError, match="capacity_tokens must be positive, got 0"):
        plan_packs(np.array([1]), 0, np.array([0]))


# --- steps


@pytest.mark.parametrize(("batch", "limit"), [(8, 2048), (8, 65536), (32, 2048), (32, 8192), (128, 8192)])
def test_a_step_holds_the_batch_that_was_asked_for(batch: int, limit: int) -> None:
    """On average, within 2%, in packs that fit the machine and are 99% full."""
    lengths = lognormal(6000, 1500)
    plan = plan_steps(Prefixes.none(lengths), batch, limit)
    assert abs(plan.steps_per_epoch - 6000 / batch) <= 1
    assert 6000 / plan.steps_per_epoch == pytest.approx(batch, rel=0.02)
    assert plan.capacity_tokens <= limit
    for epoch in range(2):
        assert sum(map(len, epoch_packs(Prefixes.none(lengths), plan, 0, epoch))) == plan.packs_per_epoch
    assert lengths.sum() / (plan.packs_per_epoch * plan.capacity_tokens) > 0.99


@small
@given(length_lists, st.integers(1, 50), st.integers(1, 100), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_deals_every_example_into_steps_of_which_none_is_empty(
    lengths: list[int], batch: int, limit: int, seed: int, epoch: int
) -> None:
    """For any lengths, batch size and machine."""
    plan = plan_steps(Prefixes.none(np.array(lengths)), batch, limit)
    steps = epoch_packs(Prefixes.none(np.array(lengths)), plan, seed, epoch)
    assert len(steps) == plan.steps_per_epoch
    assert all(steps)
    assert sum(map(len, steps)) == plan.packs_per_epoch
    assert Counter(int(i) for packs in steps for pack in packs for i in pack) == Counter(range(len(lengths)))


@pytest.mark.parametrize(("batch", "limit"), [(8, 2048), (64, 4096), (128, 8192), (512, 16384)])
@pytest.mark.parametrize("seed", [0, 1])
def test_without_sharing_the_packs_of_an_epoch_are_999_permille_full(batch: int, limit: int, seed: int) -> None:
    """Of 6,000 conversations through plan and steps, at any batch and machine: 99.9% of the positions are tokens."""
    lengths = lognormal(6000, 600, seed)
    prefixes = Prefixes.none(lengths)
    plan = plan_steps(prefixes, batch, limit, seed=seed)
    for epoch in range(2):
        packs = [pack for step in epoch_packs(prefixes, plan, seed, epoch) for pack in step]
        assert lengths.sum() / (len(packs) * plan.capacity_tokens) >= 0.999


def test_packs_are_dealt_evenly() -> None:
    """No step has two packs more than another: 7 packs over 3 steps are 2, 2 and 3."""
    steps = epoch_packs(Prefixes.none(np.full(7, 10)), StepPlan(10, 7, 3, 2.3, 10), 0, 0)
    assert sorted(len(packs) for packs in steps) == [2, 2, 3]


def test_the_packs_of_a_step_hold_as_many_examples_as_those_of_another() -> None:
    """12 packs of 1 example of 12 tokens, 12 packs of 12 of 1 token: each step has two of a kind, 26 examples."""
    lengths = np.array([12] * 12 + [1] * 144)
    for epoch in range(3):
        steps = epoch_packs(Prefixes.none(lengths), StepPlan(12, 24, 6, 26, 12), 0, epoch)
        assert [sum(map(len, packs)) for packs in steps] == [26] * 6
        assert [len(packs) for packs in steps] == [4] * 6


def test_packs_of_many_examples_are_not_dealt_to_the_same_step() -> None:
    """Packs of 9, 8, 7, 3, 2 and 1 examples, in any order, over 3 steps: 10 examples in each, two packs each."""
    counts = [3, 9, 1, 8, 2, 7]
    for seed in range(5):
        steps = _dealt(counts, 3, np.random.default_rng(seed).permutation(6))
        assert sorted(pack for step in steps for pack in step) == list(range(6))
        assert [(len(step), sum(counts[pack] for pack in step)) for step in steps] == [(2, 10)] * 3


def as_lists(steps: list[list[Any]]) -> list[list[list[int]]]:
    return [[pack.tolist() for pack in packs] for packs in steps]


def test_an_epoch_is_a_pure_function_of_seed_and_epoch() -> None:
    """The same seed and epoch give the same steps, another epoch or seed gives others."""
    lengths = lognormal(300, 900)
    plan = plan_steps(Prefixes.none(lengths), 8, 4096)
    first = as_lists(epoch_packs(Prefixes.none(lengths), plan, 1, 0))
    assert first == as_lists(epoch_packs(Prefixes.none(lengths), plan, 1, 0))
    for key in ((1, 1), (1, 2), (2, 0), (0, 1)):
        assert first != as_lists(epoch_packs(Prefixes.none(lengths), plan, *key))


def test_the_order_of_packs_differs_from_epoch_to_epoch() -> None:
    """Also where no two packs could be mixed up: 40 examples, each a pack and a step of its own."""
    prefixes, plan = Prefixes.none(np.arange(40) + 100), StepPlan(1, 40, 40, 1, 1)
    orders = [[int(p[0]) for (p,) in epoch_packs(prefixes, plan, 9, epoch)] for epoch in range(6)]
    assert len({tuple(order) for order in orders}) == 6
    assert all(order != sorted(order) for order in orders)


# --- in order


def check_in_order(examples: list[Example], capacity: int) -> None:
    """Each example once, none but what adds nothing in a pack above the capacity, and as much shared as any cut allows."""
    prefixes = Prefixes.of(examples)
    packs = packs_in_order(prefixes, capacity)
    assert Counter(int(i) for pack in packs for i in pack) == Counter(range(len(examples)))
    sizes = [len(build_pack([examples[i] for i in pack], pack.tolist()).tokens) for pack in packs]
    assert sizes == computed_tokens(prefixes, packs).tolist()
    for pack, size in zip(packs, sizes, strict=True):
        assert size <= capacity or size == max(examples[i].length_tokens for i in pack)
    trie = int(prefixes.trie_tokens(np.arange(len(examples)), np.zeros(len(examples), np.int64), 1)[0])
    cut = sum(int(prefixes.common[prefixes.rank[pack].min()]) for pack in packs)  # what each cut computes again
    assert sum(sizes) == trie + cut


@small
@given(st.integers(1, 60), st.integers(1, 200))
def test_in_order_every_example_is_in_one_pack(n: int, capacity: int) -> None:
    """For any capacity, also below the longest example."""
    check_in_order(shared(n), capacity)


def test_in_order_nearly_everything_is_shared() -> None:
    """Of 2,000 examples, what is computed is within 2% of the trie of all, and a fifth less than without sharing."""
    examples = shared(2000)
    prefixes = Prefixes.of(examples)
    found = int(computed_tokens(prefixes, packs_in_order(prefixes, 2048)).sum())
    streams = [(*e.prompt_tokens.tolist(), *e.answer_tokens[:-1].tolist()) for e in examples]
    trie = len({stream[: k + 1] for stream in streams for k in range(len(stream))})
    assert trie <= found <= 1.02 * trie
    assert found < 0.8 * prefixes.lengths.sum()


def test_in_order_one_example_is_one_pack() -> None:
    """Whatever the capacity."""
    assert [pack.tolist() for pack in packs_in_order(Prefixes.none(np.array([7])), 3)] == [[0]]


# --- the permutation


def philox(key: tuple[int, int], n: int) -> list[int]:
    """Philox4x64-10 (Salmon et al. 2011, section 4.3) in plain integers; the counter begins at 1, as numpy's does."""
    word = (1 << 64) - 1
    found: list[int] = []
    counter = 0
    while len(found) < n:
        counter += 1
        x, (k0, k1) = [counter, 0, 0, 0], key
        for _ in range(10):
            left, right = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [(right >> 64) ^ x[1] ^ k0, right & word, (left >> 64) ^ x[3] ^ k1, left & word]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & word, (k1 + 0xBB67AE8584CAA73B) & word
        found += x
    return found[:n]


@pytest.mark.parametrize("key", [(42, 0), (42, 1), (7, 2**64 - 1), (2**63 + 1, 5)])
def test_the_permutation_is_the_order_of_philox(key: tuple[int, int]) -> None:
    """Sorting the numbers of the published generator, written out above, gives the same permutation."""
    raw = philox(key, 50)
    assert shuffled(50, key).tolist() == sorted(range(50), key=raw.__getitem__)


def test_the_permutation_never_changes() -> None:
    """A run that is resumed with a later version of instil or numpy sees the same order."""
    assert shuffled(12, (42, 0)).tolist() == [11, 7, 1, 6, 10, 4, 3, 5, 9, 0, 2, 8]
    assert shuffled(12, (42, 1)).tolist() == [4, 10, 9, 5, 3, 0, 11, 2, 7, 1, 6, 8]
    assert shuffled(12, (7, 2**64 - 1)).tolist() == [1, 10, 4, 0, 11, 2, 3, 5, 9, 8, 7, 6]


def test_neighbouring_keys_give_unrelated_permutations() -> None:
    """Also above 2^53, where numbers taken for floating point would coincide."""
    keys = [(s, e) for s in (0, 1, 2**53, 2**53 + 1) for e in (0, 1, 2**64 - 2, 2**64 - 1)]
    assert len({tuple(shuffled(30, key).tolist()) for key in keys}) == len(keys)


def shared(n: int) -> list[Example]:
    """n examples: below one of three headers of 30 tokens, or of none; some are answers to one prompt, some turns."""
    rng = np.random.default_rng(3)
    headers = [rng.integers(0, 50, 30).tolist() for _ in range(3)] + [[]]
    found = []
    for i in range(n):
        prompt = [*headers[i % 4], *([7, i % 40] if i % 3 else [8, i]), 9]
        answer = rng.integers(0, 50, int(rng.integers(1, 40)))
        found.append(Example(np.array(prompt, np.int32), answer.astype(np.int32), np.ones(len(answer), np.float32),
                             f"x.jsonl:{i // 2 if i % 5 == 0 else i}", 0))  # fmt: skip
    return found


def digest_of(prefixes: Prefixes, plan: StepPlan) -> str:
    """Of three epochs, example by example."""
    digest = hashlib.sha256()
    for epoch in range(3):
        for step in epoch_packs(prefixes, plan, 11, epoch):
            for pack in step:
                digest.update(repr(pack.tolist()).encode())
            digest.update(b";")
    return digest.hexdigest()


def test_the_order_of_a_run_never_changes_unnoticed() -> None:
    """Digests of three epochs, with and without sharing. A change of packing changes them: a run that an earlier version
    began would then resume on other packs, so PACKING is raised then, and runs of before are refused."""
    plain = Prefixes.none(np.arange(200) * 37 % 91 + 5)
    plan = plan_steps(plain, 8, 300)
    assert (plan, digest_of(plain, plan)) == (
        StepPlan(200, 50, 25, 8, 300), "1510ef5b09e31c6447ab689ed884088bd988525a26ddcfca03bd00283aba8eda",
    )  # fmt: skip
    alike = Prefixes.of(shared(200))
    plan = plan_steps(alike, 8, 300)
    assert (plan, digest_of(alike, plan)) == (
        StepPlan(280, 25, 25, 8, 300), "6160649b4e20d8cc2d033441c32b0b9d3cb20456a11b862a96ced0e20f71bdf5",
    )  # fmt: skip
