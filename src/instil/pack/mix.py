"""Several sources mixed: how often an epoch passes over each, and so which examples, repeated, an epoch is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from instil.errors import UsageError
from instil.pack.bins import Indices, shuffled

MIX_KEY = 1 << 32  # of the sources' permutations: apart from the keys of epochs, which count from 0 (pack/plan.py)


@dataclass(frozen=True, slots=True)
class Mix:
    """How sources go together, one number each: `repeats` = passes an epoch, or `weights` = shares of its target tokens.

    Exactly one of the two is given. Weights need not sum to 1.
    """

    repeats: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = self.repeats or self.weights
        if bool(self.repeats) == bool(self.weights):
            raise ValueError("a mix has either repeats or weights")
        if not all(math.isfinite(x) and x >= 0 for x in numbers) or not any(numbers):
            raise ValueError(f"the numbers of a mix are finite, not negative, and not all 0: {numbers}")


@dataclass(frozen=True, slots=True)
class Mixed:
    """A mix and what it is of: the target tokens and the source of each example."""

    target_tokens: Indices
    source: Indices
    mix: Mix


@dataclass(frozen=True, slots=True)
class SourceShare:
    """What a source is of some examples: how many, with how many target tokens, and their share of all target tokens."""

    source: int
    examples: int
    target_tokens: int
    share: float


def passes(target_tokens: Indices, source: Indices, mix: Mix) -> list[float]:
    """Passes over each source in an epoch: r_s as given, or r_s = w_s * T / T_s.

    T_s = target tokens of source s, T = those of all sources: an epoch keeps its size whatever the weights are. Raises
    UsageError for a source with a weight and nothing to learn from.
    """
    if mix.repeats:
        return list(mix.repeats)
    held = [int(target_tokens[source == s].sum()) for s in range(len(mix.weights))]
    for s, weight in enumerate(mix.weights):
        if weight and not held[s]:
            what = f"has a weight of {weight:g}, but none of its rows is left to learn from"
            raise UsageError.at(f"data.train[{s}]", what, "remove it, or see the ledger for the reasons")
    whole, total = math.fsum(mix.weights), sum(held)
    return [weight / whole * total / t if t else 0.0 for weight, t in zip(mix.weights, held, strict=True)]


def epoch_examples(target_tokens: Indices, source: Indices, mix: Mix, seed: int, epoch: int) -> Indices:
    """The examples of an epoch, ascending, each as often as it is used; a pure function of its arguments.

    A source is dealt in one order, a permutation by the seed, over and over again; epoch k goes on where epoch k - 1
    ended, and ends at the example nearest to (k + 1) * r_s * T_s target tokens. So an epoch has floor(r_s) whole copies
    of the source and a part, and over k epochs every example is used floor or ceil of k * r_s times.
    """
    chosen = [np.zeros(0, np.int64)]
    for s, repeat in enumerate(passes(target_tokens, source, mix)):
        order, ends = _dealt(target_tokens, source, s, seed)
        begin, end = _ends(ends, repeat, np.array([epoch, epoch + 1]))
        chosen.append(order[np.arange(begin, end) % max(1, len(order))])
    return np.sort(np.concatenate(chosen))


def least_examples(target_tokens: Indices, source: Indices, mix: Mix, seed: int, epochs: int) -> int:
    """The number of examples in the smallest of the first `epochs` epochs: more steps than that an epoch cannot have."""
    sizes = np.zeros(epochs, np.int64)
    for s, repeat in enumerate(passes(target_tokens, source, mix)):
        sizes += np.diff(_ends(_dealt(target_tokens, source, s, seed)[1], repeat, np.arange(epochs + 1)))
    return int(sizes.min())


def _dealt(target_tokens: Indices, source: Indices, s: int, seed: int) -> tuple[Indices, Indices]:
    """The examples of a source in the order in which they are dealt, and the target tokens before each and after all."""
    members = np.flatnonzero(source == s)
    order = members[shuffled(len(members), (seed, MIX_KEY + s))]
    return order, np.concatenate([[0], np.cumsum(target_tokens[order])])


def _ends(ends: Indices, repeat: float, epochs: Indices) -> Indices:
    """How many examples of a source have been dealt after each of `epochs` epochs; ends: as in `_dealt`."""
    n = len(ends) - 1
    wholes, part = np.divmod(epochs * repeat, 1.0)  # a rounding error changes nothing: the nearest example is meant
    wanted = part * ends[-1]
    after = np.minimum(np.searchsorted(ends, wanted), n)
    before = np.maximum(after - 1, 0)
    nearer_before = wanted - ends[before] < ends[after] - wanted
    return wholes.astype(np.int64) * n + np.where(nearer_before, before, after)


def realised(indices: Indices, source: Indices, target_tokens: Indices, sources: int) -> list[SourceShare]:
    """What each of the sources 0 .. sources - 1 is of the examples at `indices` (with repetition)."""
    examples = np.bincount(source[indices], minlength=sources)
    tokens = np.bincount(source[indices], weights=target_tokens[indices], minlength=sources).astype(np.int64)
    total = max(1, int(tokens.sum()))
    return [
        SourceShare(s, int(n), int(t), int(t) / total) for s, (n, t) in enumerate(zip(examples, tokens, strict=True))
    ]
