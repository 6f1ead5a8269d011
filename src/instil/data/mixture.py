"""Several files in, one list of conversations out; and the split into training and held-out rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instil.data.formats import parse_rows
from instil.data.ledger import LedgerEntry, Side
from instil.data.sources import file_digest, scan_rows
from instil.errors import DataError, Problem
from instil.types import Conversation, Message


@dataclass(frozen=True, slots=True)
class Loaded:
    """The usable rows of all files in order, the rows a rule dropped, a sentence and a sha256 for each file."""

    conversations: tuple[Conversation, ...]
    dropped: tuple[LedgerEntry, ...]
    recognised: tuple[str, ...]
    digests: Mapping[str, str]


def load_conversations(paths: Sequence[str], side: Side = "train") -> Loaded:
    """Read every file to its end. Raises DataError with the problems of all of them; side goes into dropped entries."""
    conversations: list[Conversation] = []
    dropped: list[LedgerEntry] = []
    problems = _given_twice(paths)
    recognised, digests = [], {}
    for path in paths:
        source = scan_rows(path)
        parsed = parse_rows(source, side)
        conversations += parsed.conversations
        dropped += parsed.dropped
        problems += [*source.problems, *parsed.problems]
        recognised.append(source.sentence(parsed.format_name))
        if not source.problems:
            digests[str(path)] = file_digest(path)
    if not conversations and not problems:
        reasons = ", ".join(f"{rule} {count:,}" for rule, count in Counter(entry.rule for entry in dropped).items())
        what = f"0 of {len(dropped):,} rows left ({reasons or 'no files given'})"
        problems.append(Problem(", ".join(map(str, paths)) or "data", what, "give rows with answers", "no_rows"))
    if problems:
        raise DataError(*problems)
    return Loaded(tuple(conversations), tuple(dropped), tuple(recognised), digests)


def split_heldout(
    conversations: Sequence[Conversation], share: float, most: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), each in source order: at most min(floor(share * n), most) rows are held out.

    Rows with the same prompt (the messages before the first answer) stay together, so no held-out prompt was trained
    on. Prompts are taken in the order of their sha256: the choice depends on the rows, not on their order or a seed.
    """
    target = min(math.floor(share * len(conversations) + 1e-9), most)
    groups: dict[str, list[int]] = {}
    for i, conversation in enumerate(conversations):
        groups.setdefault(_digest(_first_prompt(conversation)), []).append(i)
    chosen: set[int] = set()
    for key in sorted(groups):
        if len(chosen) + len(groups[key]) <= target:
            chosen.update(groups[key])
    train = [each for i, each in enumerate(conversations) if i not in chosen]
    return train, [each for i, each in enumerate(conversations) if i in chosen]


def leaks(train: Sequence[Conversation], heldout: Sequence[Conversation]) -> list[Problem]:
    """Held-out rows that stand in the training rows as well, with all their messages and tools."""
    trained = {_digest(_whole(each)): each.origin for each in reversed(train)}
    problems = []
    for each in heldout:
        if (origin := trained.get(_digest(_whole(each)))) is not None:
            what = f"this held-out row is also trained on ({origin})"
            problems.append(Problem(each.origin, what, "remove one of the two", "leak"))
    return problems


def _given_twice(paths: Sequence[str]) -> list[Problem]:
    """Two rows with one origin could not be told apart in the ledger."""
    real = Counter(os.path.realpath(path) for path in paths if "\0" not in str(path))
    twice = dict.fromkeys(str(path) for path in paths if real[os.path.realpath(path)] > 1 and "\0" not in str(path))
    return [Problem(path, "the file is given twice", "name it once", "given_twice") for path in twice]


def _first_prompt(conversation: Conversation) -> list[Any]:
    prompt: list[Any] = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        prompt.append([message.role, message.content])
    return prompt


def _whole(conversation: Conversation) -> list[Any]:
    return [[_entry(message) for message in conversation.messages], [dict(tool) for tool in conversation.tools]]


def _entry(message: Message) -> list[Any]:
    return [message.role, message.content, dict(message.fields)]


def _digest(value: Any) -> str:
    # json, not orjson: integers over 64 bits; default=str: dates and bytes from Parquet.
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
