"""What the steps of a run are, exactly and without a model: sources mixed, epochs cut into packs, and the tokens in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from instil.config import Config
from instil.data.spec import SourceSpec
from instil.errors import Problem, UsageError
from instil.pack.bins import Indices
from instil.pack.loader import Loader
from instil.pack.mix import Mix, Mixed, SourceShare, epoch_examples, least_examples, realised
from instil.pack.plan import StepPlan, attended_pairs, computed_tokens, plan_steps
from instil.pack.store import ExampleStore
from instil.prepare import sources


def mix_of(specs: Sequence[SourceSpec]) -> Mix:
    """How sources go together: all by `weight`, or all by `repeat`. Raises UsageError where it is neither."""
    weighted = [spec.weight is not None for spec in specs]
    problems = []
    for s, spec in enumerate(specs):
        if any(weighted) and not weighted[s]:
            what = f"{spec.path} has no weight, and other sources have one"
            problems.append(Problem(f"data.train[{s}]", what, "give all sources a weight, or none", "mix"))
        elif weighted[s] and spec.repeat != 1:
            what = f"{spec.path} has a weight and a repeat of {spec.repeat:g}"
            problems.append(Problem(f"data.train[{s}]", what, "keep one of the two", "mix"))
    numbers = tuple(float(spec.repeat if spec.weight is None else spec.weight) for spec in specs)
    if not problems and not any(numbers):
        problems = [Problem("data.train", "every source is left out", "give one a repeat or weight above 0", "mix")]
    if problems:
        raise UsageError(*problems)
    return Mix(weights=numbers) if any(weighted) else Mix(repeats=numbers)


def mixed_of(config: Config, train: ExampleStore) -> Mixed | None:
    """The mix of a run's sources; None where every example is used once an epoch."""
    mix = mix_of(sources(config))
    if not mix.weights and set(mix.repeats) == {1.0}:
        return None
    return Mixed(train.target_tokens, train.source, mix)


def step_plan(config: Config, train: ExampleStore, mixed: Mixed | None) -> StepPlan:
    """How the epochs of a resolved configuration become steps: `plan_steps` on the examples of the first."""
    t, limit = config.train, config.pack.tokens
    chosen, least = np.arange(len(train)), None
    if mixed is not None:
        parts = mixed.target_tokens, mixed.source, mixed.mix, t.seed
        chosen, least = epoch_examples(*parts, 0), least_examples(*parts, t.epochs or 1)
        if not least:
            what = "an epoch would hold no example at these repeats"
            raise UsageError.at("data.train", what, "raise them: a repeat of 1 is every row once an epoch")
    examples_per_target = len(chosen) / int(train.target_tokens[chosen].sum())
    batch = t.batch_tokens * examples_per_target if t.batch_tokens else float(t.batch_examples or 1)
    limit = limit or int(train.lengths.max())
    return plan_steps(train.prefixes, batch, limit, chosen=chosen, most_steps=least, seed=t.seed)


def total_steps(config: Config, plan: StepPlan) -> int:
    """Updates of the whole run: epochs * steps of an epoch, at most train.steps."""
    steps = (config.train.epochs or 1) * plan.steps_per_epoch
    return min(steps, config.train.steps) if config.train.steps else steps


def loader_of(config: Config, train: ExampleStore) -> Loader:
    """The loader of a run with a resolved configuration."""
    mixed = mixed_of(config, train)
    return Loader(train, train.prefixes, step_plan(config, train, mixed), config.train.seed, mixed)


@dataclass(frozen=True)
class Work:
    """What some steps train on, summed over their packs: an example counts as often as it is used.

    unshared_tokens = what would be computed without sharing prefixes, the lengths of the examples; computed_tokens = what
    is: the distinct prefixes of each pack; room_tokens = what the packs could hold: their capacity, or their tokens where
    one is larger; attended_pairs = how often a token looks at a token, for the cost of attention.
    """

    steps: int = 0
    packs: int = 0
    examples: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    target_tokens: int = 0
    unshared_tokens: int = 0
    computed_tokens: int = 0
    attended_pairs: int = 0
    room_tokens: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def work_of_packs(train: ExampleStore, packs: Sequence[Indices], *, steps: int = 0, capacity_tokens: int = 0) -> Work:
    """The sums over packs, each given as indices of examples (with repetition)."""
    indices = np.concatenate([*packs, np.zeros(0, np.int64)]).astype(np.int64)
    counts = train.prompt_tokens, train.answer_tokens, train.target_tokens, train.lengths
    prompt, answer, target, length = (int(each[indices].sum()) for each in counts)
    computed, pairs = computed_tokens(train.prefixes, packs), attended_pairs(train.prefixes, packs)
    room = int(np.maximum(computed, capacity_tokens).sum())
    return Work(
        steps, len(packs), len(indices), prompt, answer, target, length, int(computed.sum()), int(pairs.sum()), room
    )


def work_of_each(train: ExampleStore) -> Work:
    """The sums over all examples, each once and computed by itself."""
    n = len(train)
    counts = train.prompt_tokens, train.answer_tokens, train.target_tokens, train.lengths
    prompt, answer, target, length = (int(each.sum()) for each in counts)
    pairs = int((train.lengths * (train.lengths + 1) // 2).sum())
    return Work(0, 0, n, prompt, answer, target, length, length, pairs)


def work_of_epoch(loader: Loader, train: ExampleStore, epoch: int, steps: int | None = None) -> Work:
    """The sums over the first `steps` steps of an epoch (None = all of it)."""
    dealt = loader.packs(epoch)[:steps]
    packs = [pack for step in dealt for pack in step]
    return work_of_packs(train, packs, steps=len(dealt), capacity_tokens=loader.plan.capacity_tokens)


def work_of_run(loader: Loader, train: ExampleStore, steps: int) -> Work:
    """The sums over all steps of a run. Epochs differ in what their packs share; those without sharing or a mix do not."""
    whole, rest = divmod(steps, loader.plan.steps_per_epoch)
    total = Work()
    if loader.mixed is None and whole and not train.prefixes.common.any():
        total = Work(*(whole * n for n in astuple(work_of_epoch(loader, train, 0))))
    else:
        for epoch in range(whole):
            total += work_of_epoch(loader, train, epoch)
    return total + work_of_epoch(loader, train, whole, rest) if rest else total


@dataclass(frozen=True)
class SourceUse:
    """A source in an epoch: the examples it has, those that the epoch uses, and the share of the target tokens asked for."""

    path: str
    examples: int
    asked: str
    used: SourceShare

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"path": self.path, "asked": self.asked, "examples": self.examples, "epoch_examples": self.used.examples,
                "epoch_target_tokens": self.used.target_tokens, "share": self.used.share}  # fmt: skip


def source_uses(config: Config, loader: Loader, train: ExampleStore) -> list[SourceUse]:
    """What each source is of the first epoch."""
    specs = sources(config)
    mix = mix_of(specs)
    own = np.bincount(train.source, minlength=len(specs))
    shares = realised(loader.chosen(0), train.source, train.target_tokens, len(specs))
    whole = sum(mix.weights)
    asked = [f"{w / whole:.1%}" for w in mix.weights] or [f"{r:g}x" for r in mix.repeats]
    return [SourceUse(spec.path, int(n), a, u) for spec, n, a, u in zip(specs, own, asked, shares, strict=True)]
