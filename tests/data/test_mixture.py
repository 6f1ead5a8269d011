"""mixture: several files become one list; the held-out rows are chosen by content and share no prompt with training."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.data.mixture import leaks, load_conversations, split_heldout
from instil.errors import DataError
from instil.types import Conversation, Message

GOOD = '{"prompt": "p", "completion": "c"}\n'
EMPTY = '{"prompt": "p", "completion": " "}\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def talk(prompt: str, answer: str = "a", line: int = 1, **fields) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer, fields)), f"f:{line}")


def test_files_are_joined_in_order(here):
    """Conversations, dropped rows, sentences and digests of all files are in the order of the paths."""
    Path("a.jsonl").write_text(GOOD + EMPTY)
    Path("b.json").write_text(json.dumps([{"instruction": "i", "output": "o"}]))
    loaded = load_conversations(["b.json", "a.jsonl"], "heldout")
    assert [each.origin for each in loaded.conversations] == ["b.json:1", "a.jsonl:1"]
    assert [(each.origin, each.side, each.rule) for each in loaded.dropped] == [
        ("a.jsonl:2", "heldout", "empty_answer")
    ]
    assert loaded.recognised == ("b.json: JSON array, 1 row, alpaca", "a.jsonl: JSONL, 2 rows, prompt-completion")
    assert loaded.digests == {
        "b.json": hashlib.sha256(b'[{"instruction": "i", "output": "o"}]').hexdigest(),
        "a.jsonl": hashlib.sha256((GOOD + EMPTY).encode()).hexdigest(),
    }


def test_the_problems_of_all_files_come_at_once(here):
    """A broken line, a bad row and a missing file are all in one error."""
    Path("a.jsonl").write_text(GOOD + "{\n" + '{"prompt": 1, "completion": "c"}\n')
    Path("b.jsonl").write_text(GOOD + '{"prompt": "p"}\n' + GOOD[:-3])
    with pytest.raises(DataError) as caught:
        load_conversations(["a.jsonl", "b.jsonl", "c.jsonl"])
    assert [problem.place for problem in caught.value.problems] == [
        "a.jsonl:2",
        "b.jsonl:3",
        "b.jsonl:2: completion",
        "c.jsonl",
    ]
    assert caught.value.exit_code == 3


def test_nothing_left_is_an_error(here):
    """When rules drop every row, the counts by rule say why."""
    Path("a.jsonl").write_text(EMPTY * 3)
    with pytest.raises(DataError, match=r"^a.jsonl: 0 of 3 rows left \(empty_answer 3\); give rows with answers$"):
        load_conversations(["a.jsonl"])
    with pytest.raises(DataError, match="no files given"):
        load_conversations([])


def test_a_file_given_twice_is_refused(here):
    """Two rows with one origin could not be told apart, also when the paths differ."""
    Path("a.jsonl").write_text(GOOD)
    Path("link.jsonl").symlink_to("a.jsonl")
    with pytest.raises(DataError) as caught:
        load_conversations(["a.jsonl", "link.jsonl"])
    assert caught.value.lines() == [
        "a.jsonl: the file is given twice; name it once",
        "link.jsonl: the file is given twice; name it once",
    ]


@given(st.lists(st.integers(0, 30), max_size=60), st.floats(0, 0.9), st.integers(0, 20), st.randoms())
def test_the_split_loses_nothing_and_shares_no_prompt(prompts, share, most, shuffler):
    """Both sides together are the rows, no prompt is on both, the limit holds, and order does not matter."""
    rows = [talk(f"p{prompt}", f"a{i}", i) for i, prompt in enumerate(prompts)]
    train, heldout = split_heldout(rows, share, most)
    assert sorted([*train, *heldout], key=rows.index) == rows
    assert train == sorted(train, key=rows.index)
    assert not {each.messages[0].content for each in train} & {each.messages[0].content for each in heldout}
    assert len(heldout) <= min(most, share * len(rows) + 1e-9)
    mixed = shuffler.sample(rows, len(rows))
    assert {each.origin for each in split_heldout(mixed, share, most)[1]} == {each.origin for each in heldout}


def test_with_distinct_prompts_the_share_is_exact():
    """floor(share * n) rows are held out, at most `most`, none when the floor is 0."""
    rows = [talk(str(i), line=i) for i in range(100)]
    for share, most, expected in [(0.05, 99, 5), (0.29, 99, 29), (0.5, 7, 7), (0.009, 9, 0), (0.0, 9, 0), (0.3, 0, 0)]:
        assert len(split_heldout(rows, share, most)[1]) == expected


def test_the_choice_never_changes_between_versions():
    """The same data is split the same way on every machine; the four smallest of 20 hashes are from sha256sum."""
    rows = [talk(f"question {i}", line=i) for i in range(20)]
    random.Random(0).shuffle(rows)
    assert sorted(each.origin for each in split_heldout(rows, 0.2, 9)[1]) == ["f:14", "f:17", "f:19", "f:4"]


def test_the_prompt_is_what_comes_before_the_first_answer():
    """A later turn does not move a row to the other side of an equal first prompt; a system message does count."""
    longer = Conversation((*talk("p").messages, Message("user", "more"), Message("assistant", "b")), "f:2")
    other = [talk(f"x{i}", line=i + 3) for i in range(18)]
    for rows in ([talk("p"), longer, *other], [longer, *other, talk("p")]):
        for most in range(20):
            train, heldout = split_heldout(rows, 0.95, most)
            assert ({"f:1", "f:2"} <= {each.origin for each in heldout}) or (
                {"f:1", "f:2"} <= {each.origin for each in train}
            )


def test_a_row_on_both_sides_is_a_leak():
    """Only rows that agree in everything are leaks; the first training row is named."""
    train = [talk("p", "a", 1), talk("p", "a", 2), talk("q", "a", 3, name="x")]
    heldout = [talk("p", "a", 7), talk("p", "b", 8), talk("q", "a", 9), talk("q", "a", 10, name="x")]
    assert [str(problem) for problem in leaks(train, heldout)] == [
        "f:7: this held-out row is also trained on (f:1); remove one of the two",
        "f:10: this held-out row is also trained on (f:3); remove one of the two",
    ]
