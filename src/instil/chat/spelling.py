"""Token ids in, the exact bytes that they stand for out, by a table of the vocabulary instead of the decoder."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from instil.chat.words import byte_alphabet
from instil.types import Int32

Int64 = NDArray[np.int64]

_FEW = 4_096  # ids that are looked up one by one
_AT_ONCE = 16_384  # ids gathered together, so that what is in between stays in the processor's cache
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_PER_TOKEN = 16  # ids per token: a vocabulary with more holes than that is a mistake, and gets no table
_FROM_PIECES = ["Replace", "ByteFallback", "Fuse", "Strip"]  # the order of the steps in sentencepiece-like decoders


class Spelling:
    """The bytes of every token: where they are known, `bytes_of(ids)` is what the text's UTF-8 must be.

    Byte-level tokens by the inverse of their alphabet, pieces with `▁` for a space and `<0xE9>` for a byte, added
    tokens by their own text. Built from the vocabulary on first use.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self._ready = False
        self._known = False
        self._lead: Callable[[bytes, str], bytes] = lambda spelt, first: spelt

    def bytes_of(self, ids: Sequence[int] | Int32) -> bytes | None:
        """The bytes of `ids`; None where the decoder is none that spells token by token, or an id has no token.

        Gathered from one table: a million tokens take about 30 ms on one core.
        """
        if not self._ready:
            self._build()
        if not self._known:
            return None
        if len(ids) < _FEW:
            return self._joined(ids.tolist() if isinstance(ids, np.ndarray) else list(ids))
        found = np.asarray(ids, dtype=np.int64)
        if found.ndim != 1:
            return None
        if not len(found):
            return b""
        if found.min() < 0 or found.max() >= len(self._starts) or self._lengths[found].min() < 0:
            return None
        chunks = (found[at : at + _AT_ONCE] for at in range(0, len(found), _AT_ONCE))
        return self._lead(b"".join(map(self._gathered, chunks)), self._texts[int(found[0])])

    def ends_of(self, ids: Int32) -> Int64 | None:
        """How many bytes the first 1, 2, ... of `ids` spell together; None where `bytes_of` cannot tell, or where the
        start of a text is spelt in a way of its own."""
        if not self._ready:
            self._build()
        if not self._known or self._lead is not _keep or not len(ids):
            return None
        if ids.min() < 0 or ids.max() >= len(self._lengths):
            return None
        lengths = self._lengths[ids]
        return None if lengths.min() < 0 else np.cumsum(lengths)

    def _joined(self, ids: list[int]) -> bytes | None:
        """The bytes of a few ids, by a list: quicker than a gather below some thousand of them."""
        if not ids:
            return b""
        try:
            spelt = b"".join([self._pieces[i] for i in ids])  # type: ignore[misc]
        except (IndexError, TypeError):
            return None
        return None if min(ids) < 0 else self._lead(spelt, self._texts[ids[0]])

    def _gathered(self, ids: Int64) -> bytes:
        """The bytes of ids that all have a token."""
        lengths = self._lengths[ids]
        stops = np.cumsum(lengths)
        shifts = np.repeat(self._starts[ids] - stops + lengths, lengths)
        return self._data[np.arange(len(shifts)) + shifts].tobytes()

    def _build(self) -> None:
        """Fill the table: `_data` holds every token's bytes, `_starts` and `_lengths` say where; -1 = no such token."""
        self._ready = True
        rule, lead = _rules(_steps(self._backend.decoder))
        if rule is None:
            return
        added = self._backend.get_added_tokens_decoder()
        vocabulary = {n: text for text, n in self._backend.get_vocab(with_added_tokens=True).items()}
        size = max(vocabulary, default=-1) + 1
        if size > _MOST_PER_TOKEN * len(vocabulary) + 100_000:
            return
        self._known, self._lead = True, lead
        self._texts: Mapping[int, str] = vocabulary
        pieces: list[bytes | None] = [None] * size
        for n, spelt in zip(vocabulary, _all(rule, list(vocabulary.values())), strict=True):
            pieces[n] = spelt
        for n, token in added.items():
            pieces[n] = token.content.encode()
        self._pieces = pieces
        self._lengths = np.array([-1 if piece is None else len(piece) for piece in pieces], dtype=np.int64)
        self._data = np.frombuffer(b"".join(filter(None, pieces)), dtype=np.uint8)
        held = np.maximum(self._lengths, 0)
        self._starts = np.cumsum(held) - held


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder of the library, as JSON."""
    state = {} if decoder is None else json.loads(decoder.__getstate__())
    return state.get("decoders", [state])


Rule = Callable[[str], bytes]
Lead = Callable[[bytes, str], bytes]  # what happens at the very start: (bytes of all tokens, text of the first)


def _rules(steps: list[dict[str, Any]]) -> tuple[Rule | None, Lead]:
    """How one token is spelt, and what is done to the start of the whole; None where it cannot be done by token."""
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, _keep
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        drops = steps[0].get("prepend_scheme") != "never"
        return _pieces({mark: " "}, bytes_too=False), _without_marks(mark) if drops else _keep
    in_order = [kind for kind in _FROM_PIECES for _ in range(kinds.count(kind))]
    if kinds != in_order or kinds.count("Strip") > 1 or "Replace" not in kinds:
        return None, _keep
    replaced = {step["pattern"].get("String", ""): step["content"] for step in steps if step["type"] == "Replace"}
    no_strip: dict[str, Any] = {"content": " ", "start": 0, "stop": 0}
    strip = steps[-1] if kinds[-1] == "Strip" else no_strip
    if any(len(old) != 1 for old in replaced) or strip["stop"] or (strip["start"] and "Fuse" not in kinds):
        return None, _keep
    return _pieces(replaced, "ByteFallback" in kinds), _stripped(strip["content"].encode(), strip["start"])


_BYTE_OF = {ord(char): byte for byte, char in enumerate(byte_alphabet())}
_ALPHABET = frozenset(byte_alphabet())


def _all(rule: Rule, texts: list[str]) -> Iterable[bytes]:
    """How each token is spelt. A byte-level vocabulary is translated as one text, in which each character is a byte."""
    if rule is not _byte_level:
        return map(rule, texts)
    plain = [text if _ALPHABET.issuperset(text) else "" for text in texts]
    data = "".join(plain).translate(_BYTE_OF).encode("latin-1")
    ends = list(itertools.accumulate(map(len, plain), initial=0))
    return (
        data[a:b] if kept else text.encode()
        for kept, text, (a, b) in zip(plain, texts, itertools.pairwise(ends), strict=True)
    )


def _byte_level(text: str) -> bytes:
    return text.translate(_BYTE_OF).encode("latin-1") if _ALPHABET.issuperset(text) else text.encode()


def _pieces(replaced: Mapping[str, str], bytes_too: bool) -> Rule:
    table = str.maketrans(dict(replaced))

    def spell(text: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(text) if bytes_too else None
        return bytes.fromhex(byte[1]) if byte else text.translate(table).encode()

    return spell


def _keep(spelt: bytes, first: str) -> bytes:
    return spelt


def _without_marks(mark: str) -> Lead:
    """Metaspace: the marks of the first token are no spaces."""

    def lead(spelt: bytes, first: str) -> bytes:
        return first.replace(mark, "").encode() + spelt[len(first.replace(mark, " ").encode()) :]

    return lead


def _stripped(content: bytes, most: int) -> Lead:
    """Strip: up to `most` times `content` is taken from the start."""

    def lead(spelt: bytes, first: str) -> bytes:
        for _ in range(most):
            spelt = spelt.removeprefix(content)
        return spelt

    return lead
