"""The loop: steps in order, measured, logged, saved, stopped cleanly; it resumes from one integer."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from instil.errors import DivergedError, Problem, Stopped
from instil.model.machine import release_free_memory
from instil.pack.loader import Ahead, Loader
from instil.train import checkpoint
from instil.train.optim import MasterAdamW
from instil.train.schedule import Schedule, learning_rate
from instil.train.step import step as train_step

RELEASE_EVERY_STEPS = 4  # memory stays level; the pages that come back cost little (docs/speed.md)
FORCE_S = 2.0  # a second Ctrl-C within this time leaves at once


@dataclass(frozen=True)
class LoopPlan:
    """What the loop is told: steps = all updates of the run; save_every_s counts only where save_every_steps is 0."""

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


@dataclass
class Progress:
    """Where the run is; what a checkpoint carries beside the tensors."""

    step: int = 0
    seconds: float = 0.0
    target_tokens: int = 0
    computed_tokens: int = 0
    heldout: dict[str, float] = field(default_factory=dict)

    def counters(self) -> dict[str, Any]:
        """As plain numbers, for the checkpoint."""
        return {
            "seconds": self.seconds,
            "target_tokens": self.target_tokens,
            "computed_tokens": self.computed_tokens,
            "heldout": self.heldout,
        }


def train(
    net: PreTrainedModel,
    optimizer: MasterAdamW,
    loader: Loader,
    plan: LoopPlan,
    progress: Progress,
    *,
    measure: Callable[[], float] | None,
    log: Callable[[dict[str, Any]], None],
    facts: dict[str, Any],
) -> Progress:
    """Train from progress.step to plan.steps. measure: held-out loss in nats per target token, called before the first
    step, every measure_every_steps, and after the last. log: receives one record per step.

    Raises Stopped after a verified save when a signal asked for it, DivergedError before a non-finite update.
    """
    net.train()
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved_at
        state = checkpoint.TrainState(
            progress.step, optimizer.masters, optimizer.state(), checkpoint.rng_state(), progress.counters()
        )
        checkpoint.save(plan.checkpoints, state, facts, keep=plan.keep)
        saved_at = time.monotonic()

    def heldout() -> None:
        if measure is not None and str(progress.step) not in progress.heldout:
            net.eval()
            loss = measure()
            net.train()
            progress.heldout[str(progress.step)] = loss

    with _signals() as asked, Ahead(loader, plan.steps) as batches:
        if progress.step == 0:
            heldout()
        while progress.step < plan.steps:
            record = _one_step(net, optimizer, batches, plan, progress)
            if progress.step == plan.steps or progress.step % plan.measure_every_steps == 0:
                heldout()
                record["heldout_loss"] = progress.heldout.get(str(progress.step))
            log(record)
            if progress.step % RELEASE_EVERY_STEPS == 0:
                release_free_memory()
            due = (
                progress.step % plan.save_every_steps == 0
                if plan.save_every_steps
                else time.monotonic() - saved_at > plan.save_every_s
            )
            if asked.signal is not None:
                save()
                name = signal.Signals(asked.signal).name
                stop = Problem(
                    f"step {progress.step}", f"stopped by {name}, saved", "run the same command again to go on"
                )
                raise Stopped(stop, 128 + asked.signal)
            if due and progress.step < plan.steps:
                save()
    return progress


def _one_step(
    net: PreTrainedModel,
    optimizer: MasterAdamW,
    batches: Ahead,
    plan: LoopPlan,
    progress: Progress,
) -> dict[str, Any]:
    """Draw the batch, update, count; returns the step's record."""
    start = time.monotonic()
    lr = learning_rate(progress.step, peak=plan.peak_lr, steps=plan.steps, warmup=plan.warmup, schedule=plan.schedule)
    batch = batches.batch(progress.step)
    try:
        stats = train_step(net, optimizer, batch, lr=lr, clip_norm=plan.clip_norm)
    except DivergedError as error:
        origins = sorted({batches.examples[i].origin for pack in batch.packs for i in pack.examples})
        more = f" and {len(origins) - 20} more" if origins[20:] else ""
        rows = Problem(f"step {batch.step + 1}", f"its rows: {', '.join(origins[:20])}{more}", "")
        raise DivergedError(*error.problems, rows) from error
    seconds = time.monotonic() - start
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
    }


@dataclass
class _Asked:
    signal: int | None = None
    at: float = 0.0


@contextmanager
def _signals() -> Iterator[_Asked]:
    """SIGINT and SIGTERM ask the loop to stop after the step; a second Ctrl-C within FORCE_S leaves at once."""
    asked = _Asked()

    def handle(number: int, _frame: object) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and asked.signal == number and now - asked.at < FORCE_S:
            raise KeyboardInterrupt
        if asked.signal is None:
            asked.signal, asked.at = number, now

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:  # not the main thread: signals stay with the caller
        pass
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
