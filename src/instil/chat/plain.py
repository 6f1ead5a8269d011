"""Text in which data typed control tokens in, ids out in which only the template's are control tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers

from instil.chat.words import any_of, by_library

# Each special token is renamed to a character that the text does not hold, followed by one of its own.
_LEADS = [chr(point) for point in range(0x10FFFD, 0x10FFF9, -1)]  # private use, the last of all characters
_OWN = 0xF0000  # where the second characters begin, private use as well
_NOBODYS = "\U0010ffff"  # not a character, so in no vocabulary
_MOST = 0xFFF0  # special tokens that can be renamed


@dataclass(frozen=True, slots=True)
class _Renamed:
    """The same tokenizer with other names for its special tokens. ids: of added tokens, to those in the original."""

    backend: tokenizers.Tokenizer
    names: dict[str, str]
    ids: dict[int, int]


class PlainEncoder:
    """Ids of texts whose typed control tokens are plain text, as if no special token had their names.

    The library itself tokenises, with its whole pipeline, the whole text at once: a copy of the tokenizer in which
    every special token has a name that nobody can type, and a text in which the template's control tokens have it.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._control = {token.content: token_id for token_id, token in added.items() if token.special}
        # Tokens are found on the text as it is first, then on the normalised text, and the longest wins.
        self._patterns = [
            any_of([token.content for token in added.values() if token.normalized is normalized and token.content])
            for normalized in (False, True)
        ]
        self._unknown = _unknown_tokens(backend)
        self._renamed: dict[str, _Renamed] = {}

    def encode(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """The ids of the pieces' text. pieces: (text, whether data typed it). Raises ValueError (see Tokenizer)."""
        text = "".join(piece for piece, _ in pieces)
        typed = "\0".join(piece for piece, plain in pieces if plain)
        spans = self._spans(text)
        if spans == self._template_spans(pieces):
            found = by_library(self._backend.encode_batch_fast, [text])[0].ids
            if self._control_count(found, typed) <= len(spans):  # more: normalising made control tokens of typed text
                return found
        return self._encode_renamed(pieces, text, typed)

    def _encode_renamed(self, pieces: Sequence[tuple[str, bool]], text: str, typed: str) -> list[int]:
        lead = next((lead for lead in _LEADS if lead not in text), None)
        if lead is None:
            raise ValueError("the text holds every character that could tell control tokens from typed ones")
        if lead not in self._renamed:
            self._renamed[lead] = self._rename(lead)
        renamed = self._renamed[lead]
        marked = "".join(piece if plain else self._replace(piece, renamed.names) for piece, plain in _runs(pieces))
        found = by_library(renamed.backend.encode_batch_fast, [marked])[0].ids
        if self._control_count([n for n in found if n not in renamed.ids], typed):
            raise ValueError("the vocabulary turns a control token that data typed into a real one")
        special = set(self._control.values())
        if sum(renamed.ids.get(n) in special for n in found) != marked.count(lead):
            raise ValueError("the tokenizer does not find the template's control tokens once their names are changed")
        return [renamed.ids.get(n, n) for n in found]

    def _control_count(self, ids: Sequence[int], typed: str) -> int:
        """How many ids are control tokens. That for unknown characters counts only where its name was typed."""
        unknown = {self._control.get(name) for name in self._unknown if name not in typed}
        control = set(self._control.values()) - unknown
        return sum(n in control for n in ids)

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens are written in `text`: [start, stop) of each."""
        plain, normalized = self._patterns
        found, at = [], 0
        for n, part in enumerate(plain.split(text)):
            if n % 2:
                found.append((at, part))
            else:
                found += [(at + match.start(), match.group()) for match in normalized.finditer(part)]
            at += len(part)
        return [(start, start + len(name)) for start, name in found if name in self._control]

    def _template_spans(self, pieces: Sequence[tuple[str, bool]]) -> list[tuple[int, int]]:
        """Where the template wrote special tokens, in the text of all pieces."""
        found, at = [], 0
        for text, plain in _runs(pieces):
            if not plain:
                found += [(at + start, at + stop) for start, stop in self._spans(text)]
            at += len(text)
        return found

    def _replace(self, text: str, names: dict[str, str]) -> str:
        """`text` with the new names of its special tokens."""
        for pattern in self._patterns:
            text = pattern.sub(lambda match: names.get(match.group(), match.group()), text)
        return text

    def _rename(self, lead: str) -> _Renamed:
        """A copy of the tokenizer whose special tokens are called `lead` and one more character."""
        if len(self._control) > _MOST:
            raise ValueError(f"the tokenizer has {len(self._control)} special tokens, more than can be renamed")
        names = {name: lead + chr(_OWN + n) for n, name in enumerate(self._control)}
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        originals = {}
        for token in spec["added_tokens"]:
            new = names[token["content"]] if token["special"] else token["content"]
            originals[new] = token["id"]
            token["content"] = new
        spec["post_processor"] = None  # adds tokens by name, and nothing is to be added here
        backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        ids = {n: originals[token.content] for n, token in backend.get_added_tokens_decoder().items()}
        taken = [n for n in ids if ids[n] in self._control.values() and backend.model.id_to_token(n) is not None]
        if len(ids) != len(originals) or taken:
            raise ValueError("the tokenizer's special tokens cannot be renamed")
        return _Renamed(backend, names, ids)


def _runs(pieces: Sequence[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """The pieces with neighbours of one kind joined, so that a control token written in two of them is found."""
    runs: list[tuple[str, bool]] = []
    for text, plain in pieces:
        if not text:
            continue
        if runs and runs[-1][1] == plain:
            runs[-1] = (runs[-1][0] + text, plain)
        else:
            runs.append((text, plain))
    return runs


def _unknown_tokens(backend: tokenizers.Tokenizer) -> list[str]:
    """The tokens that stand for a character outside the vocabulary: what its model makes of one."""
    try:
        return [str(backend.model.id_to_token(token.id)) for token in backend.model.tokenize(_NOBODYS)]
    except Exception:  # a model without a token for unknown characters raises a bare Exception
        return []
