"""A disk that is full at any byte of a save loses no checkpoint; the run says what it needs, and goes on or ends in order."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fulldisk
import numpy as np
import pytest
from forks import Forks

import tiny
from instil.train import checkpoint
from instil.train.checkpoint import verify

OFFSETS = 50
LINE = re.compile(
    r"step-000002: not saved: .*\(it needs [\d.e-]+ GB, [\d.e-]+ GB are free\); .*older checkpoints are unt"
)


# --- one save


def check(found: list[dict[str, Any]], reason: str) -> None:
    """Each of the saves failed, said what is needed and free and where, and lost nothing; with room again it worked."""
    for each in found:
        full, again = each["full"], each["again"]
        assert len(full["said"]) == 1, each
        assert LINE.search(full["said"][0]), each
        assert reason in full["said"][0], each
        assert full["there"] == full["good"] == ["step-000001"], each
        assert full["loaded"] == 1, each
        assert again == {"said": [], "there": ["step-000002"], "loaded": 2, "good": ["step-000002"]}, each


def bytes_of_a_save(place: Path) -> int:
    """All files of a checkpoint together."""
    folder = checkpoint.save(place / "measured", fulldisk.state(2), {}, keep=1)
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("raising", [False, True], ids=["refused by the kernel", "no space left"])
def test_a_disk_that_is_full_at_any_byte_of_a_save(
    raising: bool, cold_forks: Forks, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """50 offsets over all bytes of a save, its first and its last among them: the older checkpoint stays, no part of the
    new one does, and the line says where, what is needed and what is free."""
    offsets = [int(each) for each in np.linspace(0, bytes_of_a_save(tmp_path) - 1, OFFSETS)]
    report = tmp_path / "report.json"
    child = cold_forks.call("fulldisk:sweep", str(tmp_path), offsets, raising, str(report), log=tmp_path / "log")
    assert child.wait().code == 0, child.said()
    found = json.loads(report.read_text())
    assert [each["offset"] for each in found] == offsets
    check(found, "No space left" if raising else "File too large")
    record_property("offsets", len(found))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a file system as Linux lets any user")
def test_a_small_file_system(cold_forks: Forks, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The same on a real file system that has 0 to 49 pages free."""
    report, disk = tmp_path / "report.json", tmp_path / "disk"
    disk.mkdir()
    child = cold_forks.call("fulldisk:sweep_small_disk", str(disk), OFFSETS, str(report), log=tmp_path / "log")
    code = child.wait().code
    if code == fulldisk.NO_MOUNTS:
        pytest.skip("this system lets nobody mount a file system")
    assert code == 0, child.said()
    found = json.loads(report.read_text())
    assert len(found) == OFFSETS
    check(found, "No space left on device")
    record_property("offsets", len(found))


def test_room_for_every_byte_is_enough(cold_forks: Forks, tmp_path: Path) -> None:
    """The limit is what makes the saves above fail: one byte more than the last offset, and the save works."""
    report = tmp_path / "report.json"
    size = bytes_of_a_save(tmp_path)
    for raising in (False, True):
        child = cold_forks.call("fulldisk:sweep", str(tmp_path), [size], raising, str(report), log=tmp_path / "log")
        assert child.wait().code == 0, child.said()
        (found,) = json.loads(report.read_text())
        assert found["full"] == {"said": [], "there": ["step-000002"], "loaded": 2, "good": ["step-000002"]}


# --- in a run

RECIPE = (
    *tiny.FAST, "train.lr=1e-2", "train.epochs=3", "train.batch_examples=8", "data.heldout=0.1",
    "checkpoint.every_steps=2", "checkpoint.keep=2",
)  # fmt: skip
STEPS = 12


def words(model: Path, data: Path, run: Path) -> list[object]:
    """The command line of a run of 12 steps, with a save at every second."""
    return ["train", "--model", model, "--data", data, *RECIPE, f"run.dir={run.parent}", f"run.name={run.name}"]


@pytest.fixture(scope="module")
def plenty(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of the run on a disk with room."""
    run = tmp_path_factory.mktemp("plenty") / "x"
    assert tiny.command(*words(model, data, run)).code == 0
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def full_at_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the disk be full when these steps are saved: the second file of each gets half-written."""
    real = checkpoint.save_file

    def plan(*steps: int) -> None:
        def save_file(tensors: Any, path: Path) -> None:
            real(tensors, path)
            if path.name == "optimizer.safetensors" and any(f"step-{step:06d}" in path.parent.name for step in steps):
                os.truncate(path, 100)
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_file", save_file)

    return plan


def steps_in(run: Path) -> list[int]:
    """The checkpoints of a run, all of which verify."""
    found = sorted((run / "checkpoints").iterdir())
    assert [path.name for path in found if verify(path) is not None] == []
    return [int(path.name[5:]) for path in found]


def test_one_failed_save_does_not_end_a_run(
    model: Path, data: Path, tmp_path: Path, plenty: bytes, full_at_steps: Callable[..., None]
) -> None:
    """A warning that says where, what is needed and what is free; the next save works, and the result is the same."""
    full_at_steps(4, 8)  # not in a row: 6 works
    run = tmp_path / "x"
    said = tiny.command(*words(model, data, run))
    assert said.code == 0
    for step in (4, 8):
        (line,) = [line for line in said.err if f"step-{step:06d}: not saved: No space left on device" in line]
        assert line.startswith(f"warning: {run / 'checkpoints'}")
        assert re.search(r"it needs [\d.e-]+ GB, [\d.e-]+ GB are free", line)
        assert "training goes on" in line
        assert line in "".join((run / "log.txt").read_text().splitlines(keepends=True))
    assert steps_in(run) == [10, 12]
    assert tiny.same(run / "model" / "model.safetensors", plenty)


def test_two_failed_saves_in_a_row_end_it(
    model: Path, data: Path, tmp_path: Path, plenty: bytes, full_at_steps: Callable[..., None]
) -> None:
    """Exit 5 at the second, with the checkpoint before both intact; with room, the same command ends with the same bits."""
    full_at_steps(4, 6)
    run = tmp_path / "x"
    said = tiny.command(*words(model, data, run))
    assert said.code == 5
    assert re.search(
        r"step-000006: not saved: No space left on device \(it needs .* GB, .* GB are free\)", said.err[-1]
    )
    assert len(tiny.metrics_of(run)) == 6
    assert steps_in(run) == [2]
    assert not (run / "model").exists()
    full_at_steps()
    said = tiny.command(*words(model, data, run))
    assert said.code == 0
    assert "resumed after step 2" in said.err
    assert tiny.same(run / "model" / "model.safetensors", plenty)


def test_the_last_save_must_work(
    model: Path, data: Path, tmp_path: Path, plenty: bytes, full_at_steps: Callable[..., None]
) -> None:
    """Exit 5 rather than a run that counts as done without its last state; the same command makes up for it."""
    full_at_steps(STEPS)
    run = tmp_path / "x"
    assert tiny.command(*words(model, data, run)).code == 5
    assert steps_in(run) == [8, 10]
    assert not (run / "summary.json").exists()
    full_at_steps()
    assert tiny.command(*words(model, data, run)).code == 0
    assert tiny.same(run / "model" / "model.safetensors", plenty)


def test_asked_to_stop_with_a_full_disk(
    model: Path, data: Path, tmp_path: Path, plenty: bytes, full_at_steps: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """SIGTERM, and the save that it asks for fails: exit 5 and not 143, which would promise a save; the older one is good."""
    from instil import run as story

    append = story.append_metrics

    def stop_at_5(path: Path, record: dict[str, Any]) -> None:
        append(path, record)
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    full_at_steps(5)
    run = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(story, "append_metrics", stop_at_5)
        said = tiny.command(*words(model, data, run))
    assert said.code == 5
    assert "step-000005: not saved: No space left on device" in said.err[-1]
    assert steps_in(run) == [2, 4]
    full_at_steps()
    assert tiny.command(*words(model, data, run)).code == 0
    assert tiny.same(run / "model" / "model.safetensors", plenty)


# --- too small from the start

Usage = namedtuple("Usage", "total used free")


def of_size(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with so many bytes free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


def needed_by(model: Path, data: Path, place: Path) -> int:
    """What a run with keep 2 has on the disk at most, measured: three checkpoints, and the weights of its result."""
    assert tiny.command(*words(model, data, place)).code == 0
    one, other = (sum(f.stat().st_size for f in path.iterdir()) for path in (place / "checkpoints").iterdir())
    return one + 2 * other + (place / "model" / "model.safetensors").stat().st_size


@pytest.mark.parametrize("rank", [0, 4])
def test_a_disk_too_small_is_refused_before_step_1(
    rank: int, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 5, what is free and what is needed (keep + 1 checkpoints and the result), and nothing left behind."""
    most = needed_by(model, data, tmp_path / "measured" / "x") if not rank else 0
    before = tiny.tree(tmp_path)
    of_size(100_000, monkeypatch)
    run = tmp_path / "runs" / "x"
    said = tiny.command(*words(model, data, run), f"adapter.rank={rank}")
    assert said.code == 5
    assert tiny.tree(tmp_path) == before
    found = re.search(r"has 0.0001 GB free, and the run needs ([\d.e-]+) GB \(3 checkpoints of", said.err[-1])
    assert found
    assert str(run) in said.err[-1]
    if not rank:
        assert 0.9 * most < float(found[1]) * 1e9 < 1.1 * most
    of_size(int(float(found[1]) * 1.1e9), monkeypatch)
    assert tiny.command(*words(model, data, run), f"adapter.rank={rank}").code == 0


def test_a_disk_that_has_become_too_small_is_refused_on_resume(
    model: Path, data: Path, tmp_path: Path, plenty: bytes, full_at_steps: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What the run has there already counts for it; what is refused stays as it was, and goes on with room."""
    run = tmp_path / "x"
    full_at_steps(6, 8)
    assert tiny.command(*words(model, data, run)).code == 5
    full_at_steps()
    before = {path: path.read_bytes() for path in run.rglob("step-*/*")}
    with monkeypatch.context() as patch:
        of_size(1000, patch)
        said = tiny.command(*words(model, data, run))
        assert said.code == 5
        assert "the run needs" in said.err[-1]
    assert {path: path.read_bytes() for path in run.rglob("step-*/*")} == before
    assert len(before) == 10
    assert tiny.command(*words(model, data, run)).code == 0
    assert tiny.same(run / "model" / "model.safetensors", plenty)
