"""What examples have in common is what the sets of their prefixes have in common, for any examples and any groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.pack.prefixes import Prefixes
from instil.types import Example

small = settings(max_examples=150, deadline=None, derandomize=True)
# (prompt, answer) over three tokens, two of which differ only above the lowest byte
token = st.sampled_from([1, 2, 257])
pairs = st.tuples(st.lists(token, min_size=1, max_size=5), st.lists(token, min_size=1, max_size=4))


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[tuple[list[int], list[int]]], list[int], list[int], int]:
    """Some pairs, members of them with repetition, the group of each member, and how many groups there are."""
    found = draw(st.lists(pairs, min_size=1, max_size=9))
    members = draw(st.lists(st.integers(0, len(found) - 1), max_size=14))
    groups = draw(st.integers(1, 5))
    group = draw(st.lists(st.integers(0, groups - 1), min_size=len(members), max_size=len(members)))
    return found, members, group, groups


def made(found: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Example]:
    """Each pair an example of a row of its own."""
    return [
        Example(np.array(p, np.int32), np.array(a, np.int32), np.ones(len(a), np.float32), f"x.jsonl:{i}", 0)
        for i, (p, a) in enumerate(found)
    ]


def prefixes_of(pair: tuple[Sequence[int], Sequence[int]]) -> set[tuple[int, ...]]:
    """All non-empty beginnings of what is computed: all tokens but the last."""
    stream = (*pair[0], *pair[1])[:-1]
    return {tuple(stream[: k + 1]) for k in range(len(stream))}


def check_tries(
    prefixes: Prefixes, found: list[tuple[list[int], list[int]]], members: list[int], group: list[int], groups: int
) -> None:
    """trie_tokens, trie_pairs and between, against the sets of tuples."""
    tries: list[set[tuple[int, ...]]] = [set() for _ in range(groups)]
    for member, g in zip(members, group, strict=True):
        tries[g] |= prefixes_of(found[member])
    args = np.array(members, np.int64), np.array(group, np.int64), groups
    assert prefixes.trie_tokens(*args).tolist() == [len(trie) for trie in tries]
    assert prefixes.trie_pairs(*args).tolist() == [sum(map(len, trie)) for trie in tries]
    if members:
        first, second = args[0], args[0][::-1]
        common = [len(prefixes_of(found[i]) & prefixes_of(found[j])) for i, j in zip(first, second, strict=True)]
        assert prefixes.between(first, second).tolist() == common


@small
@given(grouped())
def test_a_trie_is_the_set_of_prefixes(some: tuple[Any, Any, Any, Any]) -> None:
    """Tokens, attended pairs and what two have in common, with repeated members, single members and empty groups."""
    check_tries(Prefixes.of(made(some[0])), *some)


DEEP = [([1, 2, 1], [2, 1]), ([1, 2, 1], [2, 2]), ([1, 2], [257, 1]), ([2], [1]), ([1, 2, 1, 2], [1, 1])]


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_wrong_common_is_caught(place: int, by: int) -> None:
    """The same check fails when one neighbour has one token more or less in common."""
    right = Prefixes.of(made(DEEP))
    common = right.common.copy()
    common[place] += by
    check_tries(right, DEEP, [0, 1, 2, 3, 4], [0] * 5, 2)
    with pytest.raises(AssertionError):
        check_tries(replace(right, common=common), DEEP, [0, 1, 2, 3, 4], [0] * 5, 2)


def test_no_examples() -> None:
    """Of nothing there is nothing."""
    nothing = np.zeros(0, np.int64)
    for prefixes in (Prefixes.of([]), Prefixes.none(nothing)):
        assert len(prefixes.lengths) == len(prefixes.family) == len(prefixes.turns) == 0
        assert prefixes.trie_tokens(nothing, nothing, 3).tolist() == [0, 0, 0]


def test_the_sorted_order_by_hand(make_example: Any) -> None:
    """1 | 1 2 | 1 2 5 | 7: the last token of an example is not computed, and so not in common."""
    found = Prefixes.of([make_example([7], [1]), make_example([1, 2], [5, 6]), make_example([1], [9]),
                         make_example([1, 2], [5])])  # fmt: skip
    assert found.lengths.tolist() == [1, 3, 1, 2]
    assert found.rank.tolist() == [3, 2, 0, 1]
    assert found.common.tolist() == [0, 1, 2, 0]


def test_of_nothing_in_common_every_trie_is_a_sum() -> None:
    """`none`: an example of length n has n tokens and n (n + 1) / 2 pairs, and shares with itself only."""
    prefixes = Prefixes.none(np.array([3, 5, 4]))
    members, group = np.array([0, 1, 2, 2]), np.array([0, 0, 1, 1])
    assert prefixes.trie_tokens(members, group, 3).tolist() == [8, 4, 0]
    assert prefixes.trie_pairs(members, group, 3).tolist() == [6 + 15, 10, 0]
    assert prefixes.between(np.array([0, 1]), np.array([1, 1])).tolist() == [0, 5]


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 3000])
def test_what_two_of_thousands_have_in_common(n: int) -> None:
    """The least over any range of the sorted order, near and far, is what comparing the two token by token gives."""
    rng = np.random.default_rng(n)
    streams = [rng.integers(0, 2, int(k)).tolist() for k in rng.integers(2, 24, n)]
    prefixes = Prefixes.of(made([(s[:1], s[1:]) for s in streams]))
    first, second = rng.integers(0, n, 4000), rng.integers(0, n, 4000)
    second[:500] = np.minimum(first[:500] + 1, n - 1)
    order = np.argsort(prefixes.rank)
    first[500:600], second[500:600] = order[0], order[-1]  # the widest range

    def common(a: list[int], b: list[int]) -> int:
        k = 0
        while k < min(len(a), len(b)) and a[k] == b[k]:
            k += 1
        return k

    expected = [common(streams[i][:-1], streams[j][:-1]) for i, j in zip(first, second, strict=True)]
    assert prefixes.between(first, second).tolist() == expected


# ── families ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def families(prefixes: Prefixes) -> set[frozenset[int]]:
    """The families as sets of examples."""
    return {frozenset(np.flatnonzero(prefixes.family == f).tolist()) for f in prefixes.family}


def test_the_turns_of_a_row_are_a_family(make_example: Any) -> None:
    """Also where they have nothing in common; a row of one turn is none, nor are rows of one name in two sources."""
    turns = [make_example([1, 2], [3], origin="a:1", turn=0), make_example([9, 9], [3], origin="a:1", turn=1)]
    other = make_example([1, 2, 3], [4], origin="a:2")
    elsewhere = replace(make_example([5], [4], origin="a:1"), source=1)
    prefixes = Prefixes.of([turns[0], other, turns[1], elsewhere])
    assert families(prefixes) == {frozenset({0, 2}), frozenset({1}), frozenset({3})}
    assert prefixes.turns.tolist() == [True, False, True, False]


def test_answers_to_one_prompt_are_a_family(make_example: Any) -> None:
    """Rows of one turn whose prompts are equal to the last token; copies of a row too. No turn of another row is."""
    rows = [
        make_example([1, 2, 3], [4], origin="a:1"),
        make_example([1, 2, 3], [5, 6], origin="a:2"),
        make_example([1, 2, 3], [4], origin="b:1"),  # a copy
        make_example([1, 2], [3, 4], origin="a:3"),  # the same tokens as the first, but another prompt
        make_example([1, 2, 3], [7], origin="a:4", turn=0),
        make_example([1, 2, 3, 7, 8], [9], origin="a:4", turn=1),
    ]
    prefixes = Prefixes.of(rows)
    assert families(prefixes) == {frozenset({0, 1, 2}), frozenset({3}), frozenset({4, 5})}
    assert prefixes.turns.tolist() == [False] * 4 + [True] * 2
