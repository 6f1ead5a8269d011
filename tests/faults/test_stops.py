"""Asked to stop (SIGTERM, Ctrl-C) at any moment: a verified save, the exit code, how to go on; and then the same bits."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import STEPS, Child, assert_same_run, forked, fresh, left_over, until, until_step, words

import instil.workers
import tiny
from instil.train import checkpoint
from instil.train.checkpoint import TrainState, load_latest, save, verify
from instil.train.signals import listening

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forks on Linux only")

# ── a real process, at random steps ──────────────────────────────────────────────────────────────────────────────────


def stopped_at_random(place: Path, folder: Path, whole: Path, times: int, seed: int) -> list[float]:
    """Stop one run again and again at random moments, then let it end; seconds from the signal to the exit."""
    rng, waits, done = random.Random(seed), [], 0
    for attempt in range(times):
        child = forked(words(place, folder), folder.with_name(f"{folder.name}-{attempt}"))
        until_step(child, folder, done + rng.randint(1, (STEPS - done) // 3))
        time.sleep(rng.random() * 0.02)
        number = rng.choice(list(CODES))
        sent = time.monotonic()
        child.send(number)
        assert child.wait() == CODES[number], child.lines()
        records = tiny.metrics_of(folder)
        waits.append(time.monotonic() - sent)
        assert waits[-1] <= max(record["seconds"] for record in records) + 1 + 4  # a save takes 0.02 s; 4 s for others
        done = len(records)
        name = signal.Signals(number).name
        assert child.lines()[-1] == f"step {done}: stopped by {name}, saved; run the same command again to go on"
        assert verify(folder / "checkpoints" / f"step-{done:06d}") is None
        assert left_over(folder) == []
        assert not (folder / "model").exists()
    said = tiny.command(*words(place, folder))
    assert said.code == 0
    assert f"resumed after step {done}" in said.err
    assert_same_run(folder, whole)
    return waits


def test_stopped_three_times_at_random_steps(
    source: Path, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGTERM or SIGINT: exit within a step, a save and a second (and what a busy machine takes), and the bits are kept."""
    waits = stopped_at_random(source, tmp_path / "x", whole, 3, seed=1)
    record_property("stops", len(waits))
    record_property("longest_s", round(max(waits), 3))
    assert len(waits) == 3


@pytest.mark.slow
def test_stopped_sixty_times_at_random_steps(
    source: Path, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Twenty runs, each stopped three times."""
    waits = [
        wait
        for seed in range(20)
        for wait in stopped_at_random(source, tmp_path / f"x{seed}", whole, 3, seed=10 + seed)
    ]
    record_property("stops", len(waits))
    record_property("longest_s", round(max(waits), 3))
    assert len(waits) == 60


# ── while it saves ───────────────────────────────────────────────────────────────────────────────────────────────────


def state_of(step: int) -> TrainState:
    weights = {"w": torch.full((8, 8), float(step))}
    return TrainState(step, weights, {"exp_avg.w": torch.ones(8, 8)}, checkpoint.rng_state(), {"seconds": 0.5})


class Points:
    """Every call of the system that a save makes and that changes a file or a name; at one of them something happens."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int, happens: Callable[[], None]):
        self.count = 0
        for name in ("fsync", "rename", "mkdir", "unlink", "rmdir", "open"):
            self._watch(patch, name, at, happens)

    def _watch(self, patch: pytest.MonkeyPatch, name: str, at: int, happens: Callable[[], None]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            self.count += 1
            if self.count == at:
                happens()
            return real(*arguments, **more)

        patch.setattr(os, name, call)


def saved_again(folder: Path, patch: pytest.MonkeyPatch, at: int, happens: Callable[[], None]) -> int:
    """Save steps 1 and 2, then step 3 (which prunes step 1) with something happening at a call of it; the calls made."""
    with patch.context() as within:
        save(folder, state_of(1), {}, keep=2)
        save(folder, state_of(2), {}, keep=2)
        points = Points(within, at, happens)
        save(folder, state_of(3), {}, keep=2)
    return points.count


def interrupt(number: int, times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)
        for _ in range(3):
            pass  # the handler runs between two instructions


def test_ctrl_c_twice_at_every_call_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """It leaves at once, wherever it is; two checkpoints are good, the newest is the old one or the new one, to the bit."""
    calls = saved_again(tmp_path / "0", monkeypatch, 0, lambda: None)
    assert calls > 10
    newest = []
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        with listening(), pytest.raises(KeyboardInterrupt):
            saved_again(folder, monkeypatch, at, lambda: interrupt(signal.SIGINT, 2))
        good = [path for path in checkpoint.steps_newest_first(folder) if verify(path) is None]
        assert len(good) >= 2, at
        found = load_latest(folder)
        assert found is not None
        assert found.damaged == []
        assert torch.equal(found.state.weights["w"], torch.full((8, 8), float(found.state.step)))
        newest.append(found.state.step)
        save(folder, state_of(4), {}, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == [f"step-{found.state.step:06d}", "step-000004"]
    record_property("points", calls)
    assert set(newest) == {2, 3}
    assert newest == sorted(newest)


def test_sigterm_at_every_call_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    """A first or another SIGTERM, or a single Ctrl-C, lets the save end: nothing is lost or left over."""
    calls = saved_again(tmp_path / "0", monkeypatch, 0, lambda: None)
    for at in range(1, calls + 1):
        for number, times in ((signal.SIGTERM, 3), (signal.SIGINT, 1)):
            folder = tmp_path / f"{at}-{number}"
            with listening() as asked:
                saved_again(folder, monkeypatch, at, lambda n=number, t=times: interrupt(n, t))  # type: ignore[misc]
            assert asked.signal == number
            assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
            assert all(verify(path) is None for path in folder.iterdir())
    record_property("points", 2 * calls)
    assert calls > 10


@pytest.fixture
def signal_in_save(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have this process get signals while the checkpoint of a step is filled."""
    fill = checkpoint._fill

    def plan(step: int, number: int, times: int = 1) -> None:
        def spy(partial: Path, state: TrainState, *more: Any) -> None:
            if state.step == step:
                interrupt(number, times)
            fill(partial, state, *more)

        monkeypatch.setattr(checkpoint, "_fill", spy)

    return plan


@pytest.mark.parametrize("number", list(CODES))
@pytest.mark.parametrize("at", [8, STEPS])
def test_a_signal_during_a_save_is_not_forgotten(
    at: int, number: signal.Signals, source: Path, whole: Path, tmp_path: Path,
    signal_in_save: Callable[..., None],
) -> None:  # fmt: skip
    """Also the last save of a run, behind which no step is: the run stops saved, before the result is written."""
    folder = tmp_path / "x"
    signal_in_save(at, number)
    said = tiny.command(*words(source, folder, "checkpoint.every_steps=8"))
    assert said.code == CODES[number]
    assert said.err[-1] == f"step {at}: stopped by {number.name}, saved; run the same command again to go on"
    assert verify(folder / "checkpoints" / f"step-{at:06d}") is None
    assert not (folder / "model").exists()
    signal_in_save(0, number)
    assert tiny.command(*words(source, folder)).code == 0
    assert_same_run(folder, whole)


def test_ctrl_c_twice_in_the_save_of_a_run(
    source: Path, whole: Path, tmp_path: Path, signal_in_save: Callable[..., None]
) -> None:
    """Exit 130 without that save; the one before is good, and the same command ends with the same bits."""
    folder = tmp_path / "x"
    signal_in_save(16, signal.SIGINT, 2)
    said = tiny.command(*words(source, folder, "checkpoint.every_steps=8"))
    assert said.code == 130
    assert said.err[-1].startswith("stopped by Ctrl-C")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000008"]
    signal_in_save(0, signal.SIGINT)
    said = tiny.command(*words(source, folder))
    assert "resumed after step 8" in said.err
    assert_same_run(folder, whole)


# ── before and after the steps ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["certified", "write_ledger", "publish_examples"])
@pytest.mark.parametrize("number", list(CODES))
def test_stopped_while_data_is_prepared(
    name: str, number: signal.Signals, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half-written and nothing else is left; the same command then begins, and ends as ever."""
    from instil import prepare

    real = getattr(prepare, name)

    def spy(*arguments: Any, **more: Any) -> Any:
        found = real(*arguments, **more)
        interrupt(number, 1)
        return found

    before = tiny.tree(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, name, spy)
        said = tiny.command(*words(source, tmp_path / "runs" / "x"))
    assert said.code == CODES[number]
    assert said.err[-1].startswith("stopped by")
    assert tiny.tree(tmp_path) == before
    assert tiny.command(*words(source, tmp_path / "runs" / "x")).code == 0
    assert_same_run(tmp_path / "runs" / "x", whole)


def export_points() -> Iterator[tuple[str, Any]]:
    """Moments of the export: before anything of it is there, with all its files there, and between it and the summary."""
    from transformers import PreTrainedModel

    import instil.files
    import instil.run

    yield "weights", (PreTrainedModel, "save_pretrained")
    yield "rename", (instil.files, "_put")
    yield "summary", (instil.run, "summary")
    yield "report", (instil.run, "write_report")


@pytest.mark.parametrize("point", ["weights", "rename", "summary", "report"])
@pytest.mark.parametrize("number", list(CODES))
def test_stopped_while_the_result_is_written(
    point: str, number: signal.Signals, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """model/ is absent or complete, the steps are saved, and the same command ends with the same bits without a step."""
    folder = tmp_path / "x"
    place, name = dict(export_points())[point]
    real = getattr(place, name)

    def spy(*arguments: Any, **more: Any) -> Any:
        if point != "rename" or str(arguments[1]).endswith("model"):
            interrupt(number, 1)
        return real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, spy)
        said = tiny.command(*words(source, folder))
    assert said.code == CODES[number]
    assert "untouched" in said.err[-1]
    assert left_over(folder) == []
    assert verify(folder / "checkpoints" / f"step-{STEPS:06d}") is None
    assert (folder / "model").exists() == (point in ("summary", "report"))
    assert (folder / "summary.json").exists() == (point == "report")
    again = tiny.command(*words(source, folder))
    assert again.code == 0
    assert not any(line.startswith("step ") for line in again.err)
    assert (folder / "report.html").exists()
    assert_same_run(folder, whole)


def sleep_in_workers(marks: Path) -> None:
    """In a child: workers say their number in a file and then take for ever."""
    instil.workers.SERIAL_ROWS, instil.workers.ROWS_AT_ONCE = 8, 4
    main = os.getpid()

    def some(*_: object) -> None:
        assert os.getpid() != main
        (marks / str(os.getpid())).touch()
        time.sleep(600)

    instil.workers._some = some  # type: ignore[assignment]
    os.sched_getaffinity = lambda _pid: {0, 1}  # type: ignore[assignment]


def gone(marks: Path) -> bool:
    """Whether no worker that left its number lives."""
    return not any(alive(int(mark.name)) for mark in marks.iterdir())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@linux
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", list(CODES))
def test_stopped_while_workers_prepare(number: signal.Signals, group: bool, source: Path, tmp_path: Path) -> None:
    """Sent to the process, or as a terminal does to all of them: no worker and no traceback is left, nor any file."""
    (tmp_path / "marks").mkdir()
    child: Child = forked(
        words(source, tmp_path / "runs" / "x"), tmp_path / "said", before=lambda: sleep_in_workers(tmp_path / "marks")
    )
    until(lambda: len(list((tmp_path / "marks").iterdir())) == 2 or child.poll() is not None, child)
    if group:
        for mark in (tmp_path / "marks").iterdir():
            os.kill(int(mark.name), number if number == signal.SIGINT else signal.SIGCONT)
    child.send(number)
    assert child.wait() == CODES[number], child.lines()
    assert len(child.lines()) == 1, child.lines()
    assert child.lines()[0].startswith("stopped by")
    assert gone(tmp_path / "marks")
    assert not (tmp_path / "runs").exists()


def stop_in_the_fork(number: signal.Signals) -> None:
    """The signal comes while the process forks a worker, where Python passes over what a handler raises."""
    sent: list[int] = []

    def send() -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    os.register_at_fork(after_in_parent=send)


@linux
@pytest.mark.parametrize("number", list(CODES))
def test_stopped_while_a_worker_is_forked(number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """The signal is not lost, and no worker is left."""
    (tmp_path / "marks").mkdir()

    def before() -> None:
        sleep_in_workers(tmp_path / "marks")
        stop_in_the_fork(number)

    child: Child = forked(words(source, tmp_path / "runs" / "x"), tmp_path / "said", before=before)
    assert child.wait() == CODES[number], child.lines()
    assert child.lines()[0].startswith("stopped by")
    assert gone(tmp_path / "marks")
    assert not (tmp_path / "runs").exists()


def test_a_fresh_interpreter_stops_like_a_fork(source: Path, tmp_path: Path) -> None:
    """Exit 143 and one line of `instil train` when SIGTERM comes before anything is loaded; nothing is left."""
    code = (
        "import os, signal, instil.folder\n"
        "instil.folder.refuse_busy = lambda config: os.kill(os.getpid(), signal.SIGTERM)\n"
        "from instil.cli.main import main; main()"
    )
    done = fresh(words(source, tmp_path / "runs" / "x"), tmp_path, code)
    assert done.returncode == 143, done.stderr
    assert done.stderr.startswith("stopped by SIGTERM; ")
    assert done.stderr.count("\n") == 1
    assert tiny.tree(tmp_path) == set()
