"""Checkpoints that older versions wrote are read forever; those of a newer one are refused by name."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

import tiny
from instil.errors import UsageError
from instil.train import checkpoint
from instil.train.checkpoint import load_latest, restore_rng, verify
from instil.train.loop import Progress

CORPUS = Path(__file__).parent / "corpus"
FORMAT_1 = CORPUS / "format-1"  # written by instil's version 0.1.0 of the format, from the values below
EMBED = [[0.0, 0.125, 0.25, 0.375], [0.5, 0.625, 0.75, 0.875], [1.0, 1.125, 1.25, 1.375]]
RANDOM = [0.5614835619926453, 0.17739641666412354, 0.8147134184837341]  # the next three numbers of that state


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A copy of the checkpoints of format 1."""
    shutil.copytree(FORMAT_1, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def test_format_1_is_read_to_the_bit() -> None:
    """Weights, moments, random state and counters are the values that were saved, and a run can go on from them."""
    assert verify(FORMAT_1 / "step-000007") is None
    found = load_latest(FORMAT_1)
    assert found is not None
    assert (found.path.name, found.damaged, found.manifest["format"]) == ("step-000007", [], 1)
    state = found.state
    assert state.weights["model.embed.weight"].tolist() == EMBED
    bits = state.weights["model.norm.weight"].view(torch.int32).tolist()
    assert bits == [0x3F800000, -0x80000000, 1, 0x7F800000]  # 1, -0, the smallest denormal number, infinity
    assert state.weights["half"].dtype == torch.bfloat16
    assert state.weights["half"].tolist() == [0.5, 3.0, -2.0]
    assert state.optimizer["exp_avg.model.embed.weight"][2].tolist() == [-0.125, -0.140625, -0.15625, -0.171875]
    assert state.optimizer["exp_avg_sq.model.embed.weight"][0, 3].item() == 9 / 4096
    assert state.optimizer["step.model.embed.weight"].item() == 7.0
    restore_rng(state.rng)
    assert torch.rand(3).tolist() == RANDOM
    progress = Progress(state.step, **state.counters)
    assert (progress.step, progress.target_tokens, progress.seconds) == (7, 2**53 - 1, 0.1 + 0.2)
    assert progress.heldout == {"0": 2.5, "5": 1.0}
    assert found.manifest["data_sha256"] == {"train.jsonl": "0789"}


@pytest.mark.parametrize("name", sorted(path.name for path in (FORMAT_1 / "step-000007").iterdir()))
def test_a_flipped_byte_in_format_1_is_seen(name: str, old: Path) -> None:
    """Every byte of every file, but for the blanks between the words of its manifest, which say nothing."""
    file = old / "step-000007" / name
    whole = file.read_bytes()
    step = max(1, len(whole) // 300)
    places = [i for i in range(0, len(whole), step) if name != "manifest.json" or not whole[i : i + 1].isspace()]
    assert len(places) > 10
    for i in places:
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert verify(old / "step-000007") is not None, f"byte {i} of {name}"


def made_newer(folder: Path, number: int, by: str | None) -> None:
    """Rewrite a checkpoint's manifest as a newer version would have, its digest right."""
    manifest: dict[str, Any] = orjson.loads((folder / "manifest.json").read_bytes())
    manifest.pop("sha256")
    manifest["format"] = number
    if by:
        manifest["versions"] = {"instil": by}
    digest = hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()
    full = {**manifest, "sha256": digest}
    (folder / "manifest.json").write_bytes(orjson.dumps(full, option=orjson.OPT_SORT_KEYS))


@pytest.mark.parametrize("by", ["9.8.7", None])
def test_a_newer_format_is_refused(by: str | None, old: Path) -> None:
    """Also where an older checkpoint could be read: going on from it would throw the newer version's work away."""
    shutil.copytree(old / "step-000007", old / "step-000009")
    made_newer(old / "step-000009", checkpoint.FORMAT + 1, by)
    with pytest.raises(UsageError, match="needs version >=") as caught:
        load_latest(old)
    (line,) = caught.value.lines()
    assert "step-000009" in line
    assert f"format {checkpoint.FORMAT + 1}" in line
    assert (by or "a newer version") in line


def test_a_run_of_a_newer_version_is_refused_with_exit_2(model: Path, data: Path, tmp_path: Path) -> None:
    """`instil train` on a run with such a checkpoint: exit 2, what it needs, and nothing in the run is changed."""
    words = ["train", "--model", model, "--data", data, *tiny.FAST, f"run.dir={tmp_path}", "run.name=x"]
    assert tiny.command(*words, "train.steps=3").code == 0
    run = tmp_path / "x"
    (run / "summary.json").unlink()
    (newest,) = (run / "checkpoints").glob("step-*")
    made_newer(newest, checkpoint.FORMAT + 1, "9.8.7")
    before = {path: path.read_bytes() for path in newest.iterdir()}
    said = tiny.command(*words, "train.steps=3")
    assert said.code == 2
    assert "needs version >= 9.8.7" in said.err[-1]
    assert {path: path.read_bytes() for path in newest.iterdir()} == before
