"""The run folder: its files, its one writer, and which model a name or a run stands for."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import platform
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import orjson

from instil import __version__
from instil.config import HARMLESS, Config, flat
from instil.errors import MachineError, UsageError
from instil.model.locate import ModelFolder, locate

LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run; nothing is created before `claim`."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def packs(self) -> Path:
        return self.path / "packs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def finished(self) -> bool:
        """summary.json is written last."""
        return self.summary.is_file()


def run_name(config: Config) -> str:
    """run.name, or one made from model, data and a digest of all that shapes the result: other settings, other folder."""
    if config.run.name:
        return config.run.name
    shaping = {k: v for k, v in flat(config.model_dump()).items() if not k.startswith(HARMLESS)}
    digest = hashlib.sha256(orjson.dumps(shaping, option=orjson.OPT_SORT_KEYS)).hexdigest()[:6]
    first = config.data.train[0]
    file = first if isinstance(first, str) else first.path
    words = [Path(config.model.rstrip("/")).name, Path(file).name.split(".")[0]]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)[:50]).strip("-._")
    return f"{slug or 'run'}-{digest}"  # a name in another script leaves no slug


@contextlib.contextmanager
def claim(config: Config, *, fresh: bool) -> Iterator[RunFolder]:
    """Open the run's folder for one writer. fresh: an older run of that name is moved aside, not deleted.

    A run that fails before it has a manifest leaves nothing: what this call made is removed, what it moved is put back.
    Raises UsageError for a folder with files that are not a run's, MachineError when another process holds it.
    """
    run = RunFolder(Path(config.run.dir) / run_name(config))
    if run.path.exists() and not run.path.is_dir():
        raise UsageError.at("run.dir", f"{run.path} is a file", "choose another run.dir or run.name")
    if run.path.is_dir() and any(run.path.iterdir()) and not (run.path / "run.lock").is_file():
        raise UsageError.at("run.dir", f"{run.path} holds files that are not a run's", "choose another run.name")
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    aside = None
    with contextlib.ExitStack() as locks:
        locks.enter_context(_locked(run.path))
        if fresh and (run.finished or run.config.exists()):
            aside = _unused(run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
            run.path.rename(aside)
            locks.enter_context(_locked(run.path))
        try:
            yield run
        except BaseException:
            if not run.manifest.exists():
                _take_back(run.path, made, aside)
            raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make `folder` where it is absent, and hold its run.lock, which tells others by whom it is held."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "run.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise MachineError.at(folder, f"cannot be written ({error.strerror})", "choose another run.dir") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise MachineError.at(folder, f"is in use by {holder}", "wait for it, or stop it") from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        handle.flush()
        yield


def _unused(folder: Path) -> Path:
    """`folder`, or with a number behind it where that is taken."""
    names = itertools.chain([folder], (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _take_back(folder: Path, made: Sequence[Path], aside: Path | None) -> None:
    """Undo a claim. made: the folders that it made, the innermost first; aside: where it moved the older run."""
    if aside is not None or folder in made:
        shutil.rmtree(folder, ignore_errors=True)
    if aside is not None:
        aside.rename(folder)
    for outer in made[1:]:
        with contextlib.suppress(OSError):  # meanwhile somebody else put something into it
            outer.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, never between."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON document, indented, atomically."""
    write_atomically(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def keep_metrics_through(path: Path, step: int) -> None:
    """Drop the lines after `step`, which the resumed run makes again; and a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if orjson.loads(line)["step"] <= step:
                kept.append(line.removesuffix(b"\n") + b"\n")
        except orjson.JSONDecodeError:
            continue
    write_atomically(path, b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run's metrics.jsonl."""
    return [orjson.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """One line a step."""
    with path.open("ab") as file:
        file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def machine_facts() -> dict[str, Any]:
    """Versions and machine, for the manifest."""
    versions = {"instil": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"versions": versions, "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            "byteorder": sys.byteorder}  # fmt: skip


@dataclass(frozen=True)
class Named:
    """What a user's M or RUN stands for. run is None for a model; base is the run's own base model."""

    folder: ModelFolder
    run: RunFolder | None
    base: str | None


def named(name: str, *, need_weights: bool) -> Named:
    """A run folder (its model/) or a model as in `locate`."""
    path = Path(name)
    run = RunFolder(path)
    if path.is_dir() and run.manifest.is_file() and run.config.is_file():
        manifest = orjson.loads(run.manifest.read_bytes())
        if not run.model.is_dir():
            raise UsageError.at(name, "the run is not finished: it has no model/ yet", "run its command again to go on")
        return Named(locate(str(run.model), need_weights=need_weights), run, str(manifest["model"]["name"]))
    return Named(locate(name, need_weights=need_weights), None, None)
