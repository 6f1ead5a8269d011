"""Steps to batches: which packs step k trains on, a pure function of (examples, plan, seed, mix, k)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from instil.pack.bins import Indices
from instil.pack.mix import Mixed, epoch_examples
from instil.pack.plan import StepPlan, epoch_packs
from instil.pack.prefixes import Prefixes
from instil.pack.tree import build_pack
from instil.types import Batch, Example, Pack


@dataclass
class Loader:
    """Random access to the batches of a run: `loader.batch(step)`, steps counted from 0.

    The position of a run is one integer, the step; resuming costs one epoch's plan whatever the position.
    mixed: how often each source is used (None = every example once an epoch).
    """

    examples: Sequence[Example]
    prefixes: Prefixes
    plan: StepPlan
    seed: int
    mixed: Mixed | None = None
    _epoch: int = field(default=-1, repr=False)
    _packs: list[list[Indices]] = field(default_factory=list, repr=False)

    def chosen(self, epoch: int) -> Indices:
        """The examples of an epoch, ascending, each as often as it is used."""
        m = self.mixed
        if m is None:
            return np.arange(len(self.prefixes.lengths))
        return epoch_examples(m.target_tokens, m.source, m.mix, self.seed, epoch)

    def packs(self, epoch: int) -> list[list[Indices]]:
        """The packs of each step of an epoch, as indices of examples."""
        if epoch != self._epoch:
            self._packs = epoch_packs(self.prefixes, self.plan, self.seed, epoch, self.chosen(epoch))
            self._epoch = epoch
        return self._packs

    def pack(self, indices: Indices) -> Pack:
        """The pack of these examples."""
        return build_pack([self.examples[int(i)] for i in indices], indices.tolist(), self.plan.limit_tokens)

    def batch(self, step: int) -> Batch:
        """The batch of a step; weight_sum is what its summed loss is divided by, known before the first backward."""
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        packs = tuple(self.pack(indices) for indices in self.packs(epoch)[within])
        return Batch(step, epoch, packs, float(sum(np.sum(pack.weight, dtype=np.float64) for pack in packs)))


class Ahead:
    """The batches of a loader, the next one prepared by a thread while the present one is trained on.

    A context: on leaving it, what is being prepared is waited for and dropped.
    """

    def __init__(self, loader: Loader, steps: int):
        self._loader, self._steps = loader, steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._next: tuple[int, Future[Batch]] | None = None

    @property
    def examples(self) -> Sequence[Example]:
        """Those of the loader."""
        return self._loader.examples

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def batch(self, step: int) -> Batch:
        """`loader.batch(step)`; raises what that raises."""
        found = self._next
        if found is None or found[0] != step:
            found = step, self._thread.submit(self._loader.batch, step)
        if step + 1 < self._steps:
            self._next = step + 1, self._thread.submit(self._loader.batch, step + 1)
        return found[1].result()
