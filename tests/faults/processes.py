"""Real processes for tests that send signals: forks of this one, in which torch is loaded, and fresh interpreters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny

PATIENCE_S = 120.0  # a busy machine
RECIPE = (*tiny.FAST, "train.lr=1e-2", "train.epochs=10", "train.batch_examples=8", "data.heldout=0.1")
STEPS = 10 * 4  # 36 of 40 rows, 8 examples a step: 4 steps an epoch


def words(place: Path, folder: Path, *more: object) -> list[str]:
    """The command line of a run at `folder`, of the model and data in `place` (tests/conftest.py)."""
    where = (f"run.dir={folder.parent}", f"run.name={folder.name}")
    return [str(w) for w in ("train", "--model", place / "m", "--data", place / "a.jsonl", *RECIPE, *where, *more)]


@dataclass
class Child:
    """A process that runs an `instil` command, what it writes going into files."""

    pid: int
    out: Path
    err: Path
    code: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """Wait until it has ended; its exit code."""
        until(lambda: self.poll() is not None, self)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def lines(self) -> list[str]:
        """What it said on stderr so far."""
        return self.err.read_text(errors="replace").splitlines()


def until(ready: Callable[[], bool], child: Child | None = None) -> None:
    """Wait for something; fail where it takes too long, killing the child."""
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        if time.monotonic() > deadline:
            if child is not None:
                child.send(signal.SIGKILL)
            raise AssertionError(f"not so within {PATIENCE_S:g} s: {child.lines() if child else ''}")
        time.sleep(0.002)


def until_step(child: Child, folder: Path, step: int) -> None:
    """Wait until a run has logged `step`."""
    metrics = folder / "metrics.jsonl"
    until(lambda: child.poll() is not None or (metrics.exists() and metrics.read_bytes().count(b"\n") >= step), child)
    assert child.poll() is None, (child.code, child.lines())


def forked(
    given: Sequence[str],
    said: Path,
    *,
    before: Callable[[], None] | None = None,
    terminal: int = -1,
    broken: Sequence[int] = (),
) -> Child:
    """Run `instil GIVEN` in a fork of this process. said: where stdout and stderr go, with .out and .err behind it.

    before: what the child does first, such as plant a fault. terminal: a file number that is its terminal instead.
    broken: of 1 and 2, the streams that are a pipe whose reader has ended.
    """
    import instil.run  # noqa: F401, so that no child spends its time on it

    child = Child(0, said.with_suffix(".out"), said.with_suffix(".err"))
    for file in (child.out, child.err):
        file.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forks of a process with threads; none holds a lock here
        child.pid = os.fork()
    if child.pid == 0:
        code = 70
        try:
            code = _live(given, child, before, terminal, broken)
        finally:
            os._exit(code)
    return child


def _live(
    given: Sequence[str], child: Child, before: Callable[[], None] | None, terminal: int, broken: Sequence[int]
) -> int:
    """What a fork does: streams of its own, then the command; returns the exit code."""
    from instil.cli.main import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if terminal >= 0:
        os.login_tty(terminal)
    else:
        for number, file in ((1, child.out), (2, child.err)):
            handle = os.open(file, os.O_WRONLY | os.O_APPEND)
            os.dup2(handle, number)
            os.close(handle)
    for stream in broken:
        reader, writer = os.pipe()
        os.dup2(writer, stream)
        os.close(reader)
        os.close(writer)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    sys.argv = ["instil", *given]
    try:
        if before is not None:
            before()
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()  # as the interpreter does when it ends: what cannot be flushed is exit code 120
    except OSError:
        code = 120
    return code


def fresh(
    given: Sequence[str], folder: Path, code: str = "from instil.cli.main import main; main()", **env: str
) -> subprocess.CompletedProcess[str]:
    """Run `instil GIVEN` in an interpreter of its own, in `folder`, warnings being errors; env: added to the environment."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *given],
        cwd=folder, env={**os.environ, **env}, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip


def assert_same_run(run: Path, other: Path) -> None:
    """Two finished runs: weights to the bit, and every record but for what a clock wrote."""
    weights = "model/model.safetensors"
    assert tiny.same(run / weights, other / weights)
    assert tiny.without_times(tiny.metrics_of(run)) == tiny.without_times(tiny.metrics_of(other))


def left_over(folder: Path) -> list[str]:
    """Names of what is half-written anywhere below a folder."""
    return sorted(p for p in tiny.tree(folder) if any(part.startswith((".partial-", ".trash-", ".tmp")) or
                  part.endswith(".tmp") for part in Path(p).parts))  # fmt: skip
