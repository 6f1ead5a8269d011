"""A disk that is full at a chosen byte of a save: by the kernel's limit on file sizes, or a small file system of its own."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from instil.errors import MachineError
from instil.train import checkpoint
from instil.train.checkpoint import TrainState, load_latest, verify

NO_MOUNTS = 66  # the exit code of a child that may not mount anything
CLONE_NEWNS, CLONE_NEWUSER, MS_PRIVATE_REC = 0x20000, 0x10000000, (1 << 18) | (1 << 14)  # linux/sched.h, linux/fs.h
PAGE = 4096


def state(step: int, numbers: int = 300) -> TrainState:
    """Three tensors of so many numbers."""
    made = torch.Generator().manual_seed(step)
    a, b, c = (torch.randn(numbers, generator=made) for _ in range(3))
    return TrainState(step, {"a": a}, {"exp_avg.a": b, "exp_avg_sq.a": c}, {"cpu": torch.zeros(40).byte()}, {"n": step})


def outcome(folder: Path) -> dict[str, Any]:
    """What a save of step 2 beside a good step 1 came to: what it said, what is there, what loads."""
    said: list[str] = []
    try:
        checkpoint.save(folder, state(2, numbers_in(folder)), {}, keep=1)
    except MachineError as error:
        said = error.lines()
    found = load_latest(folder)
    return {
        "said": said,
        "there": sorted(path.name for path in folder.iterdir()),
        "loaded": found.state.step if found else None,
        "good": [path.name for path in checkpoint.steps_newest_first(folder) if verify(path) is None],
    }


def numbers_in(folder: Path) -> int:
    """How large the tensors of step 1 are."""
    found = load_latest(folder)
    assert found is not None
    return found.state.weights["a"].numel()


def full_at(limit: int, raising: bool) -> Callable[[], None]:
    """Let no more than `limit` bytes be written by the saves from now on, all files together; returns how to undo it.

    raising: a write that goes beyond leaves what fits and raises ENOSPC; else the kernel refuses it (EFBIG).
    """
    left = limit
    real_save, real_write = checkpoint.save_file, Path.write_bytes
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(write: Callable[[], Any], path: Path) -> Any:
        nonlocal left
        if not raising:
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, hard))
        try:
            done = write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            size = path.stat().st_size if path.exists() else 0
            if raising and size > left:
                os.truncate(path, left)
            left -= min(size, left)
        if raising and size > path.stat().st_size:
            raise OSError(28, "No space left on device", str(path))
        return done

    checkpoint.save_file = lambda tensors, path: limited(lambda: real_save(tensors, path), path)
    Path.write_bytes = lambda self, data: limited(lambda: real_write(self, data), self)  # type: ignore[method-assign]

    def undo() -> None:
        checkpoint.save_file, Path.write_bytes = real_save, real_write  # type: ignore[method-assign]

    return undo


def sweep(place: str, offsets: list[int], raising: bool, report: str) -> None:
    """In a child: save step 2 on disks that are full after so many bytes, then again with room; write what came of it."""
    found = []
    for offset in offsets:
        folder = Path(place) / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.save(folder, state(1), {}, keep=1)
        undo = full_at(offset, raising)
        first = outcome(folder)
        undo()
        found.append({"offset": offset, "full": first, "again": outcome(folder)})
    Path(report).write_text(json.dumps(found))


def sweep_small_disk(place: str, offsets: int, report: str) -> int | None:
    """In a child: as `sweep`, on a file system in memory of which so and so many pages are free, by real mounts."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return NO_MOUNTS
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    except OSError:
        return NO_MOUNTS
    disk = Path(place)
    refused = libc.mount(b"none", b"/", None, MS_PRIVATE_REC, None)
    if refused or libc.mount(b"tmpfs", os.fsencode(disk), b"tmpfs", 0, b"size=4m"):
        return NO_MOUNTS
    folder, numbers = disk / "checkpoints", offsets * PAGE // 4 // 3
    found = []
    for pages in range(offsets):
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint.save(folder, state(1, numbers), {}, keep=1)
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(max(0, free - pages * PAGE)))
        full = outcome(folder)
        ballast.unlink()
        found.append({"offset": pages * PAGE, "full": full, "again": outcome(folder)})
    Path(report).write_text(json.dumps(found))
    return None
