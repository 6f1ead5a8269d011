"""A second look at finished examples, by another way than they were made: a certificate, or what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from instil.chat.control import Guarded, guard
from instil.chat.edits import EditTest, Found, contexts
from instil.chat.generation import generation_spans
from instil.chat.ids import IdTest, sampled
from instil.chat.readback import Fault, Readback
from instil.chat.targets import PROMPT
from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import ChatOptions, TurnMaker
from instil.chat.weights import weight_faults
from instil.errors import InstilError, Problem
from instil.types import KINDS, Conversation, Example, Int32

REMEDY = "do not train on these examples; please report it with the row and the template"
ROWS_AT_ONCE = 256  # rows whose tokens are spelt together


@dataclass(slots=True)
class _Counts:
    """How the examples were checked."""

    checked: int = 0
    by_edit: int = 0
    by_rendering: int = 0
    as_given: int = 0
    blocks_agree: int = 0
    blocks_differ: list[str] = field(default_factory=list)
    lossy: list[str] = field(default_factory=list)


def certify(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template,
    digests: Mapping[str, str],
    options: ChatOptions | None = None,
) -> tuple[dict[str, Any], list[Problem]]:
    """Check every example against its row and count. digests: sha256 of each data file, by name.

    The examples were cut from the rendering of the row. Here the answers are replaced by others, the edited row is
    rendered, and what did not move must be the prompt, what moved the content, what follows it the end of the turn; with
    the row's own texts put back that must be, byte by byte, what the tokens spell. The ids of a sample are compared
    with those that the tokenizers library gives for the whole text.
    """
    checker = _Checker(tokenizer, template, options or ChatOptions())
    problems = checker.check(examples, conversations) if examples else []
    counts, endings = checker.counts, checker.maker.endings
    whole = [example for example in examples if len(example.kinds) == len(example.weights)]
    weights = np.concatenate([example.weights for example in whole]) if whole else np.zeros(0, np.float32)
    of_kinds = np.concatenate([example.kinds for example in whole]) if whole else np.zeros(0, np.int8)
    kinds = np.bincount(of_kinds[weights > 0], minlength=len(KINDS))
    first_tokens = [int(example.prompt_tokens[0]) for example in examples if len(example.prompt_tokens)]
    certificate = {
        "examples": len(examples),
        "checked": counts.checked,
        "by_edit": counts.by_edit,
        "by_rendering": counts.by_rendering,
        "as_given": counts.as_given,
        "by_library": checker.ids.by_library,
        "prompt_tokens": sum(len(example.prompt_tokens) for example in examples),
        "answer_tokens": sum(len(example.answer_tokens) for example in examples),
        "bos_examples": first_tokens.count(-1 if checker.bos is None else checker.bos),
        "target_tokens": int(np.count_nonzero(weights > 0)),
        "target_kinds": dict(zip(KINDS, kinds.tolist(), strict=True)),
        "weight_sum": float(weights.sum(dtype=np.float64)),
        "terminator": endings.plain.as_dict(),
        "terminators": [ending.as_dict() for ending in endings.found],
        "lossy_texts": counts.lossy,
        "generation_blocks": {
            "agree": counts.blocks_agree,
            "differ": len(counts.blocks_differ),
            "first": counts.blocks_differ[:3],
        },
        "template_sha256": template.digest,
        "tokenizer_sha256": tokenizer.digest,
        "data_sha256": dict(digests),
        "uses_date": template.uses_date,
    }
    return certificate, problems


class _Checker:
    """The second derivation."""

    def __init__(self, tokenizer: Tokenizer, template: Template, options: ChatOptions):
        self.tokenizer, self.template, self.options = tokenizer, template, options
        # Shared with the first derivation: ends of answers, numbered calls, whether the template appends, and, where edits
        # do not apply, a turn rendered by itself.
        self.maker = TurnMaker(tokenizer, template, options)
        self.counts = _Counts()
        self.readback = Readback(tokenizer)
        self.edits = EditTest(template, self.maker, self.readback)
        self.ids = IdTest(self.maker, self.readback)
        self._has_blocks = "endgeneration" in template.source
        self.bos = tokenizer.bos_id()

    def check(self, examples: Sequence[Example], conversations: Sequence[Conversation]) -> list[Problem]:
        """The faults of all examples, row by row."""
        by_origin: dict[str, list[Example]] = {}
        for example in examples:
            by_origin.setdefault(example.origin, []).append(example)
        problems: list[Problem] = []
        for at, row in enumerate(conversations):
            if at % ROWS_AT_ONCE == 0:
                some = conversations[at : at + ROWS_AT_ONCE]
                self.readback.look_ahead([by_origin[each.origin][-1] for each in some if by_origin.get(each.origin)])
            answers = sum(message.role == "assistant" for message in row.messages)
            turns = range(row.first_turn, row.first_turn + max(answers, row.pair is not None))
            of_row = by_origin.get(row.origin, [])
            mine = [example for example in of_row if example.turn in turns]
            if mine:
                by_origin[row.origin] = [example for example in of_row if example.turn not in turns]
                problems += self._row(row, mine)
        for left in by_origin.values():
            for example in left:
                problems.append(Problem(_place(example), "no such assistant turn in the data", REMEDY, "no-source"))
        return problems

    def _row(self, row: Conversation, examples: list[Example]) -> list[Problem]:
        """What is wrong with the examples of one row."""
        faults: list[tuple[Example, Fault]] = []
        if self.options.targets.turns == "everything":
            examples = [self._unmoved(example) for example in examples]
        if row.pair is not None:
            self.counts.as_given += len(examples)
            for example in examples:
                faults += ((example, fault) for fault in self._given_faults(row, example))
        else:
            guarded, typed = guard(row, self.tokenizer, self.options.control_text)
            faults += ((examples[0], ("control-token", problem.what)) for problem in typed)
            guarded = Guarded(self.maker.numbered(guarded.row), guarded.typed)
            if any(message.fields.get("tool_calls") for message in row.messages):
                self.maker.endings.look_at_calls()
            last = examples[-1]
            whole = np.concatenate([last.prompt_tokens, last.answer_tokens])
            shared: Found | None = None
            proven = len(examples) > 1 and self.maker.appends(guarded.row)
            for example in reversed(examples):
                index = row.index_of(example.turn)
                if (
                    shared is not None
                    and self.edits.inside(example, whole, index, shared, guarded)
                    and (proven or self.edits.served(guarded, index, example))
                ):
                    self.counts.by_edit += 1
                    continue
                found = self.edits.turn(guarded, index, example)
                if found is not None:
                    self.counts.by_edit += 1
                    shared = found if example is last else shared
                else:
                    faults = [*((example, fault) for fault in self._plainly(guarded, index, example)), *faults]
            if self._has_blocks and not faults and sampled(last, True):
                self._blocks(guarded, row.index_of(last.turn), last)
        self.counts.checked += len(examples)
        for example in examples:
            faults += ((example, fault) for fault in self._common_faults(row, example))
            if row.pair is None:
                faults += ((example, fault) for fault in self.ids.faults(guarded, example, example is examples[0]))
        return [Problem(_place(example), what, REMEDY, rule) for example, (rule, what) in faults]

    def _unmoved(self, example: Example) -> Example:
        """The pair as served, where the prompt is learnt too (targets.turns=everything)."""
        moved = int(np.count_nonzero(example.kinds == PROMPT))
        if not moved:
            return example
        return Example(
            np.concatenate([example.prompt_tokens, example.answer_tokens[:moved]]), example.answer_tokens[moved:],
            example.weights[moved:], example.origin, example.turn, example.task, example.kinds[moved:],
            example.cut_tokens, example.source,
        )  # fmt: skip

    def _blocks(self, guarded: Guarded, index: int, example: Example) -> None:
        """Compare a row's last answer with what the template's author marks as generated. It is his opinion, counted and
        shown; where it differs (no terminator in it, the header in it) what the server sends decides."""
        row = guarded.row
        messages = row.messages[: index + 1]
        spans = generation_spans(self.template, messages, row.tools, row.template_args)
        if not spans:
            return
        text = self.template.render(messages, tools=row.tools, args=row.template_args, generation_prompt=False)
        block, answer = guarded.restore(text[spans[-1][0] : spans[-1][1]]), self.readback.texts(example)[1]
        if block.rstrip() == answer.rstrip():
            self.counts.blocks_agree += 1
        else:
            self.counts.blocks_differ.append(f"{_place(example)}: block {block[-40:]!r}, answer {answer[-40:]!r}")

    def _plainly(self, guarded: Guarded, index: int, example: Example) -> list[Fault]:
        """Where the edit test does not apply (the template looks into the content): the definition, rendered again."""
        row = guarded.row
        prompt, answer = self.readback.texts(example)
        for before in contexts(row, index, example):
            try:
                turn = self.maker.slow(row, index, before)
            except InstilError as error:
                return [("no-source", error.problems[0].what)]
            expected = guarded.restore(turn.prompt), guarded.restore(turn.answer)
            faults = []
            whole = np.concatenate([example.prompt_tokens, example.answer_tokens])
            if prompt != expected[0] and not self._normalised(example.prompt_tokens, expected[0]):
                faults.append(
                    ("prompt-differs", f"the prompt is not what the server sends: {_parts(prompt, expected[0])}")
                )
            if (
                answer != expected[1]
                and not self._normalised(example.answer_tokens, expected[1])
                and (faults or not self._normalised(whole, "".join(expected)))  # a token may swallow the space after it
            ):
                faults.append(
                    ("answer-differs", f"the answer is not what the model must emit: {_parts(answer, expected[1])}")
                )
                if guarded.restore(row.messages[index].content).strip() not in answer:
                    faults.append(("content-lost", "the answer does not contain the assistant's content"))
            if not faults:
                self.counts.by_rendering += 1
                return []
        return faults

    def _normalised(self, tokens: Int32, text: str) -> bool:
        """Whether the tokens spell the text as far as the tokenizer can: it may normalise, or lack some bytes."""
        if self.readback.spelt(self.tokenizer.encode(text)) != self.readback.spelt(tokens):
            return False
        self.counts.lossy.append(text[:40]) if len(self.counts.lossy) < 20 else None
        return True

    def _common_faults(self, row: Conversation, example: Example) -> Iterator[Fault]:
        """What no rendering is needed for."""
        tokenizer, prompt, answer = self.tokenizer, example.prompt_tokens, example.answer_tokens
        if self.bos is not None and prompt[:2].tolist() == [self.bos, self.bos]:
            yield "double-bos", f"the prompt begins with {tokenizer.special['bos_token']!r} twice"
        yield from weight_faults(row, example, self.options.targets)
        if row.pair is not None:
            return
        ending = self.maker.endings.of(row.messages[row.index_of(example.turn)])
        ended = (
            self.readback.spelt(answer).endswith(ending.text)
            if ending.token_id is None
            else (len(answer) > 0 and int(answer[-1]) == ending.token_id)
        )
        if ending.token_id is not None and ending.token_id in answer[:-1]:
            yield (
                "ambiguous-terminator",
                f"the answer holds {ending.text!r} before its end: the server would stop there",
            )
        if not ended:
            yield "no-terminator", f"the answer does not end with {ending.text!r}, so the model would not learn to stop"

    def _given_faults(self, row: Conversation, example: Example) -> Iterator[Fault]:
        assert row.pair is not None
        if example.prompt_tokens.tolist() != list(row.pair.prompt_tokens):
            yield "prompt-differs", "the prompt is not the row's own"
        if example.answer_tokens.tolist() != list(row.pair.answer_tokens):
            yield "answer-differs", "the answer is not the row's own"


def _parts(found: str, expected: str) -> str:
    """Where two texts part."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (left, right) in pairs if left != right), min(len(found), len(expected)))
    return f"character {at} on, {found[at : at + 24]!r} instead of {expected[at : at + 24]!r}"


def _place(example: Example) -> str:
    return f"{example.origin}: turn {example.turn}"
