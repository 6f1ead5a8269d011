"""What a template writes around the contents of a conversation, found once for all rows of the same shape."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import orjson

from instil.chat.template import Template
from instil.errors import InstilError
from instil.types import Conversation, Message

MARK = re.compile(r"instil([0-9]{6})edit")
ANSWER = 999_999  # the number of the answer's mark
MOST_SHAPES = 1_000
LOOKED_FOR = re.compile(r"[^\w\s]")  # a constant that a template may look for in contents; names of roles are none

# How templates write a content: as it is, or trimmed. On "\n x \n" each of them gives another text.
FORMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
    str.lstrip,
    str.rstrip,
    str.strip,
)

Span = tuple[int, int, int]  # (number of the mark, first character, one past the last)


@dataclass(frozen=True, slots=True)
class Shape:
    """The rendering of marks in place of contents. asked: with the generation prompt; told: with the answer.

    forms: how the content under each mark is written.
    """

    asked: str
    told: str
    forms: Mapping[int, Callable[[str], str]]


class Shapes:
    """Shapes of one template, by roles, tools and arguments; for rows whose messages are roles and contents only."""

    def __init__(self, template: Template):
        self._template = template
        self._known: dict[object, Shape | None] = {}
        constants = [text.strip() for text in template.constants() if len(text.strip()) > 2 and LOOKED_FOR.search(text)]
        longest = sorted(constants, key=len, reverse=True)
        self._looked_for = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        self._firsts = tuple({text[0] for text in constants})

    def of(self, row: Conversation, before: Sequence[Message], answer: Message) -> Shape | None:
        """The shape of a turn; None where its contents may change what the template writes around them."""
        messages = (*before, answer)
        for message in messages:
            content = message.content
            if (message.fields and message.fields.keys() != {"weight"}) or not content.strip():
                return None
            if any(first in content for first in self._firsts) and self._looked_for.search(content):
                return None
        tools = orjson.dumps(row.tools) if row.tools else b""
        args = orjson.dumps(row.template_args, option=orjson.OPT_SORT_KEYS) if row.template_args else b""
        key = (tuple(message.role for message in messages), tools, args)
        if key not in self._known:
            if len(self._known) >= MOST_SHAPES:
                self._known.clear()
            self._known[key] = self._found(row, messages)
        return self._known[key]

    def _found(self, row: Conversation, messages: Sequence[Message]) -> Shape | None:
        numbers = [*range(len(messages) - 1), ANSWER]
        bare = [Message(m.role, mark(number)) for m, number in zip(messages, numbers, strict=True)]
        padded = [Message(m.role, f"\n {m.content} \n") for m in bare]
        try:
            asked, told, wide = (
                self._template.render(some, tools=row.tools, args=row.template_args, generation_prompt=ask)
                for some, ask in ((bare[:-1], True), (bare, False), (padded, False))
            )
        except InstilError:
            return None
        texts = {number: message.content for number, message in zip(numbers, padded, strict=True)}
        forms: dict[int, Callable[[str], str]] = {}
        return Shape(asked, told, forms) if walk(wide, told, texts, found=forms) is not None else None


def mark(number: int) -> str:
    """A content that no row has."""
    return f"instil{number:06d}edit"


def walk(
    actual: str,
    edited: str,
    texts: Mapping[int, str],
    forms: Mapping[int, Callable[[str], str]] | None = None,
    found: dict[int, Callable[[str], str]] | None = None,
) -> list[Span] | None:
    """Where in `actual` each marked text stands: the pieces of `edited` between the marks must follow one another in
    `actual`, with the texts between them, and nothing else; None where they do not.

    forms: how each text is written; where it is not given, every form is tried, the longest first. found: takes the
    form that fitted.
    """
    pieces = MARK.split(edited)
    at = len(pieces[0])
    if not actual.startswith(pieces[0]):
        return None
    spans = []
    for number, piece in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        for form in FORMS if forms is None else (forms[number],):
            text = form(texts[number])
            if actual.startswith(text, at) and actual.startswith(piece, at + len(text)):
                spans.append((number, at, at + len(text)))
                at += len(text) + len(piece)
                if found is not None:
                    found[number] = form
                break
        else:
            return None
    return spans if at == len(actual) else None
