"""Prepared examples come back from disk as they were, without being read into memory, complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from instil.pack import store
from instil.pack.prefixes import Prefixes
from instil.pack.store import (
    ExampleStore,
    damage,
    open_store,
    publish_examples,
    store_key,
    write_examples,
    write_prefixes,
)
from instil.types import Example


def content(example: Example) -> tuple[Any, ...]:
    """Every field, comparable."""
    arrays = (example.prompt_tokens, example.answer_tokens, example.weights, example.kinds)
    return (
        *((a.tolist(), a.dtype) for a in arrays),
        (example.origin, example.turn, example.task, example.cut_tokens, example.source),
    )


def same(a: Example, b: Example) -> bool:
    return content(a) == content(b)


@pytest.fixture
def examples(some_examples: Any) -> list[Example]:
    found = some_examples(20, weighted=True)
    odd = found[3]
    kinds = np.arange(len(odd.answer_tokens)).astype(np.int8) % 3
    words = {"origin": "dir/ä file.jsonl:7", "turn": 3, "task": "sums/日本"}
    return [*found, replace(odd, **words, kinds=kinds, cut_tokens=12, source=2)]


def test_examples_come_back_as_they_were(tmp_path: Path, examples: list[Example]) -> None:
    """Tokens, weights to the bit, and every other field; the numbers keep their bits."""
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
    publish_examples(tmp_path / "packs", {"train": examples, "heldout": []}, {"rows": 21})
    sides, record = open_store(tmp_path / "packs")
    assert sorted(sides) == ["heldout", "train"]
    assert (len(sides["heldout"]), len(sides["train"])) == (0, 21)
    assert list(sides["heldout"]) == []
    assert sides["heldout"].lengths.tolist() == []
    assert record == {"rows": 21}


def test_opening_does_not_read_the_tokens_into_memory(tmp_path: Path, make_example: Any) -> None:
    """A store of 8 MB is mapped: Arrow allocates nothing of that size, and the tokens are views of the file."""
    examples = [make_example(np.arange(200_000), np.arange(200_000) + i) for i in range(5)]
    write_examples(tmp_path / "a.arrow", examples)
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


# ── what is stored once ──────────────────────────────────────────────────────────────────────────────────────────────


def conversation(turns: int, row: int = 0, *, rewritten: bool = False) -> list[Example]:
    """The examples of a row: each turn begins with all of the one before. rewritten: the template marks the last turn."""
    rng = np.random.default_rng(row)
    said: list[int] = []
    found = []
    for turn in range(turns):
        said = [*said, *rng.integers(0, 50_000, 40).tolist()]
        answer = rng.integers(0, 50_000, 20).tolist()
        prompt = [*said, -turn] if rewritten else said
        weights = rng.choice([0.0, 0.5, 1.0], 20)
        found.append(Example(np.array(prompt, np.int32), np.array(answer, np.int32), weights.astype(np.float32),
                             f"x.jsonl:{row}", turn, kinds=np.full(20, turn % 3, np.int8), cut_tokens=turn))  # fmt: skip
        said = [*said, *answer]
    return found


def size_of(path: Path, examples: list[Example]) -> int:
    """Bytes of the file, once it is known to give the examples back."""
    write_examples(path, examples)
    assert [content(e) for e in ExampleStore(path)] == [content(e) for e in examples]
    return path.stat().st_size


def test_the_turns_of_a_conversation_are_stored_once(tmp_path: Path) -> None:
    """Twice the turns take twice the bytes, not four times; each turn comes back in full."""
    sizes = [size_of(tmp_path / "a.arrow", conversation(turns)) for turns in (100, 200, 400)]
    assert sizes[2] - sizes[1] == pytest.approx(2 * (sizes[1] - sizes[0]), rel=0.1)
    assert sizes[2] < 400 * (60 * 4 + 20 * 5 + 100)  # 60 new tokens, 20 weights and kinds, and the other columns
    unshared = sum(e.length_tokens for e in conversation(400)) * 4
    assert sizes[2] < unshared / 100


def test_turns_that_the_template_rewrites_are_stored_in_full(tmp_path: Path) -> None:
    """Where a turn is not the beginning of the next, nothing is lost: the file is as large as its tokens."""
    assert size_of(tmp_path / "a.arrow", conversation(60, rewritten=True)) > 4 * sum(
        e.length_tokens for e in conversation(60, rewritten=True)
    )


def test_rows_of_all_kinds_side_by_side(tmp_path: Path, make_example: Any) -> None:
    """Long and short conversations, rewritten ones, copies, and turns in the wrong order come back as they were."""
    examples = [
        *conversation(5), *conversation(1, 1), *conversation(4, 2, rewritten=True), *conversation(3, 3),
        *conversation(3, 3), *reversed(conversation(4, 4)), make_example([1], [2]), make_example([1, 2], [3]),
        make_example([1], [2]), make_example([1, 2, 3, 4], [5, 6]), make_example([1, 2], [3, 4]),
    ]  # fmt: skip
    size_of(tmp_path / "a.arrow", examples)


def test_a_start_that_is_off_by_one_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same comparison fails when the tokens of a turn are looked for one place further on."""
    sequences = store._sequences

    def late(examples: list[Example]) -> Any:
        own, starts = sequences(examples)
        return own, [starts[0], starts[1] + 1, *starts[2:]]

    monkeypatch.setattr(store, "_sequences", late)
    with pytest.raises(AssertionError):
        size_of(tmp_path / "a.arrow", conversation(3))


def test_what_examples_have_in_common_comes_back_as_it_was(tmp_path: Path, examples: list[Example]) -> None:
    """Every field of `Prefixes.of`, with its type, for conversations, copies, and an empty side."""
    some = [*examples, *conversation(6), *conversation(2, 1), *examples[:3]]
    publish_examples(tmp_path / "packs", {"train": some, "heldout": []}, {})
    sides, _ = open_store(tmp_path / "packs")
    for side, expected in (("train", Prefixes.of(some)), ("heldout", Prefixes.of([]))):
        for name in ("lengths", "rank", "common", "family", "turns"):
            found = getattr(sides[side].prefixes, name)
            assert found.tolist() == getattr(expected, name).tolist(), name
            assert found.dtype == getattr(expected, name).dtype, name
    assert sides["train"].prefixes.common.any(), "the oracle must see something in common"
    assert sides["train"].prefixes.turns.any()


def test_a_store_says_how_large_its_tries_are(tmp_path: Path) -> None:
    """The prefixes read from the file give the sizes of tries: a conversation is as large as its last turn."""
    turns = conversation(6)
    write_examples(tmp_path / "a.arrow", turns)
    write_prefixes(tmp_path / "a.arrow", Prefixes.of(turns))
    found = ExampleStore(tmp_path / "a.arrow").prefixes
    assert found.trie_tokens(np.arange(6), np.zeros(6, np.int64), 1).tolist() == [turns[-1].length_tokens]


# ── complete or absent ───────────────────────────────────────────────────────────────────────────────────────────────


def failing(examples: list[Example]) -> Iterator[Example]:
    yield examples[0]
    raise OSError("disk full")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, examples: list[Example]) -> None:
    """No folder, no partial folder: the next start prepares the data anew."""
    with pytest.raises(OSError, match="disk full"):
        publish_examples(tmp_path / "packs", {"train": examples, "heldout": failing(examples)}, {})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_leaves_nothing(tmp_path: Path, examples: list[Example]) -> None:
    """Also when the data was written already."""
    with pytest.raises(TypeError):
        publish_examples(tmp_path / "packs", {"train": examples}, {"bad": object()})
    assert list(tmp_path.iterdir()) == []


def test_publishing_twice_is_harmless(tmp_path: Path, examples: list[Example]) -> None:
    """The second takes its place at once; who has the first open still reads it, and nothing is left beside it."""
    publish_examples(tmp_path / "packs", {"train": examples}, {"n": 1})
    opened = open_store(tmp_path / "packs")[0]["train"]
    publish_examples(tmp_path / "packs", {"train": examples[:3]}, {"n": 2})
    assert open_store(tmp_path / "packs")[1] == {"n": 2}
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
        publish_examples(folder, {"train": examples}, {"n": "the other"})

    monkeypatch.setattr(store, "write_examples", overtaken)
    publish_examples(folder, {"train": examples}, {"n": "this one"})
    monkeypatch.undo()
    assert open_store(folder)[1] == {"n": "this one"}
    assert damage(folder) is None
    assert [f.name for f in tmp_path.iterdir()] == ["packs"]


def test_the_key_is_a_pure_function_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of names does not matter, any value does, and so does the layout's version."""
    key = store_key({"data": "a1", "template": "b2"})
    assert key == store_key({"template": "b2", "data": "a1"})
    assert len(key) == 16
    assert key != store_key({"data": "a1", "template": "b3"})
    monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    assert key != store_key({"data": "a1", "template": "b2"})
