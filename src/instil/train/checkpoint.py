"""Checkpoints: complete or absent, hashed, verified before they are trusted and before an older one goes."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from instil.errors import InstilError, MachineError, UsageError
from instil.files import discard, make_folder, publish, sha256_of_files, sweep

FORMAT = 2  # 1: the manifest was indented; it is still read. A newer one is refused, never guessed at
TENSORS = ("weights", "optimizer", "rng")
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged manifest may raise
PIN = ".pin"  # checkpoints/step-000123.pin: that checkpoint is never pruned


@dataclass(frozen=True)
class TrainState:
    """Everything a run's future depends on. step = updates done; rng = random state as uint8; counters = plain numbers."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    counters: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        every = (self.weights, self.optimizer, self.rng)
        return sum(t.numel() * t.element_size() for tensors in every for t in tensors.values())


@dataclass(frozen=True)
class Found:
    """A checkpoint that verifies. damaged: those newer than it that do not, each with what is wrong."""

    path: Path
    state: TrainState
    manifest: Mapping[str, Any]
    damaged: list[str]


def checkpoint_name(step: int) -> str:
    """step-000123"""
    return f"step-{step:06d}"


def save(folder: Path, state: TrainState, facts: Mapping[str, Any], *, keep: int) -> Path:
    """Write folder/step-N by the protocol: partial folder, flushed, manifest with hashes, rename; then prune.

    The new checkpoint is read again and verified before any older one is removed. facts: what the manifest records
    beside the hashes (settings, data, model, versions, machine). Raises MachineError when the disk refuses; nothing is lost.
    """
    final = folder / checkpoint_name(state.step)
    try:
        make_folder(folder)
        sweep(folder)
        publish(final, lambda partial: _fill(partial, state, facts))
    except (OSError, SafetensorError) as error:
        what = f"not saved: {_reason(error)} (it needs {state.bytes / 1e9:.3g} GB, {_free(folder)})"
        raise MachineError.at(final, what, "free some space; older checkpoints are untouched", "not saved") from error
    problem = verify(final)
    if problem:
        what = f"does not read back: {problem}"
        raise MachineError.at(final, what, "check the disk; older checkpoints are untouched", "not saved")
    prune(folder, state.step, keep)
    return final


def _fill(partial: Path, state: TrainState, facts: Mapping[str, Any]) -> None:
    for name, tensors in zip(TENSORS, (state.weights, state.optimizer, state.rng), strict=True):
        save_file({k: t.detach().contiguous() for k, t in tensors.items()}, partial / f"{name}.safetensors")
    (partial / "state.json").write_bytes(_canonical({"step": state.step, "counters": dict(state.counters)}))
    manifest = {**facts, "format": FORMAT, "step": state.step, "files": hashes(partial)}
    (partial / "manifest.json").write_bytes(_canonical({**manifest, "sha256": _digest(manifest)}))


def _reason(error: Exception) -> str:
    """What the system said, without the paths of files that are gone."""
    return getattr(error, "strerror", None) or str(error)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB are free"
    except OSError:
        return "how much is free cannot be told"


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove what is older than `step` but for the newest keep - 1; pinned ones stay and are not counted.

    What is newer than `step` and damaged, so that the run went on from an older one, goes too.
    """
    loose = [path for path in steps_newest_first(folder) if not path.with_name(path.name + PIN).exists()]
    damaged = [path for path in loose if step_of(path) > step and verify(path) is not None]
    older = [path for path in loose if step_of(path) < step]
    for path in (*damaged, *older[max(0, keep - 1) :]):
        discard(path)


def hashes(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest; files are hashed in parallel, the largest first."""
    files = sorted((f for f in folder.iterdir() if f.name != "manifest.json"), key=lambda f: -f.stat().st_size)
    found = zip(files, sha256_of_files(files), strict=True)
    return {f.name: {"size": f.stat().st_size, "sha256": digest} for f, digest in sorted(found)}


def _canonical(value: object) -> bytes:
    """JSON with sorted keys and no blanks: equal content is equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's content, which the manifest itself carries as `sha256`."""
    return hashlib.sha256(_canonical(manifest)).hexdigest()


def verify(checkpoint: Path) -> str | None:
    """None if every file is what the manifest says, to the byte, else what is wrong.

    Raises UsageError for a format that a newer version wrote.
    """
    try:
        manifest = _manifest(checkpoint)
        if manifest is None:
            return "manifest.json is not what was saved"
        expected = manifest["files"]
        sizes = {f.name: f.stat().st_size for f in checkpoint.iterdir() if f.name != "manifest.json"}
        wrong = [name for name in {*expected, *sizes} if expected.get(name, {}).get("size") != sizes.get(name)]
        found = {} if wrong else hashes(checkpoint)
    except UNREADABLE as error:
        return f"no readable manifest ({type(error).__name__})"
    wrong = wrong or [name for name in expected if expected[name] != found[name]]
    return f"{min(wrong)} is not what was saved" if wrong else None


def manifests(folder: Path) -> list[dict[str, Any]]:
    """The manifests of the checkpoints in a folder, the newest first, but for those that are not what was saved; nothing
    else of a checkpoint is read. Raises UsageError for a format that a newer version wrote."""
    found = []
    for checkpoint in steps_newest_first(folder):
        with suppress(*UNREADABLE):
            manifest = _manifest(checkpoint)
            found += [manifest] if manifest is not None else []
    return found


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    """A checkpoint's manifest without its digest; None where it is not what was saved."""
    raw = (checkpoint / "manifest.json").read_bytes()
    manifest: dict[str, Any] = orjson.loads(raw)
    kind = manifest["format"]
    if manifest.pop("sha256") != _digest(manifest):
        return None
    if kind > FORMAT:
        raise _too_new(checkpoint, manifest)
    if kind > 1 and raw != _canonical({**manifest, "sha256": _digest(manifest)}):
        return None
    return manifest


def _too_new(checkpoint: Path, manifest: Mapping[str, Any]) -> InstilError:
    by = manifest.get("versions", {}).get("instil", "a newer version")
    what = f"is of format {manifest['format']}, written by instil {by}; this version reads up to {FORMAT}"
    return UsageError.at(checkpoint, what, f"it needs version >= {by}")


def load_latest(folder: Path) -> Found | None:
    """The newest checkpoint that verifies; None if there has never been one.

    Raises MachineError if there are some and all are damaged: never a silent restart; UsageError where one is of a newer
    version.
    """
    damaged: list[str] = []
    for checkpoint in steps_newest_first(folder):
        problem = verify(checkpoint)
        if problem is None:
            try:
                return Found(checkpoint, *_read(checkpoint), damaged)
            except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
                problem = f"is whole, but nothing that can be read ({type(error).__name__}: {error})"
        damaged.append(f"{checkpoint}: {problem}")
    if damaged:
        raise MachineError.at(folder, f"no checkpoint verifies ({'; '.join(damaged)})", "start over with --fresh")
    return None


def _read(checkpoint: Path) -> tuple[TrainState, dict[str, Any]]:
    weights, optimizer, rng = (load_file(checkpoint / f"{n}.safetensors") for n in TENSORS)
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


def step_of(checkpoint: Path) -> int:
    """123 of step-000123."""
    return int(checkpoint.name[5:])


def steps_newest_first(folder: Path) -> list[Path]:
    """The checkpoints by step number, highest first: never by clock or pointer file."""
    found = [f for f in folder.glob("step-*") if f.name[5:].isdecimal() and f.is_dir()] if folder.is_dir() else []
    return sorted(found, key=step_of, reverse=True)
