"""Text from data made safe to show: what would drive a terminal, reorder a line or hide in it is written out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

KEPT = "\u200c\u200d"  # the (non-)joiners: Persian, Indic scripts and emoji are spelt with them


def segments(text: str, *, ascii_only: bool = False) -> Iterator[tuple[str, bool]]:
    """`text` as runs of (characters to show, whether they are an escape).

    Escaped, as in a Python literal: control characters (ESC, newline, ...), format characters (bidi overrides, zero
    width, tags), lone surrogates, private use and unassigned code points; with ascii_only, all that is not ASCII.
    """
    plain: list[str] = []
    for char in text:
        if _shown(char) and not (ascii_only and ord(char) > 126):
            plain.append(char)
            continue
        if plain:
            yield "".join(plain), False
            plain.clear()
        yield char.encode("unicode_escape").decode(), True
    if plain:
        yield "".join(plain), False


def visible(text: str, *, ascii_only: bool = False) -> str:
    """`text` on one line, with escapes for what must not be shown as it is."""
    if text.isprintable() and (not ascii_only or text.isascii()):
        return text
    return "".join(part for part, _ in segments(text, ascii_only=ascii_only))


def visible_lines(text: str) -> str:
    """`visible` for a text of several lines: its newlines stay."""
    return "\n".join(visible(line) for line in text.split("\n"))


def _shown(char: str) -> bool:
    return char.isprintable() or char in KEPT or unicodedata.category(char) == "Zs"
