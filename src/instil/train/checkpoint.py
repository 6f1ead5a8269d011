"""Checkpoints: complete or absent, hashed, verified before they are trusted and before an older one goes."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instil.errors import MachineError

FORMAT = 1


@dataclass(frozen=True)
class TrainState:
    """Everything a run's future depends on. step = updates done; rng = random state as uint8; counters = plain numbers."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    counters: Mapping[str, Any]


def checkpoint_name(step: int) -> str:
    """step-000123"""
    return f"step-{step:06d}"


def save(folder: Path, state: TrainState, facts: Mapping[str, Any], *, keep: int) -> Path:
    """Write checkpoints/step-N by the protocol: partial folder, fsync, manifest with hashes, rename; then prune.

    The new checkpoint is read again and verified before any older one is removed. facts: what the manifest records
    beside the hashes (config, data, versions, machine). Raises MachineError when the disk refuses; nothing is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob(".partial-*"), *folder.glob(".trash-*")):
        shutil.rmtree(left, ignore_errors=True)
    final = folder / checkpoint_name(state.step)
    partial = folder / f".partial-{state.step}-{secrets.token_hex(4)}"
    try:
        partial.mkdir()
        for name, tensors in (("weights", state.weights), ("optimizer", state.optimizer), ("rng", state.rng)):
            save_file({k: t.detach().contiguous() for k, t in tensors.items()}, partial / f"{name}.safetensors")
            _sync(partial / f"{name}.safetensors")
        _write(partial / "state.json", {"step": state.step, "counters": dict(state.counters)})
        manifest = {**facts, "format": FORMAT, "step": state.step, "files": hashes(partial)}
        _write(partial / "manifest.json", {**manifest, "sha256": _digest(manifest)})
        _sync(partial)
        if final.exists():  # the same step, saved before and found damaged
            _discard(final)
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise MachineError.at(
            final, f"not saved: {error}", "free some space; older checkpoints are untouched"
        ) from error
    problem = verify(final)
    if problem:
        raise MachineError.at(
            final, f"does not read back: {problem}", "check the disk; older checkpoints are untouched"
        )
    older = [f for f in _newest_first(folder) if int(f.name[5:]) < state.step]  # a newer one was found damaged
    for old in older[max(0, keep - 1) :]:
        _discard(old)
    return final


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest; files are hashed in parallel."""
    files = sorted(f for f in folder.iterdir() if f.name != "manifest.json")

    def one(file: Path) -> dict[str, Any]:
        with file.open("rb") as f:
            return {"size": file.stat().st_size, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}

    with ThreadPoolExecutor() as pool:
        return dict(zip((f.name for f in files), pool.map(one, files), strict=True))


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's content, which the manifest itself carries as `sha256`."""
    return hashlib.sha256(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS)).hexdigest()


def verify(checkpoint: Path) -> str | None:
    """None if every file is what the manifest says, else what is wrong."""
    try:
        manifest = orjson.loads((checkpoint / "manifest.json").read_bytes())
        if manifest["format"] > FORMAT:
            return f"format {manifest['format']} is newer than this version reads"
        if manifest.pop("sha256") != _digest(manifest):
            return "manifest.json is not what was saved"
        expected, found = manifest["files"], hashes(checkpoint)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable manifest ({type(error).__name__})"
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            return f"{name} is not what was saved"
    return None


def load_latest(folder: Path) -> tuple[TrainState, dict[str, Any], list[str]] | None:
    """The newest checkpoint that verifies, its manifest, and one line for each damaged one passed over.

    None if there has never been one. Raises MachineError if there are some and all are damaged: never a silent restart.
    """
    damaged: list[str] = []
    for checkpoint in _newest_first(folder):
        problem = verify(checkpoint)
        if problem is None:
            return (*_read(checkpoint), damaged)
        damaged.append(f"{checkpoint}: {problem}")
    if damaged:
        raise MachineError.at(folder, f"no checkpoint verifies ({'; '.join(damaged)})", "start over with --fresh")
    return None


def _read(checkpoint: Path) -> tuple[TrainState, dict[str, Any]]:
    weights, optimizer, rng = (load_file(checkpoint / f"{n}.safetensors") for n in ("weights", "optimizer", "rng"))
    state = orjson.loads((checkpoint / "state.json").read_bytes())
    manifest = orjson.loads((checkpoint / "manifest.json").read_bytes())
    return TrainState(state["step"], weights, optimizer, rng, state["counters"]), manifest


def rng_state() -> dict[str, Tensor]:
    """Torch's random state, CPU and every CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    for i in range(torch.cuda.device_count()):
        states[f"cuda:{i}"] = torch.cuda.get_rng_state(i)
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """The reverse of `rng_state`, for the devices that are here."""
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda:{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda:{i}"], i)


def _newest_first(folder: Path) -> Iterator[Path]:
    """By step number: never by clock or pointer file."""
    found = [f for f in folder.glob("step-*") if f.name[5:].isdigit()] if folder.is_dir() else []
    return iter(sorted(found, key=lambda f: int(f.name[5:]), reverse=True))


def _discard(checkpoint: Path) -> None:
    trash = checkpoint.with_name(f".trash-{checkpoint.name}-{secrets.token_hex(4)}")
    checkpoint.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _write(file: Path, value: object) -> None:
    file.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS))
    _sync(file)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
