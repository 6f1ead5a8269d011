"""Workers that prepare examples and die: started again for what they had not done, no row lost or repeated, or an error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import assert_same_run, words

import instil.workers
import tiny
from instil.chat.turns import ChatOptions
from instil.data.ledger import read_ledger
from instil.errors import InstilError, MachineError
from instil.prepare import Chat, open_chat
from instil.types import Conversation, Message
from instil.workers import Certified, certified

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forks on Linux only")
ROWS = 200
Some = Callable[..., Certified]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return open_chat(tiny.write_model(tmp_path_factory.mktemp("model"), weights=False), None)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs of rows, so that two hundred need several workers, and several messages of each."""
    monkeypatch.setattr(instil.workers, "SERIAL_ROWS", 40)
    monkeypatch.setattr(instil.workers, "ROWS_AT_ONCE", 16)


def conversations(n: int) -> list[Conversation]:
    return [
        Conversation((Message("user", f"say {i}"), Message("assistant", tiny.WORDS[i % 16])), f"a.jsonl:{i + 1}")
        for i in range(n)
    ]


def made(chat: Chat, workers: int) -> Certified:
    rows = conversations(ROWS)
    return certified(rows, chat.tokenizer, chat.template, ChatOptions(), {"a.jsonl": "d"}, workers=workers)


def assert_same(found: Certified, expected: Certified) -> None:
    """Every row once and in order, the same tokens, notes and certificate."""
    assert [example.origin for example in found.pairs.examples] == [f"a.jsonl:{i + 1}" for i in range(ROWS)]
    for ours, theirs in zip(found.pairs.examples, expected.pairs.examples, strict=True):
        np.testing.assert_array_equal(ours.prompt_tokens, theirs.prompt_tokens)
        np.testing.assert_array_equal(ours.answer_tokens, theirs.answer_tokens)
    assert found.certificate == expected.certificate
    assert found.pairs.notes == expected.pairs.notes


def dying(monkeypatch: pytest.MonkeyPatch, marks: Path, origin: str, times: int, how: Callable[[], None]) -> None:
    """Let the worker that comes to the row `origin` end, `times` times; each time leaves a mark."""
    real, here = instil.workers._some, os.getpid()

    def some(rows: Sequence[Conversation], *with_: Any) -> Certified:
        if os.getpid() != here and any(row.origin == origin for row in rows):
            number = len(list(marks.iterdir()))
            if number < times:
                (marks / str(number)).touch()
                how()
        return real(rows, *with_)

    monkeypatch.setattr(instil.workers, "_some", some)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ZeroDivisionError("planted")


@pytest.mark.parametrize("how", [kill, lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: os._exit(0)])
@pytest.mark.parametrize("origin", ["a.jsonl:1", "a.jsonl:50", "a.jsonl:199"])
def test_a_worker_killed_once_is_started_again(
    how: Callable[[], None], origin: str, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first, a middle or its last run of rows: the result is that of a preparation without deaths."""
    expected = made(chat, 1)
    dying(monkeypatch, tmp_path, origin, 1, how)
    assert_same(made(chat, 3), expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_each_worker_may_die_once(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All three are killed, each in its second run of rows; no row is lost or repeated."""
    expected = made(chat, 1)
    for i, origin in enumerate(("a.jsonl:20", "a.jsonl:90", "a.jsonl:160")):
        (tmp_path / str(i)).mkdir()
        dying(monkeypatch, tmp_path / str(i), origin, 1, kill)
    assert_same(made(chat, 3), expected)
    assert [len(list((tmp_path / str(i)).iterdir())) for i in range(3)] == [1, 1, 1]


def test_a_message_torn_by_a_kill_is_not_taken(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it reports: the half message counts for nothing, the rows are done again."""
    expected = made(chat, 1)
    real = instil.workers._work

    def work(rows: Any, begin: int, folder: Path, writer: Any, with_: Any) -> None:
        if not list(tmp_path.iterdir()):
            (tmp_path / "torn").touch()
            os.write(writer.fileno(), struct.pack("!i", 1000) + b'{"rows": 16')
            kill()
        real(rows, begin, folder, writer, with_)

    monkeypatch.setattr(instil.workers, "_work", work)
    assert_same(made(chat, 3), expected)
    assert (tmp_path / "torn").exists()


@pytest.mark.parametrize("origin", ["a.jsonl:1", "a.jsonl:50"])
def test_a_worker_killed_each_time_ends_the_preparation(
    origin: str, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice is enough: exit 5, which is the system's doing, most often for memory; and no worker is left."""
    dying(monkeypatch, tmp_path, origin, 99, kill)
    with pytest.raises(MachineError, match=r"ended early 2 times \(exit -9\); free memory") as caught:
        made(chat, 3)
    assert caught.value.exit_code == 5
    assert len(list(tmp_path.iterdir())) == 2
    assert not multiprocessing.active_children()


def test_a_worker_that_fails_is_our_bug(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An exception that is no error of the user's: exit 1, naming the row from which nothing was done, and what it was."""
    dying(monkeypatch, tmp_path, "a.jsonl:20", 99, fail)
    with pytest.raises(
        InstilError, match=r"^a\.jsonl:17: a worker .* ended early 2 times \(exit 1\); please"
    ) as caught:
        made(chat, 3)
    assert caught.value.exit_code == 1
    assert "ZeroDivisionError: planted" in capfd.readouterr().err


def test_a_lost_row_would_be_seen(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a restart one run of rows too early repeats rows, and the comparison tells."""
    expected = made(chat, 1)
    real = instil.workers._work

    def again(rows: Any, begin: int, *more: Any) -> None:
        real(rows, max(0, begin - 16), *more)

    monkeypatch.setattr(instil.workers, "_work", again)
    dying(monkeypatch, tmp_path, "a.jsonl:50", 1, kill)
    with pytest.raises(AssertionError):
        assert_same(made(chat, 3), expected)


@pytest.mark.parametrize(("times", "code"), [(1, 0), (99, 5)])
def test_a_run_whose_worker_is_killed(
    times: int, code: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: nobody notices, the bits are the same. Always: exit 5, and nothing of the run is left."""
    monkeypatch.setattr(instil.workers, "SERIAL_ROWS", 8)
    monkeypatch.setattr(instil.workers, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1, 2})
    (tmp_path / "marks").mkdir()
    dying(monkeypatch, tmp_path / "marks", f"{source / 'a.jsonl'}:20", times, kill)
    folder = tmp_path / "runs" / "x"
    said = tiny.command(*words(source, folder))
    assert said.code == code, said.err
    assert len(list((tmp_path / "marks").iterdir())) == min(times, 2)
    if code:
        assert said.err[-1].startswith("memory: a worker that prepares examples ended early 2 times")
        assert not folder.exists()
    else:
        assert_same_run(folder, whole)
        assert len(read_ledger(folder / "ledger.jsonl")) == 40
