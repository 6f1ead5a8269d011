"""One JSON text in, its value out; or exactly what is wrong with it, and where."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import orjson

from instil.errors import DataError, Problem

MAX_DEPTH = 100  # levels of nesting; tool schemas stay below 20, and json, orjson.dumps and templates all recurse

_ESCAPED_COLON = re.compile(rb"\\u003[aA]")
_CUT_VALUE = re.compile(r"t|tr|tru|f|fa|fal|fals|n|nu|nul|-|\.|[eE][+-]?|N|Na|I\w*|-I\w*|\\?u[0-9a-fA-F]{0,4}|")


def parse(raw: bytes, place: str, *, offset: int = 0, last: bool = False) -> Any:
    """The value of one JSON text (RFC 8259, UTF-8); integers of any size stay exact.

    offset: of raw's first byte in its file. last: the file ends with raw, so a text that ends early means a cut file.
    Raises DataError with one Problem at `place`: syntax, encoding, duplicate key, NaN, lone surrogate, nesting.
    """
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return _parse_strictly(raw, place, offset, last)
    # orjson keeps the last of two equal keys. Written again without them, the text has fewer colons, unless a colon
    # was an escape. So equal counts prove that no key was lost, for a third of the cost of a second parse.
    if _is_plain(value) and orjson.dumps(value).count(b":") == raw.count(b":") and not _has_escaped_colon(raw):
        return value
    return _parse_strictly(raw, place, offset, last)


def kind(value: object) -> str:
    """What a JSON value is, in the words of an error message."""
    if value is None:
        return "null"
    names = {bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def syntax_problem(text: str, error: json.JSONDecodeError, place: Callable[[int], str], last: bool) -> Problem:
    """The Problem for text that is not JSON. place: from a position in text to where that is, for people.

    Columns count characters of the line, from 1.
    """
    body = text.rstrip(" \t\r\n")
    before = text[: error.pos].rstrip(" \t\r\n")
    position, rule, remedy = error.pos, "json", "fix or remove the row"
    what = f"broken JSON at column {{}}: {error.msg[:1].lower()}{error.msg[1:]}"
    if _ends_early(body, error):
        position, what = len(body), "the JSON stops in the middle of a value (column {})"
        remedy = "finish it; a row stands on one line"
        if last:
            what, rule = f"{what}: file truncated?", "truncated"
            remedy = "write or fetch the file again, or remove the broken row"
    elif text[position : position + 1] in ("}", "]") and before.endswith(","):
        position, what = len(before) - 1, "broken JSON at column {}: comma after the last element"
        remedy = "remove the comma"
    elif error.msg.startswith("Illegal trailing comma"):  # Python 3.13 points at the comma itself
        what, remedy = "broken JSON at column {}: comma after the last element", "remove the comma"
    elif text[position : position + 1] == "'":
        what, remedy = (
            "broken JSON at column {}: single quote",
            'JSON takes double quotes ("); write it with json.dumps',
        )
    elif position == 0:
        what, remedy = "not JSON at column {}", "write it as a JSON object"
    column = position - text.rfind("\n", 0, position)
    return Problem(place(position), what.format(column), remedy, rule)


def encoding_problem(raw: bytes, error: UnicodeDecodeError, place: str, offset: int, last: bool) -> Problem:
    """The Problem for bytes that are not UTF-8, with the offset in the file and a guess at what they are."""
    if last and error.reason == "unexpected end of data":
        what = "the JSON stops in the middle of a character: file truncated?"
        return Problem(place, what, "write or fetch the file again, or remove the broken row", "truncated")
    runs = re.findall(rb"[\x80-\xff]+", raw[max(0, error.start - 2048) : error.start + 2048])
    # In Western text an accented letter stands alone; in double-byte encodings the high bytes come in long runs.
    if max(map(len, runs)) <= 2:
        guess, remedy = "Windows-1252 or Latin-1?", "convert it: iconv -f WINDOWS-1252 -t UTF-8"
    else:
        guess, remedy = "GB18030, Shift-JIS, Big5 or binary?", "save it as UTF-8"
    what = f"byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8 ({guess})"
    return Problem(place, what, remedy, "encoding")


def _parse_strictly(raw: bytes, place: str, offset: int, last: bool) -> Any:
    """The same as parse, slowly and with a reason."""

    def refuse(what: str, remedy: str, rule: str) -> NoReturn:
        raise DataError(Problem(place, what, remedy, rule))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            refuse(f"the key {twice[:60]!r} stands twice in one object", "keep one of them", "duplicate_key")
        return value

    def finite(digits: str) -> float:
        if math.isinf(number := float(digits)):
            refuse(f"the number {digits[:30]} is too large", "write a finite number, or null", "non_finite")
        return number

    def constant(name: str) -> NoReturn:
        refuse(f"{name} is not JSON", "write a finite number, or null", "non_finite")

    def integer(digits: str) -> int:
        if len(digits) > 1000:
            refuse(f"an integer of {len(digits)} digits", "write it as text", "json")
        return int(digits)

    try:
        text = raw.decode()
        value = json.loads(
            text, object_pairs_hook=unique, parse_float=finite, parse_constant=constant, parse_int=integer
        )
    except UnicodeDecodeError as error:
        raise DataError(encoding_problem(raw, error, place, offset, last)) from None
    except json.JSONDecodeError as error:
        raise DataError(syntax_problem(text, error, lambda _: place, last)) from None
    except RecursionError:
        value, too_deep = None, True
    else:
        too_deep = _depth_exceeded(value)
    if too_deep:
        refuse(f"nested more than {MAX_DEPTH} levels deep", "flatten or remove the row", "too_deep")
    for path, bad in _lone_surrogates(value):
        what = f"lone surrogate \\u{ord(bad):04x} is not a character"
        raise DataError(Problem(f"{place}: {path}" if path else place, what, "remove or replace it", "surrogate"))
    return value


def _levels(value: Any) -> Iterator[list[Any]]:
    """The values at each depth of nesting, from the outermost."""
    level = [value]
    while level:
        yield level
        inner: list[Any] = []
        for each in level:
            if type(each) is dict:
                inner.extend(each.values())
            elif type(each) is list:
                inner.extend(each)
        level = inner


def _is_plain(value: Any) -> bool:
    """Whether orjson's value can be trusted: not too deep, and no float that may stand for an integer over 64 bits."""
    for depth, level in enumerate(_levels(value)):
        if depth > MAX_DEPTH:
            return False
        for each in level:
            if type(each) is float and abs(each) >= 2.0**63:
                return False
    return True


def _depth_exceeded(value: Any) -> bool:
    return any(depth > MAX_DEPTH for depth, _ in enumerate(_levels(value)))


def _has_escaped_colon(raw: bytes) -> bool:
    return b"\\u003" in raw and _ESCAPED_COLON.search(raw) is not None


def _lone_surrogates(value: Any) -> Iterator[tuple[str, str]]:
    """(path, character) of each text that UTF-8 cannot hold."""
    stack = [("", value)]
    while stack:
        path, each = stack.pop()
        if isinstance(each, dict):
            stack += [("a key", key) for key in each]
            stack += [(f"{path}.{key}".lstrip("."), inner) for key, inner in each.items()]
        elif isinstance(each, list):
            stack += [(f"{path}[{i}]", inner) for i, inner in enumerate(each)]
        elif isinstance(each, str):
            try:
                each.encode()
            except UnicodeEncodeError as error:
                yield path, each[error.start]


def _ends_early(body: str, error: json.JSONDecodeError) -> bool:
    """Whether body is a beginning of JSON rather than wrong: the parser failed because nothing more came."""
    if error.msg.startswith("Unterminated string"):
        return True
    if error.msg.startswith("Extra data"):
        return False
    rest = body[error.pos :]
    return _CUT_VALUE.fullmatch(rest) is not None
