"""Fixtures of the command line's tests: a model folder, a data file, and runs that are trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows."""
    return tiny.write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", tiny.some_rows(40))
