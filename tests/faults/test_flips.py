"""Any byte that changes in a checkpoint is noticed, and the one before is used; prepared examples are made anew."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from crashes import same_state, state

import tiny
from instil.errors import MachineError
from instil.pack.store import damage as store_damage
from instil.train import checkpoint
from instil.train.checkpoint import load_latest, save, verify

FLIPS = 500
FILES = ("manifest.json", "optimizer.safetensors", "rng.safetensors", "state.json", "weights.safetensors")
FACTS = {"versions": {"instil": "0.1.0"}, "data_sha256": {"a.jsonl": "0f"}}


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 5."""
    for step in (3, 5):
        save(tmp_path / "checkpoints", state(step), FACTS, keep=2)
    return tmp_path / "checkpoints"


def flip(content: bytes, place: int, by: int) -> bytes:
    """The bytes with one of them changed."""
    return content[:place] + bytes([content[place] ^ by]) + content[place + 1 :]


def a_place(files: dict[str, bytes], rng: random.Random, even: bool) -> tuple[str, int]:
    """A byte of some files: even = each file as often as the others, else each byte as often as the others."""
    names = sorted(files)
    name = rng.choice(names) if even else rng.choices(names, [len(files[each]) for each in names])[0]
    return name, rng.randrange(len(files[name]))


def falls_back(checkpoints: Path, name: str) -> str:
    """ "" where step 5 was found damaged and step 3 is used instead, else what was done."""
    found = load_latest(checkpoints)
    if found is None or not same_state(found.state, state(3)):
        return f"{name}: {found and found.path} was loaded"
    (line,) = found.damaged
    return "" if "step-000005: " in line and name.partition(".")[0] in line else f"{name}: {line!r} does not name it"


@pytest.mark.parametrize("flips", [FLIPS, pytest.param(10 * FLIPS, marks=pytest.mark.slow)])
def test_every_random_flip_is_noticed(flips: int, two: Path, record_property: Callable[[str, object], None]) -> None:
    """One byte anywhere in the newest checkpoint, half of them spread over the bytes, half over the files."""
    rng, newest, hits, wrong = random.Random(7), two / "step-000005", Counter[str](), []
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    assert tuple(sorted(whole)) == FILES
    for number in range(flips):
        name, place = a_place(whole, rng, even=number % 2 == 0)
        (newest / name).write_bytes(flip(whole[name], place, rng.randint(1, 255)))
        if problem := falls_back(two, name):
            wrong.append(f"byte {place} of {problem}")
        (newest / name).write_bytes(whole[name])
        hits[name] += 1
    assert load_latest(two).path == newest  # type: ignore[union-attr]
    record_property("flips", sum(hits.values()))
    record_property("by file", dict(hits))
    record_property("unnoticed", len(wrong))
    assert wrong == []
    assert min(hits[name] for name in FILES) >= flips // 20


def test_every_byte_of_the_manifest(two: Path) -> None:
    """Each of them, changed in one bit or in all."""
    file = two / "step-000005" / "manifest.json"
    whole = file.read_bytes()
    unnoticed = []
    for place in range(len(whole)):
        file.write_bytes(flip(whole, place, (1, 0x20, 0xFF)[place % 3]))
        unnoticed += [place] if verify(two / "step-000005") is None else []
    assert unnoticed == []


def test_a_checkpoint_without_hashes_would_not_notice(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: only sizes are compared; flips in the tensors then go through, so it is the hashes that notice them."""
    newest = two / "step-000005"
    expected = orjson.loads((newest / "manifest.json").read_bytes())["files"]
    monkeypatch.setattr(checkpoint, "hashes", lambda folder: expected)
    whole = (newest / "weights.safetensors").read_bytes()
    (newest / "weights.safetensors").write_bytes(flip(whole, len(whole) - 1, 1))
    assert falls_back(two, "weights.safetensors") != ""


# --- other damage


def cut(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size // 2)


def cut_by_one(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)


def emptied(folder: Path, name: str) -> None:
    os.truncate(folder / name, 0)


def zeroed(folder: Path, name: str) -> None:
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def deleted(folder: Path, name: str) -> None:
    (folder / name).unlink()


def longer(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b"\n")


def renamed(folder: Path, name: str) -> None:
    (folder / name).rename(folder / f"{name}.1")


def a_folder(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()


def of_another(folder: Path, name: str) -> None:
    """The same file of another checkpoint, a good one."""
    shutil.copyfile(folder.parent / "step-000003" / name, folder / name)


DAMAGE = (cut, cut_by_one, emptied, zeroed, deleted, longer, renamed, a_folder, of_another)


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_noticed(name: str, harm: Callable[[Path, str], None], two: Path) -> None:
    """Every file in every way: the older checkpoint is used, and a line names the newer one."""
    harm(two / "step-000005", name)
    found = load_latest(two)
    assert found is not None
    assert same_state(found.state, state(3))
    assert len(found.damaged) == 1
    assert "step-000005: " in found.damaged[0]


@pytest.mark.parametrize("extra", ["more.safetensors", ".hidden", "folder/"])
def test_what_was_not_saved_is_noticed(extra: str, two: Path) -> None:
    """A file or folder too many is no part of what was saved."""
    path = two / "step-000005" / extra
    path.mkdir() if extra.endswith("/") else path.write_bytes(b"")
    assert falls_back(two, extra.strip("/.")) == ""


def reworded(manifest: dict[str, Any]) -> None:
    manifest["data_sha256"] = {"a.jsonl": "00"}


def other_hash(manifest: dict[str, Any]) -> None:
    manifest["files"]["weights.safetensors"]["sha256"] = "0" * 64


def one_less(manifest: dict[str, Any]) -> None:
    del manifest["files"]["rng.safetensors"]


def without_digest(manifest: dict[str, Any]) -> None:
    del manifest["sha256"]


def without_format(manifest: dict[str, Any]) -> None:
    del manifest["format"]


def odd_format(manifest: dict[str, Any]) -> None:
    manifest["format"] = "two"


def nothing_left(manifest: dict[str, Any]) -> None:
    manifest.clear()


EDITS = (reworded, other_hash, one_less, without_digest, without_format, odd_format, nothing_left)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_manifest_is_noticed(edit: Callable[[dict[str, Any]], None], two: Path) -> None:
    """Rewritten as good JSON by somebody who does not know its digest."""
    file = two / "step-000005" / "manifest.json"
    manifest = orjson.loads(file.read_bytes())
    edit(manifest)
    file.write_bytes(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS))
    assert falls_back(two, "manifest.json") == ""


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"7", b"{", b"\xff\xfe", b"[" * 5000, b'{"format":2}'])
def test_a_manifest_of_anything_is_no_error_of_ours(content: bytes, two: Path) -> None:
    """Not JSON, another kind of JSON, nested too deep: the older checkpoint is used."""
    (two / "step-000005" / "manifest.json").write_bytes(content)
    assert falls_back(two, "manifest.json") == ""


def test_all_damaged_is_said_with_the_list(two: Path) -> None:
    """MachineError with a line for each, and nothing is removed."""
    cut(two / "step-000003", "state.json")
    zeroed(two / "step-000005", "weights.safetensors")
    before = tiny.tree(two)
    with pytest.raises(MachineError, match="no checkpoint verifies") as caught:
        load_latest(two)
    text = str(caught.value)
    assert "step-000005: weights.safetensors is not what was saved" in text
    assert "step-000003: state.json is not what was saved" in text
    assert tiny.tree(two) == before


# --- in a run

RECIPE = (
    *tiny.FAST, "train.lr=1e-2", "train.epochs=3", "train.batch_examples=8", "data.heldout=0.1",
    "checkpoint.every_steps=3", "checkpoint.keep=2",
)  # fmt: skip


def words(model: Path, data: Path, run: Path) -> list[object]:
    """The command line of a run of 12 steps."""
    return ["train", "--model", model, "--data", data, *RECIPE, f"run.dir={run.parent}", f"run.name={run.name}"]


@pytest.fixture(scope="module")
def untouched(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The result of the run that nothing happened to."""
    run = tmp_path_factory.mktemp("untouched") / "x"
    assert tiny.command(*words(model, data, run)).code == 0
    return (run / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def stopped(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after step 7: it has checkpoints 6 and 7."""
    from instil import run as story

    append = story.append_metrics

    def stop_at_7(path: Path, record: dict[str, Any]) -> None:
        append(path, record)
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    run = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(story, "append_metrics", stop_at_7)
        assert tiny.command(*words(model, data, run)).code == 143
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    return run


def test_a_run_never_starts_over_in_silence(model: Path, data: Path, stopped: Path) -> None:
    """All checkpoints damaged: exit 5 with the list and the way out, and nothing in the run has changed; --fresh works."""
    for step, name in ((6, "manifest.json"), (7, "weights.safetensors")):
        file = stopped / "checkpoints" / f"step-{step:06d}" / name
        file.write_bytes(flip(file.read_bytes(), 40, 1))
    kept = [*(stopped / "checkpoints").rglob("*.*"), stopped / "metrics.jsonl", stopped / "manifest.json"]
    before = {path: path.read_bytes() for path in kept if path.is_file()}
    said = tiny.command(*words(model, data, stopped))
    assert said.code == 5
    assert "step-000007: weights.safetensors is not what was saved" in said.err[-1]
    assert "step-000006: " in said.err[-1]
    assert "--fresh" in said.err[-1]
    assert {path: path.read_bytes() for path in before} == before
    assert tiny.command(*words(model, data, stopped), "--fresh").code == 0
    (old,) = stopped.parent.glob("x.old-*")
    assert len(tiny.metrics_of(old)) == 7


def test_a_run_passes_over_a_damaged_checkpoint(model: Path, data: Path, stopped: Path, untouched: bytes) -> None:
    """It says which file, goes on from the one before, and ends with the same bits; the damaged one is replaced."""
    file = stopped / "checkpoints" / "step-000007" / "optimizer.safetensors"
    file.write_bytes(flip(file.read_bytes(), file.stat().st_size // 2, 16))
    said = tiny.command(*words(model, data, stopped))
    assert said.code == 0
    (line,) = [line for line in said.err if line.startswith("passed over: ")]
    assert "step-000007: optimizer.safetensors is not what was saved" in line
    assert "resumed after step 6" in said.err
    assert tiny.same(stopped / "model" / "model.safetensors", untouched)
    assert [record["step"] for record in tiny.metrics_of(stopped)] == list(range(1, 13))
    found = sorted((stopped / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step-000009", "step-000012"]
    assert [verify(path) for path in found] == [None, None]


def test_flips_in_prepared_examples_are_noticed(stopped: Path, record_property: Callable[[str, object], None]) -> None:
    """One byte anywhere in any of their files, 200 times."""
    (stored,) = (stopped / "packs").iterdir()
    rng, hits = random.Random(8), Counter[str]()
    whole = {path.name: path.read_bytes() for path in stored.iterdir()}
    assert store_damage(stored) is None
    for number in range(200):
        name, place = a_place(whole, rng, even=number % 2 == 0)
        (stored / name).write_bytes(flip(whole[name], place, rng.randint(1, 255)))
        found = store_damage(stored)
        assert found is not None, f"byte {place} of {name}"
        assert name in found or name == "sha256.json"
        (stored / name).write_bytes(whole[name])
        hits[name] += 1
    assert store_damage(stored) is None
    assert len(hits) == len(whole) >= 6
    record_property("flips", sum(hits.values()))


@pytest.mark.parametrize("name", ["train.arrow", "heldout.arrow", "train.prefixes", "record.json", "sha256.json"])
def test_damaged_examples_are_prepared_anew(
    name: str, model: Path, data: Path, stopped: Path, untouched: bytes
) -> None:
    """The run says so, and ends with the same bits, from the same steps on."""
    (stored,) = (stopped / "packs").iterdir()
    before = (stored / name).read_bytes()
    (stored / name).write_bytes(flip(before, len(before) // 2, 4))
    said = tiny.command(*words(model, data, stopped))
    assert said.code == 0
    assert [line for line in said.err if line.startswith(str(stored)) and "prepared anew" in line]
    assert "resumed after step 7" in said.err
    assert tiny.same(stopped / "model" / "model.safetensors", untouched)
    assert tiny.same(stored / name, before)
    assert store_damage(stored) is None


def test_the_small_states_are_told_apart() -> None:
    """The oracle of these tests: states of other steps, or with one other bit, are not the same."""
    assert same_state(state(3), state(3))
    assert not same_state(state(3), state(5))
    other = state(3)
    other.weights["a"].view(torch.int32)[0, 0] ^= 1
    assert not same_state(state(3), other)
