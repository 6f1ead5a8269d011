"""Terminals that are closed, narrow, dumb or not there: training goes on, lines fit or are plain, nothing falls over."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import STEPS, Child, assert_same_run, forked, fresh, until, until_step, words

import tiny

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pseudo-terminals as Linux has them")


def opened(columns: int = 80) -> tuple[int, int]:
    """The two ends of a terminal of so many columns; reading our end never waits."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.set_blocking(ours, False)
    return ours, theirs


def shown(ours: int) -> str:
    """What the terminal has been sent and not shown before."""
    found = b""
    try:
        while some := os.read(ours, 65536):
            found += some
    except OSError:  # nothing more, or the other end is closed
        pass
    return found.decode()


def slowly() -> None:
    """In a child: steps that take a while, so that the run is still there when something happens to it."""
    from instil.train import loop

    step = loop.train_step

    def slow(*arguments: object, **more: object) -> object:
        time.sleep(0.01)
        return step(*arguments, **more)  # type: ignore[arg-type]

    loop.train_step = slow  # type: ignore[assignment]


def mortal() -> None:
    """In a child: the planted fault, SIGHUP is left as it was."""
    real = signal.signal

    def deaf(number: int, handler: object) -> object:
        return None if number == signal.SIGHUP else real(number, handler)  # type: ignore[arg-type]

    signal.signal = deaf  # type: ignore[assignment]
    slowly()


@pytest.mark.parametrize("planted", [False, True])
def test_sighup_ends_nothing(planted: bool, source: Path, whole: Path, tmp_path: Path) -> None:
    """The run goes on to the same bits with exit 0. Planted: a process that does not know of it dies of it."""
    folder = tmp_path / "x"
    child = forked(words(source, folder), tmp_path / "said", before=mortal if planted else slowly)
    for step in (2, 12):
        until_step(child, folder, step)
        child.send(signal.SIGHUP)
        if planted:
            assert child.wait() == -signal.SIGHUP
            return
    assert child.wait() == 0, child.lines()
    assert_same_run(folder, whole)


def on_its_own(given: list[str], tmp_path: Path, ours: int, theirs: int, before: Callable[[], None]) -> Child:
    """A child on a terminal whose other end only this process holds, so that closing it here closes it."""

    def alone() -> None:
        os.close(ours)
        before()

    return forked(given, tmp_path / "said", before=alone, terminal=theirs)


def careless() -> None:
    """In a child: the planted fault, what cannot be shown is an error."""
    from instil.cli import console

    def show(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    console._show = show
    slowly()


@pytest.mark.parametrize("planted", [False, True])
def test_a_closed_terminal_ends_nothing(planted: bool, source: Path, whole: Path, tmp_path: Path) -> None:
    """SIGHUP, and every write fails from then on: exit 0, the same bits, and log.txt has the lines. Planted: no guard."""
    folder = tmp_path / "x"
    ours, theirs = opened()
    child = on_its_own(words(source, folder), tmp_path, ours, theirs, careless if planted else slowly)
    os.close(theirs)
    until_step(child, folder, 5)
    assert "step " in shown(ours)
    os.close(ours)
    if planted:
        assert child.wait() != 0
        assert len(tiny.metrics_of(folder)) < STEPS
        return
    assert child.wait() == 0
    assert_same_run(folder, whole)
    log = (folder / "log.txt").read_text()
    assert "a.jsonl: JSONL, 40 rows, messages" in log
    assert f"{STEPS} steps of about 8 examples" in log
    assert all(re.match(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \[{child.pid}\] ", line) for line in log.splitlines())


def test_what_is_said_after_the_terminal_closed_is_in_the_log(source: Path, tmp_path: Path) -> None:
    """A later SIGTERM still saves with exit 143, and its line, which nobody saw, is in log.txt."""
    folder = tmp_path / "x"
    ours, theirs = opened()
    child = on_its_own(words(source, folder), tmp_path, ours, theirs, slowly)
    os.close(theirs)
    until_step(child, folder, 3)
    os.close(ours)
    until_step(child, folder, len(tiny.metrics_of(folder)) + 2)
    child.send(signal.SIGTERM)
    assert child.wait() == 143
    done = len(tiny.metrics_of(folder))
    last = (folder / "log.txt").read_text().splitlines()[-1]
    assert last.endswith(f"step {done}: stopped by SIGTERM, saved; run the same command again to go on")


@pytest.mark.parametrize("streams", [(1,), (2,), (1, 2)])
def test_a_broken_pipe_ends_nothing(streams: tuple[int, ...], source: Path, whole: Path, tmp_path: Path) -> None:
    """stdout, stderr or both go to a reader that has ended: exit 0, no traceback, the same bits."""
    child = forked(words(source, tmp_path / "x"), tmp_path / "said", broken=streams)
    assert child.wait() == 0, child.lines()
    assert "Traceback" not in "\n".join(child.lines())
    assert_same_run(tmp_path / "x", whole)


# ── narrow, dumb, in another language ────────────────────────────────────────────────────────────────────────────────


def on_terminal(
    given: list[str], tmp_path: Path, columns: int = 80, before: Callable[[], None] | None = None, **env: str
) -> str:
    """What a command shows on a terminal; it must end with exit 0."""

    def set_up() -> None:
        os.environ.pop("COLUMNS", None)
        os.environ.update({"TERM": "xterm", **env})
        if before is not None:
            before()

    ours, theirs = opened(columns)
    child = forked(given, tmp_path / "said", before=set_up, terminal=theirs)
    os.close(theirs)
    found = [""]

    def ended() -> bool:
        found[0] += shown(ours)
        return child.poll() is not None

    until(ended, child)
    found[0] += shown(ours)
    os.close(ours)
    assert child.code == 0, found[0]
    assert "Traceback" not in found[0]
    return found[0]


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_the_line_of_a_step_fits_the_terminal(columns: int, source: Path, whole: Path, tmp_path: Path) -> None:
    """It is written over and over, so it must not wrap: less than the terminal's width, whatever that is."""
    text = on_terminal(words(source, tmp_path / "x"), tmp_path, columns)
    lines = [part.partition("\n")[0].rstrip("\r") for part in text.split("\r\x1b[2K")[1:]]
    assert len(lines) == STEPS
    assert all(len(line) < columns for line in lines)
    assert lines[0].startswith("step 1/40")
    assert max(map(len, lines)) == columns - 1 or columns == 200
    assert_same_run(tmp_path / "x", whole)


def test_a_width_that_is_not_known(source: Path, tmp_path: Path) -> None:
    """A terminal that says 0 columns is taken for one of 80."""
    text = on_terminal(words(source, tmp_path / "x", "train.epochs=1"), tmp_path, 0)
    lines = [part.partition("\n")[0].rstrip("\r") for part in text.split("\r\x1b[2K")[1:]]
    assert len(lines) == 4
    assert all(40 < len(line) < 80 for line in lines)


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_gets_plain_lines(term: str, source: Path, tmp_path: Path) -> None:
    """No sequence that it could not understand, and whole lines."""
    text = on_terminal(words(source, tmp_path / "x", "train.epochs=1"), tmp_path, 20, TERM=term)
    assert "\x1b" not in text
    assert re.search(r"^step 4/4  loss .* target tokens/s  .* left\b", text.replace("\r\n", "\n"), re.MULTILINE)


def test_elsewhere_lines_are_plain(source: Path, tmp_path: Path) -> None:
    """Without a terminal there is no escape and no line that is written over."""
    child = forked(words(source, tmp_path / "x", "train.epochs=1"), tmp_path / "said")
    assert child.wait() == 0
    assert not re.search(r"[\x1b\r]", child.err.read_text() + child.out.read_text())
    assert [line for line in child.lines() if line.startswith("step 4/4  ")]


def test_no_color_is_honoured(source: Path, tmp_path: Path) -> None:
    """inspect has colours on a terminal, and none where NO_COLOR is set or the terminal is dumb."""
    given = ["inspect", str(source / "a.jsonl"), "--model", str(source / "m")]

    def colours(**env: str) -> set[str]:
        text = on_terminal(given, tmp_path, 60, **env)
        assert "say" in text
        return {code for code in ESCAPE.findall(text) if re.search(r"\[(?:.*;)?(3[0-8]|4[0-8]|9[0-7])", code)}

    assert colours()
    assert not colours(NO_COLOR="1")
    assert not colours(TERM="dumb")


ENVIRONMENTS = [
    {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "POSIX", "TERM": "dumb"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20", "NO_COLOR": "1"},
]  # fmt: skip


@pytest.mark.parametrize("env", ENVIRONMENTS, ids=lambda env: " ".join(env))
def test_a_locale_of_ascii(env: dict[str, str], source: Path, tmp_path: Path) -> None:
    """Text in other scripts, in rows and in the names of files, is shown escaped or as it is; nothing falls over."""
    rows = [*tiny.some_rows(20), tiny.row("grüße 模型", "🎉 ok")]
    tiny.write_rows(tmp_path / "daten-é.jsonl", rows)
    for given in (["inspect", "daten-é.jsonl", "--rows", "19:21"], ["check", "daten-é.jsonl"]):
        done = fresh([*given, "--model", str(source / "m")], tmp_path, **env)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout
        if env.get("PYTHONUTF8") == "0":
            assert done.stdout.isascii()


@pytest.mark.slow
@pytest.mark.parametrize("env", ENVIRONMENTS, ids=lambda env: " ".join(env))
def test_training_in_a_locale_of_ascii(env: dict[str, str], source: Path, tmp_path: Path) -> None:
    """A whole run in a fresh interpreter, rows and file named in other scripts: exit 0, and its files are UTF-8."""
    rows = [*tiny.some_rows(20), tiny.row("grüße 模型", "🎉 ok")]
    tiny.write_rows(tmp_path / "daten-é.jsonl", rows)
    given = ["train", "--model", str(source / "m"), "--data", "daten-é.jsonl", *tiny.FAST, "train.steps=2"]
    done = fresh([*given, "run.name=x"], tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "daten-é.jsonl:1" in (tmp_path / "runs" / "x" / "ledger.jsonl").read_text(encoding="utf-8")
