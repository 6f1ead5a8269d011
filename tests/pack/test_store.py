"""Prepared examples come back from disk as they were, without being read into memory, complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from instil.pack import store
from instil.pack.store import ExampleStore, open_store, publish, store_key, write_examples
from instil.types import Example


def same(a: Example, b: Example) -> bool:
    return (
        a.prompt_tokens.tolist() == b.prompt_tokens.tolist()
        and a.answer_tokens.tolist() == b.answer_tokens.tolist()
        and a.weights.tolist() == b.weights.tolist()
        and (a.origin, a.turn, a.task) == (b.origin, b.turn, b.task)
    )


@pytest.fixture
def examples(some_examples: Any) -> list[Example]:
    found = some_examples(20, weighted=True)
    odd = found[3]
    return [
        *found,
        Example(odd.prompt_tokens, odd.answer_tokens, odd.weights, "dir/ä file.jsonl:7", turn=3, task="sums/日本"),
    ]


def test_examples_come_back_as_they_were(tmp_path: Path, examples: list[Example]) -> None:
    """Tokens, weights to the bit, origin, turn and task; the numbers keep their 32 bits."""
    write_examples(tmp_path / "a.arrow", examples)
    found = ExampleStore(tmp_path / "a.arrow")
    assert len(found) == 21
    assert all(same(a, b) for a, b in zip(found, examples, strict=True))
    assert same(found[20], examples[20])
    assert (found[0].prompt_tokens.dtype, found[0].weights.dtype) == (np.int32, np.float32)


def test_counts_are_those_of_the_examples(tmp_path: Path, examples: list[Example]) -> None:
    """lengths and the three token counts, per example, are what counting the examples gives."""
    write_examples(tmp_path / "a.arrow", examples)
    found = ExampleStore(tmp_path / "a.arrow")
    assert found.lengths.tolist() == [e.length_tokens for e in examples]
    assert found.prompt_tokens.tolist() == [len(e.prompt_tokens) for e in examples]
    assert found.answer_tokens.tolist() == [len(e.answer_tokens) for e in examples]
    assert found.target_tokens.tolist() == [sum(w > 0 for w in e.weights.tolist()) for e in examples]
    assert any(e.weights.min() == 0 for e in examples), "the oracle must see a weight of 0"


@pytest.mark.parametrize("index", [-1, 21])
def test_there_is_nothing_beyond_the_end(index: int, tmp_path: Path, examples: list[Example]) -> None:
    """An index outside is an error, never another example."""
    write_examples(tmp_path / "a.arrow", examples)
    with pytest.raises(IndexError):
        ExampleStore(tmp_path / "a.arrow")[index]


def test_an_empty_side_is_empty(tmp_path: Path, examples: list[Example]) -> None:
    """A run without held-out rows has a held-out side of length 0."""
    publish(tmp_path / "packs", {"train": examples, "heldout": []}, {"rows": 21})
    sides, record = open_store(tmp_path / "packs")
    assert sorted(sides) == ["heldout", "train"]
    assert (len(sides["heldout"]), len(sides["train"])) == (0, 21)
    assert list(sides["heldout"]) == []
    assert sides["heldout"].lengths.tolist() == []
    assert record == {"rows": 21}


def test_opening_does_not_read_the_tokens_into_memory(tmp_path: Path, make_example: Any) -> None:
    """A store of 8 MB is mapped: Arrow allocates nothing of that size, and the tokens are views of the file."""
    long = make_example(np.arange(200_000), np.arange(200_000))
    write_examples(tmp_path / "a.arrow", [long] * 5)
    size = (tmp_path / "a.arrow").stat().st_size
    assert size > 8_000_000
    before = pa.total_allocated_bytes()
    found = ExampleStore(tmp_path / "a.arrow")
    assert pa.total_allocated_bytes() - before < size // 100
    tokens = found[4].prompt_tokens
    assert not tokens.flags.owndata
    assert not tokens.flags.writeable
    assert any("a.arrow" in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert tokens.tolist() == list(range(200_000))


def failing(examples: list[Example]) -> Iterator[Example]:
    yield examples[0]
    raise OSError("disk full")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, examples: list[Example]) -> None:
    """No folder, no partial folder: the next start prepares the data anew."""
    with pytest.raises(OSError, match="disk full"):
        publish(tmp_path / "packs", {"train": examples, "heldout": failing(examples)}, {})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, examples: list[Example]) -> None:
    """Also when the data was written already."""
    with pytest.raises(TypeError):
        publish(tmp_path / "packs", {"train": examples}, {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_publishing_twice_is_harmless(tmp_path: Path, examples: list[Example]) -> None:
    """The first stays as it is, also for somebody who has it open, and nothing is left beside it."""
    publish(tmp_path / "packs", {"train": examples}, {"n": 1})
    opened = open_store(tmp_path / "packs")[0]["train"]
    publish(tmp_path / "packs", {"train": examples[:3]}, {"n": 2})
    assert open_store(tmp_path / "packs")[1] == {"n": 1}
    assert same(opened[20], examples[20])
    assert [f.name for f in tmp_path.iterdir()] == ["packs"]


def test_two_runs_that_publish_at_once_both_succeed(
    tmp_path: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder may appear after this run has begun to write and before it renames its own."""
    folder, write = tmp_path / "packs", store.write_examples

    def overtaken(path: Path, rows: Any) -> None:
        write(path, rows)
        monkeypatch.setattr(store, "write_examples", write)
        publish(folder, {"train": examples}, {"n": "the other"})

    monkeypatch.setattr(store, "write_examples", overtaken)
    publish(folder, {"train": examples}, {"n": "this one"})
    monkeypatch.undo()
    assert open_store(folder)[1] == {"n": "the other"}
    assert [f.name for f in tmp_path.iterdir()] == ["packs"]


def test_the_key_is_a_pure_function_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of names does not matter, any value does, and so does the layout's version."""
    key = store_key({"data": "a1", "template": "b2"})
    assert key == store_key({"template": "b2", "data": "a1"})
    assert len(key) == 16
    assert key != store_key({"data": "a1", "template": "b3"})
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert key != store_key({"data": "a1", "template": "b2"})
