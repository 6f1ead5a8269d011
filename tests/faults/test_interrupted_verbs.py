"""Fork and verify, ended at any moment: what they were making is there or not, and nothing goes on without them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import Child, forked, until

import stories
import tiny

DONE = 4


def at(moment: str, act: Callable[[], object]) -> Callable[[], None]:
    """In a child: have something happen before or after a part of a fork."""

    def plant() -> None:
        from instil import files
        from instil import fork as module

        places: dict[str, tuple[Any, str]] = {
            "checkpoint": (module.checkpoint, "save"), "history": (module, "keep_metrics_through"),
            "configuration": (module, "dump_config"), "rename": (files, "_put"),
        }  # fmt: skip
        when, _, part = moment.partition(" ")
        where, name = places[part]
        real = getattr(where, name)

        def spy(*given: Any, **more: Any) -> Any:
            if name == "_put" and given[1].name != "y":
                return real(*given, **more)
            if when == "before":
                act()
            found = real(*given, **more)
            act()
            return found

        setattr(where, name, spy)

    return plant


MOMENTS = [
    "before checkpoint",
    "after checkpoint",
    "after history",
    "after configuration",
    "before rename",
    "after rename",
]


def forking(run: Path, said: Path, before: Callable[[], None]) -> Child:
    return forked(["fork", str(run), "y"], said, before=before)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fork_that_is_killed_is_there_or_not(moment: str, place: Path) -> None:
    """SIGKILL: no half a run to go on from; where it is not there the same fork can be made, and nothing is left beside it."""
    run = stories.stopped(place, DONE)
    child = forking(run, place / "said", at(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert child.wait() == -signal.SIGKILL, child.lines()
    folder = run.with_name("y")
    if moment != "after rename":
        assert tiny.tree(folder) == {"run.lock"}
        assert tiny.command("train", folder).code == 2
        assert tiny.command("fork", run, "y").code == 0
        assert {path.name for path in run.parent.iterdir()} == {"x", "y"}
    assert tiny.command("train", folder).code == 0
    assert {path.name for path in run.parent.iterdir()} == {"x", "y"}
    assert stories.train(place).code == 0
    assert stories.differing(folder, run) == []


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_fork_that_is_stopped_leaves_nothing(moment: str, number: int, code: int, place: Path) -> None:
    """SIGTERM as Ctrl-C: a line, and every folder as it was."""
    run = stories.stopped(place, DONE)
    before = stories.contents(run.parent)
    child = forking(run, place / "said", at(moment, lambda: os.kill(os.getpid(), number)))
    assert child.wait() == code, child.lines()
    assert "Traceback" not in "\n".join(child.lines())
    assert stories.contents(run.parent) == before
    assert not run.with_name("y").exists()


@pytest.mark.parametrize("first", [True, False], ids=["straight", "killed"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_ends_a_verify_ends_its_trial(first: bool, number: int, code: int, place: Path) -> None:
    """Neither of its two trainings goes on alone, and their folder is gone."""
    run = stories.finished(place, "train.steps=2")
    before = tiny.tree(run.parent)
    note = place / "trial"

    def slow() -> None:
        from instil import verify as module

        module.CHILD = f"import os, time; open({str(note)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(600)"
        if not first:
            module._to_the_end = lambda words: None

    child = forked(["verify", str(run)], place / "said", before=slow)
    until(lambda: note.exists() and note.read_text().endswith(" "), child)
    trial = int(note.read_text())
    child.send(number)
    assert child.wait() == code, child.lines()
    assert "Traceback" not in "\n".join(child.lines())
    with pytest.raises(ProcessLookupError):
        os.kill(trial, 0)
    assert tiny.tree(run.parent) == before
