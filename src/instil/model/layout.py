"""Who may look at whom in a pack, as runs of tokens: the segments of its prefix tree and the parts attention is made of.

Query q may look at key k exactly when k <= q < reach[k]. In depth-first order the descendants of a segment [a, b) with
reach r are the range [b, r), so the whole of attention is: every segment with itself (causal), and every range [b, r) with
the segment [a, b) above it (no mask). A window w adds `position[q] - position[k] < w`: parts outside it vanish, parts
inside stay as they are, the rest is cut into blocks whose band a small mask draws.

Everything here is a function of the pack alone, made with numpy and Python integers in O(tokens), so that it can be made
ahead of the step that needs it; what depends on a window is made on first use and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from instil.types import Pack

T = TypeVar("T")


class KeysAndValues(dict[int, tuple[Tensor, Tensor]]):
    """key [1, K, n, D] and value [1, K, n, E] by id of the attention layer; closed: a layer that runs again, because its
    activations are computed again for the backward pass, leaves nothing."""

    closed: bool = False


BATCH_TOKENS = 256  # segments up to this long share kernel calls on the CPU; longer ones keep its cores busy alone
BATCH_WASTE = 0.07  # share of a call's tokens that may be padding
WINDOW_BLOCK = (64, 256)  # queries in a block that straddles a window: at least, at most


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) with one reach and consecutive positions, the first at `position`; `level` segments are above."""

    start: int
    stop: int
    reach: int
    position: int
    level: int


@dataclass(frozen=True, slots=True)
class Part:
    """Queries [q0, q1) look at keys [k0, k1).

    causal: the ranges are one and query i looks at keys up to itself. offset: None = at all the others; else query i of
    the part (from 0) looks at its key j exactly when 0 <= i + offset - j < window; every query then sees a key.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool = False
    offset: int | None = None


class Rows:
    """Some rows of a tensor with one row a token: a slice where they are adjacent, an index otherwise."""

    def __init__(self, ranges: Sequence[tuple[int, int]], device: torch.device):
        self.count = sum(b - a for a, b in ranges)
        self._start = ranges[0][0]
        adjacent = all(ranges[i][1] == ranges[i + 1][0] for i in range(len(ranges) - 1))
        self._index = None
        if not adjacent:
            self._index = torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in ranges])).to(device)

    def of(self, x: Tensor) -> Tensor:
        """x [n, ...] -> the rows [count, ...]; a view where they are a slice."""
        if self._index is None:
            return x.narrow(0, self._start, self.count)
        return x.index_select(0, self._index)

    def put(self, x: Tensor, rows: Tensor) -> None:
        """x[these] = rows."""
        if self._index is None:
            x.narrow(0, self._start, self.count).copy_(rows)
        else:
            x.index_copy_(0, self._index, rows.to(x.dtype))

    def put_back(self, x: Tensor, rows: Tensor) -> None:
        """x[these] = rows, where rows = self.of(x) changed in place: done already where that is a view."""
        if self._index is not None:
            self.put(x, rows)

    def add(self, x: Tensor, rows: Tensor) -> None:
        """x[these] += rows; no row is among these twice."""
        if self._index is None:
            x.narrow(0, self._start, self.count).add_(rows)
        else:
            x.index_add_(0, self._index, rows.to(x.dtype))


class Group:
    """Parts computed in one kernel call: no query and no key is in two of them, and all are causal or none is.

    window: of the bands of its parts; of causal parts where the kernel is to cut them itself; None = there is none.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device, window: int | None = None):
        self.parts = tuple(parts)
        self.causal = parts[0].causal
        self.window = window
        self.device = device
        self.queries = Rows([(p.q0, p.q1) for p in parts], device)
        self.keys = self.queries if self.causal else Rows([(p.k0, p.k1) for p in parts], device)
        self.most_queries = max(p.q1 - p.q0 for p in parts)
        self.most_keys = max(p.k1 - p.k0 for p in parts)

    @cached_property
    def query_bounds(self) -> Tensor:
        """int32 [parts + 1]: where each part begins among the group's query rows."""
        return self._bounds([p.q1 - p.q0 for p in self.parts])

    @cached_property
    def key_bounds(self) -> Tensor:
        """int32 [parts + 1]: where each part begins among the group's key rows."""
        return self._bounds([p.k1 - p.k0 for p in self.parts])

    def _bounds(self, sizes: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)).to(self.device)

    @cached_property
    def padded(self) -> Padding:
        """The group's query rows as a rectangle, one row of it a part."""
        return Padding([(p.q0, p.q1) for p in self.parts], self.most_queries, self.device)


class Padding:
    """Ranges of a pack as a rectangle [parts, width]: short ones are filled up with copies of their last token."""

    def __init__(self, ranges: Sequence[tuple[int, int]], width: int, device: torch.device):
        self.shape = (len(ranges), width)
        starts, stops = np.array(ranges, np.int64).T
        places = starts[:, None] + np.arange(width)
        real = (places < stops[:, None]).ravel()
        self._places = torch.from_numpy(np.minimum(places, stops[:, None] - 1).ravel()).to(device)
        self._real = None if real.all() else torch.from_numpy(np.flatnonzero(real)).to(device)
        self._filler = torch.from_numpy(np.flatnonzero(~real)).to(device)

    def of(self, x: Tensor, *, zeros: bool = False) -> Tensor:
        """x [n, ...] -> [parts, width, ...]; zeros: the filling is 0 instead."""
        rows = x.index_select(0, self._places)
        if zeros and self._real is not None:
            rows.index_fill_(0, self._filler, 0)
        return rows.view(*self.shape, *x.shape[1:])

    def back(self, x: Tensor) -> Tensor:
        """x [parts, width, ...] -> the real rows, part by part."""
        rows = x.flatten(0, 1)
        return rows if self._real is None else rows.index_select(0, self._real)


@dataclass(frozen=True)
class Layout:
    """What attention needs to know of a pack.

    reach, positions [n] on the model's device; segments in the pack's order; longest_tokens = of the longest path.
    keep: where attention layers leave their keys and values, of a trunk; given: those of a trunk that has been computed, for
    its branches: the first given_tokens tokens of the layout are the trunk's, and only the others go through the model.
    """

    reach: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    longest_tokens: int
    keep: KeysAndValues | None = None
    given: KeysAndValues | None = None
    given_tokens: int = 0
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def plain(self) -> bool:
        """Whether it is documents one after another, without branches."""
        return all(s.reach == s.stop for s in self.segments)

    def window(self, window: int | None) -> int | None:
        """The window where it cuts anything, else None."""
        return None if window is None or window >= self.longest_tokens else window

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What `make` gives, made on first use of this key; every layer of a model asks for the same."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

    def single(self, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        """(own, above) for kernels that take one part at a time, or short causal parts of nearly equal length together.

        own: each query is in exactly one of these groups. above: queries with keys before their own segment.
        """
        return self.once(("single", self.window(window)), lambda: self._single(self.window(window)))

    def levels(self, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        """(own, above) for kernels that take many parts at a time: all segments at once, then one level of the tree after
        the other (on one level no two ranges overlap). A window is left to the kernel; a tree cannot have one here."""
        return self.once(("levels", self.window(window)), lambda: self._levels(self.window(window)))

    def _single(self, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        device = self.reach.device
        own = [part for segment in self._computed() for part in own_parts(segment, window)]
        above = [part for parent, below in self._inner() for part in above_parts(parent, below, window)]
        groups = [Group(batch, device, window) for batch in batches(own)]
        return tuple(groups), tuple(Group([part], device, window) for part in above)

    def _levels(self, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        if window is not None and not self.plain:
            raise ValueError("a window in a tree has no varlen form")
        device = self.reach.device
        own = Group([Part(s.start, s.stop, s.start, s.stop, causal=True) for s in self._computed()], device, window)
        by_level: dict[int, list[Part]] = {}
        for s in self.segments:
            if s.reach > s.stop:
                by_level.setdefault(s.level, []).append(Part(s.stop, s.reach, s.start, s.stop))
        return (own,), tuple(Group(by_level[level], device) for level in sorted(by_level))

    def _computed(self) -> Sequence[Segment]:
        """The segments whose tokens are queries: all but the trunk that is given."""
        return self.segments[1:] if self.given_tokens else self.segments

    def _inner(self) -> Iterator[tuple[Segment, Sequence[Segment]]]:
        """Each segment that has descendants, and them."""
        starts = [s.start for s in self.segments]
        for i, s in enumerate(self.segments):
            if s.reach > s.stop:
                yield s, self.segments[i + 1 : int(np.searchsorted(starts, s.reach))]

    def band(self, offset: int, window: int, dtype: torch.dtype) -> Tensor:
        """Additive mask [rows, offset + rows] of a block: 0 where 0 <= i + offset - j < window, else -inf."""

        def make() -> Tensor:
            rows = _block(window)
            i = torch.arange(rows, device=self.reach.device)[:, None]
            difference = i + offset - torch.arange(offset + rows, device=self.reach.device)
            mask = torch.zeros(difference.shape, dtype=dtype, device=self.reach.device)
            return mask.masked_fill_((difference < 0) | (difference >= window), float("-inf"))

        return self.once(("band", offset, window, dtype), make)


def layout_of(pack: Pack, device: torch.device) -> Layout:
    """The layout of a pack. Raises ValueError where its reach is not that of a tree in depth-first order."""
    reach, positions = (np.asarray(x, np.int64) for x in (pack.reach, pack.positions))
    segments = segments_of(reach, positions)
    longest = int(positions.max()) + 1 if len(positions) else 0
    return Layout(torch.from_numpy(reach).to(device), torch.from_numpy(positions.copy()).to(device), segments, longest)


def layout_of_branches(pack: Pack, begin: int, end: int, given: KeysAndValues, device: torch.device) -> Layout:
    """The layout of the branches [begin, end) of a pack that is cut, behind its trunk, whose keys and values are given."""
    trunk = pack.cuts[0]
    reach = np.concatenate(
        [np.full(trunk, trunk + end - begin), pack.reach[begin:end].astype(np.int64) - begin + trunk]
    )
    positions = np.concatenate([pack.positions[:trunk], pack.positions[begin:end]]).astype(np.int64)
    return Layout(
        torch.from_numpy(reach).to(device), torch.from_numpy(positions).to(device), segments_of(reach, positions, trunk),
        int(positions.max()) + 1, given=given, given_tokens=trunk,
    )  # fmt: skip


def segments_of(reach: np.ndarray, positions: np.ndarray, trunk: int = 0) -> tuple[Segment, ...]:
    """reach, positions [n] -> the segments, in order; O(n). trunk: a segment ends there in any case (0 = none).

    Raises ValueError for what is not a tree.
    """
    n = len(reach)
    new = np.ones(n, bool)
    new[1:] = (reach[1:] != reach[:-1]) | (positions[1:] != positions[:-1] + 1)
    if trunk:
        new[trunk] = True
    starts = np.flatnonzero(new)
    found: list[Segment] = []
    open_: list[int] = []  # the reaches of the segments that the current one is below
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), n], strict=True):
        while open_ and open_[-1] <= start:
            open_.pop()
        end = int(reach[start])
        if end < stop or end > (open_[-1] if open_ else n):
            raise ValueError(f"reach {end} at token {start} of a pack of {n}: not a tree in depth-first order")
        found.append(Segment(start, stop, end, int(positions[start]), len(open_)))
        open_.append(end)
    return tuple(found)


def own_parts(segment: Segment, window: int | None) -> Iterator[Part]:
    """The parts of a segment with itself: one, or blocks where it is longer than the window."""
    a, b = segment.start, segment.stop
    if window is None or b - a <= window:
        yield Part(a, b, a, b, causal=True)
        return
    yield Part(a, a + window, a, a + window, causal=True)
    for start in range(a + window, b, _block(window)):
        stop, first = min(b, start + _block(window)), start - window + 1
        yield Part(start, stop, first, stop, offset=window - 1)


def above_parts(parent: Segment, below: Sequence[Segment], window: int | None) -> Iterator[Part]:
    """The parts of a segment's descendants with the segment, in the pack's order."""
    a, b = parent.start, parent.stop
    if window is None:
        yield Part(b, parent.reach, a, b)
        return
    last = parent.position + b - a - 1  # position of the parent's last token
    whole: tuple[int, int] | None = None  # queries that see all of the parent
    for s in below:
        if s.level == parent.level + 1 and s.position != last + 1:
            raise ValueError(f"position {s.position} at token {s.start}: a branch must go on from {last} above it")
        if s.position + s.stop - s.start - parent.position <= window:
            if whole and whole[1] != s.start:
                yield Part(*whole, a, b)
                whole = None
            whole = (whole[0] if whole else s.start, s.stop)
            continue
        visible = min(s.stop, s.start + last + window - s.position)  # the first query that sees none of it
        for start in range(s.start, visible, _block(window)):
            stop = min(visible, start + _block(window))
            position = s.position + start - s.start
            first = max(a, a + position - window + 1 - parent.position)
            offset = position - (parent.position + first - a)
            cut = offset + stop - start > window  # whether the last query of the block does not see the first key
            yield Part(start, stop, first, b, offset=offset if cut else None)
    if whole:
        yield Part(*whole, a, b)


def batches(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts in groups for one call each: short causal ones with others of nearly their length, all others alone."""
    short = [p for p in parts if p.causal and p.q1 - p.q0 <= BATCH_TOKENS]
    yield from ([p] for p in parts if not p.causal or p.q1 - p.q0 > BATCH_TOKENS)
    batch: list[Part] = []
    filled = 0
    for part in sorted(short, key=lambda p: p.q0 - p.q1):
        size = part.q1 - part.q0
        width = batch[0].q1 - batch[0].q0 if batch else size
        if batch and (len(batch) + 1) * width - filled - size > BATCH_WASTE * (len(batch) + 1) * width:
            yield batch
            batch, filled = [], 0
        batch.append(part)
        filled += size
    if batch:
        yield batch


def _block(window: int) -> int:
    least, most = WINDOW_BLOCK
    return max(least, min(most, window))
