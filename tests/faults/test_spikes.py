"""Losses that leap: told from the usual ones, their rows named, and left out where that is wanted, with nothing learnt."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stories
import tiny
from instil.config import load_config
from instil.folder import RunFolder, read_manifest
from instil.pack.store import open_store
from instil.plan import loader_of
from instil.train import loop
from instil.train.checkpoint import load_latest
from instil.train.spikes import Spikes

GARBAGE = (40, 77)  # the rows of 96 that answer with noise
RUN = ("train.batch_examples=4", "train.epochs=3", "train.schedule=constant", "train.warmup=0")
ANSWERS = np.random.default_rng(3).choice(list("qxzjvkwpyf"), (96, 24))

# ── the limit ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("recent", "limit"),
    [
        ([1.0, 1.2] * 5, 1.1 + 8 * 1.4826 * 0.1),  # median 1.1, every loss 0.1 away from it
        ([2.0] * 12, 3.0),  # no spread: half of the median above it
        ([0.01] * 10, 0.51),  # nearly nothing left to learn: half a nat above it
        ([1.0] * 9, float("inf")),  # too few to tell
        ([], float("inf")),
        ([4.0, 3.0, 2.0, 1.0, 0.0] * 3, 2.0 + 8 * 1.4826 * 1.0),  # distances 2, 1, 0, 1, 2
        ([1.0] * 19 + [1000.0], 1.5),  # an earlier leap moves neither
    ],
)
def test_the_limit_is_the_one_worked_out_by_hand(recent: list[float], limit: float) -> None:
    """Median and median distance of short lists, on paper; just below is usual, just above leaps."""
    spikes = Spikes(recent)
    assert spikes.limit == pytest.approx(limit, rel=1e-12)
    assert not spikes.leaps(limit * (1 - 1e-9))
    assert spikes.leaps(limit * (1 + 1e-9)) == (limit < float("inf"))


def test_fifty_losses_are_remembered() -> None:
    """The oldest goes when the next one comes, also a loss that leapt."""
    recent: list[float] = []
    for i in range(60):
        recent = Spikes(recent).after(float(i))
    assert recent == [float(i) for i in range(10, 60)]


class Means(Spikes):
    """The planted fault: mean and standard deviation in place of the medians."""

    def __init__(self, recent: Sequence[float]):
        super().__init__(recent)
        if len(recent) >= 10:
            self.limit = statistics.mean(recent) + 8 * statistics.pstdev(recent)


@pytest.mark.parametrize("kind", [Spikes, Means])
def test_an_earlier_leap_hides_none_behind_it(kind: type[Spikes]) -> None:
    """Two leaps of twenty usual losses around 1: medians see the second one, means do not."""
    recent = [1.0 + 0.02 * (-1) ** i for i in range(20)]
    first = kind(recent)
    assert first.leaps(30.0)
    assert kind(first.after(30.0)).leaps(5.0) == (kind is Spikes)


# ── in a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows(garbage: Sequence[int] = GARBAGE) -> list[dict[str, Any]]:
    """Ninety-six questions with one answer, but for a few that answer with noise."""
    found = [tiny.row(f"say {tiny.WORDS[i % 16]} {i}", "red") for i in range(96)]
    for i in garbage:
        found[i] = tiny.row(f"say {tiny.WORDS[i % 16]} {i}", "".join(ANSWERS[i]))
    return found


def leaps_of(losses: Sequence[float]) -> list[int]:
    """The steps that leap, by the textbook: numpy's medians of the fifty losses before each."""
    found = []
    for i in range(10, len(losses)):
        before = np.array(losses[max(0, i - 50) : i])
        middle = np.median(before)
        spread = 1.4826 * np.median(np.abs(before - middle))
        if losses[i] > middle + max(8 * spread, 0.5 * middle, 0.5):
            found.append(i + 1)
    return found


def warnings_of(said: tiny.Said) -> dict[int, str]:
    """The warnings of leaps by their steps."""
    lines = [line for line in said.err if "the loss leaps to" in line]
    return {int(line.removeprefix("warning: step ").split(":")[0]): line for line in lines}


def noisy_steps(run: Path) -> list[int]:
    """The steps that train on a row of noise, by the batches that the run's own settings draw."""
    folder = RunFolder(run)
    store = open_store(folder.packs / read_manifest(folder)["packs"])[0]["train"]
    loader = loader_of(load_config(folder.config), store)
    last = len(tiny.metrics_of(run))
    return [k + 1 for k in range(last) if any(i in GARBAGE for p in loader.batch(k).packs for i in p.examples)]


@pytest.fixture
def noise(place: Path) -> Path:
    """A place whose data has the rows of noise."""
    tiny.write_rows(place / "a.jsonl", rows())
    return place


def test_a_leap_is_told_with_its_rows_the_worst_first(noise: Path) -> None:
    """Two noisy rows in a run that has become good: a warning at each of their later steps, naming them first."""
    said = stories.train(noise, *RUN)
    assert said.code == 0, said.err
    run = noise / "runs" / "x"
    records = tiny.metrics_of(run)
    warned = warnings_of(said)
    assert sorted(warned) == leaps_of([record["loss"] for record in records])
    noisy = noisy_steps(run)
    late = [step for step in noisy if step > 24]  # from the second epoch on the run is good
    assert len(late) >= 2
    assert set(late) <= set(warned) | {max(late)}
    assert len(set(warned) & set(noisy)) >= 2
    for step in set(warned) & set(noisy):
        named = warned[step].partition("; its rows: ")[2]
        assert named.startswith(tuple(f"{noise / 'a.jsonl'}:{i + 1} (loss " for i in GARBAGE)), warned[step]
        assert "train.spikes=skip would leave such steps out" in warned[step]
    assert json.loads((run / "summary.json").read_text())["spikes"] == {"steps": len(warned), "left_out": 0}
    assert not any("skipped" in record for record in records)


def test_an_ordinary_run_has_no_leaps(place: Path) -> None:
    """Rows of one kind, and rows with different answers to learn: not one warning."""
    for name, some in (("same", rows(())), ("other", tiny.some_rows(96))):
        tiny.write_rows(place / "a.jsonl", some)
        said = stories.train(place, *RUN, name=name)
        assert said.code == 0
        assert warnings_of(said) == {}
        assert len(tiny.metrics_of(place / "runs" / name)) == 72
        summary = json.loads((place / "runs" / name / "summary.json").read_text())
        assert summary["spikes"] == {"steps": 0, "left_out": 0}


def test_a_leap_that_is_skipped_changes_nothing(noise: Path) -> None:
    """train.spikes=skip: over such a step weights and moments are the same bits, over any other not; it is counted."""
    said = stories.train(noise, *RUN, "train.spikes=skip", "checkpoint.every_steps=1", "checkpoint.keep=1000")
    assert said.code == 0, said.err
    run = noise / "runs" / "x"
    records = tiny.metrics_of(run)
    skipped = [record["step"] for record in records if record.get("skipped")]
    assert skipped == leaps_of([record["loss"] for record in records]) == sorted(warnings_of(said))
    assert len(set(skipped) & set(noisy_steps(run))) >= 2
    assert all("; this step is left out; " in line for line in warnings_of(said).values())
    for record in records[1:]:
        before, after = (tensors_at(run, record["step"] - back) for back in (1, 0))
        assert stories.same_tensors(before, after) == (record["step"] in skipped), record["step"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["spikes"] == {"steps": len(skipped), "left_out": len(skipped)}


def tensors_at(run: Path, step: int) -> dict[str, Any]:
    """Weights and moments after a step."""
    from safetensors.torch import load_file

    folder = run / "checkpoints" / f"step-{step:06d}"
    return {
        f"{kind} {name}": tensor
        for kind in ("weights", "optimizer")
        for name, tensor in load_file(folder / f"{kind}.safetensors").items()
    }


@pytest.mark.slow  # several runs of 72 steps
def test_leaps_are_remembered_over_a_resume(noise: Path) -> None:
    """Stopped at a step that is left out, and at one before it: what is usual, and the counts, are in the checkpoint."""
    how = (*RUN, "train.spikes=skip")
    whole = stories.finished(noise, *how, name="whole")
    first = next(record["step"] for record in tiny.metrics_of(whole) if record.get("skipped"))
    for name, step in (("at", first), ("before", first - 1)):
        run = stories.stopped(noise, step, *how, name=name)
        assert stories.newest(run).counters["skipped"] == (1 if name == "at" else 0)
        assert stories.train(noise, *how, name=name).code == 0
        assert stories.differing(run, whole) == []


@pytest.mark.slow  # several runs of 72 steps
def test_forgotten_losses_are_caught(noise: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a resume that does not know what is usual learns from the step that the straight run left out."""
    how = (*RUN, "train.spikes=skip")
    whole = stories.finished(noise, *how, name="whole")
    first = next(record["step"] for record in tiny.metrics_of(whole) if record.get("skipped"))
    run = stories.stopped(noise, first - 1, *how)
    found = load_latest(run / "checkpoints")
    assert found is not None
    assert len(found.state.counters["recent"]) == min(50, first - 1)
    monkeypatch.setattr(loop, "Spikes", lambda recent: Spikes(recent[-1:]))
    assert stories.train(noise, *how).code == 0
    assert {"weights", "metrics"} <= set(stories.differing(run, whole))


def test_a_loss_that_is_not_a_number_is_never_skipped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """train.spikes=skip leaves out what is large; what is not finite ends the run all the same."""
    tiny.write_rows(place / "a.jsonl", rows(()))
    real = loop.train_step

    def poisoned(net: Any, optimizer: Any, batch: Any, **options: Any) -> Any:
        if batch.step == 15:
            masters = {name: master.detach().clone() for name, master in optimizer.masters.items()}
            masters["lm_head.weight"][1, 0] = float("nan")
            optimizer.load_masters(masters)
            assert options["most_loss"] < float("inf")
        return real(net, optimizer, batch, **options)

    monkeypatch.setattr(loop, "train_step", poisoned)
    said = stories.train(place, *RUN, "train.spikes=skip")
    assert said.code == 6
    assert any(line.startswith("step 16: loss ") for line in said.err)
