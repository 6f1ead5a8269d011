"""Several files in, one list of conversations out; and the split into training and held-out rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instil.data.duplicates import duplicates, repeated
from instil.data.ledger import LedgerEntry, Side
from instil.data.locate import DataFile, locate
from instil.data.notes import SHOWN, some
from instil.data.rows import parse_rows
from instil.data.sources import file_digest, scan_rows
from instil.data.spec import SourceSpec, as_spec, spec_problems
from instil.errors import DataError, Problem, UsageError
from instil.types import Conversation


@dataclass(frozen=True, slots=True)
class Loaded:
    """The usable rows of all sources in order, and what to tell about them.

    dropped: the rows that a rule dropped. recognised: a sentence for each file. digests: sha256 by the file's name in
    origins. notes: sentences that the user should hear: duplicates, blank lines, files that were not read, ...
    """

    conversations: tuple[Conversation, ...]
    dropped: tuple[LedgerEntry, ...]
    recognised: tuple[str, ...]
    digests: Mapping[str, str]
    notes: tuple[str, ...] = ()


def load_conversations(sources: Sequence[str | SourceSpec], side: Side = "train", *, strict: bool = False) -> Loaded:
    """Read every file of every source to its end.

    side goes into dropped entries. strict: rows without an answer are problems, not dropped.
    Raises UsageError for a source that cannot be meant, DataError with the problems of all files.
    """
    specs = [as_spec(source) for source in sources]
    if wrong := [problem for spec in specs for problem in spec_problems(spec)]:
        raise UsageError(*wrong)
    conversations: list[Conversation] = []
    dropped: list[LedgerEntry] = []
    recognised, digests = [], {}
    files, notes, problems = _located(specs)
    problems += _given_twice(file for _, file in files)
    for number, file in files:
        source = scan_rows(file.path, file.name)
        parsed = parse_rows(source, side, specs[number].mapping, strict=strict, number=number)
        conversations += parsed.conversations
        dropped += parsed.dropped
        problems += [*source.problems, *parsed.problems]
        recognised.append(source.sentence(parsed.format_name))
        notes += [*source.notes(), *parsed.notes]
        if not source.problems:
            digests[file.name] = file_digest(file.path)
    if not conversations and not problems:
        reasons = ", ".join(f"{rule} {count:,}" for rule, count in Counter(entry.rule for entry in dropped).items())
        what = f"0 of {len(dropped):,} rows left ({reasons or 'no files given'})"
        place = ", ".join(spec.path for spec in specs) or "data"
        problems.append(Problem(place, what, "give rows with answers", "no_rows"))
    if problems:
        raise DataError(*problems)
    notes += _said_twice(conversations)
    return Loaded(tuple(conversations), tuple(dropped), tuple(recognised), digests, tuple(notes))


def source_digests(sources: Sequence[str | SourceSpec]) -> dict[str, str]:
    """sha256 of every file of the sources, by its name in origins; raises as load_conversations does."""
    files, _, problems = _located([as_spec(source) for source in sources])
    if problems:
        raise DataError(*problems)
    return {file.name: file_digest(file.path) for _, file in files}


def split_heldout(
    conversations: Sequence[Conversation], share: float, most: int
) -> tuple[list[Conversation], list[Conversation]]:
    """(train, held out), each in source order: at most min(floor(share * n), most) rows are held out.

    Rows with the same prompt (the messages before the first answer) stay together, so no held-out prompt was trained
    on; so do the conversations of one row. Prompts are taken in the order of their sha256: the choice depends on the
    rows, not on their order or a seed.
    """
    target = min(math.floor(share * len(conversations) + 1e-9), most)
    chosen: set[int] = set()
    for group in _groups(conversations):
        if len(chosen) + len(group) <= target:
            chosen.update(group)
    train = [each for i, each in enumerate(conversations) if i not in chosen]
    return train, [each for i, each in enumerate(conversations) if i in chosen]


def leaks(train: Sequence[Conversation], heldout: Sequence[Conversation]) -> list[Problem]:
    """Held-out rows that stand in the training rows as well, with all their messages and tools."""
    return [
        Problem(origin, f"this held-out row is also trained on ({trained})", "remove one of the two", "leak")
        for origin, trained in repeated(train, heldout)
    ]


def _located(specs: Sequence[SourceSpec]) -> tuple[list[tuple[int, DataFile]], list[str], list[Problem]]:
    """The files of all sources, each with the number of its source; what to tell; what cannot be found."""
    files: list[tuple[int, DataFile]] = []
    notes: list[str] = []
    problems: list[Problem] = []
    for number, spec in enumerate(specs):
        try:
            found = locate(spec.path)
        except DataError as error:
            problems += error.problems
        else:
            files += [(number, file) for file in found.files]
            notes += found.notes
    return files, notes, problems


def _given_twice(files: Iterable[DataFile]) -> list[Problem]:
    """Two rows with one origin could not be told apart in the ledger."""
    names: dict[str, list[str]] = {}
    for file in files:
        if "\0" not in file.path:
            names.setdefault(os.path.realpath(file.path), []).append(file.name)
    twice = dict.fromkeys(name for same in names.values() if len(same) > 1 for name in same)
    return [Problem(name, "the file is given twice", "name it once", "given_twice") for name in twice]


def _said_twice(conversations: Sequence[Conversation]) -> list[str]:
    """The note about duplicates."""
    pairs = duplicates(conversations)
    if not pairs:
        return []
    shown = some([f"{origin} = {first}" for origin, first in pairs[:SHOWN]], len(pairs))
    return [f"{len(pairs):,} of {len(conversations):,} conversations repeat an earlier one ({shown})"]


def _groups(conversations: Sequence[Conversation]) -> list[list[int]]:
    """What must stay on one side: the conversations with one prompt, and those of one row.

    In the order of the sha256 of their prompts (of several prompts, the smallest).
    """
    prompts = [_digest(_first_prompt(each)) for each in conversations]
    above: dict[str, str] = {}  # from a prompt to a smaller one of the same group

    def smallest(prompt: str) -> str:
        while prompt in above:
            prompt = above[prompt]
        return prompt

    of_row: dict[str, str] = {}
    for each, prompt in zip(conversations, prompts, strict=True):
        one, other = smallest(of_row.setdefault(each.origin, prompt)), smallest(prompt)
        if one != other:
            above[max(one, other)] = min(one, other)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(smallest(prompt), []).append(i)
    return [groups[prompt] for prompt in sorted(groups)]


def _first_prompt(conversation: Conversation) -> list[Any]:
    if conversation.pair is not None:
        return ["tokens", *conversation.pair.prompt_tokens]
    prompt: list[Any] = []
    for message in conversation.messages:
        if message.role == "assistant":
            break
        prompt.append([message.role, message.content])
    return prompt


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
