"""Rows of an unknown format in, the mapping that probably reads them out: for an error message, never used unasked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from instil.data.mapping import pick
from instil.data.messages import ALIASES, SHAREGPT_ROLES
from instil.data.sources import Row
from instil.types import ROLES

PROMPT_NAMES = ("prompt", "instruction", "question", "query", "input", "problem")
ANSWER_NAMES = ("completion", "response", "answer", "output", "solution")
# Columns that a prompt may be meant to hold as well: a row that has one cannot be read by its names alone.
CONTEXT_NAMES = (
    "background", "chat", "choices", "chosen", "context", "conversation", "conversations", "definition", "dialog",
    "dialogue", "document", "history", "instances", "messages", "options", "paragraph", "passage", "rationale",
    "reasoning", "rejected", "schema", "story", "text", "thinking",
)  # fmt: skip
_MORE_ANSWERS = (
    "target",
    "reply",
    "answers",
    "outputs",
    "responses",
    "chosen",
    "sql",
    "summary",
    "translation",
    "label",
)
_ROLE_NAMES = ("role", "from", "speaker", "sender", "author", "who", "user", "name", "participant")
_TEXT_NAMES = ("content", "value", "text", "message", "utterance", "body", "said")
_ABOUT = re.compile(
    r"(.*_)?(id|ids|uuid|index|key|name|title|source|origin|url|lang|language|category|categories|type|split|model"
    r"|licen[cs]e|date|time|timestamp|task|topic|tags?|dataset|canary|system|weight|scenario|vertical)",
    re.IGNORECASE,
)
_MARKER = re.compile(r"\n[^\n:]{1,30}:(?:\n| ?)")
_ANSWER_MARKER = re.compile(
    r"\n\W*(a|ai|answer|assistant|bot|completion|gpt|output|response|reply|solution|sql)\W*", re.IGNORECASE
)
_SAMPLE = 200  # rows looked at


def suggest(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The mapping for rows like these, or None where nothing speaks for one."""
    values = [row.value for row in rows[:_SAMPLE]]
    return _dialogue(values) or _columns(values) or _marked(values)


def _dialogue(values: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A column with a list of objects, in which one key is a role and another a text."""
    for path, first in _leaves(values[0]):
        if not (isinstance(first, list) and first and all(isinstance(each, dict) for each in first)):
            continue
        found = [pick(value, path) for value in values]
        messages = [each for value in found if isinstance(value, list) for each in value if isinstance(each, dict)]
        role, content = _keys_of(messages)
        if role is None or content is None:
            continue
        roles = _roles(list(dict.fromkeys(str(message[role]) for message in messages if role in message)))
        if roles is not None:
            mapping = {"messages": path, "role": role, "content": content, "roles": roles}
            return {**mapping, **_calls(messages)}
    return None


def _columns(values: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One column that is the answer, and all others with texts of a prompt."""
    texts = [path for path, value in _leaves(values[0]) if _is_text(value)]
    said = [path for path in texts if not any(map(_ABOUT.fullmatch, path.split(".")))]
    by_name = sorted((rank, path) for path in said if (rank := _answer_rank(path)) is not None)
    whole = [path for path in said if path in values[0]]  # columns themselves, not parts of one
    answer = by_name[0][1] if by_name else whole[1] if len(whole) == len(said) == 2 else None
    if answer is None:
        return None
    others = [path for path in said if path != answer]
    prompts = [path for path in others if path.split(".")[-1].lower() in (*PROMPT_NAMES, *CONTEXT_NAMES, "body")]
    prompts = prompts or [path for path in others if _answer_rank(path) is None]
    if not prompts:
        return None
    return {"prompt": prompts[0] if len(prompts) == 1 else prompts, "completion": answer}


def _marked(values: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One text in which the same words, at the start of a line, stand once in every row."""
    texts = [path for path, value in _leaves(values[0]) if isinstance(value, str) and not _ABOUT.fullmatch(path)]
    for path in texts:
        every = [value for each in values if isinstance(value := pick(each, path), str)]
        markers = [marker for marker in _MARKER.findall(every[0]) if all(text.count(marker) == 1 for text in every)]
        best = [marker for marker in markers if _ANSWER_MARKER.fullmatch(marker)] or markers
        if best and len(every) == len(values):
            return {"text": path, "split_at": best[-1]}
    return None


def _leaves(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of the columns, of what is in an object, and of the first text in a list of texts."""
    for key, inner in value.items():
        path = f"{above}{key}"
        if isinstance(inner, dict):
            if not above:
                yield from _leaves(inner, f"{path}.")
        elif isinstance(inner, list) and inner and isinstance(inner[0], str):
            yield f"{path}.0", inner[0]
        else:
            yield path, inner


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _answer_rank(path: str) -> int | None:
    """How well the name says that the column is the answer: 0 is best."""
    names = (*ANSWER_NAMES, *_MORE_ANSWERS)
    steps = [step.lower() for step in path.split(".") if not step.isdigit()]
    return min((names.index(step) for step in steps if step in names), default=None)


def _keys_of(messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, str | None]:
    """The keys of role and text: by name, else the one with few and the one with many different values."""
    texts = {key: [m[key] for m in messages if isinstance(m.get(key), str)] for key in messages[0]}
    texts = {key: found for key, found in texts.items() if found and len(found) == len(messages)}
    few = [key for key in texts if 1 < len(set(texts[key])) <= 5]
    role = next((key for key in _ROLE_NAMES if key in few), next(iter(few), None))
    rest = {key: sum(map(len, found)) for key, found in texts.items() if key != role}
    content = next((key for key in _TEXT_NAMES if key in rest), max(rest, key=rest.__getitem__, default=None))
    return role, content


def _roles(names: Sequence[str]) -> dict[str, str] | None:
    """Which role each name stands for; of two strangers the first to speak asks."""
    known: dict[str, str | None] = {}
    for name in names:
        bare = name.strip().casefold()
        known[name] = bare if bare in ROLES else SHAREGPT_ROLES.get(bare) or ALIASES.get(bare)
    unknown = [name for name, role in known.items() if role is None]
    left = [role for role in ("user", "assistant") if role not in known.values()]
    if len(unknown) > len(left):
        return None
    known.update(zip(unknown, left, strict=False))
    return {name: str(role) for name, role in known.items()}


def _calls(messages: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The key that holds API calls, where there is one."""
    for key in messages[0]:
        notes = [note for m in messages if isinstance(m.get(key), list) for note in m[key] if isinstance(note, dict)]
        if notes and Counter(str(note.get("name")) for note in notes)["api_call"]:
            return {"calls": key}
    return {}
