"""Where the rows of a source are: a file, folder, glob or hub name in, the data files that it stands for out."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instil.data.notes import some
from instil.errors import DataError, Problem

_SUFFIX = re.compile(r"\.(jsonl|ndjson|json|parquet|csv|tsv)(\.(gz|gzip|zst|zstd))?", re.IGNORECASE)
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json"}
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)
_MAGIC = re.compile(r"[*?[]")
_SHOWN = 8  # names listed


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to read. name: what it is called in origins: its path as given, or a name on the hub."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class Located:
    """The files of a source, in order, and what the user should know about the choice."""

    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()


def locate(path: str) -> Located:
    """The files that a source's path stands for; an existing path wins over a pattern, a pattern over a hub name.

    Raises DataError where there is nothing to read, UsageError for a name that leaves its place on the hub.
    """
    if url := _URL.fullmatch(path):
        raise _refused_url(url)
    if path.startswith("hub:"):
        return _from_hub(path.removeprefix("hub:"), path)
    expanded = os.path.expanduser(path)
    if "\0" in path:
        return Located((DataFile(path, path),))  # its reader says what is wrong with it
    if os.path.isdir(expanded):
        return _folder(expanded, path)
    if os.path.lexists(expanded):
        return Located((DataFile(expanded, path),))
    if _MAGIC.search(path):
        return _pattern(expanded, path)
    if _looks_like_hub(path):
        return _from_hub(path, path)
    return Located((DataFile(expanded, path),))


def masked(text: str) -> str:
    """A URL without what may be secret: user, password and query."""
    url = _URL.fullmatch(text)
    return _masked(url) if url else text


def _masked(url: re.Match[str]) -> str:
    place, _, path = url["rest"].partition("/")
    host = f"***@{place.rpartition('@')[2]}" if "@" in place else place
    bare, mark, _ = f"{host}/{path}".rstrip("/").partition("?")
    return f"{url['scheme']}://{bare.partition('#')[0]}{'?***' if mark else ''}"


def _refused_url(url: re.Match[str]) -> DataError:
    remedy = "download it first, look at it, and give the path of the file"
    if url["scheme"].lower() == "hf":
        remedy = "write hub:org/name"
    return DataError(Problem(_masked(url), "is a URL, and instil opens none", remedy, "url"))


def _looks_like_hub(path: str) -> bool:
    """Whether a path that is not there can be org/name on the hub: no folder `org` here, no ending of a data file."""
    if not _HUB_NAME.fullmatch(path) or _SUFFIX.search(path) or ".." in path:
        return False
    return not os.path.isdir(path.partition("/")[0])


def _from_hub(name: str, given: str) -> Located:
    from instil.data.hub import hub_files

    files, notes = hub_files(name, given)
    return Located(tuple(DataFile(path, label) for path, label in files), tuple(notes))


def _folder(folder: str, given: str) -> Located:
    """Every data file under a folder, sorted; what else is there is named, never passed over in silence."""
    files: list[str] = []
    others: list[str] = []
    for inner in _walk(folder):
        (files if is_data_file(inner) else others).append(inner)
    shown = [os.path.join(given, name) for name in files]
    if not files:
        what = f"no data file in the folder{f' (only {some(others, len(others))})' if others else ', it is empty'}"
        raise DataError.at(given, what, "give .jsonl, .json, .parquet, .csv or .tsv files", "no_files")
    found = tuple(DataFile(os.path.join(folder, name), label) for name, label in zip(files, shown, strict=True))
    return Located(found, tuple(_not_read(given, others)))


def is_data_file(name: str) -> bool:
    """Whether the name is that of a file with rows: a known ending, and neither hidden nor known metadata."""
    parts = name.split("/")
    if any(part.startswith(".") for part in parts) or parts[-1] in _METADATA:
        return False
    match = _SUFFIX.search(parts[-1])
    return match is not None and match.end() == len(parts[-1])


def _not_read(given: str, others: list[str]) -> Iterator[str]:
    """The sentence about files that are no data."""
    if others:
        count = f"{len(others):,} file{'s' * (len(others) != 1)}"
        names = ", ".join([*others[:_SHOWN], *(["..."] if len(others) > _SHOWN else [])])
        yield f"{given}: {count} in the folder not read: {names}"


def _walk(folder: str) -> list[str]:
    """Every file under a folder, by its path from there, sorted; links are followed, circles are not."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted(set(folders) - set(hidden))
        inner = os.path.relpath(here, folder)
        found += [name if inner == "." else f"{inner}/{name}" for name in [*names, *(f"{name}/" for name in hidden)]]
    return sorted(found)


def _pattern(pattern: str, given: str) -> Located:
    """The files that a glob matches, sorted. Where the pattern says no ending, only data files are taken."""
    matches = sorted(glob.glob(pattern, recursive=True))
    files: list[str] = []
    others: list[str] = []
    ending = os.path.splitext(pattern)[1]
    for match in matches:
        if not os.path.isdir(match):
            chosen = (ending and not _MAGIC.search(ending)) or is_data_file(os.path.basename(match))
            (files if chosen else others).append(match)
    if not files:
        what = f"matches no data file{f', only {some(others, len(others))}' if others else ''}"
        raise DataError.at(given, what, _near(pattern), "no_files")
    return Located(tuple(DataFile(file, file) for file in files), tuple(_not_read(given, others)))


def _near(pattern: str) -> str:
    """The remedy: what is there that the pattern may have meant."""
    folder = os.path.dirname(_MAGIC.split(pattern)[0])
    try:
        names = sorted(os.listdir(folder or "."))
    except OSError:
        return f"there is no folder {folder!r}"
    wanted = os.path.basename(pattern)
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.4) or [name for name in names if is_data_file(name)]
    if near:
        return f"did you mean {str(Path(folder) / near[0])!r}?"
    return f"{folder or 'this folder'} holds {some(names, len(names)) or 'nothing'}"
