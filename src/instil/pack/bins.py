"""Best-fit-decreasing on the histogram of lengths: lengths in, packs out; and the permutations that decide who goes where."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


def plan_packs(lengths: Indices, capacity_tokens: int, order: Indices) -> list[Indices]:
    """Put every example into exactly one pack of at most `capacity_tokens`; an example longer than that gets its own.

    Best-fit-decreasing: longest first, each into the fullest pack that still has room. The plan is made on the histogram
    of lengths (equal lengths are interchangeable), so its cost grows with the number of distinct lengths; which example
    of a length goes where is then given by `order` (a permutation of the examples). A pure function of its arguments.
    """
    if capacity_tokens < 1:
        raise ValueError(f"capacity_tokens must be positive, got {capacity_tokens}")
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    values, counts = np.unique(lengths, return_counts=True)
    starts = dict(zip(values[::-1].tolist(), np.concatenate([[0], counts[::-1].cumsum()]).tolist(), strict=False))
    packs: list[Indices] = []
    for contents, n in _fill(values[::-1].tolist(), counts[::-1].tolist(), capacity_tokens):
        columns = []
        for length, times in contents:
            start = starts[length]
            starts[length] = start + n * times
            columns.append(by_length[start : start + n * times].reshape(n, times))
        packs.extend(np.concatenate(columns, axis=1))
    return packs


Contents = tuple[tuple[int, int], ...]  # (length, how many of it), longest first


def _fill(lengths: list[int], counts: list[int], capacity: int) -> Iterator[tuple[Contents, int]]:
    """Best-fit-decreasing over (length, count), longest first; yields (contents of a pack, number of such packs)."""
    rooms: list[int] = []  # ascending free rooms for which a pack is open
    open_packs: dict[int, list[tuple[Contents, int]]] = {}

    def put(room: int, contents: Contents, n: int) -> None:
        if room not in open_packs:
            bisect.insort(rooms, room)
            open_packs[room] = []
        open_packs[room].append((contents, n))

    for length, total in zip(lengths, counts, strict=True):
        left = total
        while left:
            i = bisect.bisect_left(rooms, length)
            if i == len(rooms):
                break
            room = rooms[i]
            contents, n = open_packs[room].pop()
            if not open_packs[room]:
                del open_packs[room], rooms[i]
            times = min(left, room // length)  # best fit keeps choosing the same pack while it has room
            full = min(n, left // times)
            put(room - times * length, (*contents, (length, times)), full)
            if n > full:
                put(room, contents, n - full)
            left -= full * times
        each = max(1, capacity // length)
        if left >= each:
            put(max(0, capacity - each * length), ((length, each),), left // each)
        if left % each:
            put(max(0, capacity - left % each * length), ((length, left % each),), 1)
    for room in rooms:
        yield from open_packs[room]


def shuffled(n: int, key: tuple[int, int]) -> Indices:
    """A permutation of n, a pure function of the key on every machine and numpy version.

    The order of the raw 64-bit outputs of Philox (Salmon et al. 2011), whose stream numpy guarantees.
    """
    return np.argsort(np.random.Philox(key=np.array(key, np.uint64)).random_raw(n), kind="stable")
