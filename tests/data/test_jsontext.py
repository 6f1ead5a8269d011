"""jsontext: every JSON value comes back exact, and every fault is named where it stands."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from instil.data.jsontext import MAX_DEPTH, parse
from instil.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)


def fault(raw: bytes, **where) -> str:
    with pytest.raises(DataError) as caught:
        parse(raw, "f:1", **where)
    (problem,) = caught.value.problems
    return str(problem)


@given(VALUES, st.booleans(), st.sampled_from([None, 2]))
@example({"a:b": ":", "\\": {"\u0000": [2**64, -(2**63) - 1, 1e300, -0.0]}}, True, None)
def test_any_value_comes_back_equal(value, ascii_only, indent):
    """What the standard library writes is read back equal, integers over 64 bits included."""
    raw = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    back = parse(raw, "f:1")
    assert json.dumps(back) == json.dumps(value)


@settings(max_examples=50)
@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=3), st.booleans())
@example({"a": -1.5e-30, "b": True, "c": [None, False], "d": "\U0001f600\x01"}, True)
def test_a_row_cut_anywhere_is_called_truncated(value, ascii_only):
    """A last line that is cut, even inside a character, a number or an escape, asks: file truncated?"""
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    for cut in range(1, len(raw)):
        assert "file truncated?" in fault(raw[:cut], last=True)


@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), st.booleans(), st.data())
def test_a_duplicate_key_is_always_found(value, ascii_only, data):
    """A key that stands twice in an object, at any depth and however it is escaped, is refused by name."""
    key = data.draw(st.sampled_from(sorted(value)))
    inner = json.dumps(value, ensure_ascii=ascii_only)
    again = "".join(f"\\u{ord(c):04x}" if ord(c) < 0x10000 else json.dumps(c)[1:-1] for c in key)
    raw = f'{{"x": [{inner[:-1]}, "{again}": 1}}]}}'.encode()
    assert fault(raw) == f"f:1: the key {key!r} stands twice in one object; keep one of them".replace("\n", " ")


@given(st.binary(max_size=40))
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"\xff\xfe{\x00")
@example(b'"\\ud800"')
@example(b"1" * 5000)
def test_random_bytes_raise_only_data_errors(raw):
    """No bytes can crash the parser."""
    try:
        parse(raw, "f:1")
    except DataError:
        pass


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'{"a": 1,}', "broken JSON at column 8: comma after the last element; remove the comma"),
        (b'{"a": [1, ]}', "broken JSON at column 9: comma after the last element; remove the comma"),
        (b"{'a': 1}", 'broken JSON at column 2: single quote; JSON takes double quotes ("); write it with json.dumps'),
        ('{"é": 1 "b"}'.encode(), "broken JSON at column 9: expecting ',' delimiter; fix or remove the row"),
        (b'{"a": 1} {"a": 2}', "broken JSON at column 10: extra data; fix or remove the row"),
        (b'{"a": "x', "the JSON stops in the middle of a value (column 9); finish it; a row stands on one line"),
        (b"id,text", "not JSON at column 1; write it as a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON; write a finite number, or null"),
        (b'{"a": -Infinity}', "-Infinity is not JSON; write a finite number, or null"),
        (b'{"a": 1e999}', "the number 1e999 is too large; write a finite number, or null"),
        (b'{"a": ' + b"7" * 5000 + b"}", "an integer of 5000 digits; write it as text"),
    ],
)
def test_the_fault_is_named_with_its_column(raw, expected):
    """Syntax errors carry the column, counted in characters from 1; others name the value."""
    assert fault(raw) == f"f:1: {expected}"


def test_a_lone_surrogate_is_named_with_its_field():
    """Half of a surrogate pair is no text: the field that holds it is named."""
    assert fault(b'{"m": [{"c": "ok"}, {"c": "a\\ud800b"}]}') == (
        "f:1: m[1].c: lone surrogate \\ud800 is not a character; remove or replace it"
    )
    assert fault(b'{"a\\udc00": 1}') == "f:1: a key: lone surrogate \\udc00 is not a character; remove or replace it"
    assert parse(b'"\\ud83d\\ude00"', "f:1") == "\U0001f600"


def test_nesting_has_a_limit():
    """The limit itself passes; one level more is refused, and ten thousand do not crash."""
    assert MAX_DEPTH == 100
    parse(b"[" * 100 + b"1" + b"]" * 100, "f:1")
    for depth in (101, 300, 1100, 10_000):
        assert "nested more than 100 levels deep" in fault(b"[" * depth + b"1" + b"]" * depth)


def test_the_offset_of_a_foreign_byte_is_counted_from_the_start_of_the_file():
    """Latin-1 is named with the byte's offset and a guess; double-byte text is guessed apart."""
    assert fault(b'{"a": "caf\xe9 noir"}', offset=100) == (
        "f:1: byte 0xe9 at offset 110 is not UTF-8 (Windows-1252 or Latin-1?); "
        "convert it: iconv -f WINDOWS-1252 -t UTF-8"
    )
    assert "GB18030, Shift-JIS, Big5 or binary?" in fault('{"a": "你好吗"}'.encode("gb18030"))


def test_a_large_object_with_a_duplicate_key_is_refused_quickly():
    """The slow path stays linear: 200,000 keys, the last one twice."""
    keys = ",".join(f'"k{i}":0' for i in range(200_000))
    start = time.monotonic()
    assert "the key 'k199999' stands twice" in fault(f'{{{keys},"k199999":0}}'.encode())
    assert time.monotonic() - start < 2
