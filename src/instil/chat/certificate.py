"""A second look at finished examples, by another way than they were made: a certificate, or what is wrong with them."""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from instil.chat.control import Guarded, guard
from instil.chat.endings import Terminator
from instil.chat.generation import generation_spans
from instil.chat.shapes import ANSWER, Shapes, Span, mark, walk
from instil.chat.targets import PROMPT, TERMINATOR, Targets
from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import ChatOptions, TurnMaker
from instil.errors import InstilError, Problem
from instil.types import KINDS, Conversation, Example, Int32, Message

REMEDY = "do not train on these examples; please report it with the row and the template"
ROWS_AT_ONCE = 256  # rows whose tokens are spelt together
LIBRARY_FIRST = 32  # rows whose first answer is compared with the tokenizers library's own tokens,
LIBRARY_EVERY = 500  # and one example in so many
THOUGHT = re.compile(r".*(?:</[a-z]+>|\[/THINK\]|<channel\|>)\s*", re.DOTALL)

Fault = tuple[str, str]  # (rule, what)


@dataclass(slots=True)
class _Counts:
    """How the examples were checked."""

    checked: int = 0
    by_edit: int = 0
    by_rendering: int = 0
    as_given: int = 0
    by_library: int = 0
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
        "by_library": counts.by_library,
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
        self.maker = TurnMaker(tokenizer, template, options)  # for its terminators and numbered calls only
        self.counts = _Counts()
        self.shapes = Shapes(template)
        self._has_blocks = "endgeneration" in template.source
        self._plain = options.targets == Targets()
        self._measured: tuple[Int32, Any] | None = None
        self.bos = tokenizer.bos_id()
        self._ahead: dict[int, tuple[str, str]] = {}

    def check(self, examples: Sequence[Example], conversations: Sequence[Conversation]) -> list[Problem]:
        """The faults of all examples, row by row."""
        by_origin: dict[str, list[Example]] = {}
        for example in examples:
            by_origin.setdefault(example.origin, []).append(example)
        problems: list[Problem] = []
        for at, row in enumerate(conversations):
            if at % ROWS_AT_ONCE == 0:
                some = conversations[at : at + ROWS_AT_ONCE]
                self._spell([by_origin[each.origin][-1] for each in some if by_origin.get(each.origin)])
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

    def _spell(self, examples: Sequence[Example]) -> None:
        """The texts of many examples by one look into the table; `_texts` finds them."""
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
            answered = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
            last = examples[-1]
            whole = np.concatenate([last.prompt_tokens, last.answer_tokens])
            shared: tuple[str, list[Span], int] | None = None
            proven = len(examples) > 1 and self.maker.appends(guarded.row)
            for example in reversed(examples):
                index = answered[example.turn - row.first_turn]
                if (
                    shared is not None
                    and self._inside(example, whole, index, shared, guarded)
                    and (proven or self._served(guarded, index, example))
                ):
                    self.counts.by_edit += 1
                    continue
                found, spans = self._turn(guarded, index, example)
                faults = [*((example, fault) for fault in found), *faults]
                if example is last and spans is not None and not found:
                    shared = spans
            if self._has_blocks and not faults and _sampled(last, True):
                self._blocks(guarded, answered[last.turn - row.first_turn], last)
        self.counts.checked += len(examples)
        for example in examples:
            faults += ((example, fault) for fault in self._common_faults(row, example))
            if row.pair is None:
                faults += ((example, fault) for fault in self._token_faults(guarded, example, example is examples[0]))
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

    def _turn(
        self, guarded: Guarded, index: int, example: Example
    ) -> tuple[list[Fault], tuple[str, list[Span], int] | None]:
        """The faults of one example; and, of a good one, its prompt, where the answers before it stand in it, and how
        much the model writes before the content."""
        row = guarded.row
        prompt, answer = self._texts(example)
        for before in self._contexts(row, index, example):
            shaped = None if guarded.typed else self._by_shape(row, before, row.messages[index], prompt, answer)
            if shaped is not None:
                self.counts.by_edit += 1
                return [], (prompt, *shaped)
            edited = [_edited(message, number) for number, message in enumerate(before)]
            target, original = _edited(row.messages[index], ANSWER)
            texts = {number: text for number, (_, text) in enumerate(edited) if text is not None}
            texts[ANSWER] = original or ""
            try:
                asked = self._render(guarded, [message for message, _ in edited], row, True)
                told = self._render(guarded, [*(message for message, _ in edited), target], row, False)
            except InstilError:
                continue
            texts = {number: guarded.restore(text) for number, text in texts.items()}
            if not told.startswith(asked):
                told = self._through_channel(guarded, index, [message for message, _ in edited], target, asked)
            for read in (str, self._read):
                asked, told = read(asked), read(told)
                spans = walk(prompt, asked, texts)
                lead = self._answer_lead(answer, asked, told, texts, self.maker.endings.of(row.messages[index]))
                if spans is not None and lead is not None:
                    self.counts.by_edit += 1
                    return [], (prompt, spans, lead)
        return self._plainly(guarded, index, example, prompt, answer), None

    def _by_shape(
        self, row: Conversation, before: Sequence[Message], message: Message, prompt: str, answer: str
    ) -> tuple[list[Span], int] | None:
        """The edit test with every content replaced by a mark, which then is the same for all rows of the shape."""
        shape = self.shapes.of(row, before, message)
        if shape is None or not shape.told.startswith(shape.asked):
            return None
        texts = {number: each.content for number, each in enumerate(before)}
        texts[ANSWER] = message.content
        spans = walk(prompt, shape.asked, texts, shape.forms)
        if spans is None:
            return None
        lead = self._answer_lead(answer, shape.asked, shape.told, texts, self.maker.endings.of(message), shape.forms)
        return None if lead is None else (spans, lead)

    def _blocks(self, guarded: Guarded, index: int, example: Example) -> None:
        """Compare a row's last answer with what the template's author marks as generated. It is his opinion, counted and
        shown; where it differs (no terminator in it, the header in it) what the server sends decides."""
        row = guarded.row
        messages = row.messages[: index + 1]
        spans = generation_spans(self.template, messages, row.tools, row.template_args)
        if not spans:
            return
        text = self.template.render(messages, tools=row.tools, args=row.template_args, generation_prompt=False)
        block, answer = guarded.restore(text[spans[-1][0] : spans[-1][1]]), self._texts(example)[1]
        if block.rstrip() == answer.rstrip():
            self.counts.blocks_agree += 1
        else:
            self.counts.blocks_differ.append(f"{_place(example)}: block {block[-40:]!r}, answer {answer[-40:]!r}")

    def _contexts(self, row: Conversation, index: int, example: Example) -> Iterator[Sequence[Message]]:
        """The messages before a turn; where old turns were cut, each way of leaving some out."""
        before = row.messages[:index]
        if not example.cut_tokens:
            yield before
            return
        head = next((i for i, message in enumerate(before) if message.role not in ("system", "developer")), 0)
        for start in [i for i in range(head + 1, len(before)) if before[i].role == "user"]:
            yield [*before[:head], *before[start:]]

    def _answer_lead(
        self,
        answer: str,
        asked: str,
        told: str,
        texts: Mapping[int, str],
        ending: Terminator,
        forms: Mapping[int, Callable[[str], str]] | None = None,
    ) -> int | None:
        """How many characters the answer has before its content; None where it is not what the edit test finds."""
        cut = told.find(ending.text, told.rfind(mark(ANSWER)))
        through = told[: cut + len(ending.text)] if cut >= 0 else told + ending.text
        if not told.startswith(asked) or (cut < 0 and not ending.appended):
            return None
        spans = walk(answer, through[len(asked) :], texts, forms)
        return None if not spans else spans[-1][1]

    def _through_channel(
        self, guarded: Guarded, index: int, before: Sequence[Message], target: Message, asked: str
    ) -> str:
        """The edited turn where the stored one does not go on from the prompt: with what closes the prompt's channel."""
        row = guarded.row
        messages = (*row.messages[:index], target, *row.messages[index + 1 :])
        try:
            turn = self.maker.slow(replace(row, messages=messages), index, before)
        except InstilError:
            return ""
        return asked + guarded.restore(turn.answer)

    def _inside(
        self,
        example: Example,
        whole: Int32,
        index: int,
        shared: tuple[str, list[Span], int],
        guarded: Guarded,
    ) -> bool:
        """Whether an earlier answer of the row is a part of the last prompt, at the place that the edit test found."""
        prompt, spans, lead = shared
        span = next(((first, last) for number, first, last in spans if number == index), None)
        message = guarded.row.messages[index]
        begins, ends = len(example.prompt_tokens), len(example.prompt_tokens) + len(example.answer_tokens)
        if span is None or message.fields or example.cut_tokens or ends > len(whole):
            return False
        if not np.array_equal(whole[:begins], example.prompt_tokens):
            return False
        if not np.array_equal(whole[begins:ends], example.answer_tokens):
            return False
        ending = self.maker.endings.of(message)
        end = ending.lead + ending.text
        if not prompt.startswith(end, span[1]):
            return False
        texts = prompt[: span[0] - lead], prompt[: span[1] + len(end)]
        return self._ends_at(whole, (begins, ends)) == tuple(
            len(text) if text.isascii() else len(text.encode()) for text in texts
        )

    def _ends_at(self, whole: Int32, counts: tuple[int, int]) -> tuple[int, ...]:
        """The bytes that the first so many tokens spell."""
        if self._measured is None or self._measured[0] is not whole:
            self._measured = whole, self.tokenizer.token_ends(whole)
        ends = self._measured[1]
        if ends is None:
            return tuple(len(self._spelt(whole[:count]).encode()) for count in counts)
        return tuple(int(ends[count - 1]) for count in counts)

    def _served(self, guarded: Guarded, index: int, example: Example) -> bool:
        """Whether a part of the rendering is what the server sends: a template may write older turns differently."""
        try:
            return self._render(guarded, guarded.row.messages[:index], guarded.row, True) == self._texts(example)[0]
        except InstilError:
            return False

    def _plainly(self, guarded: Guarded, index: int, example: Example, prompt: str, answer: str) -> list[Fault]:
        """Where the edit test does not apply (the template looks into the content): the definition, rendered again."""
        row = guarded.row
        for before in self._contexts(row, index, example):
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
        if self._spelt(self.tokenizer.encode(text)) != self._spelt(tokens):
            return False
        self.counts.lossy.append(text[:40]) if len(self.counts.lossy) < 20 else None
        return True

    def _common_faults(self, row: Conversation, example: Example) -> Iterator[Fault]:
        """What no rendering is needed for."""
        tokenizer, prompt, answer = self.tokenizer, example.prompt_tokens, example.answer_tokens
        if self.bos is not None and prompt[:2].tolist() == [self.bos, self.bos]:
            yield "double-bos", f"the prompt begins with {tokenizer.special['bos_token']!r} twice"
        if not self._plainly_weighted(row, example):
            yield from self._weight_faults(row, example)
        if row.pair is not None:
            return
        ending = self.maker.endings.of(row.messages[self._index(row, example)])
        ended = (
            self._spelt(answer).endswith(ending.text)
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

    def _plainly_weighted(self, row: Conversation, example: Example) -> bool:
        """The usual case, quickly: every token counts what row and message say, and no policy makes a difference."""
        weights, kinds = example.weights, example.kinds
        if not self._plain or row.pair is not None or not 0 < len(weights) == len(kinds) == len(example.answer_tokens):
            return False
        factor = np.float32(row.messages[self._index(row, example)].weight * row.weight)
        return bool(kinds[-1] == TERMINATOR and weights.min() == factor == weights.max() and 0 < factor < np.inf)

    def _weight_faults(self, row: Conversation, example: Example) -> Iterator[Fault]:
        """Whether each token counts what the row, the message and the policy for its kind say."""
        weights = example.weights
        if len(weights) != len(example.answer_tokens):
            yield "weights-length", f"{len(weights)} weights for {len(example.answer_tokens)} answer tokens"
        if len(weights) and not (weights.min() >= 0 and weights.max() < np.inf):  # false for NaN too
            yield "weights-value", "a weight is negative or not finite"
        if not len(weights) or not weights[-1] > 0:
            yield (
                "weights-terminator",
                "the token that ends the answer has no weight: the model would not learn to stop",
            )
        if row.pair is not None or len(weights) != len(example.answer_tokens) or not len(weights):
            return
        if len(example.kinds) != len(weights) or example.kinds[-1] != TERMINATOR:
            yield "weights-kinds", "the kinds of the answer's tokens are not those of its weights"
            return
        policy, factor = self.options.targets, row.messages[self._index(row, example)].weight * row.weight
        expected = policy.of_kinds()[example.kinds].astype(np.float64)
        if policy.per == "token":
            expected *= factor
        elif policy.turns != "everything":  # there the prompt's tokens have a share too
            expected *= factor / expected.sum()
        else:
            expected *= float(weights[-1]) / expected[-1]
        if not np.allclose(weights, expected, rtol=1e-4, atol=1e-9):
            yield "weights-policy", "the weights are not those of the row, the message and the kinds of tokens"

    def _token_faults(self, guarded: Guarded, example: Example, opening: bool) -> Iterator[Fault]:
        """Whether the text is in the tokens that the server makes of it, and typed text in no control token."""
        if guarded.typed:
            yield from self._typed_faults(guarded, example)
            return
        if _sampled(example, opening):
            self.counts.by_library += 1
            yield from self._library_faults(guarded, example)

    def _library_faults(self, guarded: Guarded, example: Example) -> Iterator[Fault]:
        """Whether the library gives these ids for the text that they spell, or, as some tokenizers add a space to a
        text which decoding keeps, for the text that was rendered."""
        faults = list(self._ids_faults(example, *self._texts(example)))
        row, index = guarded.row, self._index(guarded.row, example)
        for before in self._contexts(row, index, example) if faults else ():
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
        index = self._index(row, example)
        known = set(self.tokenizer.control_tokens.values())
        found = [n for n in (*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()) if n in known]
        for before in self._contexts(row, index, example):
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

    def _index(self, row: Conversation, example: Example) -> int:
        answered = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
        return answered[example.turn - row.first_turn]

    def _given_faults(self, row: Conversation, example: Example) -> Iterator[Fault]:
        assert row.pair is not None
        if example.prompt_tokens.tolist() != list(row.pair.prompt_tokens):
            yield "prompt-differs", "the prompt is not the row's own"
        if example.answer_tokens.tolist() != list(row.pair.answer_tokens):
            yield "answer-differs", "the answer is not the row's own"

    def _render(self, guarded: Guarded, messages: Sequence[Message], row: Conversation, ask: bool) -> str:
        text = self.template.render(messages, tools=row.tools, args=row.template_args, generation_prompt=ask)
        return guarded.restore(text)

    def _texts(self, example: Example) -> tuple[str, str]:
        """The text of prompt and answer; of the answer as it follows the prompt, where decoders treat a start apart."""
        if id(example) in self._ahead:
            return self._ahead[id(example)]
        prompt = self._spelt(example.prompt_tokens)
        if self.tokenizer.token_ends(example.prompt_tokens[:1]) is not None:
            return prompt, self._spelt(example.answer_tokens)
        both = self._spelt(np.concatenate([example.prompt_tokens, example.answer_tokens]))
        return prompt, both[len(prompt) :] if both.startswith(prompt) else self._spelt(example.answer_tokens)

    def _read(self, text: str) -> str:
        """A text as its tokens spell it: some tokenizers add a space where a text begins."""
        return self._spelt(self.tokenizer.encode(text))

    def _spelt(self, tokens: Int32 | Sequence[int]) -> str:
        """The text that tokens stand for, by the bytes of each where they are known."""
        spelt = self.tokenizer.token_bytes(tokens)
        return self.tokenizer.decode(list(tokens)) if spelt is None else spelt.decode("utf-8", "replace")


def _sampled(example: Example, opening: bool) -> bool:
    """Whether an example is one of those that are looked at more closely; the choice depends on its origin alone."""
    file, _, line = example.origin.rpartition(":")
    first = opening and line.isdecimal() and int(line) <= LIBRARY_FIRST
    return first or zlib.crc32(f"{file}:{line} {example.turn}".encode()) % LIBRARY_EVERY == 0


def _edited(message: Message, number: int) -> tuple[Message, str | None]:
    """The message with its answer replaced by a mark, and what was replaced; reasoning before the answer stays.

    A message that only calls tools has the name of its first function replaced.
    """
    if message.role != "assistant":
        return message, None
    if message.content.strip():
        thought = THOUGHT.match(message.content)
        start = thought.end() if thought else 0
        if message.content[start:].strip():
            return Message(message.role, message.content[:start] + mark(number), message.fields), message.content[
                start:
            ]
    calls = message.fields.get("tool_calls")
    if isinstance(calls, (list, tuple)) and calls and isinstance(calls[0], Mapping):
        function = calls[0].get("function", {})
        changed = {**calls[0], "function": {**function, "name": mark(number)}}
        fields = {**message.fields, "tool_calls": [changed, *calls[1:]]}
        return Message(message.role, message.content, fields), str(function.get("name"))
    return message, None


def _parts(found: str, expected: str) -> str:
    """Where two texts part."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (left, right) in pairs if left != right), min(len(found), len(expected)))
    return f"character {at} on, {found[at : at + 24]!r} instead of {expected[at : at + 24]!r}"


def _difference(found: list[int], expected: list[int]) -> str:
    """Where two token lists part."""
    pairs = enumerate(zip(found, expected, strict=False))
    at = next((i for i, (left, right) in pairs if left != right), min(len(found), len(expected)))
    return f"{len(found)} tokens instead of {len(expected)}, different from token {at} on"


def _place(example: Example) -> str:
    return f"{example.origin}: turn {example.turn}"
