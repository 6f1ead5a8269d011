"""The parts of a pack's attention cover exactly the pairs that may see each other, once each, with or without a window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.model.layout import BATCH_TOKENS, BATCH_WASTE, Group, Layout, Part, Rows, batches, layout_of
from instil.types import Pack
from tries import pack_of_paths, random_paths

CPU = torch.device("cpu")


def pack_of(positions: list[int], reach: list[int]) -> Pack:
    none = np.zeros(0, np.int32)
    tokens, p, r = (np.array(x, np.int32) for x in (positions, positions, reach))
    return Pack(tokens, p, r, none, none, none.astype(np.float32), none, ())


def visible(layout: Layout, window: int | None) -> np.ndarray:
    """[n, n]: the rule, written out."""
    reach, positions = layout.reach.numpy(), layout.positions.numpy()
    n = len(reach)
    return np.array(
        [
            [k <= q < reach[k] and (window is None or positions[q] - positions[k] < window) for k in range(n)]
            for q in range(n)
        ]
    )


def covered(groups: Iterable[Group], n: int) -> np.ndarray:
    """[n, n]: in how many parts each query sees each key."""
    count = np.zeros((n, n), int)
    for group in groups:
        for part in group.parts:
            q, k = np.arange(part.q0, part.q1)[:, None], np.arange(part.k0, part.k1)[None, :]
            seen = np.ones((q.size, k.size), bool)
            if part.causal:
                seen = (k <= q) & (True if group.window is None else q - k < group.window)
            if part.offset is not None:
                difference = (q - part.q0) + part.offset - (k - part.k0)
                seen = (difference >= 0) & (difference < group.window)
                assert seen.any(1).all(), "a query without a key has no log-sum-exp"
            count[part.q0 : part.q1, part.k0 : part.k1] += seen
    return count


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), longest=st.sampled_from([1, 4, 40, 200]), window=st.integers(1, 150) | st.none())
def test_single_parts_cover_every_visible_pair_once(seed: int, longest: int, window: int | None) -> None:
    """And every query is in exactly one part of the first kind, so that there is something to merge the others into."""
    rng = np.random.default_rng(seed)
    layout = layout_of(pack_of_paths(random_paths(rng, int(rng.integers(1, 7)), longest)), CPU)
    own, above = layout.single(window)
    for group in own:
        if len(group.parts) == 1 and group.parts[0].causal:
            assert group.window is None or group.most_queries <= group.window  # a causal part needs no band
    n = len(layout.reach)
    whole = [Group(g.parts, CPU, None if g.causal else g.window) for g in (*own, *above)]
    np.testing.assert_array_equal(covered(whole, n), visible(layout, window))
    first = np.zeros(n, int)
    for group in own:
        for part in group.parts:
            first[part.q0 : part.q1] += 1
    assert (first == 1).all()


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), longest=st.sampled_from([1, 4, 40]))
def test_levels_cover_every_visible_pair_once(seed: int, longest: int) -> None:
    """And on one level neither queries nor keys overlap: one call may take them all."""
    rng = np.random.default_rng(seed)
    layout = layout_of(pack_of_paths(random_paths(rng, int(rng.integers(1, 7)), longest)), CPU)
    own, above = layout.levels(None)
    assert len(own) == 1
    np.testing.assert_array_equal(covered((*own, *above), len(layout.reach)), visible(layout, None))
    for group in (*own, *above):
        for ranges in ([(p.q0, p.q1) for p in group.parts], [(p.k0, p.k1) for p in group.parts]):
            tokens = np.concatenate([np.arange(a, b) for a, b in ranges])
            assert len(np.unique(tokens)) == len(tokens)


def test_levels_of_documents_take_a_window() -> None:
    """Where the kernel cuts it itself; a tree has no such form."""
    plain = layout_of(pack_of_paths([[1] * 9, [2] * 5]), CPU)
    (own,), above = plain.levels(4)
    assert not above
    np.testing.assert_array_equal(covered([own], 14), visible(plain, 4))
    with pytest.raises(ValueError, match="no varlen form"):
        layout_of(pack_of_paths([[1] * 9, [1, 1, 2, 2, 2, 2]]), CPU).levels(4)


def test_segments_are_runs_of_one_reach() -> None:
    """A prefix of two tokens, two branches of which the first branches again, then a document of its own."""
    layout = layout_of(pack_of_paths([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [7, 8]]), CPU)
    found = [(s.start, s.stop, s.reach, s.position, s.level) for s in layout.segments]
    assert found == [
        (0, 2, 6, 0, 0),
        (2, 3, 5, 2, 1),
        (3, 4, 4, 3, 2),
        (4, 5, 5, 3, 2),
        (5, 6, 6, 2, 1),
        (6, 8, 8, 0, 0),
    ]
    assert layout.longest_tokens == 4
    assert not layout.plain
    assert layout.reach.dtype == layout.positions.dtype == torch.int64


def test_documents_are_segments_without_branches() -> None:
    """Three documents of 2, 1 and 3 tokens."""
    layout = layout_of(pack_of([0, 1, 0, 0, 1, 2], [2, 2, 3, 6, 6, 6]), CPU)
    assert [(s.start, s.stop) for s in layout.segments] == [(0, 2), (2, 3), (3, 6)]
    assert layout.plain


@pytest.mark.parametrize(
    ("positions", "reach"),
    [
        ([0, 1, 0, 1], [2, 1, 4, 4]),  # a token that not even itself may look at
        ([0, 1, 2, 0], [3, 4, 3, 4]),  # a branch that reaches beyond what is above it
        ([0, 1], [2, 3]),  # a reach beyond the pack
    ],
)
def test_what_is_no_tree_is_refused(positions: list[int], reach: list[int]) -> None:
    """Its parts would not be those of the rule."""
    with pytest.raises(ValueError, match="not a tree in depth-first order"):
        layout_of(pack_of(positions, reach), CPU)


def test_a_window_needs_branches_that_count_on() -> None:
    """Distances in a tree are differences of positions; without a window the positions play no part."""
    layout = layout_of(pack_of([0, 1, 0, 1, 2], [5, 5, 5, 5, 5]), CPU)
    layout.single(None)
    with pytest.raises(ValueError, match="must go on from 1"):
        layout.single(2)


def test_a_window_that_cuts_nothing_is_no_window() -> None:
    """The longest path counts, not the pack."""
    layout = layout_of(pack_of_paths([[1] * 5, [2] * 5]), CPU)
    assert layout.window(5) is None
    assert layout.window(4) == 4
    assert layout.single(5) is layout.single(None)


def test_every_layer_gets_the_same_groups() -> None:
    """They are made once for a pack and window."""
    layout = layout_of(pack_of_paths([[1] * 9, [1, 2, 3]]), CPU)
    assert layout.single(3) is layout.single(3)
    assert layout.single(3) is not layout.single(2)
    assert layout.band(2, 3, torch.float32) is layout.band(2, 3, torch.float32)


def test_a_windows_masks_are_small() -> None:
    """Never [n, n]: a block of queries by window + block keys, one mask for all blocks of a document."""
    layout = layout_of(pack_of_paths([[1] * 5000, [1] * 900 + [2] * 3000]), CPU)
    own, above = layout.single(100)
    assert all((p.q1 - p.q0) * (p.k1 - p.k0) <= 256 * 356 for g in (*own, *above) for p in g.parts)
    offsets = {p.offset for g in (*own, *above) for p in g.parts if p.offset is not None}
    assert len(offsets) <= 4


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 700), min_size=1, max_size=40))
def test_batches_hold_parts_of_nearly_one_length(sizes: list[int]) -> None:
    """Every part is in one batch; padding stays a small share; long parts stay alone."""
    ends = np.cumsum(sizes)
    parts = [Part(e - s, e, e - s, e, causal=True) for s, e in zip(sizes, ends.tolist(), strict=True)]
    found = list(batches(parts))
    assert sorted(p.q0 for batch in found for p in batch) == [p.q0 for p in parts]
    for batch in found:
        lengths = [p.q1 - p.q0 for p in batch]
        assert len(batch) == 1 or max(lengths) <= BATCH_TOKENS
        assert 1 - sum(lengths) / (max(lengths) * len(lengths)) <= BATCH_WASTE + 1e-9


@pytest.mark.parametrize("ranges", [[(2, 5)], [(2, 5), (5, 7)], [(0, 1), (4, 7)]])
def test_rows_are_views_where_they_can_be(ranges: Any) -> None:
    """Adjacent ranges are one slice; others are gathered; putting and adding write to the same rows."""
    x = torch.arange(8.0)[:, None].repeat(1, 2)
    rows = Rows(ranges, CPU)
    index = np.concatenate([np.arange(a, b) for a, b in ranges])
    assert torch.equal(rows.of(x), x[index])
    assert (rows.of(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()) == (
        len(index) == np.ptp(index) + 1
    )
    expected = x.clone()
    expected[index] *= 2
    rows.add(x, rows.of(x).clone())
    assert torch.equal(x, expected)
    expected[index] = 1
    rows.put(x, torch.ones(len(index), 2))
    assert torch.equal(x, expected)
