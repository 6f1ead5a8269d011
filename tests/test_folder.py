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
    read_manifest,
    read_metrics,
    refuse_busy,
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
    for change in ({"run.threads": 1}, {"checkpoint.keep": 1}, {"run.dir": "elsewhere"}):
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


@pytest.mark.parametrize("kept", ["config.yaml", "manifest.json", "metrics.jsonl", "summary.json", "checkpoints"])
def test_fresh_moves_aside_whatever_a_run_has_left(kept: str, tmp_path: Path) -> None:
    """One of its files is enough, so that nothing of the old run is gone on from: all of it is moved aside."""
    config = config_of(tmp_path, **{"run.name": "x"})
    with claim(config, fresh=False) as run:
        (run.checkpoints / "step-000005").mkdir(parents=True) if kept == "checkpoints" else (run.path / kept).touch()
    with claim(config, fresh=True) as run:
        assert {child.name for child in run.path.iterdir()} == {"run.lock"}
    (aside,) = run.path.parent.glob("x.old-*")
    assert (aside / kept).exists()


def test_a_run_that_lost_its_lock_is_a_run(tmp_path: Path) -> None:
    """Configuration and manifest say so as well; one of them alone does not."""
    config = config_of(tmp_path, **{"run.name": "x"})
    with claim(config, fresh=False) as run:
        run.config.write_text("a: 1\n")
    (run.path / "run.lock").unlink()
    with pytest.raises(UsageError, match="holds files that are not a run's"), claim(config, fresh=False):
        pass
    write_json(run.manifest, MANIFEST)
    with claim(config, fresh=False) as run:
        assert (run.path / "run.lock").is_file()


def test_a_tilde_in_run_dir_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a shell has it, which leaves run.dir=~/runs as it is; a second claim is refused there too."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, **{"run.dir": "~/runs", "run.name": "x"})
    with claim(config, fresh=False) as run:
        assert run.path == tmp_path / "home" / "runs" / "x"
        with pytest.raises(MachineError, match="is in use by process"):
            refuse_busy(config)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("name", ["packs", "checkpoints"])
def test_a_file_in_a_folder_s_place_is_named(name: str, tmp_path: Path) -> None:
    """Before anything is loaded: the disk is not full, and freeing space would not help."""
    config = config_of(tmp_path, **{"run.name": "x"})
    with claim(config, fresh=False) as run:
        write_json(run.manifest, MANIFEST)
        (run.path / name).write_text("mine")
    with (
        pytest.raises(UsageError, match="is a file, where a run has a folder; move it away"),
        claim(config, fresh=False),
    ):
        pass
    assert (run.path / name).read_text() == "mine"


def test_what_a_killed_fork_left_beside_is_swept(tmp_path: Path) -> None:
    """Of the run that is claimed; what belongs to others, or only begins alike, stays."""
    runs = tmp_path / "runs"
    gone, others = (
        [".partial-x-0123abcd", ".trash-x-0123abcd"],
        [".partial-x-y-0123abcd", ".partial-z-0123abcd", ".x.tmp"],
    )
    for name in (*gone, *others):
        (runs / name).mkdir(parents=True)
    said: list[str] = []
    with claim(config_of(tmp_path, **{"run.name": "x"}), fresh=False, say=said.append):
        pass
    assert {path.name for path in runs.iterdir()} == {"x", *others}
    assert said == [f"removed from {runs} what a process that died left half-written: {', '.join(gone)}"]


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


COUNTS = {"seconds": 0.5, "computed_tokens": 9}  # what every record has


def test_metrics_are_cut_after_a_step(tmp_path: Path) -> None:
    """What a resumed run makes again is dropped, and so is a torn last line; the rest is byte for byte the same."""
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        append_metrics(file, {"step": step, "loss": 1 / step, **COUNTS})
    lines = file.read_bytes().splitlines(keepends=True)
    with file.open("ab") as torn:
        torn.write(b'{"step":6,"lo')
    keep_metrics_through(file, 5)
    assert file.read_bytes() == b"".join(lines)
    keep_metrics_through(file, 3)
    assert file.read_bytes() == b"".join(lines[:3])
    append_metrics(file, {"step": 4, **COUNTS})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
    keep_metrics_through(file, 0)
    assert file.read_bytes() == b""
    keep_metrics_through(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == [file]


def test_a_last_line_that_lost_its_end_of_line_gets_it_back(tmp_path: Path) -> None:
    """Torn exactly before the line feed: the next record still begins a line."""
    file = tmp_path / "metrics.jsonl"
    lines = [b'{"step":%d,"seconds":0.5,"computed_tokens":9}' % step for step in (1, 2, 3)]
    file.write_bytes(b"\n".join(lines[:2]))
    keep_metrics_through(file, 2)
    append_metrics(file, {"step": 3, **COUNTS})
    assert file.read_bytes() == b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    "line", ['{"step":2}', '{"step":2,"seconds":0.5}', '{"step":2,"seconds":"1","computed_tokens":9}']
)
def test_a_line_without_its_counts_is_no_record(line: str, tmp_path: Path) -> None:
    """What is summed over the lines is there in each, or the line is as good as torn."""
    file = tmp_path / "metrics.jsonl"
    append_metrics(file, {"step": 1, **COUNTS})
    with file.open("a") as more:
        more.write(line + "\n")
    assert read_metrics(file) == [{"step": 1, **COUNTS}]
    (warned,) = keep_metrics_through(file, 2)
    assert "1 of the 2 steps done have no readable line" in warned


def test_the_machine_is_named() -> None:
    """The versions that decide about bits are in the manifest."""
    import torch

    facts = machine_facts()
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert facts["versions"].keys() >= {"instil", "python", "torch", "transformers", "tokenizers", "numpy"}
    assert json.dumps(facts)


# ── documents of a run that somebody else has had in hand ────────────────────────────────────────────────────────────

MANIFEST: dict[str, Any] = {
    "model": {"name": "org/base@main"}, "tokenizer_sha256": "a", "template_sha256": "b", "data_sha256": {"a.jsonl": "c"},
    "packs": "0123456789abcdef",
}  # fmt: skip


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """With nothing but what every version wrote; and a run without one has begun nothing."""
    run = RunFolder(tmp_path)
    assert read_manifest(run) == {}
    write_json(run.manifest, MANIFEST)
    assert read_manifest(run) == MANIFEST


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("packs", "/etc"), ("packs", "../../../etc"), ("packs", "../packs"), ("packs", "0123456789abcdeF"), ("packs", ""),
        ("packs", "0123456789abcdef\n"), ("packs", "0123456789abcdef/.."), ("packs", 7), ("packs", None),
        ("model", None), ("model", "m"), ("model", {}), ("tokenizer_sha256", None), ("template_sha256", 7),
        ("data_sha256", None), ("data_sha256", []), ("data_sha256", {"a": 1}), ("date", "garbage"), ("date", 20),
        ("versions", None), ("numerics", [1]), ("changes", {}), ("run", [1]),
    ],
)  # fmt: skip
def test_a_manifest_of_another_shape_is_damaged(key: str, value: Any, tmp_path: Path) -> None:
    """Values of other types, and names of folders that are paths: one line that names the key, exit 5, no traceback."""
    write_json(RunFolder(tmp_path).manifest, {**MANIFEST, key: value})
    with pytest.raises(MachineError) as refused:
        read_manifest(RunFolder(tmp_path))
    (line,) = refused.value.lines()
    assert line.startswith(f"{tmp_path / 'manifest.json'}: cannot be read ({key}")
    assert line.endswith("; put it back from a copy, or start over with --fresh")


@pytest.mark.parametrize("key", sorted(MANIFEST))
def test_a_manifest_that_lacks_a_key_is_damaged(key: str, tmp_path: Path) -> None:
    """What every version wrote must be there."""
    write_json(RunFolder(tmp_path).manifest, {name: value for name, value in MANIFEST.items() if name != key})
    with pytest.raises(MachineError, match=rf"cannot be read \({key}: "):
        read_manifest(RunFolder(tmp_path))


# ── what a name stands for ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_name_is_a_run_or_a_model(tmp_path: Path) -> None:
    """A run stands for its model/ and knows its base; a model for itself; an unfinished run is refused; no path is 4."""
    model = tiny.write_model(tmp_path / "m", weights=False)
    found = named(str(model), need_weights=False)
    assert (found.folder.path, found.run, found.base) == (model, None, None)

    run = RunFolder(tmp_path / "x")
    run.path.mkdir()
    run.config.write_text("model: m\n")
    write_json(run.manifest, MANIFEST)
    with pytest.raises(UsageError, match="not finished") as refused:
        named(str(run.path), need_weights=False)
    assert refused.value.exit_code == 2
    tiny.write_model(run.model, weights=False)
    found = named(str(run.path), need_weights=False)
    assert (found.folder.path, found.run, found.base) == (run.model, run, "org/base@main")
    with pytest.raises(ModelError):
        named(str(tmp_path / "nothing"), need_weights=False)
