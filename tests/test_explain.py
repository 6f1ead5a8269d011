"""A row's explanation is what the run did with it, seen by a spy in the training step; and no row is guessed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instil
import stories
import tiny
from instil.config import load_config
from instil.errors import DataError, MachineError, Stopped, UsageError
from instil.explain import Use, explain
from instil.train import loop
from instil.types import Pack

Seen = list[tuple[int, int, int, int, tuple[str, ...]]]  # epoch, step, pack, packs, origins in the pack


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A model `m` and forty rows in `a.jsonl`: line 40 does not fit into a pack, line 5 is a dialogue of two turns."""
    tiny.write_model(tmp_path / "m")
    rows = [*tiny.some_rows(39), tiny.row("say " + "x" * 200, "red")]
    rows[4]["messages"] += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "lime"}]
    rows[4]["task"] = "colours"
    tiny.write_rows(tmp_path / "a.jsonl", rows)
    return tmp_path


@pytest.fixture
def configure(place: Path) -> Callable[..., Any]:
    def make(*words: str, sources: Any = None) -> Any:
        data = sources or [str(place / "a.jsonl")]
        least = {"model": str(place / "m"), "data.train": data, "run.dir": str(place / "runs")}
        fixed = (
            *tiny.FAST,
            "train.lr=1e-3",
            "train.batch_examples=8",
            "train.epochs=2",
            "pack.tokens=90",
            "run.name=x",
        )
        return load_config(None, [*fixed, *words], least)

    return make


def seen_from(pack: Pack, query: int) -> tuple[int, ...]:
    """The tokens that an index of the pack sees; from where the last token of an answer is predicted: the example."""
    return tuple(int(pack.tokens[k]) for k in range(query + 1) if query < pack.reach[k])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What each training step was given, as the step itself sees it: rows are told apart by their tokens."""
    found: Seen = []
    step = loop.train_step

    def spy(net: Any, optimizer: Any, batch: Any, **named: Any) -> Any:
        for number, pack in enumerate(batch.packs, start=1):
            documents = [seen_from(pack, int(pack.at[pack.owner == i].max())) for i in pack.examples]
            found.append((batch.epoch, batch.step + 1, number, len(batch.packs), documents))  # type: ignore[arg-type]
        return step(net, optimizer, batch, **named)

    monkeypatch.setattr(loop, "train_step", spy)
    return found


def uses_seen(seen: Seen, document: tuple[int, ...], losses: dict[int, float]) -> list[Use]:
    """The uses of an example, by what the spy saw."""
    return [
        Use(epoch, step, pack, packs, len(documents) - 1, losses[step])
        for epoch, step, pack, packs, documents in seen
        for found in documents
        if found == document
    ]


@pytest.mark.parametrize("words", [(), ("train.steps=7",), ("train.epochs=3", "data.heldout=0")])
def test_the_steps_of_a_row_are_those_that_trained_on_it(
    words: tuple[str, ...], place: Path, configure: Callable[..., Any], seen: Seen
) -> None:
    """Every use of every training row: epoch, step, pack and loss, and none besides."""
    run = instil.train(configure(*words))
    losses = {record["step"]: record["loss"] for record in tiny.metrics_of(run)}
    total = 0
    examples = instil.examples([str(place / "a.jsonl")], str(place / "m"))
    for line in (1, 2, 5, 17, 38):
        found = explain(str(run), f"{place}/a.jsonl:{line}")
        if found.ledger.side == "heldout":
            continue
        own = [e for e in examples if e.origin == found.origin]
        assert [e.turn for e in found.examples] == [e.turn for e in own]
        for mine, example in zip(found.examples, own, strict=True):
            document = (*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()[:-1])
            assert list(mine.uses) == uses_seen(seen, document, losses)
            assert (mine.prompt_tokens, mine.answer_tokens) == (len(example.prompt_tokens), len(example.answer_tokens))
            total += len(mine.uses)
    assert total
    assert found.steps == found.steps_done == len(losses)


def test_a_row_of_a_repeated_source_is_used_as_often(place: Path, configure: Callable[..., Any], seen: Seen) -> None:
    """At a repeat of 2.5, twice or three times an epoch, five times in two."""
    config = configure("data.heldout=0", sources=[{"path": str(place / "a.jsonl"), "repeat": 2.5}])
    run = instil.train(config)
    losses = {record["step"]: record["loss"] for record in tiny.metrics_of(run)}
    (example,) = explain(str(run), f"{place}/a.jsonl:7").examples
    (own,) = (e for e in instil.examples([str(place / "a.jsonl")], str(place / "m")) if e.origin.endswith(":7"))
    assert len(example.uses) == 5
    document = (*own.prompt_tokens.tolist(), *own.answer_tokens.tolist()[:-1])
    assert sorted(example.uses, key=str) == sorted(uses_seen(seen, document, losses), key=str)


def test_a_held_out_row_says_so(place: Path, configure: Callable[..., Any]) -> None:
    """It has examples and no step; the ones in the loss during the run are counted."""
    run = instil.train(configure("data.heldout=0.2", "evaluate.examples=3"))
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    held = [row["origin"] for row in ledger if row["side"] == "heldout"]
    found = [explain(str(run), origin) for origin in held]
    assert len(held) > 3
    assert sum(each.measured_examples for each in found) == 3
    assert all(not example.uses for each in found for example in each.examples)
    said = tiny.command("explain", run, held[0])
    assert said.code == 0
    assert "held out: measured, never trained on" in said.out


def test_a_dropped_row_says_why(place: Path, configure: Callable[..., Any]) -> None:
    """Its rule and reason, as the ledger has them, and no example."""
    run = instil.train(configure())
    found = explain(str(run), f"{place}/a.jsonl:40")
    assert (found.ledger.fate, found.ledger.rule, found.examples) == ("dropped", "too_long", ())
    said = tiny.command("explain", run, f"{place}/a.jsonl:40")
    assert f"too_long: {found.ledger.reason}" in said.out
    assert "nothing of it is trained on" in said.out


@pytest.mark.parametrize(
    ("row", "nearest"), [("a.jsonl:99", "a.jsonl:40"), ("b.jsonl:3", "a.jsonl:3"), ("a.jsonl", "a.jsonl:1"),
                         ("nonsense", "a.jsonl:1"), ("a.jsonl:x", "a.jsonl:1")],
)  # fmt: skip
def test_an_unknown_row_is_an_error_that_names_the_nearest(
    row: str, nearest: str, place: Path, configure: Callable[..., Any]
) -> None:
    """Exit 3: the nearest line of the most similar file."""
    run = instil.train(configure("train.steps=1"))
    with pytest.raises(DataError, match="is not a row of this run") as refused:
        explain(str(run), f"{place}/{row}")
    assert f"did you mean {place}/{nearest}?" in str(refused.value)
    assert tiny.command("explain", run, f"{place}/{row}").code == 3


def test_another_path_of_the_file_is_the_same_row(
    place: Path, configure: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative, or through another folder."""
    run = instil.train(configure("train.steps=1"))
    monkeypatch.chdir(place)
    assert explain(str(run), "a.jsonl:5") == explain(str(run), f"{place}/runs/../a.jsonl:5")


def test_an_unfinished_run_is_explained_up_to_its_step(place: Path, configure: Callable[..., Any]) -> None:
    """Steps that are done have a loss, later ones are announced; the plan is that of the whole run."""
    config = configure("data.heldout=0")

    def stop(record: dict[str, Any], steps: int) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        instil.train(config, listener=instil.Listener(on_step=stop))
    run = place / "runs" / "x"
    before = {line: explain(str(run), f"{place}/a.jsonl:{line}") for line in range(1, 40)}
    assert {(found.steps_done, found.steps) for found in before.values()} == {(3, 10)}
    uses = [use for found in before.values() for example in found.examples for use in example.uses]
    assert {use.step for use in uses if use.loss is not None} == {1, 2, 3}
    assert {use.step for use in uses if use.loss is None} == set(range(4, 11))
    assert "the run is at step 3 of 10" in tiny.command("explain", run, f"{place}/a.jsonl:1").out
    instil.train(config)
    for line, found in before.items():
        after = explain(str(run), f"{place}/a.jsonl:{line}")
        steps = [[(u.step, u.pack) for u in e.uses] for e in found.examples]
        assert [[(u.step, u.pack) for u in e.uses] for e in after.examples] == steps


def test_explain_json_is_one_document(place: Path, configure: Callable[..., Any]) -> None:
    """The ledger's line, the examples, and where the run is."""
    run = instil.train(configure("data.heldout=0"))
    said = tiny.command("explain", run, f"{place}/a.jsonl:5", "--json")
    found = json.loads(said.out)
    assert (said.code, said.err) == (0, [])
    assert found.keys() == {"origin", "ledger", "examples", "measured_examples", "steps_done", "steps"}
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert found["ledger"] == next(line for line in lines if line["origin"] == found["origin"])
    assert [e["turn"] for e in found["examples"]] == [0, 1]
    assert {e["task"] for e in found["examples"]} == {"colours"}
    assert all(u.keys() == {"epoch", "step", "pack", "packs", "others", "loss"} for u in found["examples"][0]["uses"])


def test_what_is_not_a_run_is_refused(place: Path) -> None:
    """Exit 2 for a folder without a run."""
    with pytest.raises(UsageError, match="is not the folder of a run"):
        explain(str(place), "a.jsonl:1")
    assert tiny.command("explain", place, "a.jsonl:1").code == 2


def test_examples_that_are_gone_are_said_with_what_brings_them_back(tmp_path: Path) -> None:
    """An unfinished run prepares them anew when it goes on; a finished one prepares nothing, and is not sent there."""
    tiny.write_model(tmp_path / "m")
    tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(40))
    row = f"{tmp_path}/a.jsonl:1"
    run = stories.stopped(tmp_path, 4)
    before = explain(str(run), row)
    shutil.rmtree(run / "packs")
    with pytest.raises(
        MachineError, match="the prepared examples are gone; run its command again to prepare them anew"
    ):
        explain(str(run), row)
    stories.finished(tmp_path)
    assert explain(str(run), row).examples[0].uses[0].step == before.examples[0].uses[0].step
    shutil.rmtree(run / "packs")
    with pytest.raises(MachineError, match="the prepared examples are gone; put them back from a copy, or start over"):
        explain(str(run), row)
