"""The prefixes that examples share: their sorted order, what neighbours have in common, and so the size of any trie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from instil.types import Example, common_tokens

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Prefixes:
    """What planning knows of n examples. The computed tokens of an example are its prompt and answer without the last.

    lengths [n]: computed tokens; rank [n]: place of the example when all are sorted by their computed tokens (a prefix
    before what it begins); common [n]: how many tokens the example at a place has in common with the one at the place
    before it, 0 at the first; family [n]: examples of one family are drawn together (see bundle.py); turns [n]: whether
    the family is the turns of one row rather than the answers to one prompt.

    The distinct prefixes of a set of examples, in sorted order, are `sum(lengths) - sum(common of neighbours)`; what two
    examples have in common is the least `common` between their places.
    """

    lengths: Indices
    rank: Indices
    common: Indices
    family: Indices
    turns: Flags

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Prefixes:
        """Found by sorting: O(n log n) comparisons."""
        streams = [np.concatenate([e.prompt_tokens, e.answer_tokens[:-1]]).astype(np.int32) for e in examples]
        keys = [stream.tobytes() for stream in streams]
        places = sorted(range(len(keys)), key=keys.__getitem__)
        rank = np.empty(len(keys), np.int64)
        rank[places] = np.arange(len(keys))
        common = np.zeros(len(keys), np.int64)
        for place in range(1, len(places)):
            common[place] = common_tokens(streams[places[place - 1]], streams[places[place]])
        lengths = np.array([len(stream) for stream in streams], np.int64)
        return cls(lengths, rank, common, *_families(examples))

    @classmethod
    def none(cls, lengths: Indices) -> Prefixes:
        """Of examples that have nothing in common."""
        n = len(lengths)
        return cls(lengths.astype(np.int64), np.arange(n), np.zeros(n, np.int64), np.arange(n), np.zeros(n, bool))

    def trie_tokens(self, members: Indices, group: Indices, groups: int) -> Indices:
        """The distinct prefixes of each group: members [m] = examples (with repetition), group [m] = which is whose."""
        return self._sums(members, group, groups, lambda depth: depth)

    def trie_pairs(self, members: Indices, group: Indices, groups: int) -> Indices:
        """How often a token looks at itself or one before it: a token at depth d (from 0) does so d + 1 times."""
        return self._sums(members, group, groups, lambda depth: depth * (depth + 1) // 2)

    def _sums(self, members: Indices, group: Indices, groups: int, upto) -> Indices:  # type: ignore[no-untyped-def]
        """Sum over each trie of a quantity whose sum over the first `depth` tokens of an example is upto(depth)."""
        order = np.lexsort((self.rank[members], group))
        inside, g = members[order], group[order]
        known = np.zeros(len(inside), np.int64)
        if len(inside) > 1:
            known[1:] = np.where(g[1:] == g[:-1], self.between(inside[:-1], inside[1:]), 0)
        sums = np.bincount(g, upto(self.lengths[inside]) - upto(known), minlength=groups)  # exact below 2^53
        return sums.astype(np.int64)

    def between(self, first: Indices, second: Indices) -> Indices:
        """How many tokens first[i] and second[i] have in common, from the beginning."""
        a, b = np.minimum(self.rank[first], self.rank[second]), np.maximum(self.rank[first], self.rank[second])
        if not self._levels:
            return np.where(a == b, self.lengths[first], 0)
        width = np.maximum(b - a, 1)
        level = np.frexp(width)[1] - 1  # floor of log2
        found = np.zeros(len(a), np.int64)
        for k in np.unique(level).tolist():
            at = level == k
            table = self._levels[k]
            found[at] = np.minimum(
                table[np.minimum(a[at] + 1, len(table) - 1)], table[np.maximum(b[at] - (1 << k) + 1, 0)]
            )
        return np.where(a == b, self.lengths[first], found)

    @cached_property
    def _levels(self) -> list[NDArray[np.int32]]:
        """Level k holds the least of each 2^k neighbouring values of `common`: a minimum over any range from two looks."""
        if not self.common.any():
            return []
        levels = [self.common.astype(np.int32)]
        while 2 << len(levels) - 1 <= len(self.common):
            below, half = levels[-1], 1 << len(levels) - 1
            levels.append(np.minimum(below[: len(below) - half], below[half:]))
        return levels


def _families(examples: Sequence[Example]) -> tuple[Indices, Flags]:
    """Family and kind of each example: the turns of a row that has several; else the answers to one prompt."""
    rows: dict[tuple[int, str], int] = {}
    row = np.array([rows.setdefault((e.source, e.origin), len(rows)) for e in examples], np.int64)
    several = np.bincount(row, minlength=len(rows)) > 1
    turns = several[row] if len(row) else np.zeros(0, bool)
    prompts: dict[bytes, int] = {}
    family = row.copy()
    for i, example in enumerate(examples):
        if not turns[i]:
            prompt = example.prompt_tokens.astype(np.int32).tobytes()
            family[i] = len(rows) + prompts.setdefault(prompt, len(prompts))
    return family, turns
