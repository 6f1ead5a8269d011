"""sources: files of every accepted kind give their rows with the right origin; every bad file gives a clear line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from instil.data import sources
from instil.data.sources import file_digest, read_rows, scan_rows
from instil.errors import DataError

ROWS = [{"a": 1}, {"b": ["é", None]}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(TEXT, VALUES, max_size=3), min_size=1, max_size=5)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, so that paths in messages are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return caught.value.lines()


def written(name: str, content: bytes | str) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


@given(OBJECTS, st.sampled_from(["\n", "\r\n", "\n\n \t\n"]), st.booleans(), st.booleans(), st.booleans())
def test_jsonl_rows_come_back_equal_with_their_line(rows, ending, end_at_last, bom, zipped):
    """Whatever the line ending, blank lines, BOM, last newline and compression: equal rows, right lines."""
    text = ending.join(json.dumps(row) for row in rows) + ending * end_at_last
    raw = b"\xef\xbb\xbf" * bom + text.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(gzip.compress(raw) if zipped else raw)
        source = read_rows(path)
    step = ending.count("\n")
    assert [json.dumps(row.value) for row in source.rows] == [json.dumps(row) for row in rows]
    assert [row.origin for row in source.rows] == [f"{path}:{1 + i * step}" for i in range(len(rows))]
    assert source.blank_lines == (step - 1) * (len(rows) - 1 + end_at_last)
    assert source.container == ("JSONL in gzip" if zipped else "JSONL")


@given(OBJECTS, st.sampled_from([None, 0, 3]), st.booleans(), st.integers(0, 3))
def test_array_elements_come_back_equal_with_the_line_they_start_on(rows, indent, ascii_only, lines_before):
    """An array on one line or pretty-printed gives equal rows, each with the line of its opening brace."""
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_text("\n" * lines_before + text, encoding="utf-8", newline="")
        source = read_rows(path)
    assert [json.dumps(row.value) for row in source.rows] == [json.dumps(row) for row in rows]
    assert source.container == "JSON array"
    line, starts = 1 + lines_before, []
    for row in rows:
        line += indent is not None
        starts.append(line)
        line += json.dumps(row, indent=indent).count("\n")
    assert [row.origin for row in source.rows] == [f"{path}:{start}" for start in starts]


@given(
    st.sampled_from([b"", b"{", b"[", b'[{"a":', b"PAR1", b"\x1f\x8b\x08\x00", b"\xef\xbb\xbf"]), st.binary(max_size=60)
)
@example(b"[", b"[" * 50_000)
@example(b"[{", b'"a":NaN},{"a":1,"a":2},3')
@example(b"PAR1", b"\x00\x00\x00\x00PAR1")
@example(b"PAR1", b"\xff\xff\xff\x7fPAR1")
def test_random_bytes_never_crash_a_reader(start, rest):
    """No file content can crash the readers, or end with neither a row nor a problem."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(start + rest)
        source = scan_rows(path)
        assert all(problem.place.startswith(str(path)) for problem in source.problems)
        assert all(type(row.value) is dict and row.origin.startswith(f"{path}:") for row in source.rows)
        assert source.rows or source.problems


def test_what_was_recognised_is_a_sentence(here):
    """The caller can tell the user in one line what the file is, with counts that people can read."""
    many = written("many.jsonl", '{"a": 1}\n' * 1280)
    assert read_rows(many).sentence("messages") == "many.jsonl: JSONL, 1,280 rows, messages"
    blank = written("odd.jsonl", gzip.compress(b'\r\n{"a": 1}\r\n\r\n'))
    assert read_rows(blank).sentence("alpaca") == "odd.jsonl: JSONL in gzip, 1 row, alpaca (2 blank lines skipped)"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows"])
def test_the_content_decides_not_the_name(here, name):
    """JSONL, arrays and gzip are recognised under any name."""
    for raw in (b'{"a": 1}\n', b'[{"a": 1}]', b'\n [\n{"a": 1}\n]\n', gzip.compress(b'[{"a": 1}]')):
        assert [row.value for row in read_rows(written(name, raw)).rows] == [{"a": 1}]


def test_the_origin_is_the_path_as_given(here):
    """The user recognises the path: it is not made absolute or tidied up."""
    written("rows.jsonl", '{"a": 1}\n')
    assert read_rows("./rows.jsonl").rows[0].origin == "./rows.jsonl:1"
    assert read_rows(here / "rows.jsonl").rows[0].origin == f"{here}/rows.jsonl:1"


def test_zstd_is_unpacked(here):
    """JSONL, arrays and tables inside zstd; the note says so where the name does not."""
    pack = pa.Codec("zstd").compress
    for name, raw in [("a", b'{"a": "1"}\n'), ("b", b'[{"a": "1"}]'), ("c.csv.zst", b"a\n1\n")]:
        source = read_rows(written(name, pack(raw).to_pybytes()))
        assert [row.value for row in source.rows] == [{"a": "1"}]
        assert source.container.endswith(" in zstd")
        assert bool(source.notes()) == (not name.endswith(".zst"))
    whole = pack(b'{"a": 1}\n' * 900).to_pybytes()
    assert lines_of(written("f", whole[:-3]))[0].startswith("f: damaged or cut zstd data (")
    assert lines_of(written("f", whole + b"junk"))[-1].startswith("f: damaged or cut zstd data (")
    assert lines_of(written("f", pack(whole).to_pybytes()))[0].startswith("f: looks like zstd inside gzip or zstd")


def test_every_broken_line_is_reported_at_once(here):
    """The reader goes on after a bad line, and the good rows stay available to later checks."""
    path = written("rows.jsonl", '{"a": 1,}\n{"ok": 1}\n[1]\n3\nnull\n"x"\n{"b": NaN}\n{"c": 1, "c": 2}\n{"d": "cut')
    assert lines_of(path) == [
        "rows.jsonl:1: broken JSON at column 8: comma after the last element; remove the comma",
        'rows.jsonl:3: the row is a list, not an object; write it as {"key": value}',
        'rows.jsonl:4: the row is a number, not an object; write it as {"key": value}',
        'rows.jsonl:5: the row is null, not an object; write it as {"key": value}',
        'rows.jsonl:6: the row is text, not an object; write it as {"key": value}',
        "rows.jsonl:7: NaN is not JSON; write a finite number, or null",
        "rows.jsonl:8: the key 'c' stands twice in one object; keep one of them",
        "rows.jsonl:9: the JSON stops in the middle of a value (column 11): file truncated?; "
        "write or fetch the file again, or remove the broken row",
    ]
    assert [row.origin for row in scan_rows(path).rows] == ["rows.jsonl:2"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "f: 0 rows (the file is empty)"),
        (b"\r\n \n\n", "f: 0 rows (3 blank lines)"),
        (b"\xef\xbb\xbf", "f: 0 rows (1 blank lines)"),
        (b"[ ]", "f: 0 rows (the file is empty)"),
        (b"\n<!DOCTYPE html><html>", "f: looks like HTML or XML, not JSONL"),
        ('{"a": 1}\n'.encode("utf-16"), "f: looks like UTF-16 text; save it as UTF-8: iconv -f UTF-16 -t UTF-8"),
        ('{"a": 1}\n'.encode("utf-16-be"), "f: looks like UTF-16 text or a binary file"),
        ('{"a": 1}\n'.encode("utf-32"), "f: looks like UTF-32 text"),
        (b"PK\x03\x04rest", "f: looks like a zip archive; unpack it first"),
        (gzip.compress(gzip.compress(b"{}")), "f: looks like gzip inside gzip"),
        (b"version https://git-lfs.github.com/spec/v1\n", "f: looks like a Git LFS pointer, not the data"),
        (b'{"a": 1}\n{"a": "caf\xe9"}\n', "f:2: byte 0xe9 at offset 19 is not UTF-8 (Windows-1252 or Latin-1?)"),
        (b'\xef\xbb\xbf{"a": "\xe9"}', "f:1: byte 0xe9 at offset 10 is not UTF-8"),
        (b'\xef\xbb\xbf[\n{"a": "\xe9"}]', "f:2: byte 0xe9 at offset 12 is not UTF-8"),
        (gzip.compress(b'{"a": 1}\n' * 900)[:-20], "f: damaged or cut gzip data"),
        (b"\x1f\x8b\x08\x00garbage", "f: damaged or cut gzip data"),
        (
            b'{\n  "a": 1\n}\n',
            "f:1: an object that goes on over several lines; put each row on one line (`jq -c . FILE`)",
        ),
    ],
)
def test_a_file_that_is_something_else_is_named(here, raw, expected):
    """One clear line says what the file is and what to do, not a line per row."""
    (line,) = lines_of(written("f", raw))
    assert line.startswith(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"a": 1},\n{"a": 2},\n]', "f:3: broken JSON at column 9: comma after the last element; remove the comma"),
        ('[\n{"a": 1}\n{"a": 2}]', "f:3: broken JSON at column 1: expecting ',' delimiter"),
        ('[\n{"a": 1},\n{"a": "b', "f:3: the JSON stops in the middle of a value (column 9): file truncated?"),
        ('[\n{"a": 1},\n', "f:2: the JSON stops in the middle of a value (column 10): file truncated?"),
        ('[{"a": 1}]\n[{"a": 1}]', "f:2: broken JSON at column 1: text after the end of the array"),
        ('[\n{"a": 1},\n{"b": 1, "b": 2}]', "f:3: the key 'b' stands twice in one object"),
        ('[\n{"a": 1},\n7]', "f:3: the row is a number, not an object"),
        ('[\n{"a": "\\ud800"}]', "f:2: a: lone surrogate \\ud800"),
        ("[" * 10_000, "f:1: nested too deep"),
    ],
)
def test_a_broken_array_is_reported_at_its_line(here, text, expected):
    """Inside an array the line is that of the fault or of the row's first character."""
    (line,) = lines_of(written("f", text))
    assert line.startswith(expected)


def test_a_line_without_end_is_refused_by_size(here):
    """A line over the limit stops the reader before it fills the memory, also out of a small gzip file."""
    path = written("f", gzip.compress(b'{"a": "' + b"x" * sources.MAX_LINE_BYTES + b'"}', compresslevel=1))
    (line,) = lines_of(path)
    assert line.startswith("f:1: the line is longer than 67,108,864 bytes; is it JSONL?")


def test_an_array_too_large_to_hold_is_refused(here, monkeypatch):
    """What must be read in one piece has a limit; the remedy is JSONL."""
    monkeypatch.setattr(sources, "MAX_WHOLE_BYTES", 10)
    assert lines_of(written("f", '[{"a": 12345}]')) == [
        "f: more than 10 bytes that must be held at once; write it as JSONL, which is read line by line"
    ]


def test_the_wrong_file_is_given_up_after_many_problems(here, monkeypatch):
    """A file in which everything is wrong is not read to its end."""
    monkeypatch.setattr(sources, "MAX_PROBLEMS", 3)
    assert len(lines_of(written("f", "a,b\n" * 10))) == 4
    assert lines_of("f")[-1] == "f: more than 3 problems, the rest was not read; is it the right file?"


def test_a_missing_file_names_its_nearest_neighbour(here):
    """A misspelt path is answered with the file that was probably meant."""
    written("train.jsonl", "{}")
    os.mkdir("data")
    written("data/valid.jsonl", "{}")
    assert lines_of("trian.jsonl") == ["trian.jsonl: no such file; did you mean 'train.jsonl'?"]
    assert lines_of("data/valdi.jsonl") == ["data/valdi.jsonl: no such file; did you mean 'data/valid.jsonl'?"]
    assert lines_of("zzz") == ["zzz: no such file; check the path"]
    assert lines_of("no/x.jsonl") == ["no/x.jsonl: no such file; the folder 'no' cannot be read either"]
    assert lines_of("train.jsonl/x")[0].startswith("train.jsonl/x: cannot be read (Not a directory)")
    assert lines_of("a\0b")[0].startswith("a\0b: cannot be read (")


def test_only_regular_files_are_opened(here):
    """A folder, a FIFO and an endless device are refused at once instead of hanging."""
    os.mkdir("folder")
    os.mkfifo("fifo")
    start = time.monotonic()
    assert lines_of("folder") == ["folder: is a folder; name the files in it"]
    assert lines_of("fifo") == ["fifo: is not a regular file; copy the data into a file"]
    assert lines_of("/dev/zero") == ["/dev/zero: is not a regular file; copy the data into a file"]
    with pytest.raises(DataError):
        file_digest("fifo")
    assert time.monotonic() - start < 2


def test_the_digest_is_the_sha256_of_the_bytes(here):
    """The digest can be checked with sha256sum."""
    path = written("f", "abc")
    assert file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(path) == hashlib.sha256(b"abc").hexdigest()
