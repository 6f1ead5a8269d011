"""CSV or TSV in, its rows out as objects of texts under the names of the header."""

from __future__ import annotations

import csv
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import IO

from instil.data.jsontext import encoding_problem
from instil.errors import DataError, Problem

_BOM = b"\xef\xbb\xbf"
_ENDINGS = {".csv": ",", ".tsv": "\t"}
_PACKED = (".gz", ".gzip", ".zst", ".zstd")


def table_delimiter(path: str) -> str | None:
    """The delimiter that the file's name promises, None where it promises no table. No content shows it safely."""
    name = path.lower()
    for ending in _PACKED:
        name = name.removesuffix(ending)
    return next((delimiter for ending, delimiter in _ENDINGS.items() if name.endswith(ending)), None)


def table_rows(
    stream: IO[bytes], path: str, delimiter: str, most_bytes: int
) -> Iterator[tuple[int, dict[str, str] | Problem | None]]:
    """(line on which it starts, row); a Problem for a row that does not fit the header, None for a blank line.

    Every value is text, formulas too. The first row names the columns. most_bytes: of a line, and of a value.
    Raises DataError where the rest of the file cannot be told into rows.
    """
    csv.field_size_limit(most_bytes)  # the default of 131,072 characters is shorter than some answers
    reader = csv.reader(_lines(stream, path, most_bytes), delimiter=delimiter, strict=True)
    header: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(_broken(f"{path}:{line}", str(error))) from None
        if cells is None:
            return
        if not cells:
            yield line, None
        elif not header:
            header = _header(cells, f"{path}:{line}", delimiter)
        elif len(cells) != len(header):
            what = f"the row has {len(cells)} values, the header {len(header)}"
            remedy = "put values that hold a delimiter or a line break in quotes"
            yield line, Problem(f"{path}:{line}", what, remedy, "ragged")
        else:
            yield line, dict(zip(header, cells, strict=True))
        line = reader.line_num + 1


def _lines(stream: IO[bytes], path: str, most_bytes: int) -> Iterator[str]:
    """The lines as text, with their ends."""
    offset = 0
    for number in itertools.count(1):
        line = stream.readline(most_bytes + 1)
        if not line:
            return
        if len(line) > most_bytes:
            what = f"the line is longer than {most_bytes:,} bytes"
            raise DataError.at(f"{path}:{number}", what, "is it a table? put each row on a line", "too_long")
        raw = line.removeprefix(_BOM) if number == 1 else line
        try:
            yield raw.decode()
        except UnicodeDecodeError as error:
            start = offset + len(line) - len(raw)
            raise DataError(encoding_problem(raw, error, f"{path}:{number}", start, False)) from None
        offset += len(line)


def _header(cells: list[str], place: str, delimiter: str) -> list[str]:
    """The names of the columns. Raises DataError where they cannot be names."""
    twice = [name for name, count in Counter(cells).items() if count > 1]
    if "" in cells or any(not name.strip() for name in cells):
        what = f"column {1 + next(i for i, name in enumerate(cells) if not name.strip())} of the header has no name"
        raise DataError.at(place, what, "name every column in the first row", "header")
    if twice:
        raise DataError.at(place, f"two columns are called {twice[0][:60]!r}", "rename one of them", "duplicate_key")
    other = next((other for other in ";\t,|" if other != delimiter and other in cells[0]), None)
    if len(cells) == 1 and other:
        what = f"the header has one column, {cells[0][:60]!r}, so {other!r} seems to be the delimiter"
        raise DataError.at(place, what, "separate columns by commas, or by tabs in a .tsv file", "header")
    return cells


def _broken(place: str, reason: str) -> Problem:
    if "unexpected end" in reason or "larger than field limit" in reason:
        what = "a quote is opened in this row and not closed"
        return Problem(place, what, 'close it, or write a quote inside a value as ""', "open_quote")
    if "expected after" in reason:
        what = "text follows the quote that ends a value"
        return Problem(place, what, 'write a quote inside a value as ""', "open_quote")
    return Problem(place, f"not a row of a table ({reason})", "write the table again", "table")
