"""Where a run goes on: its newest good checkpoint, the history up to it, and whether the disk has room for more."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import PreTrainedModel

from instil.config import Config
from instil.errors import MachineError, UsageError, masked
from instil.files import sync
from instil.folder import RunFolder, keep_metrics_through
from instil.train import checkpoint
from instil.train.loop import Progress
from instil.train.optim import MasterAdamW

Say = Callable[[str], None]


def put_back(run: RunFolder, optimizer: MasterAdamW, seed: int, say: Say) -> Progress:
    """Put the newest checkpoint that verifies into the optimizer, if there is one; the metrics after it are dropped.

    seed: of the random numbers (dropout) where there is none. torch takes another one in every process.
    Raises MachineError where checkpoints are there and none verifies.
    """
    found = checkpoint.load_latest(run.checkpoints)
    if found is None:
        keep_metrics_through(run.metrics, 0)
        torch.manual_seed(seed)
        return Progress()
    for line in found.damaged:
        say(f"passed over: {line}")
    state = found.state
    optimizer.load_masters(state.weights)
    optimizer.load_state(state.optimizer)
    checkpoint.restore_rng(state.rng)
    for line in keep_metrics_through(run.metrics, state.step):
        say(f"warning: {line}")
    say(f"resumed after step {state.step:,}")
    return Progress(state.step, **state.counters)


def refuse_done(run: RunFolder, step: int, steps: int) -> None:
    """Raise UsageError where a checkpoint is beyond the run's last step: its settings now give fewer steps."""
    if step > steps:
        what = f"{step:,} steps are done, and these settings give {steps:,}"
        raise UsageError.at(run.path, what, "raise train.epochs or train.steps, or start over with --fresh")


def refuse_small_disk(run: RunFolder, optimizer: MasterAdamW, net: PreTrainedModel, config: Config) -> None:
    """Raise MachineError where the disk cannot hold what the run will write: keep + 1 checkpoints and the result."""
    trained = sum(master.numel() for master in optimizer.masters.values())
    one = 3 * 4 * trained  # weights and two moments in float32
    export = sum(p.numel() * p.element_size() for p in net.parameters()) + (4 * trained if config.adapter.rank else 0)
    there = sum(f.stat().st_size for f in run.checkpoints.rglob("*") if f.is_file()) if run.checkpoints.is_dir() else 0
    needed = max(0, (config.checkpoint.keep + 1) * one + export - there)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        what = f"has {free / 1e9:.3g} GB free, and the run needs {needed / 1e9:.3g} GB ({config.checkpoint.keep + 1} "
        what += f"checkpoints of {one / 1e9:.3g} GB and the model of {export / 1e9:.3g} GB)"
        remedy = "free some, choose another run.dir, or lower checkpoint.keep"
        raise MachineError.at(run.path, what, remedy, "disk")


def flush_metrics(run: RunFolder) -> None:
    """What the metrics say must be on disk before a checkpoint claims it."""
    if run.metrics.exists():
        sync(run.metrics)


def logged(path: Path, say: Say) -> Say:
    """Lines to people, and with the time into the run's log, whether or not anybody listens."""

    def both(line: str) -> None:
        with suppress(OSError):  # a full disk: what matters is said by the save
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} [{os.getpid()}] {masked(line)}\n")
        say(line)

    return both
