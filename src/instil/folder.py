"""The run folder: its files, its one writer, and which model a name or a run stands for."""

from __future__ import annotations

import contextlib
import datetime
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TextIO

import orjson
from pydantic import AfterValidator, BaseModel, Field, ValidationError

from instil import __version__
from instil.config import HARMLESS, Config, flat
from instil.errors import InstilError, MachineError, UsageError
from instil.files import make_folder, sha256_of_files, sweep, write_atomically
from instil.model.locate import ModelFolder, locate

LOCK = "run.lock"
COUNTED = ("seconds", "computed_tokens")  # of each line of metrics.jsonl
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
    def incident(self) -> Path:
        return self.path / "incident"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def finished(self) -> bool:
        """Whether summary.json, which is written last, can be read, and the result is there as it says: every file, and the
        weights to the bit; the small files may have been edited."""
        summary = read_summary(self)
        return summary is not None and _has_result(self.path, summary["files"])


def _has_result(folder: Path, files: Mapping[str, str]) -> bool:
    weights = [name for name in files if name.endswith(".safetensors")]
    there = all((folder / name).is_file() for name in files)
    return there and sha256_of_files(folder / name for name in weights) == [files[name] for name in weights]


def run_name(config: Config) -> str:
    """run.name, or one made from model, data and a digest of all that shapes the result: other settings, other folder."""
    if config.run.name:
        return config.run.name
    shaping = {k: v for k, v in flat(config.model_dump()).items() if k not in HARMLESS}
    digest = hashlib.sha256(orjson.dumps(shaping, option=orjson.OPT_SORT_KEYS)).hexdigest()[:6]
    first = config.data.train[0]
    file = first if isinstance(first, str) else first.path
    words = [Path(config.model.rstrip("/")).name, Path(file).name.split(".")[0]]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)[:50]).strip("-._")
    return f"{slug or 'run'}-{digest}"  # a name in another script leaves no slug


def run_folder(config: Config) -> RunFolder:
    """The folder of a configuration's run; ~ is the home folder."""
    return RunFolder(Path(os.path.expanduser(config.run.dir)) / run_name(config))


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: by its lock, or, where that was lost, by the two files that every run has."""
    run = RunFolder(folder)
    return (folder / LOCK).is_file() or (run.config.is_file() and run.manifest.is_file())


@contextlib.contextmanager
def claim(config: Config, *, fresh: bool, say: Callable[[str], None] = lambda line: None) -> Iterator[RunFolder]:
    """Open the run's folder for one writer, and remove what a process that died left, which is said. fresh: an older run of
    that name is moved aside, not deleted.

    A run that fails before it has a manifest leaves nothing: what this call made is removed, what it moved is put back.
    Raises UsageError for a folder with files that are not a run's, MachineError when another process holds it.
    """
    run = run_folder(config)
    _refuse_place(run.path, config)
    if run.path.exists() and not run.path.is_dir():
        raise UsageError.at("run.dir", f"{run.path} is a file", "choose another run.dir or run.name")
    if run.path.is_dir() and any(run.path.iterdir()) and not is_run(run.path):
        raise UsageError.at("run.dir", f"{run.path} holds files that are not a run's", "choose another run.name")
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    aside = None
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(run.path))
        begun = (run.config, run.manifest, run.checkpoints, run.metrics, run.summary)
        if fresh and any(place.exists() for place in begun):
            aside = _unused(run.path.with_name(f"{run.path.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
            run.path.rename(aside)
            locks.enter_context(locked(run.path))
        try:
            for place in (run.packs, run.checkpoints):
                if place.exists() and not place.is_dir():
                    raise UsageError.at(place, "is a file, where a run has a folder", "move it away, then run again")
            for place, of in ((run.path, ""), (run.packs, ""), (run.checkpoints, ""), (run.path.parent, run.path.name)):
                if left := sweep(place, of):
                    say(f"removed from {place} what a process that died left half-written: {', '.join(left)}")
            yield run
        except BaseException:
            if not run.manifest.exists():
                _take_back(run.path, made, aside)
            raise


def _refuse_place(folder: Path, config: Config) -> None:
    """Raise UsageError for a run in or as a folder that is for something else: the root, the home folder, the data's."""
    there, remedy = folder.resolve(), "choose another run.dir, for instance run.dir=runs"
    for place, name in (
        (Path("/"), "the root of the file system"),
        (Path(os.path.expanduser("~")), "your home folder"),
    ):
        if place.resolve() in (there, there.parent):
            raise UsageError.at("run.dir", f"{place} is {name}, and no folder of runs", remedy, "place")
    heldout = [config.data.heldout] if isinstance(config.data.heldout, str) else []
    for source in (*config.data.train, *heldout):
        data = Path(os.path.expanduser(source if isinstance(source, str) else source.path))
        inside = data.is_dir() and there.is_relative_to(data.resolve())
        if inside or (data.is_file() and there == data.resolve().parent):
            what = f"{folder} is {'in ' if inside else ''}the folder of the data ({data}), which a run would write into"
            raise UsageError.at("run.dir", what, "choose another run.dir, or give the data as files", "place")


def keep_out_of_git(folder: Path) -> None:
    """In a git work tree the run ignores itself: weights and data are never committed by accident."""
    file = folder / ".gitignore"
    if not file.exists() and any((outer / ".git").exists() for outer in folder.resolve().parents):
        file.write_text("*\n", encoding="utf-8")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` where it is absent, and hold its run.lock, which tells others by whom it is held.

    The lock is the system's (flock): it ends with the process, however that ends.
    """
    try:
        make_folder(folder)
        handle = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    with handle:
        if not _taken(handle):
            raise _in_use(folder, handle)
        try:
            handle.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            handle.write(f"process {os.getpid()} on {socket.gethostname()} since {since} (boot {_boot()})\n")
            handle.flush()
            keep_out_of_git(folder)
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def refuse_busy(config: Config) -> None:
    """Raise MachineError where another process holds the run's folder: at once, before anything heavy is loaded."""
    folder = run_folder(config).path
    with contextlib.suppress(OSError), (folder / LOCK).open(encoding="utf-8") as handle:
        if not _taken(handle):
            raise _in_use(folder, handle)


def _taken(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(folder: Path, handle: TextIO) -> InstilError:
    handle.seek(0)
    holder = handle.read().strip().partition(" (boot")[0] or "another process"
    return MachineError.at(folder, f"is in use by {holder}", "wait for it, stop it, or choose another run.name", "lock")


def _unwritable(folder: Path, error: OSError) -> InstilError:
    return MachineError.at(folder, f"cannot be written ({error.strerror})", "choose another run.dir, or free space")


def _boot() -> str:
    """The system's boot id: a process number means nothing after another boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """One JSON document, indented, atomically."""
    write_atomically(path, orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def keep_metrics_through(path: Path, step: int) -> list[str]:
    """Drop the lines after `step`, which the resumed run makes again, lines twice there, and a torn last line.

    Returns what a user should know: that lines before `step` are missing or unreadable.
    """
    kept: dict[int, bytes] = {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        record = _record(line)
        if record is not None and record["step"] <= step:
            kept[record["step"]] = line + b"\n"
    if path.exists():
        write_atomically(path, b"".join(kept[number] for number in sorted(kept)))
    gone = step - len(kept)
    return [f"{path}: {gone:,} of the {step:,} steps done have no readable line; the history has gaps"] if gone else []


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is torn, or lacks what is summed over them."""
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    whole = isinstance(found, dict) and isinstance(found.get("step"), int)
    return found if whole and all(isinstance(found.get(key), int | float) for key in COUNTED) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; torn lines, as a kill leaves one at the end, are no records."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [record for line in lines if (record := _record(line)) is not None]


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """One line a step."""
    with path.open("ab") as file:
        file.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


class _Named(BaseModel):
    name: str


class _Manifest(BaseModel):
    """What is read of manifest.json. packs is the name of a folder that is written and removed: a digest, never a path."""

    model: _Named
    tokenizer_sha256: str
    template_sha256: str
    data_sha256: dict[str, str]
    packs: str = Field(pattern="^[0-9a-f]{16}$")
    date: Annotated[str, AfterValidator(datetime.date.fromisoformat)] | None = None
    versions: dict[str, Any] = {}
    numerics: dict[str, Any] = {}
    changes: list[dict[str, Any]] = []
    run: dict[str, Any] | None = None


class _Summary(BaseModel):
    """What is read of summary.json; numbers that a run did not measure are null."""

    loss_before: float | None
    loss_after: float | None
    target_tokens_per_s: float | None
    computed_tokens_per_s: float | None
    peak_memory_bytes: int
    files: dict[str, str]


def _as(shape: type[BaseModel], found: Any) -> dict[str, Any]:
    """A document of that shape as it is. Raises ValueError saying what of it is otherwise."""
    try:
        shape.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where + ': ' if where else ''}{first['msg']}") from None
    return dict(found)


def read_summary(run: RunFolder) -> dict[str, Any] | None:
    """summary.json; None where there is none, or none that can be read: then the run makes it again from its last step."""
    try:
        return _as(_Summary, orjson.loads(run.summary.read_bytes()))
    except (OSError, ValueError):
        return None


def read_manifest(run: RunFolder) -> dict[str, Any]:
    """manifest.json of a run that has begun; {} where there is none. Raises MachineError where it cannot be read."""
    try:
        return _as(_Manifest, orjson.loads(run.manifest.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(run, str(error)) from None


def _damaged(run: RunFolder, why: str) -> InstilError:
    return MachineError.at(
        run.manifest, f"cannot be read ({why})", "put it back from a copy, or start over with --fresh"
    )


def open_run(name: str) -> RunFolder:
    """The folder of a run that has begun. Raises UsageError for anything else."""
    run = RunFolder(Path(name))
    if not (run.config.is_file() and run.manifest.is_file()):
        raise UsageError.at(name, "is not the folder of a run that has begun", "give one that `instil train` has made")
    return run


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
        manifest = read_manifest(run)
        if not run.model.is_dir():
            raise UsageError.at(name, "the run is not finished: it has no model/ yet", "run its command again to go on")
        return Named(locate(str(run.model), need_weights=need_weights), run, str(manifest["model"]["name"]))
    return Named(locate(name, need_weights=need_weights), None, None)
