"""The edit test: with another answer in its place, what moves in the rendering is the answer, the rest the prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from instil.chat.control import Guarded
from instil.chat.endings import Terminator
from instil.chat.readback import Readback
from instil.chat.shapes import ANSWER, Shapes, Span, mark, walk
from instil.chat.template import Template
from instil.chat.turns import TurnMaker
from instil.errors import InstilError
from instil.types import Conversation, Example, Int32, Message

THOUGHT = re.compile(r".*(?:</[a-z]+>|\[/THINK\]|<channel\|>)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Found:
    """What the test found in a good example.

    prompt: its text; spans: where the answers before it stand in the prompt; lead: the characters that the model writes
    before the content.
    """

    prompt: str
    spans: list[Span]
    lead: int


def contexts(row: Conversation, index: int, example: Example) -> Iterator[Sequence[Message]]:
    """The messages before a turn; where old turns were cut, each way of leaving some out."""
    before = row.messages[:index]
    if not example.cut_tokens:
        yield before
        return
    head = next((i for i, message in enumerate(before) if message.role not in ("system", "developer")), 0)
    for start in [i for i in range(head + 1, len(before)) if before[i].role == "user"]:
        yield [*before[:head], *before[start:]]


class EditTest:
    """Renders edited rows and compares; `maker` is used for terminators and where a channel stands between."""

    def __init__(self, template: Template, maker: TurnMaker, readback: Readback):
        self.template, self.maker, self.readback = template, maker, readback
        self.shapes = Shapes(template)

    def turn(self, guarded: Guarded, index: int, example: Example) -> Found | None:
        """What was found in a good example; None where the test finds another, or does not apply."""
        row = guarded.row
        prompt, answer = self.readback.texts(example)
        for before in contexts(row, index, example):
            shaped = None if guarded.typed else self._by_shape(row, before, row.messages[index], prompt, answer)
            if shaped is not None:
                return Found(prompt, *shaped)
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
            for read in (str, self.readback.again):
                asked, told = read(asked), read(told)
                spans = walk(prompt, asked, texts)
                lead = self._answer_lead(answer, asked, told, texts, self.maker.endings.of(row.messages[index]))
                if spans is not None and lead is not None:
                    return Found(prompt, spans, lead)
        return None

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

    def inside(
        self,
        example: Example,
        whole: Int32,
        index: int,
        shared: Found,
        guarded: Guarded,
    ) -> bool:
        """Whether an earlier answer of the row is a part of the last prompt, at the place that the edit test found."""
        prompt, spans, lead = shared.prompt, shared.spans, shared.lead
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
        return self.readback.ends_at(whole, (begins, ends)) == tuple(
            len(text) if text.isascii() else len(text.encode()) for text in texts
        )

    def served(self, guarded: Guarded, index: int, example: Example) -> bool:
        """Whether a part of the rendering is what the server sends: a template may write older turns differently."""
        try:
            return (
                self._render(guarded, guarded.row.messages[:index], guarded.row, True)
                == self.readback.texts(example)[0]
            )
        except InstilError:
            return False

    def _render(self, guarded: Guarded, messages: Sequence[Message], row: Conversation, ask: bool) -> str:
        text = self.template.render(messages, tools=row.tools, args=row.template_args, generation_prompt=ask)
        return guarded.restore(text)


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
