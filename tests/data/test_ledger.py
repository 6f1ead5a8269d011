"""ledger: complete, in source order, balanced, and never half-written."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.data.ledger import LedgerEntry, in_source_order, ledger_counts, read_ledger, write_ledger
from instil.errors import DataError, MachineError

ENTRIES = [
    LedgerEntry("b.jsonl:10", "used", "train", 2, 100, 30),
    LedgerEntry("b.jsonl:9", "dropped", "train", rule="empty_answer", reason="says nothing"),
    LedgerEntry("a.jsonl:1", "used", "heldout", 1, 5, 7),
    LedgerEntry("b.jsonl:2", "dropped", "heldout", rule="too_long", reason="9,000 tokens"),
]


def test_entries_stand_in_source_order(tmp_path):
    """Files in the order of their first appearance, lines by number (9 before 10)."""
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, ENTRIES)
    assert [entry.origin for entry in read_ledger(path)] == ["b.jsonl:2", "b.jsonl:9", "b.jsonl:10", "a.jsonl:1"]
    assert path.read_text().splitlines()[3] == (
        '{"origin":"a.jsonl:1","fate":"used","side":"heldout","examples":1,'
        '"prompt_tokens":5,"answer_tokens":7,"cut_tokens":0,"dropped_tokens":0,"rule":"","reason":"","digest":""}'
    )
    assert os.listdir(tmp_path) == ["ledger.jsonl"]


@settings(deadline=None)  # each example waits for the disk
@given(
    st.lists(
        st.builds(
            LedgerEntry,
            st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
            st.sampled_from(["used", "dropped"]),
            st.sampled_from(["train", "heldout"]),
            *[st.integers(0, 2**40)] * 3,
            *[st.text(st.characters(exclude_categories=["Cs"]), max_size=9)] * 2,
        ),
        max_size=6,
    )
)
def test_a_ledger_comes_back_as_it_was_written(tmp_path_factory, entries):
    """Any entry survives the file, and ordering loses none."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.jsonl"
    write_ledger(path, entries)
    assert read_ledger(path) == in_source_order(entries)
    assert sorted(map(repr, read_ledger(path))) == sorted(map(repr, entries))


def test_counts_balance():
    """The sums are those of the entries, counted by hand."""
    counts = ledger_counts(ENTRIES)
    assert (counts.rows, counts.used_rows, counts.dropped_rows) == (4, 2, 2)
    assert (counts.train_rows, counts.heldout_rows) == (2, 2)
    assert (counts.examples, counts.prompt_tokens, counts.answer_tokens) == (3, 105, 37)
    assert counts.dropped_by_rule == {"empty_answer": 1, "too_long": 1}


def test_a_failed_write_leaves_the_old_ledger_and_no_draft(tmp_path, monkeypatch):
    """When the disk is full, the old file stays whole and nothing half-written lies beside it."""
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, ENTRIES[:1])

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"the ledger cannot be written \(No space left on device\)"):
        write_ledger(path, ENTRIES)
    assert read_ledger(path) == ENTRIES[:1]
    assert os.listdir(tmp_path) == ["ledger.jsonl"]


@pytest.mark.parametrize("line", [b'{"origin": "a:1"', b"[]", b'{"origin": "a:1"}'])
def test_a_foreign_file_is_not_read_as_a_ledger(tmp_path, line):
    """A torn or foreign line is named by its number."""
    path = tmp_path / "ledger.jsonl"
    write_ledger(path, ENTRIES)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match=r"ledger.jsonl:5: not a ledger entry"):
        read_ledger(path)
    with pytest.raises(DataError, match="no ledger"):
        read_ledger(tmp_path / "none")
