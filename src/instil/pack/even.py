"""Packs that are evenly full: as few as can be, each with long and short examples, so that steps are alike."""

from __future__ import annotations

import math

import numpy as np

from instil.pack.bins import Indices, plan_packs

SLACKS = (0.0, 0.0005, 0.002, 0.005, 0.01)  # more packs than the tokens need at least, tried in turn
ROUNDS = 2000  # of exchanges between packs that are too full and others,
ALL_LOOKS = 20_000_000  # at pairs of examples in all rounds together,
MOST_LOOKS = 200_000  # and in one
MOST_PER_PACK = 512  # examples: an exchange looks at all pairs; packs of more examples are even without
PATIENCE = 250  # rounds without a helpful exchange
STRIDE = 7919  # packs between one partner and the next


def even_packs(lengths: Indices, capacity_tokens: int, order: Indices) -> list[Indices]:
    """Put every example into exactly one pack of at most `capacity_tokens`; an example longer than that gets its own.

    The packs are the fewest that hold the tokens, or a few more, evenly filled; where that cannot be reached, those of
    best-fit-decreasing (bins.py), which leaves the last packs with short examples only. `order` (a permutation of the
    examples) decides which example of a length goes where. A pure function of its arguments.
    """
    fitting = order[lengths[order] <= capacity_tokens]
    alone = order[lengths[order] > capacity_tokens]
    packs = [alone[i : i + 1] for i in range(len(alone))]
    if not len(fitting):
        return packs
    least = math.ceil(int(lengths[fitting].sum()) / capacity_tokens)
    for tried in dict.fromkeys(math.ceil(least * (1 + slack)) for slack in SLACKS):  # each number once
        found = _even(lengths, fitting, tried, capacity_tokens)
        if found is not None:
            return found + packs
    kept = plan_packs(lengths[fitting], capacity_tokens, np.arange(len(fitting)))
    return [fitting[pack] for pack in kept] + packs


def _even(lengths: Indices, items: Indices, packs: int, capacity: int) -> list[Indices] | None:
    """`packs` packs of at most `capacity` tokens, or None where none were found.

    Longest first, as many as there are packs at a time, the longest of them to the pack with the fewest tokens; then what
    is too full exchanges examples with what is not.
    """
    if packs >= len(items):
        return [items[i : i + 1] for i in range(len(items))]
    items = items[np.argsort(-lengths[items], kind="stable")]
    columns = math.ceil(len(items) / packs)
    places = np.full(packs * columns, -1)
    places[: len(items)] = items
    held = places.reshape(columns, packs)
    size = np.where(held >= 0, lengths[held], 0)
    sums = size[0].copy()
    for k in range(1, columns):
        emptiest = np.argsort(sums, kind="stable")
        placed, its = np.empty_like(held[k]), np.empty_like(size[k])
        placed[emptiest], its[emptiest] = held[k], size[k]
        held[k], size[k] = placed, its
        sums += its
    if sums.max() > capacity:
        if columns > MOST_PER_PACK:
            return None
        _exchange(held, size, sums, capacity)
        if sums.max() > capacity:
            return None
    flat = held.T[held.T >= 0]
    return np.split(flat, np.cumsum((held >= 0).sum(0))[:-1])


def _exchange(held: Indices, size: Indices, sums: Indices, capacity: int) -> None:
    """Exchange two examples (or one and none) of a pack above the capacity and one below, while that helps; in place.

    Packs meet in turn, another pair each time; of many packs at once only some of their examples are looked at.
    """
    columns, looks, helped = len(size), 0, 0
    for turn in range(ROUNDS):
        over, under = np.flatnonzero(sums > capacity), np.flatnonzero(sums < capacity)
        n = min(len(over), len(under))
        if not n or looks > ALL_LOOKS or turn - helped > PATIENCE:
            return
        over = over[np.argsort(-sums[over], kind="stable")[:n]]
        under = under[(turn * STRIDE + np.arange(n)) % len(under)]
        few = max(1, min(columns, MOST_LOOKS // (n * columns)))
        looks += n * columns * few
        mine = (turn * few + np.arange(few)) % columns
        gain = size[mine][:, over][:, None, :] - size[:, under][None, :, :]  # what `over` loses by each exchange
        excess = np.maximum(sums[over] - gain - capacity, 0) + np.maximum(sums[under] + gain - capacity, 0)
        excess = excess.reshape(-1, n)
        best = excess.argmin(0)
        helps = excess[best, np.arange(n)] < sums[over] - capacity
        if not helps.any():
            continue
        helped = turn
        a, b = np.divmod(best[helps], columns)
        a, o, u = mine[a], over[helps], under[helps]
        moved = size[a, o] - size[b, u]
        sums[o] -= moved
        sums[u] += moved
        for table in (held, size):
            table[a, o], table[b, u] = table[b, u], table[a, o]
