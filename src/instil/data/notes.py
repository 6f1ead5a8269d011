"""What the user should hear about the rows, gathered over a file: how many, and the first of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from instil.errors import Problem
from instil.types import Conversation

SHOWN = 5  # origins named in a note
CONTROL_SHARE = 0.01  # of the rows; above it, the file is taken for binary data or a broken export
_ROWS_AT_ONCE = 256

# Tab, line feed, vertical tab, form feed and return are white space; ESC begins a terminal's colours, which logs hold.
_CONTROL = bytes([*range(9), *range(0x0E, 0x1B), *range(0x1C, 0x20), 0x7F])
_ESCAPE = b"\x1b"


@dataclass(slots=True)
class Tally:
    """Counts by what was seen. Each text has a {} where its count goes."""

    counts: dict[str, int] = field(default_factory=dict)
    origins: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, origin: str, count: int = 1) -> None:
        """One more row in which `what` was seen `count` times."""
        self.counts[what] = self.counts.get(what, 0) + count
        seen = self.origins.setdefault(what, [])
        if len(seen) < SHOWN and origin not in seen[-1:]:
            seen.append(origin)

    def sentences(self, path: str) -> list[str]:
        """One sentence for each kind, in the order first seen."""
        return [
            f"{path}: {what.format(f'{count:,}')} ({some(self.origins[what], count)})"
            for what, count in self.counts.items()
        ]


def some(names: Sequence[str], count: int) -> str:
    """The first few names, with dots where there are more."""
    return ", ".join([*names[:SHOWN], *(["..."] if count > len(names[:SHOWN]) else [])])


def control_characters(conversations: Sequence[Conversation], tally: Tally) -> list[str]:
    """The origins of the rows with NUL or control characters in a text, which `tally` then knows as well."""
    found: dict[str, None] = {}
    for start in range(0, len(conversations), _ROWS_AT_ONCE):
        chunk = conversations[start : start + _ROWS_AT_ONCE]
        if not _holds(_texts(chunk), _CONTROL + _ESCAPE):
            continue
        for each in chunk:
            if _holds(_texts([each]), _CONTROL) and each.origin not in found:
                found[each.origin] = None
                tally.add("{} rows hold NUL or control characters", each.origin)
            elif _holds(_texts([each]), _ESCAPE):
                tally.add("{} rows hold terminal escapes (ESC)", each.origin)
    return list(found)


def control_problem(path: str, origins: Sequence[str], rows: int) -> list[Problem]:
    """The problem where more than CONTROL_SHARE of the rows hold control characters."""
    if len(origins) <= CONTROL_SHARE * rows:
        return []
    what = f"{len(origins):,} of {rows:,} rows hold NUL or control characters ({some(origins, len(origins))})"
    return [Problem(path, what, "remove them; is it a broken export, or binary data?", "control_characters")]


def _texts(conversations: Iterable[Conversation]) -> str:
    parts = []
    for conversation in conversations:
        for message in conversation.messages:
            parts.append(message.content)
            if message.fields:
                parts.append(message.reasoning)
    return "".join(parts)


def _holds(text: str, characters: bytes) -> bool:
    """Whether an ASCII character of `characters` is in the text: deleting them all is the fastest way to know."""
    raw = text.encode(errors="surrogatepass")
    return len(raw.translate(None, characters)) != len(raw)
