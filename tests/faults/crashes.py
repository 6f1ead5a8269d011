"""Points at which a process may die: before every call that changes files, and in the middle of every write; and what the
disk has of the files when the power goes at one of them."""

from __future__ import annotations

import builtins
import io
import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensor_bytes

from instil import files
from instil.data.ledger import LedgerEntry, write_ledger
from instil.pack import store
from instil.train import checkpoint
from instil.train.checkpoint import TrainState
from instil.types import Example

DIED = 77  # the exit code of a child that died at its point
At = Callable[[str], None]


def state(step: int) -> TrainState:
    """A small state that only this step has."""
    made = torch.Generator().manual_seed(step)
    return TrainState(
        step=step,
        weights={"a": torch.randn(6, 5, generator=made), "b": torch.randn(7, generator=made)},
        optimizer={"exp_avg.a": torch.randn(6, 5, generator=made), "step.a": torch.tensor(float(step))},
        rng={"cpu": torch.arange(step, step + 64).to(torch.uint8)},
        counters={"seconds": 0.1 * step, "target_tokens": 100 * step},
    )


def same_state(a: TrainState, b: TrainState) -> bool:
    """Equal to the bit."""
    groups = ((a.weights, b.weights), (a.optimizer, b.optimizer), (a.rng, b.rng))
    tensors = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in groups)
    return tensors and (a.step, dict(a.counters)) == (b.step, dict(b.counters))


# --- what is not on the disk yet


@dataclass(frozen=True)
class Op:
    """A change of a name in a folder, that a power cut may undo. was: the bytes of a file that it replaced or removed."""

    kind: str
    folder: int
    name: str
    other: str = ""
    was: bytes | None = None


@dataclass
class Unsynced:
    """Files (by inode) written since they were last flushed to the disk, and changes of names since their folder was."""

    dirty: set[int] = field(default_factory=set)
    ops: list[Op] = field(default_factory=list)

    def flushed(self, handle: int) -> None:
        inode = os.fstat(handle).st_ino
        self.dirty.discard(inode)
        self.ops = [op for op in self.ops if op.folder != inode]


@dataclass(frozen=True)
class Snapshot:
    """The files at a point, and what of them the disk may not have yet (names below `path`, as they were then)."""

    what: str
    path: Path
    dirty: list[str]
    ops: list[Op]
    folders: Mapping[int, str]

    def after_power_loss(self, place: Path, data: str, names: str, seed: int = 0) -> Path:
        """A copy without what was not flushed. data: zeroed, cut or gone; names: kept, undone, or some (of them undone)."""
        rng = random.Random(seed)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.path, place)
        now = {inode: (place / name).stat().st_ino for inode, name in self.folders.items()}
        for name in self.dirty:
            file = place / name
            size = file.stat().st_size
            if data == "zeroed":
                file.write_bytes(bytes(size))
            elif data == "cut":
                os.truncate(file, rng.randrange(size) if size else 0)
            else:
                file.unlink()
        for op in reversed(self.ops):
            if names == "undone" or (names == "some" and rng.random() < 0.5):
                _undo(op, place, now.get(op.folder))
        return place


def _undo(op: Op, place: Path, inode: int | None) -> None:
    """Put a name back to what it was, where that is possible still."""
    folders = [Path(top) for top, _, _ in os.walk(place) if Path(top).stat().st_ino == inode]
    if not folders:
        return
    name, other = folders[0] / op.name, folders[0] / op.other
    if op.kind == "made":
        shutil.rmtree(name, ignore_errors=True)
        name.unlink(missing_ok=True)
    elif op.kind == "renamed" and other.exists() and not name.exists():
        other.rename(name)
        if op.was is not None:
            other.write_bytes(op.was)
    elif op.kind == "exchanged" and name.exists() and other.exists():
        between = folders[0] / "between"
        name.rename(between)
        other.rename(name)
        between.rename(other)
    elif op.kind == "removed" and op.was is not None and not name.exists():
        name.write_bytes(op.was)
    elif op.kind == "removed folder" and not name.exists():
        name.mkdir()


# --- the shim


class Written:
    """A file open for writing, with a point before and in the middle of each write."""

    def __init__(self, file: Any, at: At, unsynced: Unsynced):
        self._file, self._at, self._unsynced = file, at, unsynced

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        self._at("write")
        self._unsynced.dirty.add(os.fstat(self._file.fileno()).st_ino)
        half = len(data) // 2
        self._file.write(data[:half])
        self._file.flush()
        self._at("half a write")
        self._file.write(data[half:])
        return len(data)


@contextmanager
def watched(at: At, *, exchange: bool = True) -> Iterator[Unsynced]:
    """Have `at(what)` called before each call that changes files, until the end of the block. exchange: whether the system
    can let two names change places."""
    unsynced, quiet = Unsynced(), [0]

    def point(what: str) -> None:
        if not quiet[0]:
            quiet[0] += 1
            try:
                at(what)
            finally:
                quiet[0] -= 1

    def parent(path: Any, handle: int | None) -> int:
        return os.fstat(handle).st_ino if handle is not None else os.stat(Path(os.fsdecode(path)).parent).st_ino

    def note(kind: str, path: Any, other: Any = "", handle: int | None = None) -> None:
        if not quiet[0]:
            quiet[0] += 1
            was = _content(other if kind == "renamed" else path, handle)
            unsynced.ops.append(Op(kind, parent(path, handle), _name(path), _name(other), was))
            quiet[0] -= 1

    real = {name: getattr(os, name) for name in ("open", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")}
    real_open, real_save, real_table, real_exchange = io.open, checkpoint.save_file, store._write, files._exchanged

    def fsync(handle: Any) -> None:
        point("fsync")
        real["fsync"](handle)
        if not quiet[0]:
            unsynced.flushed(handle if isinstance(handle, int) else handle.fileno())

    def renamed(name: str) -> Callable[..., None]:
        def call(a: Any, b: Any, **more: Any) -> None:
            point(name)
            note("renamed", a, b)
            real[name](a, b, **more)

        return call

    def removed(name: str, kind: str) -> Callable[..., None]:
        def call(path: Any, *, dir_fd: int | None = None) -> None:
            point(name)
            note(kind, path, handle=dir_fd)
            real[name](path, dir_fd=dir_fd)

        return call

    def mkdir(path: Any, mode: int = 0o777, **more: Any) -> None:
        point("mkdir")
        real["mkdir"](path, mode, **more)
        note("made", path)

    def os_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        point("os.open")
        opened: int = real["open"](path, flags, *rest, **more)
        return opened

    def made_file(path: Any) -> None:
        if not quiet[0]:
            unsynced.dirty.add(os.stat(path).st_ino)
            note("made", path)

    def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if quiet[0] or isinstance(path, int) or not set(mode) & set("wax+"):
            return real_open(path, mode, *rest, **more)
        point("open")
        new = not os.path.exists(path)
        file = real_open(path, mode, *rest, **more)
        if new:
            made_file(path)
        return Written(file, point, unsynced)

    def save_file(tensors: Any, path: Any) -> None:
        point("save_file")
        whole = tensor_bytes(tensors)
        with real_open(path, "wb") as file:
            file.write(whole[: len(whole) // 2])
        made_file(path)
        point("half a save_file")
        real_save(tensors, path)
        unsynced.dirty.add(os.stat(path).st_ino)

    def table(path: Path, what: Any) -> None:
        point("table")
        real_table(path, what)
        made_file(path)
        os.truncate(path, path.stat().st_size // 2)
        point("half a table")
        real_table(path, what)
        unsynced.dirty.add(os.stat(path).st_ino)

    def exchanged(a: Path, b: Path) -> bool:
        point("exchange")
        done = exchange and real_exchange(a, b)
        if done:
            note("exchanged", a, b)
        return done

    shims: list[tuple[Any, str, Any]] = [
        (os, "open", os_open), (os, "fsync", fsync), (os, "replace", renamed("replace")),
        (os, "rename", renamed("rename")), (os, "unlink", removed("unlink", "removed")),
        (os, "rmdir", removed("rmdir", "removed folder")), (os, "mkdir", mkdir), (io, "open", opened),
        (builtins, "open", opened), (checkpoint, "save_file", save_file), (store, "_write", table),
        (files, "_exchanged", exchanged),
    ]  # fmt: skip
    before = [(place, name, getattr(place, name)) for place, name, _ in shims]
    for place, name, shim in shims:
        setattr(place, name, shim)
    try:
        yield unsynced
    finally:
        for place, name, was in before:
            setattr(place, name, was)


def _name(path: Any) -> str:
    return os.path.basename(os.fsdecode(path)) if path != "" else ""


def _content(path: Any, handle: int | None) -> bytes | None:
    """The bytes of a file that is about to go; None for a folder, or where there is none."""
    try:
        opened = os.open(path, os.O_RDONLY, dir_fd=handle)
    except OSError:
        return None
    try:
        return None if stat.S_ISDIR(os.fstat(opened).st_mode) else os.read(opened, 1 << 24)
    finally:
        os.close(opened)


def snapshots(act: Callable[[], None], root: Path, place: Path, **options: Any) -> list[Snapshot]:
    """Do something, and keep the files below `root` as they are at each point of it, and at its end."""
    found: list[Snapshot] = []
    place.mkdir()

    def keep(what: str, unsynced: Unsynced) -> None:
        copy = place / str(len(found))
        shutil.copytree(root, copy)
        names = {path.stat().st_ino: str(path.relative_to(root)) for path in (root, *root.rglob("*"))}
        dirty = [names[inode] for inode in sorted(unsynced.dirty) if inode in names]
        folders = {inode: name for inode, name in names.items() if (root / name).is_dir()}
        found.append(Snapshot(what, copy, dirty, list(unsynced.ops), folders))

    holder: list[Unsynced] = []
    with watched(lambda what: keep(what, holder[0]), **options) as unsynced:
        holder.append(unsynced)
        act()
    keep("end", holder[0])
    return found


# --- what is done while a process dies


def _publish_new(root: Path) -> None:
    files.publish(root / "model", lambda folder: _fill(folder, NEW))


def _fill(folder: Path, content: Mapping[str, bytes]) -> None:
    for name, data in content.items():
        (folder / name).write_bytes(data)


OLD = {"config.json": b"{}", "model.safetensors": b"old" * 50, "only.old": b"1"}
NEW = {"config.json": b"{ }", "model.safetensors": b"new" * 60, "tokenizer.json": b"2"}
OLD_LEDGER = [LedgerEntry("a.jsonl:1", "used", "train", 1)]
NEW_LEDGER = [LedgerEntry(f"a.jsonl:{i}", "used", "train", i) for i in range(1, 30)]


def examples() -> list[Example]:
    """A few, always the same."""
    rows = torch.arange(40, dtype=torch.int32).reshape(8, 5).numpy()
    return [Example(row[:3], row[3:], torch.ones(2).numpy(), f"a.jsonl:{i + 1}", 0) for i, row in enumerate(rows)]


def _publish_examples(root: Path) -> None:
    store.publish_examples(root / "packs" / "key", {"train": examples(), "heldout": examples()[:2]}, {"rows": 8})


ACTS: dict[str, Callable[[Path], object]] = {
    "first save": lambda root: checkpoint.save(root / "checkpoints", state(1), {"a": 1}, keep=2),
    "third save, which prunes": lambda root: checkpoint.save(root / "checkpoints", state(3), {"a": 1}, keep=2),
    "save over a damaged one": lambda root: checkpoint.save(root / "checkpoints", state(5), {"a": 1}, keep=2),
    "prune": lambda root: checkpoint.prune(root / "checkpoints", 5, 2),
    "publish": _publish_new,
    "publish over an older one": _publish_new,
    "publish examples": _publish_examples,
    "publish examples over damaged ones": _publish_examples,
    "write_atomically": lambda root: files.write_atomically(root / "file", b"new" * 40),
    "write_ledger": lambda root: write_ledger(root / "ledger.jsonl", NEW_LEDGER),
}
SAVES = {
    "first save": (), "third save, which prunes": (1, 2), "save over a damaged one": (2, 3, 5), "prune": (1, 2, 3, 4, 5),
}  # fmt: skip


def prepare(act: str, root: Path) -> None:
    """What is there before."""
    root.mkdir()
    for step in SAVES.get(act, ()):
        checkpoint.save(root / "checkpoints", state(step), {"a": 1}, keep=9)
    if act == "save over a damaged one":
        file = root / "checkpoints" / "step-000005" / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    if act == "publish over an older one":
        (root / "model").mkdir()
        _fill(root / "model", OLD)
    if act == "publish examples over damaged ones":
        _publish_examples(root)
        (root / "packs" / "key" / "train.arrow").write_bytes(b"damaged")
    if act == "write_atomically":
        (root / "file").write_bytes(b"old")
    if act == "write_ledger":
        write_ledger(root / "ledger.jsonl", OLD_LEDGER)


def dies(act: str, root: str, point: int, exchange: bool, plant: str = "") -> None:
    """Do something in this process, and end it at once at the n-th point. See fork server (forks.py)."""
    count = 0

    def at(_what: str) -> None:
        nonlocal count
        count += 1
        if count == point:
            os._exit(DIED)

    if plant:
        PLANTS[plant]()
    with watched(at, exchange=exchange):
        ACTS[act](Path(root))


# --- planted faults


def _no_flush_of(wanted: Callable[[Path], bool]) -> None:
    real = files.sync
    files.sync = lambda path: None if wanted(path) else real(path)


def _in_place() -> None:
    def publish(folder: Path, fill: Callable[[Path], None]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fill(folder)

    checkpoint.publish = files.publish = store.publish = publish


def _prune_first() -> None:
    real = checkpoint.publish

    def publish(folder: Path, fill: Callable[[Path], None]) -> None:
        checkpoint.prune(folder.parent, int(folder.name[5:]), 2)
        real(folder, fill)

    checkpoint.publish = publish


def _discard_in_place() -> None:
    checkpoint.discard = lambda folder: shutil.rmtree(folder)


def _plain_writes() -> None:
    def write(path: Path, data: bytes) -> None:
        path.write_bytes(data)

    from instil.data import ledger

    files.write_atomically = ledger.write_atomically = write


PLANTS: dict[str, Callable[[], None]] = {
    "files are not flushed": lambda: _no_flush_of(lambda path: path.is_file()),
    "the manifest is not flushed": lambda: _no_flush_of(lambda path: path.name == "manifest.json"),
    "folders are not flushed": lambda: _no_flush_of(lambda path: path.is_dir()),
    "written in place": _in_place,
    "pruned before the save": _prune_first,
    "removed without a rename": _discard_in_place,
    "plain writes": _plain_writes,
}
