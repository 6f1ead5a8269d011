"""A GGUF file's header walked by its own counts and lengths, so that none of them leads beyond the file."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What real files stay far below (a vocabulary of 262,144 tokens with its merges has 1.3 million elements).
MOST_KEYS, MOST_TENSORS, MOST_ELEMENTS, MOST_TEXT, MOST_DIMENSIONS = 10_000, 100_000, 4_000_000, 16_000_000, 4
SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by gguf's value type
STRING, ARRAY = 8, 9


class Crafted(ValueError):
    """A count, length or offset of the file that cannot be."""


def walk_header(file: Path) -> None:
    """Read every length and count of the header once, without making anything of them. Raises Crafted.

    gguf's own reader goes on reading nothing, for as long as a count says, when it is past the end of the file.
    """
    with file.open("rb") as stream:
        size = stream.seek(0, 2)
        if size < 24:
            raise Crafted(f"has {size} bytes")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] != b"GGUF":
                raise Crafted("does not begin with GGUF")
            _Walk(data, "<" if int.from_bytes(data[4:8], "little") & 0xFFFF else ">").header()


def refuse_overlap(tensors: Iterable[Any], size: int) -> None:
    """Raise Crafted where tensors, as gguf's reader gives them, share bytes or end beyond the file's `size` bytes: a small
    file could else stand for any number of large tensors."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda each: (int(each.data_offset), int(each.n_bytes))):
        begin = int(tensor.data_offset)
        if begin < end:
            raise Crafted(f"tensors {before} and {tensor.name} overlap")
        end, before = begin + int(tensor.n_bytes), tensor.name
        if end > size:
            raise Crafted(f"tensor {tensor.name} ends at {end:,}, and the file has {size:,} bytes")


class _Walk:
    """A place in the file that only goes forward."""

    def __init__(self, data: mmap.mmap, order: str):
        self._data, self._order, self._at, self._elements = data, order, 4, 0

    def header(self) -> None:
        self._skip(4, "the version")
        tensors, keys = self._number("Q", "the count of tensors"), self._number("Q", "the count of keys")
        for what, count, most in (("tensors", tensors, MOST_TENSORS), ("keys", keys, MOST_KEYS)):
            if count > most:
                raise Crafted(f"says that it has {count:,} {what}, more than {most:,}")
        for i in range(keys):
            self._text(f"key {i}")
            self._value(self._number("I", f"the type of key {i}"), f"the value of key {i}")
        for i in range(tensors):
            self._text(f"the name of tensor {i}")
            dimensions = self._number("I", f"the dimensions of tensor {i}")
            if dimensions > MOST_DIMENSIONS:
                raise Crafted(f"tensor {i} has {dimensions:,} dimensions, more than {MOST_DIMENSIONS}")
            self._skip(8 * dimensions + 4 + 8, f"tensor {i}")

    def _value(self, kind: int, what: str) -> None:
        if kind == STRING:
            self._text(what)
        elif kind == ARRAY:
            self._array(what)
        elif kind in SCALARS:
            self._skip(SCALARS[kind], what)
        else:
            raise Crafted(f"{what} is of type {kind:,}, which there is not")

    def _array(self, what: str) -> None:
        kind, count = self._number("I", what), self._number("Q", what)
        self._elements += count
        if self._elements > MOST_ELEMENTS:
            raise Crafted(f"{what} is a list of {count:,} elements, more than {MOST_ELEMENTS:,} in all")
        if kind == ARRAY:
            raise Crafted(f"{what} is a list of lists")
        if kind in SCALARS:
            self._skip(count * SCALARS[kind], what)
            return
        for _ in range(count):
            self._value(kind, what)

    def _text(self, what: str) -> None:
        length = self._number("Q", f"the length of {what}")
        if length > MOST_TEXT:
            raise Crafted(f"{what} is a text of {length:,} bytes, more than {MOST_TEXT:,}")
        self._skip(length, what)

    def _number(self, kind: str, what: str) -> int:
        at = self._at
        self._skip(struct.calcsize(self._order + kind), what)
        found: int = struct.unpack_from(self._order + kind, self._data, at)[0]
        return found

    def _skip(self, count: int, what: str) -> None:
        self._at += count
        if self._at > len(self._data):
            raise Crafted(f"{what} ends at {self._at:,}, and the file has {len(self._data):,} bytes")
