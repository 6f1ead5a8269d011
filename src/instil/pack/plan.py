"""An epoch's examples to packs, and packs to steps: a pure function of (examples, plan, seed, epoch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from instil.pack.bins import Indices, shuffled
from instil.pack.bundle import Bundles
from instil.pack.prefixes import Prefixes
from instil.pack.tree import LEAST_TRUNK

PACKING = 2  # recorded with a run; another one whenever the same examples, plan and seed give other packs
FINER = 1.005  # the next larger capacity that is tried


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How an epoch becomes steps: packs of at most `capacity_tokens`, dealt evenly over `steps_per_epoch`.

    batch_examples: examples of a step on average; what begins alike is drawn together only as far as that allows
    (bundle.py). limit_tokens: computed at one time, beside a common beginning: packs that have one may be larger (tree.py).
    """

    capacity_tokens: int
    packs_per_epoch: int
    steps_per_epoch: int
    batch_examples: float
    limit_tokens: int


def plan_steps(
    prefixes: Prefixes,
    batch_examples: float,
    limit_tokens: int,
    *,
    chosen: Indices | None = None,
    most_steps: int | None = None,
    seed: int = 0,
) -> StepPlan:
    """Choose the pack capacity and the number of steps of an epoch so that a step holds `batch_examples` on average.

    chosen: the examples of the first epoch, with repetition (None = each once). most_steps: the number of examples in the
    smallest epoch, where epochs differ (mix.py). limit_tokens: the largest pack that fits the machine.

    With packs of `limit_tokens` a step would need k of them; the capacity is the least at which all examples fit into
    steps * k packs, so that packs are even and no step is left with a remainder. Packs are never cut, so a step may hold
    a few examples more or less than the mean; its loss is divided by what it holds, exactly. What is drawn together
    (bundle.py) is not cut for it: where rows have more turns than a step would hold examples, there are fewer steps.
    """
    chosen = np.arange(len(prefixes.lengths)) if chosen is None else chosen
    steps = max(1, round(len(chosen) / batch_examples))

    def packed(capacity: int) -> list[Indices]:
        return Bundles(prefixes, chosen, capacity, batch_examples, seed, 0).packs()

    families = Bundles(prefixes, chosen, limit_tokens, batch_examples, seed, 0)
    steps = min(steps, len(families.count))
    largest = packed(limit_tokens)
    tokens = int(computed_tokens(prefixes, largest).sum())
    wanted = steps * math.ceil(len(largest) / steps)
    whole = families.tokens[(families.count > 1) & (families.tokens <= limit_tokens)].max(initial=1)
    least = min(limit_tokens, max(int(whole), math.ceil(tokens / wanted)))
    capacity, packs = _least_capacity(lambda c: len(packed(c)), least, limit_tokens, len(largest), wanted)
    steps = min(steps, most_steps or steps)
    return StepPlan(capacity, max(packs, steps), steps, batch_examples, limit_tokens)


def _least_capacity(count: Callable[[int], int], least: int, limit: int, at_limit: int, wanted: int) -> tuple[int, int]:
    """The least capacity from `least` on at which count(capacity) <= wanted, within 1 in 2,000, and that count.

    at_limit = count(limit) <= wanted. A capacity is tried, then ever larger ones, then the gap is halved.
    """
    low, high, packs, growth = least - 1, least, 0, FINER
    while high < limit and (packs := count(high)) > wanted:
        low, high = high, min(limit, math.ceil(high * growth))
        growth = growth**2
    if high >= limit:
        high, packs = limit, at_limit
    while high - low > max(1, high // 2000):
        middle = (low + high) // 2
        if (found := count(middle)) <= wanted:
            high, packs = middle, found
        else:
            low = middle
    return high, packs


def computed_tokens(prefixes: Prefixes, packs: Sequence[Indices]) -> Indices:
    """The tokens that go through the model for each pack: the distinct prefixes of its examples."""
    return prefixes.trie_tokens(*_flat(packs), len(packs))


def attended_pairs(prefixes: Prefixes, packs: Sequence[Indices]) -> Indices:
    """How often a token of each pack looks at a token, itself included."""
    return prefixes.trie_pairs(*_flat(packs), len(packs))


def _flat(packs: Sequence[Indices]) -> tuple[Indices, Indices]:
    members = np.concatenate([*packs, np.zeros(0, np.int64)]).astype(np.int64)
    return members, np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])


def epoch_packs(
    prefixes: Prefixes, plan: StepPlan, seed: int, epoch: int, chosen: Indices | None = None
) -> list[list[Indices]]:
    """The packs of each step of an epoch, a pure function of its arguments; no step is empty.

    chosen: the epoch's examples, an index as often as the example is used (None = each once). Their number may differ
    between epochs, but is at least the steps of the plan (`most_steps` of `plan_steps`).
    """
    chosen = np.arange(len(prefixes.lengths)) if chosen is None else chosen
    packs = Bundles(prefixes, chosen, plan.capacity_tokens, plan.batch_examples, seed, epoch).packs()
    packs = _at_least(plan.steps_per_epoch, packs)
    steps = _dealt([len(pack) for pack in packs], plan.steps_per_epoch, shuffled(len(packs), (seed, 2 * epoch + 1)))
    return [[packs[j] for j in steps[i]] for i in shuffled(len(steps), (seed, 2 * epoch)).tolist()]


def _dealt(counts: Sequence[int], steps: int, order: Indices) -> list[list[int]]:
    """Packs of `counts` examples to steps, as many packs to each, or one more, and about as many examples.

    A pack that shares much holds more examples than others of its size; by chance alone, what shares nothing would be in
    smaller steps, and so weigh more (measured: 1.21 against 0.84).
    """
    examples = np.array(counts)
    order = order[np.argsort(-examples[order], kind="stable")]
    dealt: list[list[int]] = [[] for _ in range(steps)]
    held = np.zeros(steps, np.int64)
    for begin in range(0, len(order), steps):
        for pack, step in zip(order[begin : begin + steps].tolist(), np.argsort(held, kind="stable"), strict=False):
            dealt[step].append(pack)
            held[step] += examples[pack]
    return dealt


def packs_in_order(prefixes: Prefixes, capacity_tokens: int) -> list[Indices]:
    """All examples in sorted order, cut where a pack would be more than full and its examples have no common beginning of
    LEAST_TRUNK tokens: the most sharing, and no chance; for measuring."""
    places = np.argsort(prefixes.rank, kind="stable")
    lengths, common = prefixes.lengths[places].tolist(), prefixes.common.tolist()
    cuts, tokens, trunk = [], 0, 0
    for place, (length, shared) in enumerate(zip(lengths, common, strict=True)):
        more = length - shared
        if tokens and more and tokens + more > capacity_tokens and min(trunk, shared) < LEAST_TRUNK:
            cuts.append(place)
            tokens = 0
        trunk = min(trunk, shared) if tokens else length
        tokens += more if tokens else length
    return np.split(places, cuts)


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
