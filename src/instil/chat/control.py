"""Control tokens typed in a row's own text: found, and kept apart from those that the template writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from instil.chat.tokenizer import Tokenizer
from instil.errors import Problem
from instil.types import Conversation, Message

ControlText = Literal["plain", "reject", "as-served"]

# Stands for a typed token while the template runs: digits pass through trim, case and JSON filters unchanged.
BEFORE, AFTER = "70539182641", "46281935072"
PLACEHOLDER = re.compile(f"{BEFORE}([0-9]{{6}}){AFTER}")


@dataclass(frozen=True, slots=True)
class Guarded:
    """A row whose typed control tokens are placeholders. typed: the tokens, by number; empty as a rule."""

    row: Conversation
    typed: tuple[str, ...] = ()

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """A rendered text in pieces, with whether each was typed in the row and so must not become a control token."""
        parts = PLACEHOLDER.split(text)
        return [(self.typed[int(part)], True) if at % 2 else (part, False) for at, part in enumerate(parts) if part]

    def restore(self, text: str) -> str:
        """A rendered text with the typed tokens back in it."""
        return PLACEHOLDER.sub(lambda found: self.typed[int(found.group(1))], text) if self.typed else text


def guard(row: Conversation, tokenizer: Tokenizer, policy: ControlText) -> tuple[Guarded, list[Problem]]:
    """The row, safe to render. policy plain: typed tokens stay text; reject: each is a problem; as-served: left alone."""
    found = list(_typed(row, tokenizer)) if policy != "as-served" else []
    if not found:
        return Guarded(row), []
    if policy == "reject":
        return Guarded(row), [
            Problem(
                f"{row.origin}: {where}", f"contains the control token {token!r} as text",
                "remove it, or allow it as plain text with chat.control_text=plain", "control-token",
            )
            for where, token in found
        ]  # fmt: skip
    if any(BEFORE in text for _, text in _texts(row)):
        what = f"contains both control tokens and the digits {BEFORE}, which stand for them while the template runs"
        return Guarded(row), [Problem(row.origin, what, "remove the control tokens", "control-token")]
    typed: list[str] = []

    def stand_in(text: str) -> str:
        def number(match: re.Match[str]) -> str:
            typed.append(match.group())
            return f"{BEFORE}{len(typed) - 1:06d}{AFTER}"

        return tokenizer.control_pattern.sub(number, text)

    messages = tuple(
        Message(m.role, stand_in(m.content), {str(k): _changed(v, stand_in) for k, v in m.fields.items()})
        for m in row.messages
    )
    tools = tuple(_changed(tool, stand_in) for tool in row.tools)
    return Guarded(replace(row, messages=messages, tools=tools), tuple(typed)), []


def _typed(row: Conversation, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """Where the row types which control token."""
    begins = _begins(tokenizer).search
    for message in row.messages:
        if message.fields or begins(message.content):
            break
    else:
        if not row.tools:
            return
    for where, text in _texts(row):
        if begins(text):
            for match in tokenizer.control_pattern.finditer(text):
                yield where, match.group()


@lru_cache(maxsize=8)
def _begins(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What control tokens begin with: a text without any of it needs no closer look."""
    return re.compile("|".join(sorted({re.escape(token[:2]) for token in tokenizer.control_tokens if token})) or "(?!)")


def _texts(row: Conversation) -> Iterator[tuple[str, str]]:
    """Every string that the row puts before the template, with its place."""
    for index, message in enumerate(row.messages):
        yield f"messages[{index}].content", message.content
        for key, value in message.fields.items():
            yield from ((f"messages[{index}].{key}", text) for text in _strings(value))
    for tool in row.tools:
        yield from (("tools", text) for text in _strings(tool))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_changed(item, change) for item in value]
    return value
