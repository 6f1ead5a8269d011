"""Stopped and gone on: Ctrl-C and SIGTERM save, the same command finishes, and the result is bit for bit the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny

RECIPE = (*tiny.FAST, "train.lr=1e-2", "train.epochs=40", "train.batch_examples=8", "data.heldout=0.1")
STEPS = 40 * 4  # 36 rows, 8 examples a step: 4 steps an epoch


def words(model: Path, data: Path, folder: Path, *more: object) -> list[str]:
    """The command line of a run at `folder`."""
    where = (f"run.dir={folder.parent}", f"run.name={folder.name}")
    return [str(word) for word in ("train", "--model", model, "--data", data, *RECIPE, *where, *more)]


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "x"
    assert tiny.command(*words(model, data, folder)).code == 0
    assert len(tiny.metrics_of(folder)) == STEPS
    return folder


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Have this process get a signal while the record of a step is written."""
    from instil import run as story

    append = story.append_metrics

    def plan(number: int, step: int) -> None:
        def spy(path: Path, record: dict[str, Any]) -> None:
            append(path, record)
            if record["step"] == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(story, "append_metrics", spy)

    return plan


def assert_same_run(run: Path, other: Path) -> None:
    """Equal but for what a clock wrote."""
    weights = "model/model.safetensors"
    assert tiny.same(run / weights, other / weights)
    assert tiny.without_times(tiny.metrics_of(run)) == tiny.without_times(tiny.metrics_of(other))
    mine, its = (json.loads((folder / "summary.json").read_text()) for folder in (run, other))
    for key in ("steps", "loss_before", "loss_after", "heldout_losses", "target_tokens", "computed_tokens"):
        assert mine[key] == its[key], key


def test_ctrl_c_saves_and_the_same_command_goes_on(model: Path, data: Path, whole: Path, tmp_path: Path) -> None:
    """A real process, a real SIGINT: exit 130, a verified checkpoint, how to resume; then the uninterrupted run's bits."""
    from instil.train.checkpoint import verify

    folder = tmp_path / "x"
    code = "from instil.cli.main import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *words(model, data, folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    done = len(tiny.metrics_of(folder))
    assert err.splitlines()[-1] == f"step {done}: stopped by SIGINT, saved; run the same command again to go on"
    saved = folder / "checkpoints" / f"step-{done:06d}"
    assert verify(saved) is None
    assert not (folder / "summary.json").exists()
    assert not (folder / "model").exists()

    said = tiny.command(*words(model, data, folder))
    assert said.code == 0
    assert f"resumed after step {done}" in said.err
    assert_same_run(folder, whole)


@pytest.mark.parametrize("at", [5, STEPS])
def test_sigterm_saves_at_any_step(
    at: int, model: Path, data: Path, whole: Path, tmp_path: Path, signal_at: Callable[[int, int], None]
) -> None:
    """Exit 143 after the step, also after the last one; the same command finishes with the same bits."""
    folder = tmp_path / "x"
    signal_at(signal.SIGTERM, at)
    said = tiny.command(*words(model, data, folder))
    assert said.code == 143
    assert said.err[-1] == f"step {at}: stopped by SIGTERM, saved; run the same command again to go on"
    for verb in ("chat", "evaluate"):
        unfinished = tiny.command(verb, folder, text="hello\n")
        assert unfinished.code == 2
        assert unfinished.err[-1].startswith(f"{folder}: the run is not finished: it has no model/ yet; ")
    signal_at(signal.SIGTERM, 0)
    assert tiny.command(*words(model, data, folder)).code == 0
    assert_same_run(folder, whole)


def test_a_second_ctrl_c_leaves_at_once(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two within two seconds: exit 130 without a save, and what was saved before is untouched."""
    from instil import run as story

    append = story.append_metrics

    def twice(path: Path, record: dict[str, Any]) -> None:
        append(path, record)
        if record["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(story, "append_metrics", twice)
    said = tiny.command(*words(model, data, tmp_path / "x", "checkpoint.every_steps=2"))
    assert said.code == 130
    assert said.err[-1].startswith("stopped by Ctrl-C")
    assert sorted(f.name for f in (tmp_path / "x" / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


def test_ctrl_c_before_training_leaves_nothing(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the data is prepared there is nothing to save: exit 130 and no folder."""
    from instil import prepare

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "certified", stop)
    before = tiny.tree(tmp_path)
    assert tiny.command(*words(model, data, tmp_path / "runs" / "x")).code == 130
    assert tiny.tree(tmp_path) == before


def test_a_killed_run_goes_on_from_its_checkpoint(
    model: Path, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal, no save: lines after the checkpoint and a torn last line are made again, with the same bits."""
    from instil import run as story

    class Killed(BaseException):
        pass

    append = story.append_metrics

    def die(path: Path, record: dict[str, Any]) -> None:
        append(path, record)
        if record["step"] == 9:
            with path.open("ab") as file:
                file.write(b'{"step":10,"lo')
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(story, "append_metrics", die)
        with pytest.raises((Killed, AssertionError)):
            tiny.command(*words(model, data, tmp_path / "x", "checkpoint.every_steps=6"))
    said = tiny.command(*words(model, data, tmp_path / "x"))
    assert said.code == 0
    assert "resumed after step 6" in said.err
    assert_same_run(tmp_path / "x", whole)


def test_a_damaged_checkpoint_is_passed_over_aloud(
    model: Path, data: Path, whole: Path, tmp_path: Path, signal_at: Callable[[int, int], None]
) -> None:
    """A flipped byte in the newest checkpoint: the run says so, goes on from the one before, and ends the same."""
    signal_at(signal.SIGTERM, 8)
    assert tiny.command(*words(model, data, tmp_path / "x", "checkpoint.every_steps=3")).code == 143
    newest = tmp_path / "x" / "checkpoints" / "step-000008" / "weights.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    signal_at(signal.SIGTERM, 0)
    said = tiny.command(*words(model, data, tmp_path / "x"))
    assert said.code == 0
    assert any(line.startswith("passed over: ") and "step-000008" in line for line in said.err)
    assert "resumed after step 6" in said.err
    assert_same_run(tmp_path / "x", whole)
