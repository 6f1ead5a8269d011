"""Files and folders that are the old or the new, never between: drafts, flushed to disk, renamed; and sweeping up."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

PARTIAL, TRASH, DRAFT = ".partial-", ".trash-", ".tmp"  # what a process that died may leave; nobody reads it
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def write_atomically(path: Path, data: bytes) -> None:
    """The file is the old one or the new one, and after a power cut too."""
    draft = path.with_name(f".{path.name}{DRAFT}")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
    sync(path.parent)


def publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a sibling of `folder`, flush it to disk, and rename it: absent, the old, or the new.

    A crash leaves a sibling that `sweep` removes; an error removes it here.
    """
    make_folder(folder.parent)
    partial = folder.with_name(f"{PARTIAL}{folder.name}-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        fill(partial)
        for path in sorted(partial.rglob("*")):
            sync(path)
        sync(partial)
        _put(partial, folder)
        sync(folder.parent)
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, folder: Path) -> None:
    """Rename; where there is an older folder the two change places at once, and the older one is left as `partial`."""
    if not folder.exists():
        os.rename(partial, folder)
    elif not _exchanged(partial, folder):
        discard(folder)
        os.rename(partial, folder)


def _exchanged(a: Path, b: Path) -> bool:
    """Let two names change places in one call of the system; False where it has no such call (other systems, NFS)."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        done: int = ctypes.CDLL(None).renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE)
    except (OSError, AttributeError):
        return False
    return done == 0


def make_folder(folder: Path) -> None:
    """Make a folder, where it is absent, and those that it is in; after a power cut it is still there."""
    if not folder.is_dir():
        if not folder.parent.exists():
            make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        with suppress(PermissionError):  # a folder may be written to without being read
            sync(folder.parent)


def discard(folder: Path) -> None:
    """Remove a folder: renamed first, so that it is there or not there, never in part."""
    trash = folder.with_name(f"{TRASH}{folder.name}-{secrets.token_hex(4)}")
    os.rename(folder, trash)
    shutil.rmtree(trash, ignore_errors=True)


def sweep(folder: Path, of: str = "") -> list[str]:
    """Remove what a process that died left in a folder (the caller has the folder's lock); the names of it.

    of: only what it left of the folder of that name in there (the caller has that one's lock).
    """
    left = [path for path in sorted(folder.glob(".*")) if path.name.startswith((PARTIAL, TRASH)) or _is_draft(path)]
    if of:
        own = re.compile(f"({re.escape(PARTIAL)}|{re.escape(TRASH)}){re.escape(of)}-[0-9a-f]{{8}}")
        left = [path for path in left if own.fullmatch(path.name)]
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return [path.name for path in left]


def _is_draft(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == DRAFT and path.is_file()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(folder: Path, leave_out: Iterable[str] = ("sha256.json", "manifest.json")) -> dict[str, str]:
    """The hash of every file in a folder, but of those that hold such hashes, by name."""
    names = [path for path in folder.iterdir() if path.is_file() and path.name not in set(leave_out)]
    return dict(zip((path.name for path in names), sha256_of_files(names), strict=True))


def sha256_of_files(paths: Iterable[Path]) -> list[str]:
    """The hashes of files, made in parallel: a core does about 1.5 GB/s where it has instructions for it."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
