"""The loop: steps in order, measured, logged, saved, stopped cleanly; it resumes from one integer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from instil.errors import DivergedError, MachineError, Problem, Stopped
from instil.model.machine import release_free_memory
from instil.model.memory import computes_layers_again
from instil.pack.loader import Ahead, Loader
from instil.train import checkpoint
from instil.train.incident import How, Seen, examples_of, looked_at, record_incident, rows_line
from instil.train.optim import MasterAdamW
from instil.train.room import Room
from instil.train.schedule import Schedule, learning_rate
from instil.train.signals import Asked, listening
from instil.train.spikes import Spikes
from instil.train.step import StepStats
from instil.train.step import step as train_step
from instil.types import Batch

RELEASE_EVERY_STEPS = 4  # memory stays level; the pages that come back cost little (docs/speed.md)


@dataclass(frozen=True)
class LoopPlan:
    """What the loop is told: steps = all updates of the run; save_every_s counts only where save_every_steps is 0.

    skip_spikes: a step whose loss leaps (spikes.py) is not learnt from. incidents: where a step that diverged is kept.
    """

    steps: int
    peak_lr: float
    schedule: Schedule
    warmup: float
    clip_norm: float
    measure_every_steps: int
    save_every_steps: int
    save_every_s: float
    keep: int
    checkpoints: Path
    skip_spikes: bool = False
    incidents: Path | None = None


@dataclass
class Progress:
    """Where the run is; what a checkpoint carries beside the tensors. recent: the losses that a leap is told by."""

    step: int = 0
    seconds: float = 0.0
    target_tokens: int = 0
    computed_tokens: int = 0
    heldout: dict[str, float] = field(default_factory=dict)
    recent: list[float] = field(default_factory=list)
    spikes: int = 0
    skipped: int = 0

    def counters(self) -> dict[str, Any]:
        """As plain numbers, for the checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "step"}


@dataclass(frozen=True)
class Told:
    """Whom the loop tells: log(record of a step), say(line), before_save() = what must be on disk before a checkpoint."""

    log: Callable[[dict[str, Any]], None]
    say: Callable[[str], None] = lambda line: None
    before_save: Callable[[], None] = lambda: None


def train(
    net: PreTrainedModel,
    optimizer: MasterAdamW,
    loader: Loader,
    plan: LoopPlan,
    progress: Progress,
    *,
    measure: Callable[[], float] | None,
    tell: Told,
    facts: dict[str, Any],
) -> Progress:
    """Train from progress.step to plan.steps, and save. measure: held-out loss in nats per target token, called before the
    first step, every measure_every_steps, and after the last.

    Raises Stopped after a verified save when a signal asked for it, DivergedError before a non-finite update, MachineError
    when two saves in a row have failed.
    """
    net.train()
    saves = _Saves(optimizer, plan, progress, tell, facts)

    def heldout() -> None:
        if measure is not None and str(progress.step) not in progress.heldout:
            net.eval()
            loss = measure()
            net.train()
            progress.heldout[str(progress.step)] = loss

    room = Room(loader.examples, loader.plan.limit_tokens, tell.say)
    with listening() as asked, Ahead(loader, plan.steps) as batches:
        steps = _Steps(net, optimizer, batches, plan, progress, tell, asked, facts, room)
        if progress.step == 0:
            heldout()
        while progress.step < plan.steps:
            record = steps.one()
            if progress.step == plan.steps or progress.step % plan.measure_every_steps == 0:
                heldout()
                record["heldout_loss"] = progress.heldout.get(str(progress.step))
            tell.log(record)
            if progress.step % RELEASE_EVERY_STEPS == 0:
                release_free_memory()
            if asked.signal is not None or progress.step == plan.steps:
                saves.now()
            elif saves.due():
                saves.try_now()
            if asked.signal is not None:  # perhaps while it was saved
                saves.now()
                what = f"stopped by {asked.name}, saved"
                stop = Problem(f"step {progress.step}", what, "run the same command again to go on")
                raise Stopped(stop, 128 + asked.signal)
        saves.now()  # where nothing was left to train: what a process that was killed in its last save had still to do
    return progress


class _Saves:
    """When and how the loop saves. One save that fails is said, and tried again when the next is due; two end the run."""

    def __init__(self, optimizer: MasterAdamW, plan: LoopPlan, progress: Progress, tell: Told, facts: dict[str, Any]):
        self._optimizer, self._plan, self._progress, self._tell, self._facts = optimizer, plan, progress, tell, facts
        self._at, self._step, self._failed = time.monotonic(), progress.step, False

    def due(self) -> bool:
        """Whether it is time, by steps or by the clock."""
        if self._plan.save_every_steps:
            return self._progress.step % self._plan.save_every_steps == 0
        return time.monotonic() - self._at > self._plan.save_every_s

    def now(self) -> None:
        """Save, unless nothing has changed since. Raises MachineError."""
        p = self._progress
        if self._step == p.step and (self._plan.checkpoints / checkpoint.checkpoint_name(p.step)).is_dir():
            checkpoint.prune(self._plan.checkpoints, p.step, self._plan.keep)
            return
        self._tell.before_save()
        weights, moments = self._optimizer.masters, self._optimizer.state()
        state = checkpoint.TrainState(p.step, weights, moments, checkpoint.rng_state(), p.counters())
        checkpoint.save(self._plan.checkpoints, state, self._facts, keep=self._plan.keep)
        self._step, self._failed = p.step, False

    def try_now(self) -> None:
        """Save; what the first failure says is passed on, the second in a row is raised."""
        try:
            self.now()
        except MachineError as error:
            if self._failed:
                raise
            self._failed = True
            for line in error.lines():
                self._tell.say(f"warning: {line}; training goes on, the next save is the last try")
        finally:
            self._at = time.monotonic()


@dataclass
class _Steps:
    """What a step needs, and how it is made."""

    net: PreTrainedModel
    optimizer: MasterAdamW
    batches: Ahead
    plan: LoopPlan
    progress: Progress
    tell: Told
    asked: Asked
    facts: dict[str, Any]
    room: Room

    def one(self) -> dict[str, Any]:
        """Draw the batch, update, count; returns the step's record."""
        start, plan, progress = time.monotonic(), self.plan, self.progress
        lr = learning_rate(
            progress.step, peak=plan.peak_lr, steps=plan.steps, warmup=plan.warmup, schedule=plan.schedule
        )
        batch = self.batches.batch(progress.step)
        spikes = Spikes(progress.recent)
        most = spikes.limit if plan.skip_spikes else float("inf")
        rng = checkpoint.rng_state()  # before the step: its own forward passes draw (dropout)
        try:
            stats = train_step(
                self.net, self.optimizer, batch, lr=lr, clip_norm=plan.clip_norm, most_loss=most, room=self.room
            )
        except DivergedError as error:
            raise self._diverged(error, batch, lr, rng) from error
        seconds = self.asked.without_pauses(time.monotonic() - start, progress.seconds / max(1, progress.step))
        if spikes.leaps(stats.loss):
            self._spiked(batch, stats, spikes)
        progress.recent = spikes.after(stats.loss)
        progress.step += 1
        progress.seconds += seconds
        progress.target_tokens += stats.target_tokens
        progress.computed_tokens += stats.computed_tokens
        return {
            "step": progress.step,
            "epoch": batch.epoch,
            "loss": stats.loss,
            "accuracy": stats.accuracy,
            "entropy": stats.entropy,
            "lr": lr,
            "grad_norm": stats.grad_norm,
            "target_tokens": stats.target_tokens,
            "computed_tokens": stats.computed_tokens,
            "examples": sum(len(pack.examples) for pack in batch.packs),
            "seconds": seconds,
            **({"skipped": True} if stats.skipped else {}),
        }

    def _spiked(self, batch: Batch, stats: StepStats, spikes: Spikes) -> None:
        """Count the leap, and name the rows, those with the largest loss first."""
        self.progress.spikes += 1
        self.progress.skipped += stats.skipped
        rows = sorted(self._rows(batch), key=lambda row: -row.loss)
        what = f"the loss leaps to {stats.loss:.4g} (the median was {spikes.median:.4g})"
        fate = "this step is left out" if stats.skipped else "train.spikes=skip would leave such steps out"
        self.tell.say(f"warning: step {batch.step + 1}: {what}; {fate}; its rows: {rows_line(rows)}")

    def _diverged(
        self, error: DivergedError, batch: Batch, lr: float, rng: Mapping[str, torch.Tensor]
    ) -> DivergedError:
        """The error with the rows of its step and their largest logits, the step being kept for `instil replay`.

        rng: the random state before the step.
        """
        p, found = self.progress, self._rows(batch)
        rows = Problem(f"step {batch.step + 1}", f"its rows, the worst first: {rows_line(found)}", "")
        if self.plan.incidents is None:
            return DivergedError(*error.problems, rows)
        weights, moments = self.optimizer.masters, self.optimizer.state()
        state = checkpoint.TrainState(p.step, weights, moments, rng, p.counters())
        how = How(lr, computes_layers_again(self.net))
        kept = record_incident(self.plan.incidents, error, found, state, how, self.facts)
        return DivergedError(*error.problems, rows, kept)

    def _rows(self, batch: Batch) -> list[Seen]:
        """The examples of a batch as the present weights see them."""
        used = examples_of(batch, self.batches.examples)
        try:
            return looked_at(self.net, used)
        except (RuntimeError, MemoryError):  # of memory: their names are known all the same
            return [Seen(example.origin, example.turn, float("nan"), float("nan")) for example in used]
