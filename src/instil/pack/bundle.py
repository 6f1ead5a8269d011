"""Examples that begin alike, brought into one pack, but no more of them than a fair draw would bring into a step.

What is drawn together:

1. The turns of one row, whatever the batch: one conversation is one sequence in every other trainer, too.
2. Answers to one prompt, up to a quarter of a step's examples.
3. Examples that begin alike otherwise (a system prompt, a tool schema, few-shot headers): of a prefix that the share p of
   all examples has, about p * B at a time, where B is the examples of a step: as many as a step has of them on average.
   What nine in ten have in common is no restriction.

What has at least LEAST_TRUNK tokens in common is not bound by the capacity of a pack: its trunk is computed once, and its
branches in turn (tree.py).

Copies of an example, where a source is repeated, are never drawn together. Whatever else meets in a pack shares what it
has in common (tree.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from instil.pack.bins import shuffled
from instil.pack.even import even_packs
from instil.pack.prefixes import Indices, Prefixes
from instil.pack.tree import LEAST_TRUNK

PROMPT_SHARE = 4  # answers to one prompt are at most 1 / PROMPT_SHARE of a step
NEARLY_ALL = 0.9  # of the examples: what so many have in common, any draw has in common
LEAST_DEPTH = 16  # tokens: shorter beginnings are not worth an arrangement
DEEPER = 1.25  # a beginning inside another one is looked for where it is that much longer
BUNDLE_KEY = 1 << 48  # of the permutations made here: apart from those of epochs and sources (plan.py, mix.py)


@dataclass
class Node:
    """The examples at the places begin .. end - 1 of the sorted order: the first `depth` tokens are common to them."""

    begin: int
    end: int
    depth: int
    children: list[Node] = field(default_factory=list)


def beginnings(common: Indices, before: Indices, least: float) -> Node:
    """The tree of beginnings that at least `least` examples have; its root is all examples and what is common to all.

    common: of the sorted order (prefixes.py); before [n + 1]: how many of the epoch's examples are at an earlier place.
    """
    n = len(common)
    found: dict[tuple[int, int], int] = {}
    threshold = float(LEAST_DEPTH)
    while n > 1:
        alike = np.concatenate([[False], common[1:] >= threshold, [False]])
        begins = np.flatnonzero(alike[1:] & ~alike[:-1])
        ends = np.flatnonzero(alike[:-1] & ~alike[1:]) + 1
        large = before[ends] - before[begins] >= max(2.0, least)
        if not large.any():
            break
        for begin, end in zip(begins[large].tolist(), ends[large].tolist(), strict=True):
            found[begin, end] = int(common[begin + 1 : end].min())
        threshold = max(threshold + LEAST_DEPTH, threshold * DEEPER)
    root = Node(0, n, found.pop((0, n), 0))
    path = [root]
    for begin, end in sorted(found, key=lambda span: (span[0], -span[1])):
        while path[-1].end < end:
            path.pop()
        node = Node(begin, end, found[begin, end])
        path[-1].children.append(node)
        path.append(node)
    return root


@dataclass
class Bundles:
    """Sets of an epoch's examples, each to go into one pack; larger ones are made of smaller ones until they are packs.

    chosen [m]: the epoch's examples, an index as often as the example is used. of [m]: the first bundle, a family, of each
    of them. Of every bundle: tokens = size of its trie, count = examples, first and last = the lowest and highest of their
    places, parent = the bundle that it went into, -1 = none.
    """

    prefixes: Prefixes
    chosen: Indices
    capacity: int
    batch_examples: float
    seed: int
    epoch: int

    def __post_init__(self) -> None:
        self._permutations = 0
        used = np.bincount(self.prefixes.rank[self.chosen], minlength=len(self.prefixes.rank))
        self._before = np.concatenate([[0], np.cumsum(used)])  # how many of `chosen` are at an earlier place
        self._label(_families_of(self.prefixes, self.chosen))
        large = self._too_large()
        if len(large):
            of, next_free = self.of.copy(), len(self.count)
            members = np.split(np.argsort(of, kind="stable"), np.cumsum(self.count)[:-1])
            for bundle in large.tolist():
                for part in self._parts(members[bundle]):
                    of[part] = next_free
                    next_free += 1
            self._label(np.unique(of, return_inverse=True)[1])

    def packs(self) -> list[Indices]:
        """All of the epoch's examples in packs of at most `capacity` tokens, but for examples that are longer."""
        root = beginnings(self.prefixes.common, self._before, 2 * len(self.chosen) / self.batch_examples)
        self._gather(root, np.argsort(self.first, kind="stable"), whole=True)
        top = self.of
        while (above := self.parent[top]).max(initial=-1) >= 0:
            top = np.where(above >= 0, above, top)
        order = np.argsort(top, kind="stable")
        ends = np.flatnonzero(np.diff(top[order])) + 1
        return np.split(self.chosen[order], ends)

    # ── families ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _label(self, of: Indices) -> None:
        """Take `of` as the first bundles."""
        n = int(of.max()) + 1 if len(of) else 0
        place = self.prefixes.rank[self.chosen]
        self.of, self.count = of, np.bincount(of, minlength=n)
        self.tokens = self.prefixes.trie_tokens(self.chosen, of, n)
        self.first, self.last = np.full(n, len(self.prefixes.rank)), np.full(n, -1)
        np.minimum.at(self.first, of, place)
        np.maximum.at(self.last, of, place)
        self.parent = np.full(n, -1)

    @property
    def _most_answers(self) -> int:
        return max(2, int(self.batch_examples / PROMPT_SHARE))

    def _too_large(self) -> Indices:
        """Families of too many tokens for a pack, or of too many answers to one prompt for a step."""
        turns = np.zeros(len(self.count), bool)
        turns[self.of] = self.prefixes.turns[self.chosen]
        too_many = ~turns & (self.count > self._most_answers)
        too_long = (self.tokens > self.capacity) & (self._trunk(self.first, self.last) < LEAST_TRUNK)
        return np.flatnonzero((self.count > 1) & (too_long | too_many))

    def _trunk(self, first: Indices, last: Indices) -> Indices:
        """What the examples at each pair of places, and so all between them, have in common."""
        at = np.argsort(self.prefixes.rank, kind="stable")
        return self.prefixes.between(at[first], at[last])

    def _parts(self, at: Indices) -> Iterator[Indices]:
        """A family in parts that are small enough; at: where its examples are in `chosen`."""
        pieces = [at]
        if not self.prefixes.turns[self.chosen[at[0]]]:
            mixed = at[self._shuffled(len(at))]
            pieces = [mixed[i : i + self._most_answers] for i in range(0, len(at), self._most_answers)]
        for piece in pieces:
            ordered = piece[np.argsort(-self.prefixes.rank[self.chosen[piece]], kind="stable")]  # the deepest first
            examples = self.chosen[ordered]
            more = self.prefixes.lengths[examples[1:]] - self.prefixes.between(examples[:-1], examples[1:])
            begin, tokens = 0, int(self.prefixes.lengths[examples[0]])
            trunk = int(self._trunk(*self.prefixes.rank[examples[[-1, 0]]][:, None])[0])
            for i, extra in enumerate(more.tolist(), start=1):
                # what adds nothing goes along, also into too long a pack
                if extra and tokens + extra > self.capacity and trunk < LEAST_TRUNK:
                    yield ordered[begin:i]
                    begin, tokens = i, int(self.prefixes.lengths[examples[i]])
                else:
                    tokens += extra
            yield ordered[begin:]

    # ── beginnings ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _gather(self, node: Node, bundles: Indices, *, whole: bool = False) -> Indices:
        """Bring the bundles of a node together; returns those that there are then. bundles: ascending by `first`.

        whole: the root; every bundle that is left goes into a pack.
        """
        taken = np.zeros(len(bundles), bool)
        parts = []
        for child in node.children:
            a, b = np.searchsorted(self.first[bundles], [child.begin, child.end])
            inside = self.last[bundles[a:b]] < child.end
            parts.append(self._gather(child, bundles[a:b][inside]))
            taken[a:b] = inside
        bundles = np.concatenate([bundles[~taken], *parts]) if parts else bundles
        if not whole and len(bundles) < 2:
            return bundles
        share = float(self._before[node.end] - self._before[node.begin]) / len(self.chosen)
        order, depth = self._shuffled(len(bundles)), node.depth
        lengths, counts = np.maximum(self.tokens[bundles] - depth, 1), self.count[bundles]
        if depth >= LEAST_TRUNK:
            groups = _few(lengths, counts, np.inf, self.batch_examples * share, order)
        else:
            room = max(1, self.capacity - depth)
            of_a_full_pack = room / float(lengths.mean()) * float(counts.mean())
            if share > NEARLY_ALL or of_a_full_pack <= self.batch_examples * share:
                groups = even_packs(lengths, room, order)
            else:
                groups = _few(lengths, counts, room, self.batch_examples * share, order)
        return self._join(bundles, groups, depth)

    def _join(self, bundles: Indices, groups: list[Indices], depth: int) -> Indices:
        """Make each group of bundles, which have their first `depth` tokens in common, one; returns the new ones."""
        sizes = np.array([len(group) for group in groups])
        flat = bundles[np.concatenate(groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        new = len(self.count) + np.arange(len(groups))
        self.parent[flat] = np.repeat(new, sizes)
        self.parent = np.concatenate([self.parent, np.full(len(groups), -1)])
        self.tokens = np.concatenate([self.tokens, depth + np.add.reduceat(self.tokens[flat] - depth, starts)])
        self.first = np.concatenate([self.first, np.minimum.reduceat(self.first[flat], starts)])
        self.last = np.concatenate([self.last, np.maximum.reduceat(self.last[flat], starts)])
        self.count = np.concatenate([self.count, np.add.reduceat(self.count[flat], starts)])
        return new[np.argsort(self.first[new], kind="stable")]

    def _shuffled(self, n: int) -> Indices:
        """Another permutation each time, a pure function of seed, epoch and how many there were before."""
        self._permutations += 1
        return shuffled(n, (self.seed, BUNDLE_KEY + (self.epoch << 24) + self._permutations))


def _few(lengths: Indices, counts: Indices, room: float, most: float, order: Indices) -> list[Indices]:
    """In the given order, groups of `room` tokens at most and of about `most` examples: evenly many in each."""
    groups: list[list[int]] = []
    each = int(counts.sum()) / max(1, round(int(counts.sum()) / most))
    tokens = examples = current = 0
    for i, length, count in zip(order.tolist(), lengths[order].tolist(), counts[order].tolist(), strict=True):
        turn = int((examples + count / 2) // each)  # by the middle of its examples
        if not groups or tokens + length > room or turn > current:
            groups.append([])
            tokens, current = 0, turn
        groups[-1].append(i)
        tokens, examples = tokens + length, examples + count
    return [np.array(group, np.int64) for group in groups]


def _families_of(prefixes: Prefixes, chosen: Indices) -> Indices:
    """A number for each family among the epoch's examples; the copies of an example are in different ones."""
    if len(chosen) < 2:
        return np.zeros(len(chosen), np.int64)
    order = np.argsort(chosen, kind="stable")
    again = chosen[order][1:] == chosen[order][:-1]
    copy = np.zeros(len(chosen), np.int64)
    runs = np.arange(len(chosen)) - np.maximum.accumulate(
        np.where(np.concatenate([[True], ~again]), np.arange(len(chosen)), 0)
    )
    copy[order] = runs
    key = prefixes.family[chosen] * (int(copy.max()) + 1) + copy
    values, first, of = np.unique(key, return_index=True, return_inverse=True)
    number = np.empty(len(values), np.int64)
    number[np.argsort(first, kind="stable")] = np.arange(len(values))  # in the order in which they appear
    return number[of]
