"""Best-fit-decreasing packing on the length histogram: example lengths in, packs of example indices out."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How an epoch becomes steps: packs of at most `capacity_tokens`, dealt evenly over `steps_per_epoch`."""

    capacity_tokens: int
    packs_per_epoch: int
    steps_per_epoch: int


def plan_steps(lengths: Indices, batch_examples: float, limit_tokens: int, most_steps: int | None = None) -> StepPlan:
    """Choose the pack capacity and the number of steps of an epoch so that a step holds `batch_examples` on average.

    lengths: of the first epoch's examples, with repetition. most_steps: the number of examples in the smallest epoch,
    where epochs differ (mix.py). limit_tokens: the largest pack that fits the machine.

    The batch of t = batch_examples * mean(length) tokens is laid out as k = ceil(t / limit) packs; the capacity is the
    least at which all examples fit into steps * k packs, so that packs are even and no step is left with a remainder.
    Packs are never cut, so a step may hold a few examples more or less than the mean; its loss is divided by what it
    holds, exactly.
    """
    steps = max(1, round(len(lengths) / batch_examples))
    tokens_per_step = int(lengths.sum()) / steps
    wanted = steps * max(1, math.ceil(tokens_per_step / limit_tokens))
    capacity = max(1, math.ceil(int(lengths.sum()) / wanted))
    packs = _count(lengths, capacity)
    while packs > wanted and capacity < limit_tokens:
        capacity = min(limit_tokens, capacity + max(1, capacity // 200))
        packs = _count(lengths, capacity)
    return StepPlan(capacity, packs, min(steps, packs, most_steps or packs))


def _count(lengths: Indices, capacity_tokens: int) -> int:
    """Packs of an epoch: the same in every epoch, since the histogram is."""
    values, counts = np.unique(lengths, return_counts=True)
    return sum(n for _, n in _fill(values[::-1].tolist(), counts[::-1].tolist(), capacity_tokens))


def shuffled(n: int, key: tuple[int, int]) -> Indices:
    """A permutation of n, a pure function of the key on every machine and numpy version.

    The order of the raw 64-bit outputs of Philox (Salmon et al. 2011), whose stream numpy guarantees.
    """
    return np.argsort(np.random.Philox(key=np.array(key, np.uint64)).random_raw(n), kind="stable")


def epoch_packs(
    lengths: Indices, plan: StepPlan, seed: int, epoch: int, chosen: Indices | None = None
) -> list[list[Indices]]:
    """The packs of each step of an epoch, a pure function of its arguments; no step is empty.

    chosen: the epoch's examples, an index as often as the example is used (None = each once). Their number may differ
    between epochs, but is at least the steps of the plan (`most_steps` of `plan_steps`).
    """
    chosen = np.arange(len(lengths)) if chosen is None else chosen
    packs = plan_packs(lengths[chosen], plan.capacity_tokens, shuffled(len(chosen), (seed, 2 * epoch)))
    packs = _at_least(plan.steps_per_epoch, packs)
    order = shuffled(len(packs), (seed, 2 * epoch + 1))
    steps = plan.steps_per_epoch
    cuts = [round(i * len(packs) / steps) for i in range(steps + 1)]
    return [[chosen[packs[j]] for j in order[a:b]] for a, b in itertools.pairwise(cuts)]


def _at_least(n: int, packs: list[Indices]) -> list[Indices]:
    """At least n packs: the one of most examples is halved until there are."""
    packs = list(packs)
    while len(packs) < n:
        i = max(range(len(packs)), key=lambda j: len(packs[j]))
        half = len(packs[i]) // 2
        if not half:
            raise ValueError(f"{n} steps need as many examples, and the epoch has {len(packs)}")
        packs[i : i + 1] = [packs[i][:half], packs[i][half:]]
    return packs
