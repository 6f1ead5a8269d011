"""Conversations in, the pairs that are the same out."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence

from instil.types import Conversation


def duplicates(conversations: Sequence[Conversation]) -> list[tuple[str, str]]:
    """(origin, first origin) of every conversation that stands in an earlier row as well, with messages and tools."""
    earlier = _Earlier()
    pairs = ((each.origin, earlier.same(each)) for each in conversations)
    return [(origin, first) for origin, first in pairs if first is not None and first != origin]


def repeated(first: Sequence[Conversation], second: Sequence[Conversation]) -> list[tuple[str, str]]:
    """(origin in `second`, earliest origin in `first`) of every conversation of `second` that `first` has as well."""
    earlier = _Earlier()
    for each in first:
        earlier.same(each)
    pairs = ((each.origin, earlier.same(each, keep=False)) for each in second)
    return [(origin, found) for origin, found in pairs if found is not None]


class _Earlier:
    """The conversations so far: by their texts, and only where two share those, by everything."""

    def __init__(self) -> None:
        self._by_texts: dict[Hashable, Conversation] = {}
        self._by_all: dict[Hashable, str] = {}

    def same(self, conversation: Conversation, keep: bool = True) -> str | None:
        """The origin of the first that is the same. keep: remember this one, if it is new."""
        texts = _texts(conversation)
        first = self._by_texts.setdefault(texts, conversation) if keep else self._by_texts.get(texts)
        if first is None or first is conversation:
            return None
        self._by_all.setdefault((texts, _rest(first)), first.origin)
        key = (texts, _rest(conversation))
        if keep and key not in self._by_all:
            self._by_all[key] = conversation.origin
            return None
        return self._by_all.get(key)


def _texts(conversation: Conversation) -> Hashable:
    """Roles and texts: cheap to compare, and different in almost all rows that differ."""
    if conversation.pair is not None:
        return conversation.pair
    return tuple([part for message in conversation.messages for part in (message.role, message.content)])


def _rest(conversation: Conversation) -> str:
    """All that can be learnt from besides roles and texts. As text, because 1 and True are equal in Python."""
    fields = [(i, dict(message.fields)) for i, message in enumerate(conversation.messages) if message.fields]
    if not (fields or conversation.tools or conversation.template_args):
        return ""
    rest = [fields, conversation.tools, dict(conversation.template_args)]
    return json.dumps(rest, sort_keys=True, default=str)  # default=str: dates and bytes from Parquet
