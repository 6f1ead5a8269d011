"""Which tokens of an answer are learnt, and how much: kinds of target, the policy, and the weight of each token."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from instil.chat.tokenizer import Tokenizer
from instil.types import KINDS, Example, Float32, Int8, Message, common_tokens

ANSWER, REASONING, TOOL_CALL, TERMINATOR, PROMPT = range(len(KINDS))
THINK = re.compile(r"\s*<(think|thinking|thought|reasoning)>", re.IGNORECASE)
THOUGHT = re.compile(r"</(?:think|thinking|thought|reasoning)>\s*|\[/THINK\]\s*|<channel\|>\s*", re.IGNORECASE)
THOUGHT_BEGINS = ("</", "[/", "<channel")  # a text without any of them has no end of a thinking channel

Span = tuple[int, int, int]  # (kind, first character, one past the last)


@dataclass(frozen=True, slots=True)
class Targets:
    """The policy. turns: all | last | everything (all, and the prompt too). per: a loss is the mean over tokens, or
    over examples. The others are weights of a kind of token; the terminator's must be above 0."""

    turns: Literal["all", "last", "everything"] = "all"
    per: Literal["token", "example"] = "token"
    answer: float = 1.0
    reasoning: float = 1.0
    tool_call: float = 1.0
    terminator: float = 1.0

    def of_kinds(self) -> Float32:
        """The weight of each of KINDS; the prompt has one only where everything is learnt."""
        prompt = 1.0 if self.turns == "everything" else 0.0
        return np.array([self.answer, self.reasoning, self.tool_call, self.terminator, prompt], np.float32)


def spans(message: Message, prompt: str, body: str) -> list[Span]:
    """The kinds of an answer's text before its terminator, where it is not plain answer from end to end.

    Reasoning is what comes before the content in a turn that has reasoning, and what stands between the tags of a
    thinking channel, tags included. A tool call is what the template makes of `tool_calls`.
    """
    content = message.content.strip()
    at = body.rfind(content) if content else -1
    found: list[Span] = []
    start = 0
    closed = list(THOUGHT.finditer(body))
    if closed and (THINK.match(body) or THINK.search(prompt[-40:]) or message.reasoning):
        start = closed[0].end()
        found.append((REASONING, 0, start))
    elif message.reasoning and message.reasoning.strip() in body:
        start = at if at > 0 else body.find(message.reasoning.strip()) + len(message.reasoning.strip())
        found.append((REASONING, 0, start))
    if message.fields.get("tool_calls"):
        if at < start:
            found.append((TOOL_CALL, start, len(body)))
        elif body[start:at].strip() and not body[at + len(content) :].strip():
            found.append((TOOL_CALL, start, at))
        else:
            found.append((TOOL_CALL, at + len(content), len(body)))
    return found


def kinds_of(answer_tokens: list[int], ending_tokens: int, found: list[Span], tokenizer: Tokenizer) -> Int8:
    """The kind of each answer token; a token that spans two kinds has that of its first character."""
    kinds = np.zeros(len(answer_tokens), np.int8)
    for kind, first, last in found:
        kinds[_token_at(answer_tokens, first, tokenizer) : _token_at(answer_tokens, last, tokenizer)] = kind
    kinds[len(answer_tokens) - ending_tokens :] = TERMINATOR
    return kinds


def _token_at(tokens: list[int], character: int, tokenizer: Tokenizer) -> int:
    """The first token that begins at or after a character of the decoded text."""
    low, high = 0, len(tokens)
    while low < high:
        middle = (low + high) // 2
        if len(tokenizer.decode(tokens[:middle]).rstrip("\ufffd")) < character:
            low = middle + 1
        else:
            high = middle
    return low


def weigh(examples: list[Example], policy: Targets) -> list[Example]:
    """The examples of one row with their final weights: kind by kind, and each summing to one where the loss is per
    example. The weights that they come with (of message and row) are kept as factors."""
    if policy.turns == "everything":
        examples = _whole(examples)
    weighed = []
    table = policy.of_kinds()
    plain = bool(np.all(table[:4] == 1.0)) and policy.per == "token"
    for example in examples:
        if plain:
            weighed.append(example)
            continue
        weights = example.weights * table[example.kinds]
        total = float(weights.sum(dtype=np.float64))
        if policy.per == "example" and total > 0:
            factor = float(example.weights.max())
            weights = (weights * (factor / total)).astype(np.float32)
        weighed.append(replace(example, weights=weights))
    return weighed


def _whole(examples: list[Example]) -> list[Example]:
    """The prompts as targets too: each token of a row once, all but the very first, which nothing comes before."""
    moved: list[Example] = []
    before: list[np.ndarray] = []
    for example in examples:
        tokens = np.concatenate([example.prompt_tokens, example.answer_tokens])
        prompt = len(example.prompt_tokens)
        start = min(prompt, max([1, *(common_tokens(tokens, other) for other in before)]))
        before.append(tokens)
        factor = example.weights.max() if len(example.weights) else np.float32(1.0)
        moved.append(
            replace(
                example,
                prompt_tokens=tokens[:start],
                answer_tokens=tokens[start:],
                weights=np.concatenate([np.full(prompt - start, factor, np.float32), example.weights]),
                kinds=np.concatenate([np.full(prompt - start, PROMPT, np.int8), example.kinds]),
            )
        )
    return moved
