"""What ends an answer: found in what the template writes, confirmed or replaced by the model's generation_config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from instil.chat.template import PROBE, Template
from instil.chat.tokenizer import Tokenizer
from instil.errors import TemplateError
from instil.types import Message

ANSWER = "instil looks for this answer"
CALLED, VALUE, OTHER_VALUE = "instil_calls_this", "instil passes this", "instil passes that"
RESULT = "instil returns this"
SAY_IT = "say with chat.terminator=TEXT what the server stops at"
ATOM = re.compile(r"<[^<>]*>|\s+|[^<\s]+|<")  # a tag counts as a whole
TAG = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]")  # what looks like a control token to people

IN_TURN = "the template writes it at the end of the turn"
IN_HISTORY = "the template writes it once another message follows"
NEXT_HEADER = "the header of the next message, where servers of this template stop"
IN_CONFIG = "generation_config, as the template writes no end"
BY_USER = "chat.terminator"


@dataclass(frozen=True, slots=True)
class Terminator:
    """The text that ends an answer. token_ids: one control token as a rule; several where the tokenizer has none for it.

    lead: what the template writes between content and terminator. source: where it was found. appended: the rendering
    of a conversation that ends with the answer lacks it, so it is put after the answer.
    """

    text: str
    token_ids: tuple[int, ...]
    lead: str = ""
    source: str = IN_TURN
    appended: bool = False

    @property
    def token_id(self) -> int | None:
        """The id that a server stops at; None where the terminator is not one token."""
        return self.token_ids[0] if len(self.token_ids) == 1 else None

    def as_dict(self) -> dict[str, Any]:
        """For the certificate."""
        return {"text": self.text, "id": self.token_id, "ids": list(self.token_ids), "source": self.source}


class Endings:
    """How turns of this template end for this tokenizer: after text, and after tool calls.

    asked: what the user says the server stops at. stops: the texts of generation_config's eos tokens.
    Raises TemplateError when no end is found, naming what to do.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, asked: str | None = None, stops: Sequence[str] = ()):
        self._template, self._tokenizer, self._stops = template, tokenizer, tuple(stops)
        self._opening = _opening(template)
        self._asked = asked
        self.plain = self._after_text()
        self._after_call: Terminator | None = None

    def of(self, message: Message) -> Terminator:
        """The terminator of an assistant message."""
        return self.look_at_calls() if message.fields.get("tool_calls") else self.plain

    def look_at_calls(self) -> Terminator:
        """The terminator after tool calls; to be asked before the first rendering with calls (see null_content)."""
        if self._after_call is None:
            self._after_call = self._after_calls()
        return self._after_call

    @property
    def found(self) -> tuple[Terminator, ...]:
        """Every terminator met so far."""
        both = [self.plain] if self._after_call is None else [self.plain, self._after_call]
        return tuple({ending.text: ending for ending in both}.values())

    def _after_text(self) -> Terminator:
        answered = [*self._opening, Message("assistant", ANSWER)]
        whole = self._template.render(answered, generation_prompt=False)
        tail = _after(whole, ANSWER, self._template.place)
        follows = self._following([*answered, Message("user", PROBE[::-1])], ANSWER, PROBE[::-1])
        if self._asked is not None:
            before = tail.partition(self._asked)
            lead, inside = (before[0], bool(before[1])) if before[1] else (tail if not tail.strip() else "", False)
            return self._made(self._asked, lead, BY_USER, appended=not inside)
        mark = self._mark(tail)
        if mark is not None:
            return self._made(mark.group(), tail[: mark.start()], IN_TURN)
        if tail.strip() or (tail and follows.startswith(tail) and not self._mark(follows)):
            return self._made(tail.rstrip() or tail, "", IN_TURN)
        header = _common_suffix(follows, self._before_question())
        own = follows.removesuffix(header)
        mark, source = self._mark(own), IN_HISTORY
        if mark is None:
            own, mark, source = follows, self._mark(follows), NEXT_HEADER
        found = None if mark is None else self._made(mark.group(), own[: mark.start()], source, appended=True)
        return self._decided(found)

    def _decided(self, found: Terminator | None) -> Terminator:
        """The last turn's rendering lacks its end: generation_config decides, if there is one."""
        if not self._stops:
            if found is None:
                what = "the template writes nothing after an answer that ends it, and there is no generation_config"
                raise TemplateError.at(self._template.place, what, SAY_IT, "no-terminator")
            return found
        if found is not None and found.text in self._stops:
            return replace(found, source=f"{found.source}; generation_config says so too")
        eos = self._tokenizer.special.get("eos_token")
        chosen = self._stops[0] if len(self._stops) == 1 else eos if eos in self._stops else None
        if chosen is None:
            what = (
                f"the template writes no end of a turn, and generation_config knows several: {', '.join(self._stops)}"
            )
            raise TemplateError.at(self._template.place, what, SAY_IT, "no-terminator")
        return self._made(chosen, "", IN_CONFIG, appended=True)

    def _after_calls(self) -> Terminator:
        """As text turns end, unless a rendered call shows another end."""
        rests = self._call_rests()
        if self._asked is not None or rests[0] is None:
            return self.plain
        tail, two = rests[0].rpartition(VALUE)[2], rests[1] or ""  # some templates write one call only
        if not self.plain.appended and self.plain.text in tail:
            return self.plain
        marks = list(self._marks(tail))
        if marks and not tail[marks[-1].end() :].strip() and two.count(marks[-1].group()) <= 1:
            return self._made(marks[-1].group(), "", IN_TURN)
        call = _call_message((VALUE,))
        try:
            follows = self._following(
                [*self._opening, call, Message("tool", RESULT, _result_fields(0))], tail, RESULT, tools=True
            )
        except TemplateError:
            return self.plain
        mark = self._mark(follows)
        if mark is None:
            return self.plain
        return self._made(mark.group(), follows[: mark.start()], NEXT_HEADER, appended=True)

    def _call_rests(self) -> list[str | None]:
        """One call and two calls as text; with null in place of an empty content where only that writes them."""
        plain = self._template.render([*self._opening, Message("assistant", ANSWER)], generation_prompt=False)
        usual = max(1, plain.rpartition(PROBE)[2].count(self.plain.text))  # the question may end with it too
        for null in (False, True):
            self._template.null_content = null
            rests = [self._call_rest(values) for values in ((VALUE,), (VALUE, OTHER_VALUE))]
            if rests[0] is not None and rests[0].count(self.plain.text) <= usual:
                return rests
        self._template.null_content = False
        return [self._call_rest(values) for values in ((VALUE,), (VALUE, OTHER_VALUE))]

    def _call_rest(self, values: Sequence[str]) -> str | None:
        """What the template makes of a turn with these calls, after the question; None where it cannot."""
        try:
            whole = self._template.render(
                [*self._opening, _call_message(values)], tools=[_SCHEMA], generation_prompt=False
            )
        except TemplateError:
            return None
        rest = whole.rpartition(PROBE)[2]
        return rest if values[-1] in rest else None

    def _following(self, messages: Sequence[Message], left: str, right: str, tools: bool = False) -> str:
        """What the template writes between `left` and `right`."""
        text = self._template.render(messages, tools=[_SCHEMA] if tools else (), generation_prompt=False)
        return text.rpartition(right)[0].rpartition(left)[2]

    def _before_question(self) -> str:
        text = self._template.render(self._opening, generation_prompt=False)
        return text.rpartition(PROBE)[0]

    def _mark(self, text: str) -> re.Match[str] | None:
        return next(self._marks(text), None)

    def _marks(self, text: str) -> Iterator[re.Match[str]]:
        """The control tokens in a text; where it has none, what looks like one."""
        found = list(self._tokenizer.control_pattern.finditer(text))
        return iter(found or TAG.finditer(text))

    def _made(self, text: str, lead: str, source: str, appended: bool = False) -> Terminator:
        control = self._tokenizer.control_tokens.get(text)
        ids = (control,) if control is not None else tuple(self._tokenizer.encode(text))
        return Terminator(text, ids, lead, source, appended)


_SCHEMA: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": CALLED,
        "description": "A probe.",
        "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": "A text."}},
                       "required": ["what"]},
    },
}  # fmt: skip


def call_id(number: int) -> str:
    """The id of a call that the row left without one: nine letters and digits, which is what Mistral's servers ask."""
    return f"call{number:05d}"


def _call_message(values: Sequence[str]) -> Message:
    calls = [
        {"type": "function", "id": call_id(n), "function": {"name": CALLED, "arguments": {"what": value}}}
        for n, value in enumerate(values)
    ]
    return Message("assistant", "", {"tool_calls": calls})


def _result_fields(number: int) -> dict[str, Any]:
    return {"tool_call_id": call_id(number), "name": CALLED}


def _opening(template: Template) -> list[Message]:
    """The least that the template takes before an answer."""
    question = Message("user", PROBE)
    try:
        template.render([question], generation_prompt=True)
    except TemplateError:  # some templates want a system message first
        return [Message("system", "instil says nothing"), question]
    return [question]


def _after(whole: str, answer: str, place: str) -> str:
    """What follows the answer, which must be there once."""
    _, found, tail = whole.partition(answer)
    if not found or answer in tail:
        what = f"the template writes the assistant's content {whole.count(answer)} times into its turn, not once"
        raise TemplateError.at(place, what, "use --template FILE with one that writes it", "content-lost")
    return tail


def _common_suffix(left: str, right: str) -> str:
    """The end that both texts have, in whole tags."""
    n = 0
    for a, b in zip(reversed(ATOM.findall(left)), reversed(ATOM.findall(right)), strict=False):
        if a != b:
            break
        n += len(a)
    return left[len(left) - n :]
