"""Steps to batches: which packs step k trains on, a pure function of (examples, plan, seed, mix, k)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from instil.pack.mix import Mixed, epoch_examples
from instil.pack.plan import Indices, StepPlan, epoch_packs
from instil.pack.tree import build_pack
from instil.types import Batch, Example


@dataclass
class Loader:
    """Random access to the batches of a run: `loader.batch(step)`, steps counted from 0.

    The position of a run is one integer, the step; resuming costs one epoch's plan whatever the position.
    mixed: how often each source is used (None = every example once an epoch).
    """

    examples: Sequence[Example]
    lengths: Indices
    plan: StepPlan
    seed: int
    mixed: Mixed | None = None
    _epoch: int = field(default=-1, repr=False)
    _packs: list[list[Indices]] = field(default_factory=list, repr=False)

    def chosen(self, epoch: int) -> Indices:
        """The examples of an epoch, ascending, each as often as it is used."""
        m = self.mixed
        if m is None:
            return np.arange(len(self.lengths))
        return epoch_examples(m.target_tokens, m.source, m.mix, self.seed, epoch)

    def packs(self, epoch: int) -> list[list[Indices]]:
        """The packs of each step of an epoch, as indices of examples."""
        if epoch != self._epoch:
            self._packs = epoch_packs(self.lengths, self.plan, self.seed, epoch, self.chosen(epoch))
            self._epoch = epoch
        return self._packs

    def batch(self, step: int) -> Batch:
        """The batch of a step; weight_sum is what its summed loss is divided by, known before the first backward."""
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        packs = tuple(
            build_pack([self.examples[int(i)] for i in pack], pack.tolist()) for pack in self.packs(epoch)[within]
        )
        return Batch(step, epoch, packs, float(sum(np.sum(pack.weight, dtype=np.float64) for pack in packs)))
