"""Workers share the rows, and nothing of the result depends on how many they are."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

import instil.workers
import tiny
from instil.chat.turns import ChatOptions
from instil.errors import MachineError, TemplateError
from instil.prepare import open_chat
from instil.types import Conversation, Message
from instil.workers import certified


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return open_chat(tiny.write_model(tmp_path_factory.mktemp("model"), weights=False), None)


@pytest.fixture
def few(monkeypatch):
    """Small runs of rows, so that a few hundred of them need several workers and several runs each."""
    monkeypatch.setattr(instil.workers, "SERIAL_ROWS", 40)
    monkeypatch.setattr(instil.workers, "ROWS_AT_ONCE", 32)


def rows(n, **changed):
    """n conversations of one or two turns; `changed` = content of the answer of some rows, by number."""
    made = []
    for i in range(n):
        answer = changed.get(f"row{i}", tiny.WORDS[i % 16])
        messages = [Message("user", f"say {i}"), Message("assistant", answer)]
        if i % 3 == 0:
            messages += [Message("user", "again"), Message("assistant", f"{answer} again")]
        made.append(Conversation(tuple(messages), f"a.jsonl:{i + 1}"))
    return made


def run(chat, conversations, workers, **more):
    return certified(
        conversations, chat.tokenizer, chat.template, ChatOptions(), {"a.jsonl": "d"}, workers=workers, **more
    )


def test_any_number_of_workers_gives_the_same(chat, few):
    """Examples in order, certificate and notes are those of one process."""
    conversations = rows(300, row7="<|im_end|> typed", row290="<|im_start|>")
    one = run(chat, conversations, 1)
    for workers in (2, 5):
        many = run(chat, conversations, workers)
        assert many.certificate == one.certificate
        assert many.pairs.notes == one.pairs.notes == {"typed_control_tokens": 2}
        assert many.pairs.terminators == one.pairs.terminators
        assert len(many.pairs.examples) == len(one.pairs.examples) == 400
        for ours, theirs in zip(many.pairs.examples, one.pairs.examples, strict=True):
            assert (ours.origin, ours.turn, ours.source, ours.cut_tokens) == (theirs.origin, theirs.turn, 0, 0)
            for name in ("prompt_tokens", "answer_tokens", "weights", "kinds"):
                np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_problems_of_rows_come_back_from_the_workers(chat, few):
    """A row that cannot be used is named, whichever worker had it."""
    conversations = rows(300)
    conversations[250] = Conversation((Message("assistant", "first"), Message("user", "no")), "a.jsonl:251")
    found = run(chat, conversations, 3)
    assert [(problem.place, problem.rule) for problem in found.pairs.problems] == [
        ("a.jsonl:251: messages[0]", "no-prompt")
    ]
    assert len({example.origin for example in found.pairs.examples}) == 299


def test_an_error_in_a_worker_is_raised_here(chat, few, tmp_path):
    """A template that no row gets through is refused as in one process: the first rows say so."""
    folder = tiny.write_model(tmp_path / "m", weights=False, template=tiny.REWRITES)
    with pytest.raises(TemplateError, match=r"a\.jsonl:1\b.*being the first"):
        run(open_chat(folder, None), rows(300), 3)


def test_a_worker_that_dies_is_noticed(chat, few, monkeypatch):
    """Rows of a worker that the system killed are not silently missing."""
    made = instil.workers._some
    here = os.getpid()

    def die(some, *with_):
        if os.getpid() != here and some[0].origin != "a.jsonl:1":
            os.kill(os.getpid(), signal.SIGKILL)
        return made(some, *with_)

    monkeypatch.setattr(instil.workers, "_some", die)
    with pytest.raises(MachineError, match="ended early"):
        run(chat, rows(300), 3)


def test_progress_reaches_all_rows(chat, few):
    """The rows done grow to all of them."""
    for workers in (1, 3):
        seen: list[tuple[int, int]] = []
        run(chat, rows(300), workers, progress=lambda done, whole, seen=seen: seen.append((done, whole)))
        assert seen[-1] == (300, 300)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_few_rows_start_no_process(chat, monkeypatch):
    """A small file is done here: a process would cost more than it saves."""
    monkeypatch.setattr(instil.workers, "_Job", None)
    assert len(run(chat, rows(30), None).pairs.examples) == 40


def test_nothing_of_the_workers_is_left(chat, few, monkeypatch, tmp_path):
    """Their files are gone when the examples are there."""
    monkeypatch.setattr(instil.workers.tempfile, "tempdir", str(tmp_path))
    found = run(chat, rows(300), 2)
    assert list(Path(tmp_path).iterdir()) == []
    assert int(found.pairs.examples[0].prompt_tokens[0]) >= 0


def test_a_template_is_judged_by_all_rows(chat, few, tmp_path):
    """Rows that the template refuses are problems of rows where others get through, whichever worker has them."""
    source = tiny.CHATML + "{{ raise_exception('no shouting') if 'SHOUT' in messages[0].content }}"
    loud = open_chat(tiny.write_model(tmp_path / "m", weights=False, template=source), None)
    quiet = rows(150)
    shouting = [
        Conversation((Message("user", "SHOUT"), *row.messages[1:]), f"b.jsonl:{i + 1}") for i, row in enumerate(quiet)
    ]
    for workers in (1, 4):
        found = run(loud, [*shouting, *quiet], workers)
        assert {problem.place.partition(":")[0] for problem in found.pairs.problems} == {"b.jsonl"}
        assert {example.origin.partition(":")[0] for example in found.pairs.examples} == {"a.jsonl"}
        with pytest.raises(TemplateError, match=r"no shouting.*in every row, b"):
            run(loud, shouting, workers)
