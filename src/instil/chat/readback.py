"""What the tokens of finished examples spell, for the certificate that reads them back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from instil.chat.tokenizer import Tokenizer
from instil.types import Example, Int32

Fault = tuple[str, str]  # what a check finds: (rule, what)


class Readback:
    """Texts of examples: by the bytes of each token where they are known, else by the decoder."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._ahead: dict[int, tuple[str, str]] = {}
        self._measured: tuple[Int32, Any] | None = None

    def look_ahead(self, examples: Sequence[Example]) -> None:
        """The texts of many examples by one look into the table; `texts` finds them."""
        self._ahead = {}
        ids = [tokens for example in examples for tokens in (example.prompt_tokens, example.answer_tokens)]
        whole = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        ends, spelt = self.tokenizer.token_ends(whole), self.tokenizer.token_bytes(whole)
        if ends is None or spelt is None:
            return
        stops = np.concatenate([[0], ends])[np.cumsum([0, *map(len, ids)])].tolist()
        texts = [spelt[a:b].decode("utf-8", "replace") for a, b in itertools.pairwise(stops)]
        for example, prompt, answer in zip(examples, texts[::2], texts[1::2], strict=True):
            self._ahead[id(example)] = prompt, answer

    def texts(self, example: Example) -> tuple[str, str]:
        """The text of prompt and answer; of the answer as it follows the prompt, where decoders treat a start apart."""
        if id(example) in self._ahead:
            return self._ahead[id(example)]
        prompt = self.spelt(example.prompt_tokens)
        if self.tokenizer.token_ends(example.prompt_tokens[:1]) is not None:
            return prompt, self.spelt(example.answer_tokens)
        both = self.spelt(np.concatenate([example.prompt_tokens, example.answer_tokens]))
        return prompt, both[len(prompt) :] if both.startswith(prompt) else self.spelt(example.answer_tokens)

    def ends_at(self, whole: Int32, counts: tuple[int, int]) -> tuple[int, ...]:
        """The bytes that the first so many tokens spell."""
        if self._measured is None or self._measured[0] is not whole:
            self._measured = whole, self.tokenizer.token_ends(whole)
        ends = self._measured[1]
        if ends is None:
            return tuple(len(self.spelt(whole[:count]).encode()) for count in counts)
        return tuple(int(ends[count - 1]) for count in counts)

    def again(self, text: str) -> str:
        """A text as its tokens spell it: some tokenizers add a space where a text begins."""
        return self.spelt(self.tokenizer.encode(text))

    def spelt(self, tokens: Int32 | Sequence[int]) -> str:
        """The text that tokens stand for, by the bytes of each where they are known."""
        spelt = self.tokenizer.token_bytes(tokens)
        return self.tokenizer.decode(list(tokens)) if spelt is None else spelt.decode("utf-8", "replace")
