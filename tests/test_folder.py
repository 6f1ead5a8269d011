"""The run folder: its name, its one writer, files that are whole or absent, and what a name stands for."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from instil.config import NAME, Config, load_config
from instil.errors import MachineError, ModelError, UsageError
from instil.files import write_atomically
from instil.folder import (
    RunFolder,
    append_metrics,
    claim,
    keep_metrics_through,
    machine_facts,
    named,
    run_name,
    write_json,
)


def config_of(folder: Path, model: str = "m", data: str = "a.jsonl", **given: Any) -> Config:
    return load_config(None, (), {"model": model, "data.train": [data], "run.dir": str(folder / "runs"), **given})


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("org/Model-7B@main", "/a/b/train.v2.jsonl"), ("demo", "x.jsonl"), ("./models/tiny/", "../data.parquet"),
        ("/", "/"), ("..", ".."), ("模型", "数据.jsonl"), ("a b/c d", "e f.jsonl"), ("-x", "--y"), (".hidden", ".z.jsonl"),
        ("m" * 300, "d" * 300), ("m\nn", "d\td"), ("CON", "🎉.jsonl"), ("hf://org/x?y=1#z", "https://h/p/q.jsonl?t=1"),
    ],
)  # fmt: skip
def test_a_made_name_is_a_name_that_could_be_given(model: str, data: str) -> None:
    """Whatever model and data are called, the folder's name passes run.name's own rule and has no path in it."""
    name = run_name(config_of(Path(), model, data))
    assert re.fullmatch(NAME, name), name
    assert Path(name).name == name
    assert load_config(None, (), {"model": "m", "data.train": ["a"], "run.name": name}).run.name == name


def test_a_made_name_says_what_it_is() -> None:
    """Model and data can be read from it."""
    assert run_name(config_of(Path(), "org/Tiny", "/data/train.jsonl")).startswith("Tiny-train-")


def test_a_source_with_settings_is_named_by_its_path() -> None:
    """{path, ...} reads like the path alone; how it is read and mixed shapes the result, so the digest differs."""
    names = {
        run_name(load_config(None, (), {"model": "org/Tiny", "data.train": [source]}))
        for source in ("/d/train.jsonl", {"path": "/d/train.jsonl", "repeat": 2.0},
                       {"path": "/d/train.jsonl", "mapping": {"prompt": "q", "completion": "a"}})
    }  # fmt: skip
    assert len(names) == 3
    assert all(name.startswith("Tiny-train-") for name in names)


def test_other_settings_have_another_folder() -> None:
    """What shapes the result is in the name; what is harmless is not; a name that was given is the name."""
    base = run_name(config_of(Path()))
    for change in ({"train.lr": 1e-3}, {"train.seed": 1}, {"data.heldout": 0.1}, {"template": "t"}, {"pack.tokens": 9},
                   {"targets.turns": "last"}, {"chat.control_text": "reject"}, {"data.too_long": "error"},
                   {"data.mapping": {"prompt": "q"}}, {"chat.template_args": {"x": 1}}):  # fmt: skip
        assert run_name(config_of(Path(), **change)) != base
    for change in ({"run.threads": 1}, {"checkpoint.keep": 1}, {"evaluate.examples": 1}, {"run.dir": "elsewhere"}):
        assert run_name(config_of(Path(), **change)) == base
    assert run_name(config_of(Path(), **{"run.name": "mine"})) == "mine"


# ── claiming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_claim_makes_the_folder_and_says_who_holds_it(tmp_path: Path) -> None:
    """run.lock names the process, and a second claim within it is refused with that name."""
    config = config_of(tmp_path, **{"run.name": "x"})
    with claim(config, fresh=False) as run:
        assert run.path == tmp_path / "runs" / "x"
        assert f"process {os.getpid()} " in (run.path / "run.lock").read_text()
        with pytest.raises(MachineError, match=f"is in use by process {os.getpid()} "), claim(config, fresh=False):
            pass
        assert run.path.is_dir()
    with claim(config, fresh=False) as run:
        assert (run.path / "run.lock").read_text().count("process") == 1


class Broken(Exception):
    pass


def fail_in(config: Config, *, fresh: bool = False, manifest: bool = False, neighbour: bool = False) -> None:
    """A run that writes something and fails."""

    def fail() -> None:
        with claim(config, fresh=fresh) as run:
            (run.packs / "key").mkdir(parents=True, exist_ok=True)
            run.ledger.write_text("{}")
            if manifest:
                write_json(run.manifest, {})
            if neighbour:
                run.path.with_name("neighbour").mkdir()
            raise Broken

    with pytest.raises(Broken):
        fail()


def test_a_run_that_never_began_leaves_nothing(tmp_path: Path) -> None:
    """Neither its folder nor the folders above it that the claim had made."""
    fail_in(config_of(tmp_path / "deep" / "er", **{"run.name": "x"}))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_there_stay(tmp_path: Path) -> None:
    """run.dir with other runs stays, and so does what another process put there meanwhile."""
    (tmp_path / "runs" / "other").mkdir(parents=True)
    fail_in(config_of(tmp_path, **{"run.name": "x"}))
    assert tiny.tree(tmp_path) == {"runs", "runs/other"}
    fail_in(config_of(tmp_path / "new", **{"run.name": "x"}), neighbour=True)
    assert tiny.tree(tmp_path / "new") == {"runs", "runs/neighbour"}


def test_a_folder_that_the_user_made_is_not_removed(tmp_path: Path) -> None:
    """An empty folder may be used as a run's; it is not the claim's to remove."""
    (tmp_path / "runs" / "x").mkdir(parents=True)
    fail_in(config_of(tmp_path, **{"run.name": "x"}))
    assert (tmp_path / "runs" / "x").is_dir()


def test_a_run_that_began_stays(tmp_path: Path) -> None:
    """With a manifest there is something to resume and to look into."""
    fail_in(config_of(tmp_path, **{"run.name": "x"}), manifest=True)
    assert (tmp_path / "runs" / "x" / "manifest.json").is_file()


def test_fresh_is_undone_where_it_fails(tmp_path: Path) -> None:
    """The older run is moved aside; when the new one never begins it is moved back, with all it had."""
    config = config_of(tmp_path, **{"run.name": "x"})
    with claim(config, fresh=False) as run:
        run.config.write_text("old")
        write_json(run.manifest, {"old": True})
    before = tiny.tree(tmp_path)
    fail_in(config, fresh=True)
    assert tiny.tree(tmp_path) == before
    assert (tmp_path / "runs" / "x" / "config.yaml").read_text() == "old"
    with claim(config, fresh=True) as run:
        assert {child.name for child in run.path.iterdir()} == {"run.lock"}
        assert len(list(run.path.parent.iterdir())) == 2


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_not_a_run_s_is_not_touched(fresh: bool, tmp_path: Path) -> None:
    """A file in the folder's place, or a folder with other files: exit 2, nothing changed."""
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "a.txt").write_text("mine")
    (tmp_path / "runs" / "y").write_text("mine")
    before = tiny.tree(tmp_path)
    for name, says in (("x", "holds files that are not a run's"), ("y", "is a file")):
        with pytest.raises(UsageError, match=says), claim(config_of(tmp_path, **{"run.name": name}), fresh=fresh):
            pass
    assert tiny.tree(tmp_path) == before


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle: the old content is there, and no draft."""
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(file, b"new")
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_metrics_are_cut_after_a_step(tmp_path: Path) -> None:
    """What a resumed run makes again is dropped, and so is a torn last line; the rest is byte for byte the same."""
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_metrics(file, {"step": step, "loss": 1 / step})
    lines = file.read_bytes().splitlines(keepends=True)
    with file.open("ab") as torn:
        torn.write(b'{"step":6,"lo')
    keep_metrics_through(file, 5)
    assert file.read_bytes() == b"".join(lines)
    keep_metrics_through(file, 3)
    assert file.read_bytes() == b"".join(lines[:3])
    append_metrics(file, {"step": 4})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
    keep_metrics_through(file, 0)
    assert file.read_bytes() == b""
    keep_metrics_through(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == [file]


def test_a_last_line_that_lost_its_end_of_line_gets_it_back(tmp_path: Path) -> None:
    """Torn exactly before the line feed: the next record still begins a line."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step":1}\n{"step":2}')
    keep_metrics_through(file, 2)
    append_metrics(file, {"step": 3})
    assert file.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


def test_the_machine_is_named() -> None:
    """The versions that decide about bits are in the manifest."""
    import torch

    facts = machine_facts()
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["versions"].keys() >= {"instil", "python", "torch", "transformers", "tokenizers", "numpy"}
    assert json.dumps(facts)


# ── what a name stands for ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_is_a_run_or_a_model(tmp_path: Path) -> None:
    """A run stands for its model/ and knows its base; a model for itself; an unfinished run is refused; no path is 4."""
    model = tiny.write_model(tmp_path / "m", weights=False)
    found = named(str(model), need_weights=False)
    assert (found.folder.path, found.run, found.base) == (model, None, None)

    run = RunFolder(tmp_path / "x")
    run.path.mkdir()
    run.config.write_text("model: m\n")
    write_json(run.manifest, {"model": {"name": "org/base@main"}})
    with pytest.raises(UsageError, match="not finished") as refused:
        named(str(run.path), need_weights=False)
    assert refused.value.exit_code == 2
    tiny.write_model(run.model, weights=False)
    found = named(str(run.path), need_weights=False)
    assert (found.folder.path, found.run, found.base) == (run.model, run, "org/base@main")
    with pytest.raises(ModelError):
        named(str(tmp_path / "nothing"), need_weights=False)
