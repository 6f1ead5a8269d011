"""A second look at finished examples, by another way than they were made: a certificate, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import Terminator, find_terminator, prompt_text
from instil.errors import InstilError, Problem
from instil.types import Conversation, Example

EXAMPLES_AT_ONCE = 1024  # examples rendered before their texts are tokenised together
REMEDY = "do not train on these examples; please report it with the row and the template"


@dataclass(frozen=True, slots=True)
class _Rendering:
    """What the templates make of an example's turn now. ids and offsets belong to `whole`, the turn's end included."""

    prompt_ids: list[int]
    prompt_text: str
    whole: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    content: str
    content_ids: list[int]


@dataclass(frozen=True, slots=True)
class _Expected:
    """The answer as the offsets of the full rendering give it; tokens is None where one token spans the boundary."""

    tokens: list[int] | None
    text: str


def certify(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template,
    digests: Mapping[str, str],
) -> tuple[dict[str, Any], list[Problem]]:
    """Check every example against its row and count. digests: sha256 of each data file, by name.

    The examples were cut from the prompt and the prompt with its answer, tokenised apart. Here the whole conversation
    up to the turn is tokenised, with what the template writes after the answer, and the answer is found by offsets.
    """
    terminator = find_terminator(template, tokenizer)
    rows = {row.origin: row for row in conversations}
    problems: list[Problem] = []
    checked = merged_boundaries = 0
    for start in range(0, len(examples), EXAMPLES_AT_ONCE):
        batch = examples[start : start + EXAMPLES_AT_ONCE]
        renderings, unfit = _render(batch, rows, tokenizer, template)
        problems += unfit
        checked += len(renderings)
        for example, rendering in renderings:
            expected = _expect(rendering, terminator)
            merged_boundaries += expected is not None and expected.tokens is None
            place = _place(example)
            for rule, what in _faults(example, rendering, expected, tokenizer, terminator):
                problems.append(Problem(place, what, REMEDY, rule))
    certificate = {
        "examples": len(examples),
        "checked": checked,
        "prompt_tokens": sum(len(example.prompt_tokens) for example in examples),
        "answer_tokens": sum(len(example.answer_tokens) for example in examples),
        "target_tokens": int(sum(np.count_nonzero(example.weights > 0) for example in examples)),
        "terminator": {"text": terminator.text, "id": terminator.token_id},
        "merged_boundaries": merged_boundaries,
        "template_sha256": template.digest,
        "tokenizer_sha256": tokenizer.digest,
        "data_sha256": dict(digests),
        "uses_date": template.uses_date,
    }
    return certificate, problems


def _render(
    examples: Sequence[Example], rows: Mapping[str, Conversation], tokenizer: Tokenizer, template: Template
) -> tuple[list[tuple[Example, _Rendering]], list[Problem]]:
    """Each example with what its turn renders to now, and a problem for each that has no such turn."""
    found: list[tuple[Example, str, str, str]] = []
    problems: list[Problem] = []
    for example in examples:
        row = rows.get(example.origin)
        answered = [] if row is None else [i for i, message in enumerate(row.messages) if message.role == "assistant"]
        if row is None or not 0 <= example.turn < len(answered):
            problems.append(Problem(_place(example), "no such assistant turn in the data", REMEDY, "no-source"))
            continue
        index = answered[example.turn]
        try:
            prompt = prompt_text(row.messages[:index], template, row.tools)
            whole = template.render(row.messages[: index + 1], tools=row.tools, generation_prompt=False)
        except InstilError as error:
            problems += [Problem(_place(example), problem.what, REMEDY, "no-source") for problem in error.problems]
            continue
        found.append((example, prompt, whole, row.messages[index].content.strip()))
    prompts = tokenizer.encode_batch([prompt for _, prompt, _, _ in found])
    wholes = tokenizer.encode_offsets([whole for _, _, whole, _ in found])
    contents = tokenizer.encode_batch([content for _, _, _, content in found])
    renderings = []
    for (example, prompt, whole, content), ids, (whole_ids, offsets), content_ids in zip(
        found, prompts, wholes, contents, strict=True
    ):
        renderings.append((example, _Rendering(ids, prompt, whole, whole_ids, offsets, content, content_ids)))
    return renderings, problems


def _expect(rendering: _Rendering, terminator: Terminator) -> _Expected | None:
    """The answer in the full rendering: from where the prompt's text ends through the next terminator, if any."""
    boundary = len(rendering.prompt_text)
    if not rendering.whole.startswith(rendering.prompt_text):
        return None
    first = next((i for i, (_, stop) in enumerate(rendering.offsets) if stop > boundary), len(rendering.ids))
    last = next((i for i in range(first, len(rendering.ids)) if rendering.ids[i] == terminator.token_id), None)
    if last is None:
        return None
    text = rendering.whole[boundary : rendering.offsets[last][1]]
    # A control token with `rstrip` swallows the whitespace after it, across the boundary too: it stays the prompt's.
    for start in (first, len(rendering.prompt_ids)):
        if rendering.ids[:start] == rendering.prompt_ids:
            return _Expected(rendering.ids[start : last + 1], text)
    return _Expected(None, text)


def _faults(
    example: Example, rendering: _Rendering, expected: _Expected | None, tokenizer: Tokenizer, terminator: Terminator
) -> Iterator[tuple[str, str]]:
    """What is wrong with an example, as (rule, what)."""
    prompt, answer = example.prompt_tokens.tolist(), example.answer_tokens.tolist()
    if prompt != rendering.prompt_ids:
        yield "prompt-differs", f"the prompt is not what the server sends: {_difference(prompt, rendering.prompt_ids)}"
    if len(prompt) > 1 and prompt[0] == prompt[1] == tokenizer.bos_id():
        yield "double-bos", f"the prompt begins with {tokenizer.special['bos_token']!r} twice"
    if expected is None:
        yield "answer-differs", "the rendered conversation does not hold the prompt and an ended answer after it"
    elif expected.tokens is not None and answer != expected.tokens:
        yield "answer-differs", f"the answer is not what the model must emit: {_difference(answer, expected.tokens)}"
    elif expected.tokens is None and tokenizer.decode(prompt + answer) != rendering.prompt_text + expected.text:
        yield "answer-differs", "prompt and answer do not spell the rendered conversation"
    if not answer or answer[-1] != terminator.token_id:
        yield "no-terminator", f"the answer does not end with {terminator.text!r}, so the model would not learn to stop"
    if not _spells(answer, rendering, tokenizer):
        yield "content-lost", f"the answer does not contain the assistant's content {rendering.content[:40]!r}"
    yield from _weight_faults(example, terminator)
    typed = set(tokenizer.control_tokens.values()).intersection(rendering.content_ids)
    if typed:
        yield "control-token", f"the content becomes the control token {tokenizer.decode([min(typed)])!r}"


def _weight_faults(example: Example, terminator: Terminator) -> Iterator[tuple[str, str]]:
    """What is wrong with the weights of an example."""
    weights = example.weights
    if len(weights) != len(example.answer_tokens):
        yield "weights-length", f"{len(weights)} weights for {len(example.answer_tokens)} answer tokens"
    if not np.all(np.isfinite(weights) & (weights >= 0)):
        yield "weights-value", "a weight is negative or not finite"
    if not len(weights) or not weights[-1] > 0:
        yield "weights-terminator", f"{terminator.text!r} has no weight, so the model would not learn to stop"


def _spells(answer: list[int], rendering: _Rendering, tokenizer: Tokenizer) -> bool:
    """Whether the decoded answer contains the content, or what the tokenizer keeps of it (it may normalise text)."""
    text = tokenizer.decode(answer)
    return rendering.content in text or tokenizer.decode(rendering.content_ids).strip() in text


def _difference(found: list[int], expected: list[int]) -> str:
    """Where two token lists part."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (left, right) in pairs if left != right), min(len(found), len(expected)))
    return f"{len(found)} tokens instead of {len(expected)}, different from token {at} on"


def _place(example: Example) -> str:
    return f"{example.origin}: turn {example.turn}"
