"""Texts in, ids out, each word and segment encoded once: exactly the library's ids, at several times its speed."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from instil.chat.splitter import word_regex
from instil.errors import ModelError
from instil.types import Int32

CACHE_ENTRIES = 200_000  # segments, and likewise words, that are remembered
CACHE_BYTES = 64_000_000  # of texts and ids together, for segments and likewise for words
AUDIT_FIRST, AUDIT_EVERY = 64, 1_000  # segments encoded by words that the library encodes too, for comparison

# Pre-tokenizers that treat a segment between two added tokens alike wherever it stands in the text.
_LOCAL = {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
          "CharDelimiterSplit", "UnicodeScripts", "FixedLength"}  # fmt: skip
_SAME_ON_ASCII = {"NFC", "NFD", "NFKC", "NFKD"}


class Encoder:
    """The ids of texts, as `backend.encode_batch_fast(texts, add_special_tokens=False)` gives them.

    A text is split at its added tokens, as the library does first, and each segment is encoded once (`segments`). An
    ASCII segment is split into words by the pre-tokenizer's regex, and each word is encoded once (`words`). Whatever
    is not known to allow this goes through the library: the text where its segments depend on their place, the segment
    where its words cannot be found. notes: what turned out otherwise than expected; empty when all is well.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        self.notes: list[str] = []
        added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
        self._ids = {token.content: token_id for token_id, token in backend.get_added_tokens_decoder().items()}
        pre_tokenizer, normalizer = _state(backend.pre_tokenizer), _state(backend.normalizer)
        self.by_segment = (
            _is_local(pre_tokenizer)
            and not _is_random(backend.model)
            and not any(token.lstrip or token.rstrip or token.single_word for token in added)
        )
        self._cut = any_of([token.content for token in added if not token.normalized])
        normalized = [token.content for token in added if token.normalized]
        self._normalized = any_of(normalized) if normalized else None
        regex = word_regex(pre_tokenizer) if _keeps_ascii(normalizer) else None
        self.by_word = self.by_segment and regex is not None
        self._find = regex.findall if regex else None
        self._words = _Words(backend)
        self._segments: dict[str, bytes] = {}
        self._held = self._counted = 0

    def encode(self, texts: Sequence[str]) -> list[Int32]:
        """The ids of each text. The arrays are new: the caller may change them."""
        if not self.by_segment:
            return self._by_library(texts)
        if len(self._segments) > CACHE_ENTRIES or self._held > CACHE_BYTES:
            self._segments, self._held = {}, 0
        parts = [self._cut.split(text) for text in texts]
        known = self._segments
        missing = {segment for text_parts in parts for segment in text_parts if segment not in known}
        self._learn(sorted(missing))
        if not self.by_segment:  # the audit found a difference
            return self._by_library(texts)
        return [np.frombuffer(bytearray().join(map(known.__getitem__, each)), np.int32) for each in parts]

    def prefixes(self, text: str, cuts: Sequence[int]) -> list[Int32]:
        """The ids of text[:cut] for each cut; what the prefixes share is looked up once, and held once: where a prefix
        is the beginning of the longest one, its ids are a view of those. They are not to be changed.
        """
        if not self.by_segment:
            return self._by_library([text[:cut] for cut in cuts])
        parts = self._cut.split(text)
        starts = list(itertools.accumulate(map(len, parts), initial=0))
        known, last, torn = self._segments, [], set()
        for cut in cuts:
            at = max(0, bisect.bisect_right(starts, cut, hi=len(parts)) - 1)
            piece = text[starts[at] : cut]
            if piece and parts[at] in self._ids and piece != parts[at]:
                torn.add(cut)  # inside an added token, whose beginning is ordinary text
            last.append((at, piece))
        self._learn(sorted({part for part in (*parts, *(piece for _, piece in last)) if part not in known}))
        if not self.by_segment:
            return self._by_library([text[:cut] for cut in cuts])
        ids = [known[part] for part in parts]
        stops = list(itertools.accumulate(map(len, ids), initial=0))
        whole = b"".join(ids)
        found = []
        for cut, (at, piece) in zip(cuts, last, strict=True):
            stop = stops[at] + len(known[piece])
            if cut in torn:
                found.append(self._by_library([text[:cut]])[0])
            elif whole.startswith(known[piece], stops[at]):
                found.append(np.frombuffer(whole, np.int32, stop // 4))
            else:
                found.append(np.frombuffer(whole[: stops[at]] + known[piece], np.int32))
        return found

    def _learn(self, segments: Sequence[str]) -> None:
        """Encode segments that are not known yet."""
        known, left = self._segments, []
        for segment in segments:
            if segment in self._ids:
                known[segment] = np.int32(self._ids[segment]).tobytes()
                continue
            ids = self._by_words(segment) if self.by_word else None
            if ids is None:
                left.append(segment)
                continue
            known[segment] = ids
            self._counted += 1
            if self._counted <= AUDIT_FIRST or self._counted % AUDIT_EVERY == 0:
                self._audit(segment, ids)
        for segment, array in zip(left, self._by_library(left), strict=True):
            known[segment] = array.tobytes()
        self._held += sum(4 * len(segment) + len(known[segment]) for segment in segments)

    def _by_words(self, segment: str) -> bytes | None:
        """The ids of a segment by its words; None where only the library can tell."""
        if self._find is None or not segment.isascii() or (self._normalized and self._normalized.search(segment)):
            return None
        words = self._find(segment)
        if len("".join(words)) != len(segment):
            return None
        return b"".join(map(self._words.__getitem__, words))

    def _audit(self, segment: str, ids: bytes) -> None:
        """Compare with the library; after a difference everything goes through the library, and `notes` says so."""
        if ids != self._by_library([segment])[0].tobytes():
            self.by_segment = self.by_word = False
            self.notes.append(
                f"words and the library disagree on the tokens of {segment[:60]!r}: the library encodes from here on; "
                f"{self._counted - 1} segments before it were encoded by words, a sample of which agreed"
            )

    def _by_library(self, texts: Sequence[str]) -> list[Int32]:
        if not texts:
            return []
        found = by_library(self.backend.encode_batch_fast, texts)
        return [np.array(each.ids, dtype=np.int32) for each in found]


class _Words(dict[str, bytes]):
    """The ids of each ASCII word that the pre-tokenizer leaves whole, as bytes of int32."""

    def __init__(self, backend: tokenizers.Tokenizer):
        super().__init__()
        self.model = backend.model
        self.alphabet = {byte: char for byte, char in enumerate(byte_alphabet()) if byte < 128}
        self.held = 0

    def __missing__(self, word: str) -> bytes:
        if len(self) > CACHE_ENTRIES or self.held > CACHE_BYTES:
            self.clear()
            self.held = 0
        ids = _ids_bytes([token.id for token in self.model.tokenize(word.translate(self.alphabet))])
        self[word] = ids
        self.held += len(word) + len(ids)
        return ids


def by_library(
    encode_batch: Callable[..., list[tokenizers.Encoding]], texts: Sequence[str]
) -> list[tokenizers.Encoding]:
    """`encode_batch` of the texts, nothing added. Raises ModelError naming the first text on which the library panics.

    Its regex engine does so where a match needs too many steps; the library's exception is no Exception.
    """
    try:
        return encode_batch(list(texts), add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        if len(texts) > 1:
            for text in texts:
                by_library(encode_batch, [text])
        what = f"the tokenizers library fails on a text of {len(texts[0])} characters that begins {texts[0][:40]!r}"
        remedy = "remove the row, or use another tokenizer"
        raise ModelError.at("tokenizer.json", f"{what} ({str(error)[:80]})", remedy, "tokenizer-limits") from None


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies.

    Printable bytes stand for themselves, the others for U+0100 on, in order (GPT-2's bytes_to_unicode).
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A regex with one group for the longest of `texts` that begins at a place; it matches nowhere where there is none.

    Grouped by their first characters, so that a place where none begins costs little however many there are.
    """
    groups: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        groups.setdefault(text[:3], []).append(re.escape(text[3:]))
    branches = [f"{re.escape(head)}(?:{'|'.join(groups[head])})" for head in sorted(groups, key=len, reverse=True)]
    return re.compile(f"({'|'.join(branches)})" if branches else "((?!))")


def _ids_bytes(ids: Sequence[int]) -> bytes:
    array: NDArray[np.int32] = np.array(ids, dtype=np.int32)
    return array.tobytes()


def _state(part: Any) -> dict[str, Any] | None:
    """A part of the library's tokenizer as the JSON it is saved as."""
    return None if part is None else json.loads(part.__getstate__())


def _is_random(model: Any) -> bool:
    """Whether the model samples among tokenisations: BPE with dropout, Unigram with subword regularisation."""
    return bool(getattr(model, "dropout", None) or getattr(model, "alpha", None) or getattr(model, "nbest_size", None))


def _is_local(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a segment is split alike wherever in the text it stands."""
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return all(map(_is_local, pre_tokenizer["pretokenizers"]))
    return kind in _LOCAL or (kind == "Metaspace" and pre_tokenizer.get("prepend_scheme") in ("always", "never"))


def _keeps_ascii(normalizer: dict[str, Any] | None) -> bool:
    """Whether the normaliser leaves every ASCII text as it is."""
    if normalizer is None:
        return True
    if normalizer["type"] == "Sequence":
        return all(map(_keeps_ascii, normalizer["normalizers"]))
    return normalizer["type"] in _SAME_ON_ASCII
