"""Columns that the user named in, a conversation out: prompt and completion, messages under other names, or one text."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from instil.data.jsontext import kind, parse
from instil.data.messages import Parts, key_names, message_weight, role_problem, shown, text_of, tool_calls
from instil.data.notes import Tally
from instil.errors import DataError, Problem
from instil.types import REASONING_FIELDS, ROLES, Message

MERGED = "{} messages joined to the one before, which has the same role"
BROKEN_CALL = "broken_call"  # rule: the row is dropped, for a log of calls cannot be repaired by hand
_KEPT = ("name", "tool_calls", "tool_call_id", "weight", "train", "loss_weight", *REASONING_FIELDS)
_MISSING = object()


def read_mapped(value: Mapping[str, Any], origin: str, mapping: Mapping[str, Any], tally: Tally) -> Parts:
    """The messages of a row as `mapping` says (spec.py: MAPPING_KEYS); a mapping that was checked."""
    if "text" in mapping:
        parts = _split(value, origin, mapping["text"], mapping["split_at"])
    elif "messages" in mapping:
        parts = _dialogue(value, origin, mapping, tally)
    else:
        parts = []
        for role, key in (("user", "prompt"), ("assistant", "completion")):
            text = _text(value, mapping[key], origin)
            parts.append(text if isinstance(text, Problem) else Message(role, text))
    if "system" not in mapping:
        return parts
    system = _text(value, mapping["system"], origin, optional=True)
    if isinstance(system, Problem):
        return [system, *parts]
    return [Message("system", system), *parts] if system else parts


def described(mapping: Mapping[str, Any]) -> str:
    """What was read as what, for people: `question = prompt, answer = completion`."""
    names = {key: " + ".join(columns(mapping[key])) for key in mapping if key not in ("roles", "split_at")}
    return ", ".join(f"{name} = {key}" for key, name in names.items())


def columns(given: Any) -> list[str]:
    """One column or several, as a list."""
    return [given] if isinstance(given, str) else list(given)


def pick(value: Any, path: str) -> Any:
    """What stands under a key, or under a dotted path (numbers count the elements of a list); _MISSING if nothing."""
    if isinstance(value, Mapping) and path in value:
        return value[path]
    for step in path.split("."):
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isascii() and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        else:
            return _MISSING
    return value


def _text(value: Mapping[str, Any], given: Any, origin: str, optional: bool = False) -> str | Problem:
    """The text of one column, or of several, joined by an empty line; those that are empty are passed over."""
    names = columns(given)
    texts = []
    for name in names:
        found = pick(value, name)
        if found is _MISSING and not optional:
            return _no_column(value, name, origin)
        if found is _MISSING or (found is None and (optional or len(names) > 1)):
            continue
        if isinstance(found, int | float) and not isinstance(found, bool):
            found = json.dumps(found)
        if not isinstance(found, str):
            what, remedy = f"is {kind(found)}, not text", "write it as text"
            if isinstance(found, list):
                remedy = f"name one of its elements: {name}.0"
            elif isinstance(found, dict):
                remedy = f"name what is in it: {name}.{next(iter(found), 'KEY')}"
            return Problem(f"{origin}: {name}", what, remedy, "content")
        texts.append(found)
    return "\n\n".join(text for text in texts if text.strip()) if len(names) > 1 else "".join(texts)


def _no_column(value: Mapping[str, Any], name: str, origin: str) -> Problem:
    near = difflib.get_close_matches(name, map(str, value), n=1)
    what = f"is missing (keys: {key_names(value)})"
    remedy = f"did you mean {near[0]!r}?" if near else "correct the mapping, or add it"
    return Problem(f"{origin}: {name}", what, remedy, "missing_field")


def _split(value: Mapping[str, Any], origin: str, column: str, marker: str) -> Parts:
    text = _text(value, column, origin)
    if isinstance(text, Problem):
        return [text]
    if (count := text.count(marker)) != 1:
        what = f"holds {marker!r} {count} times, not once"
        return [Problem(f"{origin}: {column}", what, "choose another split_at, or correct the row", "split_at")]
    at = text.index(marker) + len(marker)
    return [Message("user", text[:at]), Message("assistant", text[at:])]


def _dialogue(value: Mapping[str, Any], origin: str, mapping: Mapping[str, Any], tally: Tally) -> Parts:
    name = mapping["messages"]
    raw, place = pick(value, name), f"{origin}: {name}"
    if raw is _MISSING:
        return [_no_column(value, name, origin)]
    if not isinstance(raw, list):
        return [Problem(place, f"is {kind(raw)}, not a list of messages", "name the list", "content")]
    parts: Parts = []
    for i, each in enumerate(raw):
        parts += _utterance(each, f"{place}[{i}]", mapping)
    return _merged(parts, origin, tally)


def _utterance(raw: Any, place: str, mapping: Mapping[str, Any]) -> Parts:
    """A message and the calls at it: those of an assistant lead to its text, those of others answer theirs."""
    if not isinstance(raw, dict):
        return [Problem(place, f"is {kind(raw)}, not an object", "name a list of objects", "content")]
    role_key, content_key = mapping.get("role", "role"), mapping.get("content", "content")
    roles = {**{role: role for role in ROLES}, **{str(k): v for k, v in mapping.get("roles", {}).items()}}
    name = raw.get(role_key)
    if not isinstance(name, str) or name not in roles:
        return [role_problem(raw, role_key, place, tuple(roles))]
    fields = {key: raw[key] for key in _KEPT if key in raw and key not in (role_key, content_key)}
    calls = tool_calls(fields.pop("tool_calls", None), f"{place}.tool_calls")
    weight = message_weight(fields, place)
    api = _api_calls(raw.get(mapping["calls"]), f"{place}.{mapping['calls']}") if "calls" in mapping else []
    for found in (calls, weight):
        if isinstance(found, Problem):
            return [found]
    if calls:
        fields["tool_calls"] = calls
    content = "" if calls and raw.get(content_key) is None else text_of(raw, content_key, place)
    if isinstance(content, Problem):
        return [content]
    for key in ("train", "loss_weight"):
        fields.pop(key, None)
    if weight is not None:
        fields["weight"] = weight
    said = [Message(roles[name], content, fields)]
    return [*api, *said] if roles[name] == "assistant" else [*said, *api]


def _api_calls(raw: Any, place: str) -> Parts:
    """Taskmaster's notes [{"name": api_call | request | api_response | response, "value"}] as calls and results."""
    if not isinstance(raw, list | None):
        return [Problem(place, f"is {kind(raw)}, not a list", "name a list of calls", "tool_call")]
    parts: Parts = []
    for i, note in enumerate(raw or []):
        name, value = (note.get("name"), note.get("value")) if isinstance(note, dict) else (None, None)
        here = f"{place}[{i}]"
        last = parts[-1] if parts and isinstance(parts[-1], Message) else None
        if not isinstance(value, str) or name not in ("api_call", "request", "api_response", "response"):
            what = f"{shown(name)} is not one of api_call, request, api_response, response with a text"
            return [Problem(here, what, "leave `calls` out of the mapping", "tool_call")]
        if name == "api_call":
            parts.append(Message("assistant", "", {"tool_calls": _call(value, {})}))
        elif name == "request" and last and last.role == "assistant":
            arguments = _arguments(value, here)
            if isinstance(arguments, Problem):
                return [arguments]
            parts[-1] = Message("assistant", "", {"tool_calls": _call(_called(last), arguments)})
        elif name == "response" and last and last.role == "assistant":
            parts.append(Message("tool", value, {"name": _called(last)}))
        elif name != "api_response":
            return [Problem(here, f"a {name} without its api_call", "put the call before it", "tool_call")]
    return parts


def _call(name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def _called(message: Message) -> str:
    return str(message.fields["tool_calls"][0]["function"]["name"])


def _arguments(text: str, place: str) -> dict[str, Any] | Problem:
    try:
        value = parse(text.encode(errors="surrogatepass"), f"{place}.value")
    except DataError as error:
        return dataclasses.replace(error.problems[0], rule=BROKEN_CALL)
    if isinstance(value, dict):
        return value
    return Problem(f"{place}.value", f"is {kind(value)}, not an object", "write it as an object", BROKEN_CALL)


def _merged(parts: Sequence[Message | Problem], origin: str, tally: Tally) -> Parts:
    """Texts of one role in a row become one message, as templates want turns that alternate."""
    merged: Parts = []
    for part in parts:
        last = merged[-1] if merged else None
        plain = isinstance(part, Message) and isinstance(last, Message) and not part.fields and not last.fields
        if plain and part.role == last.role and part.role in ("user", "assistant", "system"):  # type: ignore[union-attr]
            merged[-1] = Message(part.role, f"{last.content}\n{part.content}")  # type: ignore[union-attr]
            tally.add(MERGED, origin)
        else:
            merged.append(part)
    return merged
