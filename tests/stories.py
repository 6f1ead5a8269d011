"""Whole runs of the tiny model by the command line, stopped, changed, and looked at from outside."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import tiny
from instil import run as story
from instil.train.checkpoint import TrainState, load_latest

RECIPE = (*tiny.FAST, "train.lr=1e-2", "train.batch_examples=8", "data.heldout=0", "train.epochs=2")
STEPS = 10  # of the recipe on forty rows


def words(place: Path, *more: object, name: str = "x") -> list[str]:
    """The command line of a run `name` of the model `m` on `a.jsonl`; later settings win."""
    what = (f"model={place / 'm'}", f"data.train=[{place / 'a.jsonl'}]")
    where = (f"run.dir={place / 'runs'}", f"run.name={name}")
    return [str(word) for word in ("train", *what, *RECIPE, *where, *more)]


def train(place: Path, *more: object, name: str = "x") -> tiny.Said:
    """Begin the run, or go on with it."""
    return tiny.command(*words(place, *more, name=name))


def finished(place: Path, *more: object, name: str = "x") -> Path:
    """A run that went through."""
    said = train(place, *more, name=name)
    assert said.code == 0, said.err
    return place / "runs" / name


def stopped(place: Path, step: int, *more: object, name: str = "x") -> Path:
    """A run that SIGTERM stopped after a step, with a verified save."""
    with after_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        said = train(place, *more, name=name)
    assert said.code == 143, said.err
    return place / "runs" / name


def after_step(step: int, act: Callable[[], object]) -> Any:
    """A context in which something happens when the record of a step has been written."""
    patch = pytest.MonkeyPatch.context()
    append = story.append_metrics

    class Within:
        def __enter__(self) -> None:
            def spy(path: Path, record: Mapping[str, Any]) -> None:
                append(path, record)
                if record["step"] == step:
                    act()

            patch.__enter__().setattr(story, "append_metrics", spy)

        def __exit__(self, *problem: Any) -> None:
            patch.__exit__(*problem)

    return Within()


def again(run: Path, name: str) -> Path:
    """A copy of a run beside it."""
    return Path(shutil.copytree(run, run.with_name(name)))


def contents(folder: Path, *leave_out: str) -> dict[str, bytes]:
    """Every file below a folder with its bytes; the lock is everybody's."""
    kept = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.lock", *leave_out))
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def newest(run: Path) -> TrainState:
    """What the newest checkpoint of a run holds."""
    found = load_latest(run / "checkpoints")
    assert found is not None
    return found.state


def same_tensors(mine: Mapping[str, Any], its: Mapping[str, Any]) -> bool:
    """Equal to the bit, NaN included."""
    return mine.keys() == its.keys() and all(
        t.dtype == its[name].dtype and t.shape == its[name].shape and _bits(t) == _bits(its[name])
        for name, t in mine.items()
    )


def _bits(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def differing(run: Path, other: Path) -> list[str]:
    """What two finished runs do not share to the bit: result, weights, optimizer, random state, position, history."""
    a, b = newest(run), newest(other)
    found = [name for name in ("weights", "optimizer", "rng") if not same_tensors(getattr(a, name), getattr(b, name))]
    timeless = [{k: v for k, v in state.counters.items() if k != "seconds"} for state in (a, b)]
    found += ["step"] * (a.step != b.step) + ["counters"] * (timeless[0] != timeless[1])
    if (run / "model" / "model.safetensors").read_bytes() != (other / "model" / "model.safetensors").read_bytes():
        found.append("model")
    if tiny.without_times(tiny.metrics_of(run)) != tiny.without_times(tiny.metrics_of(other)):
        found.append("metrics")
    return found


def strict_json(text: str) -> Any:
    """A JSON document as the standard has it: NaN and Infinity are no numbers there."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)
