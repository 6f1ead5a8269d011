"""A source as the user gives it: where its rows are, what its columns mean, how often and how much they count."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from instil.errors import Problem
from instil.types import ROLES

MAPPING_KEYS = {
    "prompt": "column, or list of columns, that make the prompt",
    "completion": "column, or list of columns, that make the answer",
    "system": "column, or list of columns, that make the system text",
    "messages": "column that holds the list of messages",
    "role": "name of the role inside a message",
    "content": "name of the text inside a message",
    "roles": "what the file calls a role: the role",
    "calls": "name of the list of API calls inside a message",
    "text": "column whose text holds prompt and answer",
    "split_at": "text that ends the prompt; the answer follows",
    "tools": "column of the tool schemas",
    "weight": "column of the row's weight",
    "task": "column of the row's task",
}
_KINDS = {"prompt": ("completion",), "messages": (), "text": ("split_at",)}  # a dialogue is one of these, with these
_BELONGS = {
    "completion": "prompt",
    "split_at": "text",
    "role": "messages",
    "content": "messages",
    "roles": "messages",
    "calls": "messages",
}
_LISTS = ("prompt", "completion", "system")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_YAML_WORDS = {"null", "true", "false"}


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """One source of rows.

    path: a file, a folder, a glob, or a data set on the hub. mapping: what its columns mean, where the format is not
    known (MAPPING_KEYS). repeat: how often its rows are seen in an epoch. weight: of its target tokens, None = as is.
    """

    path: str
    mapping: Mapping[str, Any] = field(default_factory=dict)
    repeat: float = 1.0
    weight: float | None = None


def as_spec(source: Any) -> SourceSpec:
    """A path alone is a source as well."""
    return source if isinstance(source, SourceSpec) else SourceSpec(str(source))


def spec_problems(spec: SourceSpec) -> list[Problem]:
    """What is wrong with a source before any file is opened."""
    problems = list(mapping_problems(spec.mapping, spec.path))
    for name, value in (("repeat", spec.repeat), ("weight", spec.weight)):
        if value is None and name == "weight":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            what = f"is {value!r}, not a number from 0"
            problems.append(Problem(f"{spec.path}: {name}", what, "give a finite number", "source"))
    return problems


def mapping_problems(mapping: Any, path: str) -> Iterable[Problem]:
    """What is wrong with a mapping: unknown keys, values of another type, parts that do not fit together."""
    if not isinstance(mapping, Mapping):
        yield Problem(f"{path}: mapping", f"is {mapping!r}", "write {prompt: COLUMN, completion: COLUMN}", "mapping")
        return
    for key, value in mapping.items():
        place = f"{path}: mapping.{key}"
        if key not in MAPPING_KEYS:
            near = difflib.get_close_matches(str(key), MAPPING_KEYS, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"use {', '.join(MAPPING_KEYS)}"
            yield Problem(place, "is not a key of a mapping", remedy, "mapping")
        elif key == "roles":
            yield from _role_problems(value, place)
        elif not (_is_name(value) or (key in _LISTS and isinstance(value, list | tuple) and _are_names(value))):
            yield Problem(place, f"is {value!r}", f"give the {MAPPING_KEYS[key]}", "mapping")
    kinds = [key for key in _KINDS if key in mapping]
    if len(kinds) > 1:
        what = f"{' and '.join(kinds)} exclude each other"
        yield Problem(f"{path}: mapping", what, "keep one", "mapping")
    for key in kinds:
        for other in _KINDS[key]:
            if other not in mapping:
                yield Problem(f"{path}: mapping", f"{key} without {other}", f"add {other}", "mapping")
    for key, other in _BELONGS.items():
        if key in mapping and other not in mapping:
            yield Problem(f"{path}: mapping.{key}", f"stands without {other}", f"add {other}", "mapping")


def says_dialogue(mapping: Mapping[str, Any]) -> bool:
    """Whether a mapping says where prompt and answer are, and not only where weights or tasks are."""
    return any(key in mapping for key in _KINDS)


def override(mapping: Mapping[str, Any]) -> str:
    """A mapping as an override for the command line, quoted for the shell."""
    return f"'data.mapping={_flow(mapping)}'"


def _flow(value: Any) -> str:
    """YAML 1.2 in flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    # A single quote would end the shell's quoting; other characters that cannot be printed are not YAML.
    return "".join(c if c.isprintable() and c != "'" else f"\\U{ord(c):08x}" for c in quoted)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(values: Any) -> bool:
    return len(values) > 0 and all(_is_name(value) for value in values)


def _role_problems(roles: Any, place: str) -> Iterable[Problem]:
    if not isinstance(roles, Mapping) or not roles:
        yield Problem(place, f"is {roles!r}", "write {name in the file: role}", "mapping")
        return
    for name, role in roles.items():
        if role not in ROLES:
            near = difflib.get_close_matches(str(role), ROLES, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ROLES)}"
            yield Problem(f"{place}.{name}", f"{role!r} is not a role", remedy, "mapping")
