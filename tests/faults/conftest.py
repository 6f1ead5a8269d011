"""Fixtures of the fault tests: the run that nothing happened to, the fork server, signal handlers put back; and counts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from processes import STEPS, words

import tiny


@pytest.fixture(autouse=True)
def _handlers_put_back() -> Iterator[None]:
    """A command in this process leaves its handlers of signals behind."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGCONT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model `m` and forty rows in `a.jsonl`, that no test changes."""
    folder = tmp_path_factory.mktemp("source")
    tiny.write_model(folder / "m")
    tiny.write_rows(folder / "a.jsonl", tiny.some_rows(40))
    return folder


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole") / "x"
    assert tiny.command(*words(source, folder)).code == 0
    assert len(tiny.metrics_of(folder)) == STEPS
    return folder


@pytest.fixture(scope="session")
def model(source: Path) -> Path:
    """The model of `source`."""
    return source / "m"


@pytest.fixture(scope="session")
def data(source: Path) -> Path:
    """The rows of `source`."""
    return source / "a.jsonl"


@pytest.fixture(scope="session")
def cold_forks() -> Iterator[Forks]:
    """The fork server (forks.py), for children that run no model."""
    server = Forks()
    server.load("crashes")
    yield server
    server.close()


@pytest.fixture(scope="session")
def forks(cold_forks: Forks, model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """The fork server, which has imported all that a run needs."""
    place = tmp_path_factory.mktemp("warm")
    where = (f"run.dir={place}", "run.name=x", "train.steps=2", "data.heldout=0.1", "adapter.rank=2")
    cold_forks.warm(["train", "--model", model, "--data", data, *tiny.FAST, *where], place / "log")
    return cold_forks


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the fault tests counted: kills, points, flips."""
    for report in terminalreporter.stats.get("passed", []):
        if "faults" in report.nodeid and report.when == "call" and report.user_properties:
            found = ", ".join(f"{name} {value}" for name, value in report.user_properties)
            terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {found}")
