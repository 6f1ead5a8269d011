"""Token ids to pieces: what each token adds to the text, in time linear in their number, and how a piece is shown."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from instil.report.escape import segments

PartKind = Literal["text", "escape", "byte", "newline", "tab", "empty"]

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character
BYTES = "[\udc80-\udcff]"  # lone surrogates: each marks a byte of a character that a later token completes
MOST_TOGETHER = 16  # tokens that are decoded as one: a character has 4 bytes, but data may hold U+FFFD itself


def pieces(
    tokens: Sequence[int], decode: Callable[[list[int]], str], name: Callable[[int], str | None] = lambda _: None
) -> list[str]:
    """What each token adds to the decoded text: joined, the pieces are decode(tokens), but for marks of bytes.

    Each token is decoded behind the ones before it, as some decoders drop the space in front of the first. Where a
    character lies in several tokens, the last of them adds it; the others have marks, which `joined` leaves out: a lone
    surrogate for each byte (as in Python's "surrogateescape"). name: the token as its vocabulary spells it, from which
    the bytes are known; without it the others add nothing.
    """
    ids = [int(token) for token in tokens]
    found: list[str] = []
    first = start = 0  # [first, start) is what the next tokens are decoded behind
    before = ""
    for stop in range(1, len(ids) + 1):
        text = decode(ids[first:stop])
        added = text[len(before) :]
        split = _split(added, ids[start:stop], name)
        torn = text.endswith(UNFINISHED) and (split is None or joined(split) != added)
        if torn and stop < len(ids) and stop - start < MOST_TOGETHER:
            continue
        found += split or [*[""] * (stop - start - 1), added]
        first, start = start, stop
        before = decode(ids[first:start])
    return found


def joined(found: Sequence[str]) -> str:
    """The text that consecutive pieces add."""
    return re.sub(BYTES, "", "".join(found))


def parts(piece: str, *, ascii_only: bool = False) -> Iterator[tuple[PartKind, str]]:
    """A piece as runs of (kind, what to show): text as it is, and whatever must not reach a screen written out.

    escape: control and format characters as in a Python literal; byte: <0xE2>, of a character that a later token
    completes; newline and tab: shown as "", the caller draws them; empty: a piece without text.
    """
    if not piece:
        yield "empty", ""
    for found in re.split(f"(\n|\t|{BYTES})", piece):
        if found == "\n":
            yield "newline", ""
        elif found == "\t":
            yield "tab", ""
        elif re.fullmatch(BYTES, found):
            yield "byte", f"<0x{ord(found) - 0xDC00:02X}>"
        else:
            for shown, escaped in segments(found, ascii_only=ascii_only):
                yield ("escape" if escaped else "text"), shown


def _split(added: str, ids: Sequence[int], name: Callable[[int], str | None]) -> list[str] | None:
    """The text that some tokens add together as one piece each; None where their names do not spell it."""
    if len(ids) == 1 and UNFINISHED not in added:
        return [added]
    names = [name(token) for token in ids]
    for reading in (_byte_level, _byte_fallback):
        spelt = [reading(each) for each in names if each is not None]
        if len(spelt) == len(ids) and _alike(b"".join(spelt).decode("utf-8", "replace"), added):
            return list(_decode_each(spelt))
    return None


def _decode_each(spelt: Sequence[bytes]) -> Iterator[str]:
    """The characters that each token completes, then marks for the bytes of it that are left over."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    waiting = b""
    for some in spelt:
        text = re.sub(f"^{BYTES}{{0,{len(waiting)}}}", "", decoder.decode(some))  # marked already, where they came
        waiting = decoder.getstate()[0]
        yield text + waiting[-len(some) :].decode("utf-8", "surrogateescape")


def _alike(left: str, right: str) -> bool:
    """Equal but for how many U+FFFD stand for bytes that make no character: decoders differ in that."""
    return re.sub(f"{UNFINISHED}+", UNFINISHED, left) == re.sub(f"{UNFINISHED}+", UNFINISHED, right)


def _byte_level(name: str) -> bytes:
    """The bytes of a name in a byte-level vocabulary, where a printable character stands for each byte."""
    return bytes(_BYTES[c] for c in name) if all(c in _BYTES for c in name) else name.encode()


def _byte_fallback(name: str) -> bytes:
    """The bytes of a name in a SentencePiece vocabulary, where <0xE2> is a byte and ▁ a space."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
    return bytes.fromhex(byte[1]) if byte else name.replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: its Latin-1 one if that is visible, else the next from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()
