"""Whether an example's ids are those that the tokenizers library gives, and typed text is no control token."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from instil.chat.control import Guarded
from instil.chat.edits import contexts
from instil.chat.readback import Fault, Readback
from instil.chat.turns import TurnMaker
from instil.errors import InstilError
from instil.types import Example

LIBRARY_FIRST = 32  # rows whose first answer is compared with the tokenizers library's own tokens,
LIBRARY_EVERY = 500  # and one example in so many


class IdTest:
    """by_library: how many examples were compared with the library's ids."""

    def __init__(self, maker: TurnMaker, readback: Readback):
        self.maker, self.readback, self.tokenizer = maker, readback, readback.tokenizer
        self.by_library = 0

    def faults(self, guarded: Guarded, example: Example, opening: bool) -> Iterator[Fault]:
        """Whether the text is in the tokens that the server makes of it, and typed text in no control token."""
        if guarded.typed:
            yield from self._typed_faults(guarded, example)
            return
        if sampled(example, opening):
            self.by_library += 1
            yield from self._library_faults(guarded, example)

    def _library_faults(self, guarded: Guarded, example: Example) -> Iterator[Fault]:
        """Whether the library gives these ids for the text that they spell, or, as some tokenizers add a space to a
        text which decoding keeps, for the text that was rendered."""
        faults = list(self._ids_faults(example, *self.readback.texts(example)))
        row, index = guarded.row, guarded.row.index_of(example.turn)
        for before in contexts(row, index, example) if faults else ():
            try:
                turn = self.maker.slow(row, index, before)
            except InstilError:
                continue
            if not any(self._ids_faults(example, turn.prompt, turn.answer)):
                return
        yield from faults

    def _ids_faults(self, example: Example, prompt: str, answer: str) -> Iterator[Fault]:
        """Whether the library gives these ids for these texts."""
        served, joint = self.tokenizer.encode(prompt), self.tokenizer.encode(prompt + answer)
        if served != example.prompt_tokens.tolist():
            found = _difference(example.prompt_tokens.tolist(), served)
            yield "prompt-differs", f"the library gives other tokens: {found}"
            return
        merged = joint[: len(served)] != served
        expected = self.tokenizer.encode(answer) if merged else joint[len(served) :]
        if expected != example.answer_tokens.tolist():
            found = _difference(example.answer_tokens.tolist(), expected)
            yield "answer-differs", f"the library gives other tokens: {found}"

    def _typed_faults(self, guarded: Guarded, example: Example) -> Iterator[Fault]:
        """Whether the control tokens are those that the template wrote, and no typed one is among them."""
        row = guarded.row
        index = row.index_of(example.turn)
        known = set(self.tokenizer.control_tokens.values())
        found = [n for n in (*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()) if n in known]
        for before in contexts(row, index, example):
            try:
                turn = self.maker.slow(row, index, before)
            except InstilError:
                continue
            written = self.tokenizer.control_pattern.findall(turn.prompt + turn.answer)
            if found == [self.tokenizer.control_tokens[text] for text in written]:
                prompt, answer = guarded.pieces(turn.prompt), guarded.pieces(turn.answer)
                ids = self.tokenizer.encode_marked([*prompt, *answer])
                apart = [*self.tokenizer.encode_marked(prompt), *self.tokenizer.encode_marked(answer)]
                if [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()] not in (ids, apart):
                    yield "answer-differs", "the tokens are not those of the text with its typed control tokens as text"
                return
        yield "control-token", "text from the row became a control token, or one that the template wrote became text"


def sampled(example: Example, opening: bool) -> bool:
    """Whether an example is one of those that are looked at more closely; the choice depends on its origin alone."""
    file, _, line = example.origin.rpartition(":")
    first = opening and line.isdecimal() and int(line) <= LIBRARY_FIRST
    return first or zlib.crc32(f"{file}:{line} {example.turn}".encode()) % LIBRARY_EVERY == 0


def _difference(found: list[int], expected: list[int]) -> str:
    """Where two token lists part."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (left, right) in pairs if left != right), min(len(found), len(expected)))
    return f"{len(found)} tokens instead of {len(expected)}, different from token {at} on"
