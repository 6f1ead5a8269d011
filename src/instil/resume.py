"""Where a run goes on: its newest good checkpoint, the history up to it, and whether the disk has room for more."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson
import torch
from transformers import PreTrainedModel

from instil.config import Config
from instil.errors import MachineError, UsageError, masked
from instil.files import sync, write_atomically
from instil.folder import RunFolder, keep_metrics_through, read_metrics
from instil.train import checkpoint
from instil.train.loop import Progress
from instil.train.optim import MasterAdamW

Say = Callable[[str], None]


def put_back(run: RunFolder, optimizer: MasterAdamW, seed: int, measured: str, say: Say) -> Progress:
    """Put the newest checkpoint that verifies into the optimizer, if there is one; the metrics after it are dropped.

    seed: of the random numbers (dropout) where there is none. torch takes another one in every process.
    measured: digest of the held-out examples; losses on others, as a fork may bring along, are left out of the history.
    Raises MachineError where checkpoints are there and none verifies, UsageError where it is one of other tensors. That
    it is of this run is seen before (resolve.py: recorded, record.py: refuse_changed).
    """
    found = checkpoint.load_latest(run.checkpoints)
    if found is None:
        if done := len(read_metrics(run.metrics)):
            say(f"no checkpoint is there: the {done:,} steps that were logged are done again, from the first one")
        keep_metrics_through(run.metrics, 0)
        torch.manual_seed(seed)
        return Progress()
    for line in found.damaged:
        say(f"passed over: {line}")
    state = found.state
    theirs, ours = ({n: t.shape for n, t in tensors.items()} for tensors in (state.weights, optimizer.masters))
    if theirs != ours:
        first = min(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        what = f"holds other tensors than this run trains (the first is {first})"
        remedy = "set the model and the adapter back to what they were, or start over with --fresh"
        raise UsageError.at(found.path, what, remedy)
    optimizer.load_masters(state.weights)
    optimizer.load_state(state.optimizer)
    checkpoint.restore_rng(state.rng)
    for line in keep_metrics_through(run.metrics, state.step):
        say(f"warning: {line}")
    progress = Progress(state.step, **state.counters)
    if found.manifest.get("measured", measured) != measured and progress.heldout:
        progress.heldout = {}
        _without_heldout(run.metrics)
        say("the held-out losses so far were measured on other examples: they are left out")
    say(f"resumed after step {state.step:,}")
    return progress


def _without_heldout(metrics: Path) -> None:
    lines = ({k: v for k, v in record.items() if k != "heldout_loss"} for record in read_metrics(metrics))
    write_atomically(metrics, b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))


def refuse_done(run: RunFolder, step: int, steps: int) -> None:
    """Raise UsageError where a checkpoint is beyond the run's last step: its settings now give fewer steps."""
    if step > steps:
        what = f"{step:,} steps are done, and these settings give {steps:,}"
        remedy = "set train.epochs and train.steps back to what they were, or start over with --fresh"
        for manifest in checkpoint.manifests(run.checkpoints):
            if origin := manifest.get("forked_from"):
                remedy = f"fork {origin['path']} once more, with more train.epochs or train.steps"
        raise UsageError.at(run.path, what, remedy)


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
