"""Clocks that lie: jumps of a year, equal and backward file times, a process that was stopped; only order and steps count."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import assert_same_run, forked, until_step, words

import tiny
from instil.train import checkpoint
from instil.train.checkpoint import TrainState, load_latest, save, steps_newest_first
from instil.train.signals import Asked

YEAR_S = 365.25 * 86_400


def state_of(step: int) -> TrainState:
    return TrainState(step, {"w": torch.full((4,), float(step))}, {}, checkpoint.rng_state(), {})


def touched(folder: Path, at: Callable[[int], float]) -> None:
    """Give every checkpoint and every file in it a time; at: of the number of a step."""
    for path in steps_newest_first(folder):
        for each in (*path.iterdir(), path):
            os.utime(each, (at(checkpoint.step_of(path)),) * 2)


@pytest.mark.parametrize(
    "at",
    [lambda step: 1e9, lambda step: 1e9 - step, lambda step: 1e9 + step * YEAR_S * (-1) ** step, lambda step: 0.0],
    ids=["equal", "backward", "jumping", "epoch"],
)
def test_file_times_decide_nothing(at: Callable[[int], float], tmp_path: Path) -> None:
    """Which checkpoint is used and which are pruned goes by their step, whatever the times of their files."""
    for step in (1, 2, 3, 10, 11):
        save(tmp_path, state_of(step), {}, keep=9)
    touched(tmp_path, at)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state.step == 11
    assert found.state.weights["w"].tolist() == [11.0] * 4
    save(tmp_path, state_of(12), {}, keep=3)
    assert [path.name for path in steps_newest_first(tmp_path)] == ["step-000012", "step-000011", "step-000010"]


def test_going_by_file_times_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: with the newest file time first, the check above finds another checkpoint."""

    def by_time(folder: Path) -> list[Path]:
        return sorted(folder.glob("step-*"), key=lambda path: path.stat().st_mtime, reverse=True)

    for step in (1, 2, 3):
        save(tmp_path, state_of(step), {}, keep=9)
    touched(tmp_path, lambda step: 1e9 - step)
    monkeypatch.setattr(checkpoint, "steps_newest_first", by_time)
    found = load_latest(tmp_path)
    assert found is not None
    assert found.state.step == 1


@pytest.fixture
def wall_jumps(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the wall clock be off by so much more at every look."""
    real, real_text, off = time.time, time.strftime, [0.0]

    def jump(by: float) -> None:
        def now() -> float:
            off[0] += by
            return real() + off[0]

        def text(form: str, at: Any = None) -> str:
            off[0] += by
            return real_text(form, at or time.localtime(max(0.0, real() + off[0])))

        monkeypatch.setattr(time, "time", now)
        monkeypatch.setattr(time, "strftime", text)

    return jump


@pytest.mark.parametrize("by", [YEAR_S / 20, -YEAR_S / 20, YEAR_S, -YEAR_S / 4], ids=["+18d", "-18d", "+1y", "-3mo"])
def test_a_wall_clock_that_jumps_changes_nothing(
    by: float, source: Path, whole: Path, tmp_path: Path, wall_jumps: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Saved by the clock and resumed while it jumps at every look: the same bits, and durations of the monotonic clock."""
    wall_jumps(by)
    folder, append = tmp_path / "x", []
    from instil import run as story

    real = story.append_metrics

    def stop(path: Path, record: dict[str, Any]) -> None:
        real(path, record)
        append.append(record["step"])
        if record["step"] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(story, "append_metrics", stop)
    began = time.monotonic()
    first = tiny.command(*words(source, folder, "checkpoint.every_s=1e-3", "checkpoint.keep=3"))
    assert first.code == 143
    kept = [checkpoint.step_of(path) for path in steps_newest_first(folder / "checkpoints")]
    assert kept == [9, 8, 7]
    second = tiny.command(*words(source, folder))
    gone = time.monotonic() - began
    assert second.code == 0
    assert "resumed after step 9" in second.err
    assert append == list(range(1, 41))
    assert_same_run(folder, whole)
    seconds = [record["seconds"] for record in tiny.metrics_of(folder)]
    assert all(0 < each < gone for each in seconds)
    assert sum(seconds) < gone


def test_save_intervals_do_not_follow_the_wall_clock(
    source: Path, tmp_path: Path, wall_jumps: Callable[[float], None]
) -> None:
    """Five minutes between saves stay five minutes though a year passes at every look: only the last step is saved."""
    wall_jumps(YEAR_S)
    assert tiny.command(*words(source, tmp_path / "x", "train.epochs=2")).code == 0
    assert [path.name for path in (tmp_path / "x" / "checkpoints").iterdir()] == ["step-000008"]


# ── a process that was stopped ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no SIGSTOP here")
@pytest.mark.parametrize("planted", [False, True])
def test_a_pause_is_in_no_step(
    planted: bool, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP for three seconds, SIGCONT: no step holds them, nor do tokens/s. Planted: without SIGCONT's word one does."""
    folder, pause = tmp_path / "x", 3.0

    def deaf() -> None:
        if planted:
            Asked.without_pauses = lambda self, seconds, usual: seconds  # type: ignore[method-assign]
        from instil.train import loop

        step = loop.train_step

        def slow(*arguments: Any, **more: Any) -> Any:
            time.sleep(0.02)  # the stop finds the process within a step, most probably
            return step(*arguments, **more)

        loop.train_step = slow  # type: ignore[assignment]

    began = time.monotonic()
    child = forked(words(source, folder), tmp_path / "said", before=deaf)
    until_step(child, folder, 6)
    child.send(signal.SIGSTOP)
    time.sleep(pause)
    child.send(signal.SIGCONT)
    assert child.wait() == 0, child.lines()
    gone = time.monotonic() - began
    assert_same_run(folder, whole)
    seconds = [record["seconds"] for record in tiny.metrics_of(folder)]
    assert (max(seconds) >= pause) == planted
    assert (sum(seconds) < gone - pause) != planted


@pytest.mark.parametrize(
    ("seconds", "usual", "paused", "counted"),
    [(5.0, 0.5, False, 5.0), (5.0, 0.5, True, 0.5), (0.4, 0.5, True, 0.4), (5.0, 0.0, True, 5.0)],
)
def test_what_a_step_counts_for(seconds: float, usual: float, paused: bool, counted: float) -> None:
    """Its own time; the usual time after a pause, where one is known; and a pause is forgotten with its step."""
    asked = Asked(paused=paused)
    assert asked.without_pauses(seconds, usual) == counted
    assert asked.without_pauses(seconds, usual) == seconds
