"""Files in, rows out: JSONL, a JSON array, Parquet or CSV, plain, gzip or zstd, recognised by content."""

from __future__ import annotations

import difflib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from instil.data.jsontext import encoding_problem, kind, parse, syntax_problem
from instil.data.parquet import parquet_rows
from instil.data.table import table_delimiter, table_rows
from instil.errors import DataError, Problem

MAX_LINE_BYTES = 64 * 2**20  # one row; about 16 million tokens
MAX_WHOLE_BYTES = 2 * 2**30  # what must be held in memory at once: a JSON array, or Parquet inside gzip
MAX_PROBLEMS = 10_000  # a file with more is the wrong file; reading on would only cost time

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")

_ENDINGS = {"gzip": (".gz", ".gzip", ".tgz"), "zstd": (".zst", ".zstd")}

# What people give by mistake: first bytes, what it is, what to do.
_FOREIGN = (
    (b"\xff\xfe\x00\x00", "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\x00\x00\xfe\xff", "UTF-32 text", "save it as UTF-8: iconv -f UTF-32 -t UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    (b"PK\x03\x04", "a zip archive", "unpack it first"),
    (b"BZh", "bzip2 data", "unpack it first, or use gzip or zstd"),
    (b"\xfd7zXZ\x00", "xz data", "unpack it first, or use gzip or zstd"),
    (b"\x28\xb5\x2f\xfd", "zstd inside gzip or zstd", "unpack it once"),
    (b"\x1f\x8b", "gzip inside gzip", "unpack it once"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it first"),
    (b"\x89HDF", "an HDF5 file", "write it as JSONL or Parquet"),
    (b"SQLite format 3", "an SQLite database", "write its rows as JSONL or Parquet"),
    (b"ARROW1", "an Arrow file", "write it as Parquet"),
    (b"PARE", "an encrypted Parquet file", "write it without encryption"),
    (b"version https://git-lfs", "a Git LFS pointer, not the data", "run `git lfs pull`"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file. origin = `file:line`, where the row starts (Parquet: `file:row`), counted from 1."""

    value: dict[str, Any]
    origin: str


@dataclass(frozen=True, slots=True)
class Source:
    """What a file turned out to hold. container: JSONL, JSON array, Parquet, CSV or TSV, and what was around it.

    path: what the file is called in origins: its path as given, or a name on the hub.
    """

    path: str
    container: str
    rows: tuple[Row, ...]
    blank_lines: int
    problems: tuple[Problem, ...]

    def sentence(self, format_name: str) -> str:
        """What was recognised: `train.jsonl: JSONL, 1,280 rows, messages`."""
        rows = f"{len(self.rows):,} row{'s' * (len(self.rows) != 1)}"
        blank = f" ({self.blank_lines:,} blank line{'s' * (self.blank_lines != 1)} skipped)" if self.blank_lines else ""
        return f"{self.path}: {self.container}, {rows}, {format_name}{blank}"

    def notes(self) -> list[str]:
        """What the user should know beyond the sentence: blank lines, compression that the name does not show."""
        found = []
        if self.blank_lines:
            found.append(f"{self.path}: {self.blank_lines:,} blank line{'s' * (self.blank_lines != 1)} skipped")
        _, _, packing = self.container.partition(" in ")
        if packing and not self.path.endswith(_ENDINGS[packing]):
            found.append(f"{self.path}: is {packing} data, whatever its name, and was read as such")
        return found


def read_rows(path: str | Path) -> Source:
    """The rows of a file, all of them good. Raises DataError with every problem found."""
    source = scan_rows(path)
    if source.problems:
        raise DataError(*source.problems)
    return source


def scan_rows(file: str | Path, name: str | None = None) -> Source:
    """The good rows of a file and the problems of the others; never raises for what the file holds.

    name: what to call the file in origins and problems, if not by its path.
    """
    file = str(file)
    path = file if name is None else name
    container, rows, blank_lines, problems = "unreadable", [], 0, []
    try:
        with _opened(file, path) as (stream, packing):
            container, reader = _recognise(stream, path)
            if packing and container == "Parquet":
                stream = io.BytesIO(_read_whole(stream, path))
            container += f" in {packing}" if packing else ""
            for found in reader(stream, path):
                if isinstance(found, Row):
                    rows.append(found)
                elif found is None:
                    blank_lines += 1
                else:
                    problems.append(found)
                    if len(problems) == MAX_PROBLEMS:
                        what = f"more than {MAX_PROBLEMS:,} problems, the rest was not read"
                        raise DataError.at(path, what, "is it the right file?", "too_many")
    except DataError as error:
        problems += error.problems
    if not rows and not problems:
        what = f"0 rows ({blank_lines:,} blank lines)" if blank_lines else "0 rows (the file is empty)"
        problems.append(Problem(path, what, "give a file with at least one row", "no_rows"))
    return Source(path, container, tuple(rows), blank_lines, tuple(problems))


def file_digest(path: str | Path) -> str:
    """sha256 of the file's bytes, in hexadecimal. Raises DataError when it cannot be read."""
    _check_regular(str(path))
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(str(path), error) from None


def _check_regular(path: str) -> None:
    """Anything but a regular file would fail late or never end (FIFO, /dev/zero)."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise DataError.at(path, "no such file", _nearest(path), "missing_file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise _unreadable(path, error) from None
    if path.endswith(".py"):
        remedy = "run it yourself and give the data it writes; instil executes no data set script"
        raise DataError.at(path, "is a Python script, not data", remedy, "script")
    if stat.S_ISDIR(mode):
        raise DataError.at(path, "is a folder", "name the files in it", "not_a_file")
    if not stat.S_ISREG(mode):
        raise DataError.at(path, "is not a regular file", "copy the data into a file", "not_a_file")


def _nearest(path: str) -> str:
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return f"the folder {folder!r} cannot be read either"
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {os.path.join(folder, near[0])!r}?" if near else "check the path"


def _unreadable(path: str, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(
        Problem(path, f"cannot be read ({reason})", "check the path, its permissions and the disk", "unreadable")
    )


@contextmanager
def _opened(file: str, path: str) -> Iterator[tuple[IO[bytes], str]]:
    """The file's bytes, unpacked if they are gzip or zstd, and which of them ("" if none). Errors become DataError."""
    _check_regular(file)
    try:
        with open(file, "rb") as raw:
            head = raw.read(4)
            raw.seek(0)
            if head[:2] == b"\x1f\x8b":
                with io.BufferedReader(gzip.GzipFile(fileobj=raw)) as unpacked:  # type: ignore[arg-type]
                    yield unpacked, "gzip"
            elif head == b"\x28\xb5\x2f\xfd":
                with io.BufferedReader(_Zstd(file)) as unpacked:
                    yield unpacked, "zstd"
            else:
                yield raw, ""
    except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as error:
        packing = "zstd" if isinstance(error, _Damaged) else "gzip"
        what = f"damaged or cut {packing} data ({error})"
        raise DataError.at(path, what, "write or fetch the file again", "truncated") from None
    except OSError as error:
        raise _unreadable(path, error) from None


class _Damaged(Exception):
    """What pyarrow says of bytes that are not zstd, or not all of it."""


class _Zstd(io.RawIOBase):
    """The unpacked bytes of a zstd file, through pyarrow, which brings the library; can go back to the start only."""

    def __init__(self, file: str):
        self._file = file
        self._begin()

    def _begin(self) -> None:
        import pyarrow

        # A file of its own each time: a stream closes the one below it when it goes.
        self._stream = pyarrow.CompressedInputStream(pyarrow.OSFile(self._file), "zstd")

    def close(self) -> None:
        self._stream.close()
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if offset or whence != io.SEEK_SET:
            raise io.UnsupportedOperation("a zstd stream goes back to its start only")
        self._begin()
        return 0

    def readinto(self, buffer: Any) -> int:
        try:
            found = self._stream.read(len(buffer))
        except OSError as error:
            raise _Damaged(" ".join(str(error).split())[:100]) from None
        buffer[: len(found)] = found
        return len(found)


Reader = Callable[[IO[bytes], str], "Iterator[Row | Problem | None]"]  # None stands for a blank line


def _recognise(stream: IO[bytes], path: str) -> tuple[str, Reader]:
    """What the first bytes say the file is, with the function that reads it."""
    head = stream.read(65536)
    stream.seek(0)
    if head.startswith(b"PAR1"):
        return "Parquet", _parquet
    for magic, name, remedy in _FOREIGN:
        if head.startswith(magic):
            raise DataError.at(path, f"looks like {name}", remedy, "foreign")
    if head[257:262] == b"ustar":
        raise DataError.at(path, "looks like a tar archive", "unpack it first", "foreign")
    if 0 in head[:2]:
        what, remedy = "looks like UTF-16 text or a binary file", "save it as UTF-8 JSONL"
        raise DataError.at(path, what, remedy, "foreign")
    start = head.removeprefix(_BOM).lstrip(b" \t\r\n")[:1]
    if start == b"<":
        raise DataError.at(path, "looks like HTML or XML, not JSONL", "fetch the data itself, not its page", "foreign")
    delimiter = table_delimiter(path)
    if delimiter and start not in (b"{", b"["):
        return ("TSV" if delimiter == "\t" else "CSV"), functools.partial(_table, delimiter=delimiter)
    if path.endswith(".parquet") and start not in (b"{", b"[", b""):
        raise DataError.at(path, "not a Parquet file (no PAR1 at its start)", "write or fetch it again", "parquet")
    return ("JSON array", _elements) if start == b"[" else ("JSONL", _lines)


def _row(raw: bytes, place: str, *, offset: int = 0, last: bool = False) -> Row | Problem:
    try:
        value = parse(raw, place, offset=offset, last=last)
    except DataError as error:
        return error.problems[0]
    if not isinstance(value, dict):
        return Problem(place, f"the row is {kind(value)}, not an object", 'write it as {"key": value}', "not_an_object")
    return Row(value, place)


def _lines(stream: IO[bytes], path: str) -> Iterator[Row | Problem | None]:
    """JSONL: one object a line."""
    offset = 0
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        place = f"{path}:{number}"
        if len(line) > MAX_LINE_BYTES:
            what = f"the line is longer than {MAX_LINE_BYTES:,} bytes"
            yield Problem(place, what, "is it JSONL? put each row on a line of its own", "too_long")
            return
        raw = line.removeprefix(_BOM) if number == 1 else line
        if not raw or raw.isspace():
            yield None
        elif raw.strip() == b"{":
            remedy = "put each row on one line (`jq -c . FILE`), or all of them in one array [...]"
            yield Problem(place, "an object that goes on over several lines", remedy, "json")
            return
        else:
            yield _row(raw, place, offset=offset + len(line) - len(raw), last=not line.endswith(b"\n"))
        offset += len(line)


def _elements(stream: IO[bytes], path: str) -> Iterator[Row | Problem | None]:
    """A JSON array of objects, on one line or many. The scan finds where each element ends; `parse` judges it."""
    whole = _read_whole(stream, path)
    raw = whole.removeprefix(_BOM)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        place = f"{path}:{1 + raw.count(10, 0, error.start)}"
        yield encoding_problem(raw, error, place, len(whole) - len(raw), last=True)
        return
    scanner = json.JSONDecoder(parse_int=str, parse_float=str)
    at, counted, line = _skip(text, text.index("[") + 1), 0, 1
    try:
        while not text.startswith("]", at):
            line, counted = line + text.count("\n", counted, at), at
            _, end = scanner.raw_decode(text, at)
            yield _row(text[at:end].encode(), f"{path}:{line}")
            at = _skip(text, end)
            if text.startswith(",", at):
                at = _skip(text, at + 1)
                if text.startswith("]", at):
                    raise json.JSONDecodeError("Expecting value", text, at)
            elif not text.startswith("]", at):
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
        if (after := _skip(text, at + 1)) < len(text):
            raise json.JSONDecodeError("Text after the end of the array", text, after)
    except json.JSONDecodeError as error:
        yield syntax_problem(text, error, lambda at: f"{path}:{1 + text.count(chr(10), 0, at)}", last=True)
    except RecursionError:
        yield Problem(f"{path}:{line}", "nested too deep", "flatten or remove the row", "too_deep")


def _skip(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _parquet(stream: IO[bytes], path: str) -> Iterator[Row | Problem | None]:
    for number, value in enumerate(parquet_rows(stream, path), start=1):
        yield value if isinstance(value, Problem) else Row(value, f"{path}:{number}")


def _table(stream: IO[bytes], path: str, delimiter: str) -> Iterator[Row | Problem | None]:
    for line, value in table_rows(stream, path, delimiter, MAX_LINE_BYTES):
        yield Row(value, f"{path}:{line}") if isinstance(value, dict) else value


def _read_whole(stream: IO[bytes], path: str) -> bytes:
    raw = stream.read(MAX_WHOLE_BYTES + 1)
    if len(raw) > MAX_WHOLE_BYTES:
        what = f"more than {MAX_WHOLE_BYTES:,} bytes that must be held at once"
        raise DataError.at(path, what, "write it as JSONL, which is read line by line", "too_long")
    return raw
