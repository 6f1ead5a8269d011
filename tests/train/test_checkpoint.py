"""A checkpoint is complete, verified, or not a checkpoint; any damage is seen and the one before it is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from instil import files
from instil.errors import MachineError, UsageError
from instil.train import checkpoint
from instil.train.checkpoint import TrainState, load_latest, restore_rng, rng_state, save, verify

FILES = ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
FACTS = {"config": {"lr": 2e-5}, "data": "a1b2", "versions": {"torch": "2.13"}}


def state(step: int) -> TrainState:
    """Tensors of several kinds, shapes and values that text would lose."""
    torch.manual_seed(step)
    odd = torch.tensor([float("inf"), -0.0, 1e-45, 3.0])
    return TrainState(
        step=step,
        weights={"a.weight": torch.randn(3, 5), "b": odd, "t": torch.randn(4, 6).t(), "h": torch.randn(3).bfloat16()},
        optimizer={"exp_avg.a.weight": torch.randn(3, 5), "step.a.weight": torch.tensor(float(step))},
        rng=rng_state(),
        counters={"seconds": 0.1 + 0.2, "target_tokens": 2**53 - 1, "heldout": {"0": 2.5, "100": 1.0}},
    )


def same(a: TrainState, b: TrainState) -> None:
    assert (a.step, a.counters) == (b.step, b.counters)
    for mine, theirs in ((a.weights, b.weights), (a.optimizer, b.optimizer), (a.rng, b.rng)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype
            bits = [x.contiguous().flatten().view(torch.uint8).tolist() for x in (tensor, theirs[name])]
            assert bits[0] == bits[1], name


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def latest(folder: Path) -> tuple[int, list[str]]:
    found = load_latest(folder)
    assert found is not None
    return found.state.step, found.damaged


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Weights, optimizer, random state, counters, and the facts in the manifest."""
    path = save(tmp_path, state(7), FACTS, keep=2)
    assert path.name == "step-000007"
    assert names(path) == sorted(FILES)
    found = load_latest(tmp_path)
    assert found is not None
    same(found.state, state(7))
    assert {key: found.manifest[key] for key in FACTS} == FACTS
    assert found.damaged == []


def test_a_state_without_updates_can_be_saved(tmp_path: Path) -> None:
    """A run stopped in its first step has an empty optimizer."""
    save(tmp_path, replace(state(0), optimizer={}), {}, keep=2)
    found = load_latest(tmp_path)
    assert found is not None
    assert dict(found.state.optimizer) == {}


@pytest.mark.parametrize("folder", ["absent", "."])
def test_a_run_without_checkpoints_starts_at_the_beginning(folder: str, tmp_path: Path) -> None:
    """None, and no error."""
    assert load_latest(tmp_path / folder) is None


def test_random_numbers_go_on_where_they_were() -> None:
    """The next random numbers after putting the state back are those that came after taking it."""
    kept = rng_state()
    expected = torch.rand(5)
    torch.rand(100)
    restore_rng(kept)
    assert torch.equal(torch.rand(5), expected)


# --- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.Random(len(data)).randrange(len(data))] ^= 4
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def append(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def delete(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, zero, append, delete])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_the_older_one_used(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    """Any file, flipped, cut, zeroed, longer or gone: step 5 is passed over with a line that names it, 3 is used."""
    for step in (3, 5):
        save(tmp_path, state(step), FACTS, keep=2)
    damage(tmp_path / "step-000005" / name)
    step, damaged = latest(tmp_path)
    assert step == 3
    assert len(damaged) == 1
    assert "step-000005: " in damaged[0]
    same(load_latest(tmp_path).state, state(3))  # type: ignore[union-attr]


def test_every_single_flipped_bit_of_the_manifest_is_seen(tmp_path: Path) -> None:
    """Also one in what it records beside the hashes: the configuration, the data, the versions."""
    path = save(tmp_path, state(5), FACTS, keep=2)
    whole = (path / "manifest.json").read_bytes()
    for i in range(len(whole)):
        if not whole[i : i + 1].isspace():
            (path / "manifest.json").write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            assert verify(path) is not None, f"byte {i} of {whole.decode()}"


def test_a_file_that_does_not_belong_is_seen(tmp_path: Path) -> None:
    """What was saved is exactly what is there."""
    path = save(tmp_path, state(5), {}, keep=2)
    (path / "extra").write_bytes(b"")
    assert verify(path) == "extra is not what was saved"


def test_all_damaged_is_an_error_and_never_a_restart(tmp_path: Path) -> None:
    """Exit code 5, with each checkpoint and what is wrong with it."""
    for step in (3, 5):
        flip(save(tmp_path, state(step), {}, keep=2) / "weights.safetensors")
    with pytest.raises(MachineError) as caught:
        load_latest(tmp_path)
    (line,) = caught.value.lines()
    assert caught.value.exit_code == 5
    assert "step-000003: weights.safetensors" in line
    assert "step-000005: weights.safetensors" in line
    assert "--fresh" in line


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version's checkpoint is not guessed at."""
    monkeypatch.setattr(checkpoint, "FORMAT", 9)
    save(tmp_path, state(5), {"versions": {"instil": "7.1"}}, keep=2)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"of format 9, written by instil 7\.1; .*it needs version >= 7\.1"):
        load_latest(tmp_path)


def test_half_written_folders_are_no_checkpoints(tmp_path: Path) -> None:
    """A partial folder with a higher step, a folder that is not named as a step: ignored, and the first one cleaned."""
    path = save(tmp_path, state(3), {}, keep=2)
    shutil.copytree(path, tmp_path / ".partial-9-abcd")
    shutil.copytree(path, tmp_path / ".trash-step-000002-abcd")
    shutil.copytree(path, tmp_path / "step-best")
    assert latest(tmp_path) == (3, [])
    save(tmp_path, state(4), {}, keep=2)
    assert names(tmp_path) == ["step-000003", "step-000004", "step-best"]


def test_the_latest_is_the_highest_step_and_not_the_youngest_file(tmp_path: Path) -> None:
    """1000 comes after 999, whatever the clock says."""
    for step in (999_999, 1_000_000, 12):
        save(tmp_path, state(step), {}, keep=9)
    assert latest(tmp_path)[0] == 1_000_000


# --- how many are kept


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_keep_is_how_many_there_are(keep: int, left: list[int], tmp_path: Path) -> None:
    """The newest ones, and nothing else in the folder."""
    for step in range(1, 6):
        save(tmp_path, state(step), {}, keep=keep)
    assert names(tmp_path) == [f"step-{step:06d}" for step in left]


def test_a_damaged_checkpoint_does_not_push_a_sound_one_out(tmp_path: Path) -> None:
    """Resumed from 3 because 6 was damaged, the run saves 4: with keep 2, both 3 and 4 are there."""
    for step in (3, 6):
        save(tmp_path, state(step), {}, keep=2)
    flip(tmp_path / "step-000006" / "weights.safetensors")
    save(tmp_path, state(4), {}, keep=2)
    assert {"step-000003", "step-000004"} <= set(names(tmp_path))


def test_the_same_step_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    """A run that went back and came to step 5 again."""
    flip(save(tmp_path, state(5), {}, keep=2) / "weights.safetensors")
    save(tmp_path, state(5), {}, keep=2)
    assert names(tmp_path) == ["step-000005"]
    assert latest(tmp_path) == (5, [])


# --- a disk that refuses


def refuse_after(n: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let the n-th fsync or rename from now on fail, as a full disk does; returns how many there have been."""
    calls = 0

    def counted(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return call

    monkeypatch.setattr("os.fsync", counted(files.os.fsync))
    monkeypatch.setattr("os.rename", counted(files.os.rename))
    return lambda: calls


@pytest.mark.parametrize("n", range(1, 9))
def test_a_save_that_fails_loses_nothing(n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of its writes fails: exit code 5, the place and the reason, and the older checkpoint still loads."""
    save(tmp_path, state(3), {}, keep=1)
    refuse_after(n, monkeypatch)
    with pytest.raises(MachineError) as caught:
        save(tmp_path, state(5), {}, keep=1)
    monkeypatch.undo()
    (line,) = caught.value.lines()
    assert "step-000005: not saved: " in line
    assert "No space left" in line
    assert latest(tmp_path)[0] in (3, 5)
    assert "step-000003" in names(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".partial")]


def test_the_sweep_covers_every_write_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five files, their folder, the rename and the parent are eight."""
    calls = refuse_after(99, monkeypatch)
    save(tmp_path, state(3), {}, keep=1)
    assert calls() == 8


def test_a_checkpoint_that_does_not_read_back_keeps_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that writes something else: exit code 5, and step 3 is still there although keep is 1."""
    save(tmp_path, state(3), {}, keep=1)
    write = checkpoint.save_file

    def lying(tensors: Any, path: Path) -> None:
        write(tensors, path)
        hashes = checkpoint.hashes

        def then_damaged(folder: Path) -> Any:
            found = hashes(folder)
            monkeypatch.setattr(checkpoint, "hashes", hashes)
            flip(folder / "weights.safetensors")
            return found

        monkeypatch.setattr(checkpoint, "hashes", then_damaged)
        monkeypatch.setattr(checkpoint, "save_file", write)

    monkeypatch.setattr(checkpoint, "save_file", lying)
    with pytest.raises(MachineError, match="does not read back: weights"):
        save(tmp_path, state(5), {}, keep=1)
    assert latest(tmp_path)[0] == 3
