"""Whatever happens to a run between its steps, it ends as the run to which nothing happened, to the bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

import tiny
from instil import run as story
from instil.train.checkpoint import steps_newest_first, verify

RECIPE = (*tiny.FAST, "train.lr=1e-2", "train.epochs=4", "train.batch_examples=8", "data.heldout=0.1")
STEPS = 4 * 5  # 36 rows, 8 examples a step: 4 or 5 steps an epoch; the last ones may stay unused
KEYS = ("steps", "loss_before", "loss_after", "heldout_losses", "target_tokens", "computed_tokens")


class Killed(BaseException):
    """A process that ends without a word."""


class Run:
    """A run of the tiny model, and what can be done to it."""

    def __init__(self, place: Path, folder: Path):
        self.place, self.folder = place, folder

    def go(self, at: int = 0, do: Callable[[Path], None] = lambda metrics: None) -> int:
        """Run the command; do something while the record of the `at`-th step from now is written. Returns its exit code."""
        append, left = story.append_metrics, at

        def spy(path: Path, record: dict[str, Any]) -> None:
            nonlocal left
            append(path, record)
            left -= 1
            if left == 0:
                do(path)

        where = (f"run.dir={self.folder.parent}", f"run.name={self.folder.name}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(story, "append_metrics", spy)
            try:
                words = ("train", "--model", self.place / "m", "--data", self.place / "a.jsonl", *RECIPE, *where)
                return tiny.command(*words, "checkpoint.every_steps=2").code
            except Killed:
                return -9

    @property
    def checkpoints(self) -> list[Path]:
        return steps_newest_first(self.folder / "checkpoints")

    @property
    def sound(self) -> list[Path]:
        return [path for path in self.checkpoints if verify(path) is None]


def same(one: Path, other: Path) -> None:
    """Equal but for what a clock wrote."""
    weights = "model/model.safetensors"
    assert tiny.same(one / weights, other / weights)
    assert tiny.without_times(tiny.metrics_of(one)) == tiny.without_times(tiny.metrics_of(other))


class Faults(RuleBasedStateMachine):
    """Steps, stops, kills, damage, moves and copies in any order; at the end the command runs through."""

    place: Path
    whole: Path
    seen: dict[str, int]

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(dir=self.place))
        self.run = Run(self.place, self.scratch / "runs" / "x")

    def count(self, what: str) -> None:
        self.seen[what] = self.seen.get(what, 0) + 1

    @property
    def begun(self) -> bool:
        return (self.run.folder / "manifest.json").exists()

    @rule(steps=st.integers(1, 7))
    def stop(self, steps: int) -> None:
        """SIGTERM after some steps."""
        code = self.run.go(steps, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert code in (0, 143)
        self.count("stop")

    @rule(steps=st.integers(1, 7), torn=st.booleans())
    def kill(self, steps: int, torn: bool) -> None:
        """No save and no word; the line of a step may be torn."""

        def die(metrics: Path) -> None:
            if torn:
                with metrics.open("ab") as file:
                    file.write(b'{"step":99,"lo')
            raise Killed

        assert self.run.go(steps, die) in (0, -9)
        self.count("kill")

    @precondition(lambda self: len(self.run.sound) > 1)
    @rule(seed=st.integers(0, 2**32), how=st.sampled_from(["flip", "cut", "zero", "gone", "extra"]))
    def damage(self, seed: int, how: str) -> None:
        """Something happens to a file of the newest checkpoint; an older one is sound."""
        rng, newest = random.Random(seed), self.run.sound[0]
        file = rng.choice(sorted(newest.iterdir()))
        content = bytearray(file.read_bytes())
        if how == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif how == "cut":
            content = content[: rng.randrange(len(content))]
        elif how == "zero":
            content = bytearray(len(content))
        if how == "gone":
            file.unlink()
        elif how == "extra":
            (newest / "extra").write_bytes(b"")
        else:
            file.write_bytes(bytes(content))
        assert verify(newest) is not None
        self.count("damage")

    @precondition(lambda self: self.begun)
    @rule(step=st.integers(1, 40))
    def litter(self, step: int) -> None:
        """What processes that died left: a partial checkpoint with a high step, trash, drafts, a partial export."""
        folder = self.run.folder / "checkpoints"
        folder.mkdir(exist_ok=True)
        for name in (f".partial-step-{step:06d}-ab12", ".trash-step-000001-ab12"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "weights.safetensors").write_bytes(b"half")
        (self.run.folder / ".manifest.json.tmp").write_bytes(b"{")
        (self.run.folder / ".partial-model-ab12").mkdir(exist_ok=True)
        self.count("litter")

    @precondition(lambda self: self.begun)
    @rule(name=st.sampled_from(["x", "y", "other"]), copied=st.booleans())
    def move(self, name: str, copied: bool) -> None:
        """The folder goes somewhere else, or a copy of it does and the original is lost."""
        there = Path(tempfile.mkdtemp(dir=self.scratch)) / name
        if copied:
            shutil.copytree(self.run.folder, there)
            shutil.rmtree(self.run.folder)
        else:
            self.run.folder.rename(there)
        self.run.folder = there
        self.count("copy" if copied else "move")

    @precondition(lambda self: self.begun)
    @rule(days=st.integers(-400, 400))
    def clock(self, days: int) -> None:
        """Every file's time is another, the newest checkpoint's the oldest."""
        for i, path in enumerate(sorted(self.run.folder.rglob("*"), reverse=True)):
            os.utime(path, (1.8e9 + 86400 * days + i,) * 2)
        self.count("clock")

    def teardown(self) -> None:
        """The command runs through, and nothing of all this is to be seen."""
        code = self.run.go()
        assert code == 0
        same(self.run.folder, self.whole)
        assert not [path for path in self.run.folder.rglob(".*") if path.name != ".gitignore"]
        shutil.rmtree(self.scratch)
        self.count("finished")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> type[Faults]:
    """The machine with its model, its data, and the run to which nothing happened."""
    place = tmp_path_factory.mktemp("state")
    tiny.write_model(place / "m")
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(40))
    whole = Run(place, place / "whole" / "x")
    assert whole.go() == 0
    return type("PlacedFaults", (Faults,), {"place": place, "whole": whole.folder, "seen": {}})


def search(machine: type[Faults], examples: int) -> dict[str, int]:
    quick = settings(
        max_examples=examples, stateful_step_count=8, deadline=None, derandomize=examples < 20,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(machine, settings=quick)
    return machine.seen


def test_nothing_that_happens_changes_how_a_run_ends(machine: type[Faults]) -> None:
    """A few random histories, each of up to eight things."""
    seen = search(machine, 4)
    assert seen["finished"] >= 4
    assert seen["kill"] + seen["stop"] >= 4


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_nothing_that_happens_changes_how_a_run_ends_at_length(
    machine: type[Faults], record_property: Callable[[str, object], None]
) -> None:
    """Sixty histories; every kind of fault is among them."""
    seen = search(machine, 60)
    for what, number in seen.items():
        record_property(what, number)
    assert seen["finished"] >= 60
    assert {"stop", "kill", "damage", "litter", "move", "copy", "clock"} <= seen.keys(), seen


def test_a_run_that_forgets_its_random_order_is_caught(machine: type[Faults], monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a resume that does a step twice ends otherwise, and the comparison sees it."""
    from instil import resume

    put_back = resume.put_back

    def one_less(*given: Any) -> Any:
        progress = put_back(*given)
        progress.step = max(0, progress.step - 1)
        return progress

    folder = machine.place / "planted" / "x"
    run = Run(machine.place, folder)
    assert run.go(5, lambda _: os.kill(os.getpid(), signal.SIGTERM)) == 143
    monkeypatch.setattr(story, "put_back", one_less)
    run.go()
    with pytest.raises(AssertionError):
        same(folder, machine.whole)
