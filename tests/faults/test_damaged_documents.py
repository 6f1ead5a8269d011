"""Files of a run that are gone, cut, or of another shape: said in a line, or made again with the same bits; no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stories
import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a finished run `whole` and a stopped one `half`; no test changes them."""
    place = tmp_path_factory.mktemp("documents")
    tiny.write_model(place / "m")
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(40))
    stories.finished(place, "adapter.rank=2", name="whole")
    stories.stopped(place, 5, name="half")
    return place


@pytest.fixture
def finished(made: Path) -> Any:
    run = stories.again(made / "runs" / "whole", "x")
    yield run
    shutil.rmtree(run)


@pytest.fixture
def stopped(made: Path) -> Any:
    run = stories.again(made / "runs" / "half", "y")
    yield run
    shutil.rmtree(run)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def result(run: Path) -> dict[str, bytes]:
    """The files of model/ and adapter/."""
    return {str(p.relative_to(run)): p.read_bytes() for name in ("model", "adapter") for p in (run / name).iterdir()}


# ── a result that is gone ────────────────────────────────────────────────────────────────────────────────────────────

DAMAGES: dict[str, Callable[[Path], object]] = {
    "no model": lambda run: shutil.rmtree(run / "model"),
    "no weights": lambda run: (run / "model" / "model.safetensors").unlink(),
    "no tokenizer": lambda run: (run / "model" / "tokenizer.json").unlink(),
    "no adapter": lambda run: shutil.rmtree(run / "adapter"),
    "flipped weights": lambda run: flip(run / "model" / "model.safetensors"),
    "flipped adapter": lambda run: flip(run / "adapter" / "adapter_model.safetensors"),
    "empty summary": lambda run: (run / "summary.json").write_text(""),
    "cut summary": lambda run: (run / "summary.json").write_text('{"steps": 10, "loss'),
    "no key in summary": lambda run: (run / "summary.json").write_text("{}"),
    "summary is a list": lambda run: (run / "summary.json").write_text("[]"),
    "no number in summary": lambda run: (run / "summary.json").write_text('{"loss_before": "much"}'),
    "no summary": lambda run: (run / "summary.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_result_is_gone_makes_it_again(damage: str, finished: Path) -> None:
    """From its last checkpoint, to the bit; then it is finished, and says so."""
    before = result(finished)
    DAMAGES[damage](finished)
    said = tiny.command("train", finished, "--json")
    assert said.code == 0, said.err
    assert "resumed after step 10" in said.err
    told = f"{finished}: its result or summary.json is not what was written: it goes on, and makes them again"
    assert (told in said.err) == (damage != "no summary")
    assert stories.strict_json(said.out)["steps"] == 10
    assert result(finished) == before
    said = tiny.command("train", finished)
    assert f"{finished} is finished already; --fresh starts it over" in said.err


def test_a_result_with_a_user_s_own_files_stays(finished: Path) -> None:
    """A model card, a changed generation_config: the run is finished, and neither is touched."""
    (finished / "model" / "README.md").write_text("a card")
    (finished / "model" / "generation_config.json").write_text('{"temperature": 0.5}')
    before = result(finished)
    said = tiny.command("train", finished)
    assert said.code == 0
    assert f"{finished} is finished already; --fresh starts it over" in said.err
    assert result(finished) == before


# ── a manifest of another shape ──────────────────────────────────────────────────────────────────────────────────────


def changed(run: Path, key: str, value: object) -> None:
    """manifest.json with another value; None: without the key."""
    manifest = json.loads((run / "manifest.json").read_text()) | {key: value}
    if value is None:
        del manifest[key]
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("how", ["{victim}", "../../victim", "../../../victim"])
def test_a_manifest_cannot_name_a_folder_to_write_or_remove(how: str, stopped: Path, made: Path) -> None:
    """A run folder may come from somebody else: what its manifest names is a digest, or nothing is done."""
    victim = made / "victim"
    victim.mkdir(exist_ok=True)
    (victim / "thesis.txt").write_text("years of work")
    changed(stopped, "packs", how.format(victim=victim))
    before = stories.contents(made, "log.txt")
    for words in (
        ("train",),
        ("verify", "--steps", "0"),
        ("explain", f"{made / 'a.jsonl'}:3"),
        ("fork", "z"),
        ("replay",),
    ):
        verb, *more = words
        said = tiny.command(verb, stopped, *more)
        assert said.code == (5 if verb != "replay" else 2), said.err
        if verb != "replay":
            assert f"{stopped / 'manifest.json'}: cannot be read (packs: " in said.err[-1]
        assert stories.contents(made, "log.txt") == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("model", None), ("tokenizer_sha256", None), ("template_sha256", None), ("data_sha256", None), ("packs", 7),
     ("date", "garbage"), ("numerics", [1]), ("data_sha256", [])],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "verify"])
def test_a_manifest_of_another_shape_is_said(verb: str, key: str, value: object, stopped: Path) -> None:
    """Exit 5 in one line that names the key; nothing of the run has changed."""
    changed(stopped, key, value)
    before = stories.contents(stopped, "log.txt")
    said = tiny.command(verb, stopped, *(("--steps", "0") if verb == "verify" else ()))
    assert said.code == 5
    assert f"{stopped / 'manifest.json'}: cannot be read ({key}" in said.err[-1]
    assert stories.contents(stopped, "log.txt") == before


# ── other files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_line_of_the_metrics_without_its_counts(stopped: Path, made: Path) -> None:
    """It is no record: the run goes on and ends, with a line that its history has a gap."""
    lines = (stopped / "metrics.jsonl").read_text().splitlines()
    lines[1] = '{"step":2}'
    (stopped / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    said = tiny.command("train", stopped)
    assert said.code == 0, said.err
    assert any("1 of the 5 steps done have no readable line" in line for line in said.err)


def test_folders_that_only_look_like_checkpoints(stopped: Path) -> None:
    """step-² is a digit to Python, and no number."""
    for name in ("step-²", "step-", "step-x", "step--1", "step-1e3"):
        (stopped / "checkpoints" / name).mkdir()
    said = tiny.command("train", stopped)
    assert said.code == 0, said.err
    assert "resumed after step 5" in said.err


def test_checkpoints_that_are_a_file(stopped: Path) -> None:
    """Said before anything is loaded, as what it is: no disk is full."""
    shutil.rmtree(stopped / "checkpoints")
    (stopped / "checkpoints").write_text("mine")
    said = tiny.command("train", stopped)
    assert said.code == 2
    assert said.err == [f"{stopped / 'checkpoints'}: is a file, where a run has a folder; move it away, then run again"]


@pytest.mark.parametrize("how", ["folder", "command"])
def test_a_lost_lock_is_no_lost_run(how: str, stopped: Path, made: Path) -> None:
    """The folder resumes by its name and by its command."""
    (stopped / "run.lock").unlink()
    said = tiny.command("train", stopped) if how == "folder" else stories.train(made, name="y")
    assert said.code == 0, said.err
    assert "resumed after step 5" in said.err


def test_fresh_begins_at_the_beginning_without_a_configuration(stopped: Path, made: Path) -> None:
    """config.yaml is gone: --fresh still moves the old run aside, and nothing of it is gone on from."""
    (stopped / "config.yaml").unlink()
    said = stories.train(made, "--fresh", name="y")
    assert said.code == 0, said.err
    assert not [line for line in said.err if line.startswith("resumed")]
    (aside,) = stopped.parent.glob("y.old-*")
    assert (aside / "checkpoints" / "step-000005").is_dir()
    shutil.rmtree(aside)
