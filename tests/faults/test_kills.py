"""Killed at any instant (SIGKILL) and started again by the same command, a run ends as the one that nobody killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from forks import Child, Forks

import tiny
from instil.data.ledger import read_ledger
from instil.folder import read_metrics
from instil.pack.store import damage
from instil.train.checkpoint import steps_newest_first, verify

RECIPE = (
    *tiny.FAST, "train.lr=1e-2", "train.epochs=3", "train.batch_examples=8", "data.heldout=0.1",
    "checkpoint.every_steps=1", "checkpoint.keep=2",
)  # fmt: skip
STEPS = 3 * 4  # 36 rows, 8 examples a step: 4 steps an epoch
KILLS = int(os.environ.get("INSTIL_KILLS", "60"))
LEFTOVERS = (".partial-", ".trash-")


def words(model: Path, data: Path, run: Path, *more: str) -> list[object]:
    """The command line of a run."""
    return ["train", "--model", model, "--data", data, *RECIPE, f"run.dir={run.parent}", f"run.name={run.name}", *more]


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed, and how long it took."""

    path: Path
    seconds: float


@pytest.fixture(scope="module")
def whole(forks: Forks, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The run that nobody killed."""
    run = tmp_path_factory.mktemp("whole") / "x"
    began = time.monotonic()
    child = forks.instil(words(model, data, run), run.parent / "log", seed=0)
    assert child.wait().code == 0, child.said()
    assert len(tiny.metrics_of(run)) == STEPS
    return Whole(run, time.monotonic() - began)


def differences(run: Path, other: Path) -> list[str]:
    """In what two finished runs are not the same: result, newest checkpoint's tensors, metrics, files."""
    found = []
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        if (other / name).exists() and (run / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    mine, its = (steps_newest_first(folder / "checkpoints")[0] for folder in (run, other))
    if (mine.name, verify(mine)) != (its.name, None):
        found.append("the newest checkpoint")
    for name in ("weights", "optimizer", "rng"):
        if (mine / f"{name}.safetensors").read_bytes() != (its / f"{name}.safetensors").read_bytes():
            found.append(f"{name} of the newest checkpoint")
    records, expected = tiny.metrics_of(run), tiny.metrics_of(other)
    if [record["step"] for record in records] != list(range(1, len(expected) + 1)):
        found.append("the steps in metrics.jsonl")
    if tiny.without_times(records) != tiny.without_times(expected):
        found.append("metrics.jsonl")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (run, other)]
    for key in ("steps", "loss_before", "loss_after", "heldout_losses", "target_tokens", "computed_tokens", "rows"):
        if summaries[0][key] != summaries[1][key]:
            found.append(f"{key} of summary.json")
    return found + sorted(tiny.tree(run) ^ tiny.tree(other))


def left_in(folder: Path) -> list[str]:
    """What a process that was killed in a save, or in a prune, has left."""
    return [path.name for path in folder.glob(".*") if path.name.startswith(LEFTOVERS)] if folder.is_dir() else []


@dataclass
class Tally:
    """What was counted."""

    kills: int = 0
    in_saves: int = 0
    in_prunes: int = 0
    runs: int = 0
    before_first_save: int = 0
    resumed_from: list[int] = field(default_factory=list)


def killed_often(
    forks: Forks, command: Callable[[Path], list[object]], whole: Whole, place: Path, kills: int, seed: int
) -> Tally:
    """Kill runs at random instants, every other time inside a save, until there were `kills`; each run is killed up to 6
    times, resumed each time, and compared in the end."""
    rng, tally = random.Random(seed), Tally()
    while tally.kills < kills:
        tally.runs += 1
        run = place / f"run-{tally.runs}"
        for _ in range(6):
            child = forks.instil(command(run), place / "log", seed=rng.randrange(2**32))
            if rng.random() < 0.6:
                aim_at_a_save(child, run / "checkpoints", rng)
            else:
                time.sleep(rng.random() * whole.seconds)
            if child.kill().code != -signal.SIGKILL:
                break  # it was done already
            tally.kills += 1
            left = left_in(run / "checkpoints")
            tally.in_saves += any(name.startswith(".partial-") for name in left)
            tally.in_prunes += any(name.startswith(".trash-") for name in left)
            good = [path for path in steps_newest_first(run / "checkpoints") if verify(path) is None]
            tally.before_first_save += not good
            broken = [path.name for path in steps_newest_first(run / "checkpoints") if path not in good]
            assert broken == [], f"{run}: checkpoints that do not verify"
            tally.resumed_from.append(int(good[0].name[5:]) if good else 0)
        child = forks.instil(command(run), place / "log")
        assert child.wait().code == 0, child.said()[-20:]
        assert differences(run, whole.path) == [], f"{run} after {tally}"
        shutil.rmtree(run)
    return tally


def aim_at_a_save(child: Child, checkpoints: Path, rng: random.Random) -> None:
    """Wait for some saves to begin, the last of them for a random part of its time."""
    for _ in range(rng.randint(1, 4)):
        while not left_in(checkpoints):
            if child.ended():
                return
            time.sleep(0.0005)
        if rng.random() < 0.5:
            break
        while left_in(checkpoints) and not child.ended():
            time.sleep(0.0005)
    time.sleep(rng.random() * 0.02)


def check_kills(tally: Tally, kills: int, record_property: Callable[[str, object], None]) -> None:
    """There were as many as wanted, 30% of them in a save, and some of the rest in other places."""
    for name in ("kills", "in_saves", "in_prunes", "runs", "before_first_save"):
        record_property(name, getattr(tally, name))
    assert tally.kills >= kills
    assert tally.in_saves + tally.in_prunes >= 0.3 * tally.kills, tally
    assert len(set(tally.resumed_from)) > 2, tally


def test_killed_at_random_instants(
    forks: Forks, model: Path, data: Path, whole: Whole, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """12 kills, a third of them and more in a save: every run ends with the bits of the one that nobody killed."""
    tally = killed_often(forks, lambda run: words(model, data, run), whole, tmp_path, 12, seed=1)
    check_kills(tally, 12, record_property)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_at_many_random_instants(
    forks: Forks, model: Path, data: Path, whole: Whole, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """60 kills, or as many as INSTIL_KILLS says."""
    seed = int(os.environ.get("INSTIL_SEED", "2"))
    tally = killed_often(forks, lambda run: words(model, data, run), whole, tmp_path, KILLS, seed)
    check_kills(tally, KILLS, record_property)


@pytest.mark.parametrize("plant", ["moments are lost", "metrics stay"])
def test_a_resume_that_forgets_is_caught(
    plant: str, forks: Forks, model: Path, data: Path, whole: Whole, tmp_path: Path
) -> None:
    """Planted: the optimizer's moments are not put back, or the history is not cut: the runs are told apart."""
    run = tmp_path / "x"
    child = forks.instil(words(model, data, run, "checkpoint.every_steps=2"), tmp_path / "log")
    while len(read_metrics(run / "metrics.jsonl")) < 5:
        assert child.ended() is None, child.said()
        time.sleep(0.0005)
    child.kill()
    cut_to(run, 4)  # so that there is a step after the checkpoint, however late the kill came
    child = forks.instil(words(model, data, run, "checkpoint.every_steps=2"), tmp_path / "log", plant=plant)
    assert child.wait().code == 0, child.said()
    found = differences(run, whole.path)
    if plant == "metrics stay":
        assert "the steps in metrics.jsonl" in found
    else:
        assert {"model/model.safetensors", "metrics.jsonl", "optimizer of the newest checkpoint"} <= set(found)


def cut_to(run: Path, step: int) -> None:
    """Take away the checkpoints after a step."""
    for path in steps_newest_first(run / "checkpoints"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.mark.parametrize("name", ["model/model.safetensors", "metrics.jsonl", "rng", "files"])
def test_any_difference_is_told(name: str, whole: Whole, tmp_path: Path) -> None:
    """Planted in a copy of a finished run: a bit of the result, a step twice, other random numbers, a file that stayed."""
    run = tmp_path / "x"
    shutil.copytree(whole.path, run)
    assert differences(run, whole.path) == []
    if name == "files":
        (run / "checkpoints" / ".partial-step-000009-abc").mkdir()
    elif name == "metrics.jsonl":
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join([*lines, lines[-1]]))
    else:
        newest = steps_newest_first(run / "checkpoints")[0]
        file = newest / "rng.safetensors" if name == "rng" else run / name
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
    assert differences(run, whole.path)


# --- while the data is prepared, and while the result is written


def begun(child: Child, seen: Callable[[], bool]) -> bool:
    """Wait until something is there to see; False if the child ended before."""
    while not seen():
        if child.ended():
            return False
        time.sleep(0.0003)
    return True


@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_the_data_is_prepared(
    kills: int,
    forks: Forks,
    model: Path,
    data: Path,
    whole: Whole,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The examples are there in full or not at all, the ledger too, and the next start ends with the same bits."""
    rng, done, partly, run = random.Random(3), 0, 0, tmp_path / "x"
    for i in range(10 * kills):
        shutil.rmtree(run, ignore_errors=True)
        child = forks.instil(words(model, data, run), tmp_path / "log", seed=i)
        if i % 2:
            begun(child, lambda: bool(left_in(run / "packs")) or (run / "manifest.json").exists())
            time.sleep(rng.random() * 0.02)
        else:
            begun(child, lambda: run.exists())
            time.sleep(rng.random() * 0.2 * whole.seconds)
        if (run / "manifest.json").exists() or child.kill().code != -signal.SIGKILL:
            child.kill()
            continue  # too late
        done += 1
        partly += bool(left_in(run / "packs"))
        for stored in (run / "packs").glob("[!.]*"):
            assert damage(stored) is None
        if (run / "ledger.jsonl").exists():
            assert len(read_ledger(run / "ledger.jsonl")) == 40
        if done % 3 == 0 or left_in(run / "packs"):
            child = forks.instil(words(model, data, run), tmp_path / "log")
            assert child.wait().code == 0, child.said()
            assert differences(run, whole.path) == []
        if done >= kills and partly:
            break
    record_property("kills", done)
    record_property("while examples were written", partly)
    assert done >= kills
    assert partly


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_while_the_result_is_written(
    kills: int,
    rank: int,
    forks: Forks,
    model: Path,
    data: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """model/ and adapter/ are there in full or not at all, also where they were there before; the checkpoint is untouched."""
    rng, done, partly, run, other = random.Random(4), 0, 0, tmp_path / "x", tmp_path / "whole"
    child = forks.instil(words(model, data, other, f"adapter.rank={rank}"), tmp_path / "log")
    assert child.wait().code == 0, child.said()
    command = words(model, data, run, f"adapter.rank={rank}")
    child = forks.instil(command, tmp_path / "log")
    begun(child, lambda: (run / "checkpoints" / f"step-{STEPS:06d}").exists())
    child.kill()
    shutil.copytree(run, tmp_path / "trained")
    for i in range(10 * kills):
        if i % 3 == 0:  # from no result at all; else over what the last one left
            shutil.rmtree(run)
            shutil.copytree(tmp_path / "trained", run)
        (run / "summary.json").unlink(missing_ok=True)
        child = forks.instil(command, tmp_path / "log", seed=i)
        begun(child, lambda: bool(left_in(run)))
        time.sleep(rng.random() * 0.03)
        if child.kill().code != -signal.SIGKILL:
            continue
        done += 1
        partly += bool(left_in(run))
        for name in ("model", "adapter"):
            if (run / name).exists():
                for file in (other / name).iterdir():
                    assert tiny.same(run / name / file.name, file), file
        assert verify(run / "checkpoints" / f"step-{STEPS:06d}") is None
        if done >= kills and partly >= kills / 2:
            break
    child = forks.instil(command, tmp_path / "log")
    assert child.wait().code == 0, child.said()
    assert differences(run, other) == []
    record_property("kills", done)
    record_property("while the result was written", partly)
    assert done >= kills
    assert partly >= kills / 2


def test_killed_between_the_last_save_and_its_prune(
    forks: Forks, model: Path, data: Path, whole: Whole, tmp_path: Path
) -> None:
    """The next start, which has nothing left to train, removes the checkpoint that is one too many."""
    run = tmp_path / "x"
    shutil.copytree(whole.path, run)
    (run / "summary.json").unlink()
    shutil.copytree(run / "checkpoints" / f"step-{STEPS - 1:06d}", run / "checkpoints" / f"step-{STEPS - 2:06d}")
    child = forks.instil(words(model, data, run), tmp_path / "log")
    assert child.wait().code == 0, child.said()
    assert differences(run, whole.path) == []


# --- asked to stop


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="a child's processor time is read from /proc")
@pytest.mark.parametrize("stops", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_asked_to_stop_at_random_instants(
    stops: int,
    forks: Forks,
    model: Path,
    data: Path,
    whole: Whole,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """SIGTERM or SIGINT ends a run with exit 143 or 130 within a step, a save and a second of processor time, without a
    traceback, and the same command ends with the same bits."""
    rng, asked, longest, longest_cpu, runs = random.Random(5), 0, 0.0, 0.0, 0
    while asked < stops:
        runs += 1
        run, log = tmp_path / f"run-{runs}", tmp_path / f"log-{runs}"
        for _ in range(3):
            number = rng.choice([signal.SIGTERM, signal.SIGINT])
            child = forks.instil(words(model, data, run), log, seed=rng.randrange(2**32))
            begun(child, lambda run=run: (run / "run.lock").exists())  # type: ignore[misc]
            time.sleep(rng.random() * whole.seconds)
            if child.ended():
                break
            before, began = child.cpu_s(), time.monotonic()
            child.send(number)
            ended, gone = child.wait(), time.monotonic() - began
            assert "Traceback" not in "\n".join(child.said()), child.said()
            if ended.code == 0:
                break  # the last line was written already
            assert ended.code == 128 + number, child.said()[-5:]
            asked += 1
            steps = [record["seconds"] for record in read_metrics(run / "metrics.jsonl")]
            longest, longest_cpu = max(longest, gone), max(longest_cpu, ended.cpu_s - before)
            assert ended.cpu_s - before < 1 + max([*steps, 0.0]) + 1  # a step, a save (a second is ample here), 1 s
        child = forks.instil(words(model, data, run), log)
        assert child.wait().code == 0, child.said()
        assert differences(run, whole.path) == []
    record_property("stops", asked)
    record_property("longest_s", round(longest, 2))
    record_property("longest_cpu_s", round(longest_cpu, 2))
