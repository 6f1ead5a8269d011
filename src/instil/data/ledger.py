"""What became of every row: one entry each, written whole or not at all, and counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import orjson

from instil.errors import DataError, MachineError
from instil.files import write_atomically
from instil.types import Conversation, Fate

Side = Literal["train", "heldout"]


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """The fate of one row: used; split = some of its examples were dropped; cut = old turns left a prompt; dropped.

    examples, prompt_tokens and answer_tokens are what it contributes; cut_tokens what left its prompts; dropped_tokens
    those of its dropped examples. rule and reason say why something was dropped or cut. digest: of what the row holds, ""
    where it could not be read.
    """

    origin: str
    fate: Fate
    side: Side
    examples: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cut_tokens: int = 0
    dropped_tokens: int = 0
    rule: str = ""
    reason: str = ""
    digest: str = ""


@dataclass(frozen=True, slots=True)
class LedgerCounts:
    """Sums over a ledger: rows = used_rows + dropped_rows = train_rows + heldout_rows. used_rows: all but dropped ones.

    dropped_by_rule sums to dropped_rows; its rules are in the order of their first row.
    """

    rows: int
    used_rows: int
    dropped_rows: int
    train_rows: int
    heldout_rows: int
    examples: int
    prompt_tokens: int
    answer_tokens: int
    cut_tokens: int
    dropped_tokens: int
    dropped_by_rule: Mapping[str, int]


def in_source_order(entries: Iterable[LedgerEntry]) -> list[LedgerEntry]:
    """Entries by file (in order of first appearance), then by line."""
    entries = list(entries)
    places = [_place(entry.origin) for entry in entries]
    file_rank = {file: rank for rank, file in enumerate(dict.fromkeys(file for file, _ in places))}
    order = sorted(range(len(entries)), key=lambda i: (file_rank[places[i][0]], places[i][1]))
    return [entries[i] for i in order]


def write_ledger(path: str | Path, entries: Iterable[LedgerEntry]) -> None:
    """One JSON line per entry, in source order; the file appears complete or not at all.

    Raises MachineError when it cannot be written; an older ledger at `path` is then untouched.
    """
    lines = (orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE) for entry in in_source_order(entries))
    try:
        write_atomically(Path(path), b"".join(lines))
    except OSError as error:
        what = f"the ledger cannot be written ({error.strerror or error})"
        raise MachineError.at(path, what, "free space or fix the permissions, then run again", "unwritable") from None


def row_digests(conversations: Iterable[Conversation]) -> dict[str, str]:
    """By origin: 16 hex digits of what each row holds. Two rows with the same digest are the same row."""
    found: dict[str, str] = {}
    for row in conversations:
        content = (
            found.get(row.origin, ""),
            row.messages,
            row.tools,
            row.task,
            row.weight,
            row.template_args,
            row.pair,
        )
        raw = orjson.dumps(content, default=dict, option=orjson.OPT_NON_STR_KEYS)
        found[row.origin] = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return found


def read_ledger(path: str | Path) -> list[LedgerEntry]:
    """The entries of a ledger file. Raises DataError when it is not one."""
    names = {field.name for field in fields(LedgerEntry)}
    entries = []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError.at(path, f"no ledger ({error.strerror})", "check the run folder", "ledger") from None
    for number, line in enumerate(lines, start=1):
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            values = None
        if (
            not isinstance(values, dict) or not names - {"digest"} <= values.keys() <= names
        ):  # older ones have no digest
            raise DataError.at(f"{path}:{number}", "not a ledger entry", "run again to write the ledger anew", "ledger")
        entries.append(LedgerEntry(**values))
    return entries


def ledger_counts(entries: Sequence[LedgerEntry]) -> LedgerCounts:
    """The sums that must balance."""
    fates = Counter(entry.fate for entry in entries)
    sides = Counter(entry.side for entry in entries)
    return LedgerCounts(
        rows=len(entries),
        used_rows=len(entries) - fates["dropped"],
        dropped_rows=fates["dropped"],
        train_rows=sides["train"],
        heldout_rows=sides["heldout"],
        examples=sum(entry.examples for entry in entries),
        prompt_tokens=sum(entry.prompt_tokens for entry in entries),
        answer_tokens=sum(entry.answer_tokens for entry in entries),
        cut_tokens=sum(entry.cut_tokens for entry in entries),
        dropped_tokens=sum(entry.dropped_tokens for entry in entries),
        dropped_by_rule=dict(Counter(entry.rule for entry in entries if entry.fate == "dropped")),
    )


def _place(origin: str) -> tuple[str, int]:
    file, _, line = origin.rpartition(":")
    return (file, int(line)) if file and line.isascii() and line.isdigit() else (origin, 0)
