"""One writer a run folder: a second start is refused at once with who holds it; the lock of the dead is nobody's."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import PATIENCE_S, assert_same_run, forked, fresh, until, until_step, words

import instil.workers
import tiny
from instil.config import load_config
from instil.errors import MachineError
from instil.folder import claim, refuse_busy

HELD = (
    r"x: is in use by process (\d+) on (\S+) since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d); "
    r"wait for it, stop it, or choose another run.name"
)
# Says at the end when it began, when it was refused, and whether torch was there by then.
TIMED = """
import sys, time
began = time.monotonic()
from instil.cli.main import main
try:
    main()
finally:
    print(time.monotonic() - began, "torch" in sys.modules)
"""


def test_a_second_start_is_refused_before_anything_is_loaded(
    source: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Exit 5 in about a second (of a machine at rest), naming process, host and time; torch is not imported for it."""
    folder = tmp_path / "x"
    config = load_config(None, (), {"model": "m", "data.train": ["a"], "run.dir": str(tmp_path), "run.name": "x"})
    with claim(config, fresh=False):
        before = {path: path.read_bytes() for path in folder.rglob("*")}
        began = time.time()
        done = fresh(words(source, folder), tmp_path, TIMED)
        (seconds, torch) = done.stdout.split()
        assert {path: path.read_bytes() for path in folder.rglob("*")} == before
    assert done.returncode == 5, done.stderr
    (line,) = done.stderr.splitlines()
    found = re.fullmatch(re.escape(str(tmp_path)) + "/" + HELD, line)
    assert found, line
    assert (int(found[1]), found[2]) == (os.getpid(), socket.gethostname())
    since = time.mktime(time.strptime(found[3], "%Y-%m-%d %H:%M:%S"))
    assert abs(since - began) < PATIENCE_S
    assert torch == "False"
    record_property("seconds", round(float(seconds), 2))
    assert float(seconds) < 10  # 0.4 s alone; a busy machine is slower


@pytest.mark.slow
def test_the_refusal_is_not_luck(source: Path, tmp_path: Path) -> None:
    """The planted fault: without the early look, torch is imported before the lock is met, and the test above sees it."""
    code = TIMED.replace("try:", "import instil.folder\ninstil.folder.refuse_busy = lambda config: None\ntry:", 1)
    config = load_config(None, (), {"model": "m", "data.train": ["a"], "run.dir": str(tmp_path), "run.name": "x"})
    with claim(config, fresh=False):
        done = fresh(words(source, tmp_path / "x"), tmp_path, code)
    assert done.returncode == 5, done.stderr
    assert done.stdout.split()[1] == "True"


def test_two_real_runs(source: Path, whole: Path, tmp_path: Path) -> None:
    """The second says who the first is; the first goes on untouched to the same bits."""
    folder = tmp_path / "x"
    first = forked(words(source, folder, "checkpoint.every_steps=1"), tmp_path / "first")
    until_step(first, folder, 2)
    first.send(signal.SIGSTOP)
    for given in (words(source, folder), ["train", str(folder)], words(source, folder, "--fresh")):
        second = forked(given, tmp_path / "second")
        assert second.wait() == 5
        assert f"is in use by process {first.pid} on {socket.gethostname()} since " in second.lines()[-1]
        assert len(second.lines()) == 1
    first.send(signal.SIGCONT)
    assert first.wait() == 0, first.lines()
    assert_same_run(folder, whole)


def test_the_lock_of_a_killed_run_is_nobodys(source: Path, whole: Path, tmp_path: Path) -> None:
    """After SIGKILL the same command goes on at once and says nothing of locks, whatever run.lock holds."""
    folder = tmp_path / "x"
    child = forked(words(source, folder, "checkpoint.every_steps=2"), tmp_path / "said")
    until_step(child, folder, 5)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert f"process {child.pid} " in (folder / "run.lock").read_text()
    said = tiny.command(*words(source, folder))
    assert said.code == 0
    assert not [line for line in said.err if re.search(r"run\.lock|in use|process \d", line)]
    assert any(line.startswith("resumed after step ") for line in said.err)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("content", ["", "process 1 on elsewhere since 2020-01-01 00:00:00 (boot other)\n", "\0" * 64])
def test_what_a_lock_file_says_binds_nobody(content: str, tmp_path: Path) -> None:
    """The lock is the system's: another boot's process number, or nonsense, in the file is overwritten."""
    config = load_config(None, (), {"model": "m", "data.train": ["a"], "run.dir": str(tmp_path), "run.name": "x"})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.lock").write_text(content)
    refuse_busy(config)
    with claim(config, fresh=False):
        assert (tmp_path / "x" / "run.lock").read_text().startswith(f"process {os.getpid()} on ")
        with pytest.raises(MachineError, match=f"process {os.getpid()} "):
            refuse_busy(config)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forks on Linux only")
@pytest.mark.parametrize("planted", [False, True])
def test_workers_do_not_keep_the_lock_of_a_killed_run(planted: bool, source: Path, tmp_path: Path) -> None:
    """They are forks that hold the file too: they end with their parent. Planted: left alone, they would hold it."""
    marks = tmp_path / "marks"
    marks.mkdir()
    folder = tmp_path / "runs" / "x"

    def sleepy() -> None:
        instil.workers.SERIAL_ROWS = 8
        if planted:
            instil.workers.PR_SET_PDEATHSIG = 0  # no such order: nothing happens

        def some(*_: object) -> None:
            (marks / str(os.getpid())).touch()
            time.sleep(600)

        instil.workers._some = some  # type: ignore[assignment]
        os.sched_getaffinity = lambda _pid: {0, 1}  # type: ignore[assignment]

    child = forked(words(source, folder), tmp_path / "said", before=sleepy)
    until(lambda: len(list(marks.iterdir())) == 2 or child.poll() is not None, child)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    config = load_config(
        None, (), {"model": "m", "data.train": ["a"], "run.dir": str(tmp_path / "runs"), "run.name": "x"}
    )

    def free() -> bool:
        try:
            refuse_busy(config)
        except MachineError:
            return False
        return True

    if planted:
        time.sleep(1.0)
        assert not free()
        for mark in marks.iterdir():
            os.kill(int(mark.name), signal.SIGKILL)
    until(free)
    assert tiny.command(*words(source, folder)).code == 0
