"""What tokens are for: the kind of each token of an example's answer, and how many of each kind there are in all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from instil.types import KINDS, Example, Int8

WORDS = {
    "answer": "answer", "reasoning": "reasoning", "tool_call": "tool call", "terminator": "ends the answer",
    "prompt": "learnt prompt",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Account:
    """Tokens by what became of them. Their sum is every token of the examples, with what was taken out of them.

    prompt: read, not learnt. targets: learnt, by kind. unlearnt: in an answer, with weight 0. cut: old turns that left
    a prompt. dropped: of examples that are not used.
    """

    prompt: int
    targets: Mapping[str, int]
    unlearnt: int = 0
    cut: int = 0
    dropped: int = 0

    @property
    def target_tokens(self) -> int:
        """All that is learnt."""
        return sum(self.targets.values())

    @property
    def tokens(self) -> int:
        """All there were."""
        return self.prompt + self.target_tokens + self.unlearnt + self.cut + self.dropped


def answer_kinds(example: Example) -> Int8:
    """The kind of each answer token, as an index into KINDS. Without kinds of its own: the last ends the answer.

    Raises ValueError when there are not as many kinds as answer tokens.
    """
    answer_tokens = len(example.answer_tokens)
    if len(example.kinds) == answer_tokens:
        return example.kinds
    if len(example.kinds):
        raise ValueError(f"{len(example.kinds)} kinds for {answer_tokens} answer tokens of {example.origin}")
    kinds = np.full(answer_tokens, KINDS.index("answer"), np.int8)
    kinds[-1:] = KINDS.index("terminator")
    return kinds


def token_account(examples: Iterable[Example], *, dropped_tokens: int = 0) -> Account:
    """The account of some examples; dropped_tokens are those of the examples that are not among them."""
    prompt = unlearnt = cut = 0
    targets = np.zeros(len(KINDS), np.int64)
    for example in examples:
        learnt = example.weights > 0
        targets += np.bincount(answer_kinds(example)[learnt], minlength=len(KINDS))
        prompt += len(example.prompt_tokens)
        unlearnt += int(np.count_nonzero(~learnt))
        cut += example.cut_tokens
    return Account(prompt, dict(zip(KINDS, targets.tolist(), strict=True)), unlearnt, cut, dropped_tokens)
