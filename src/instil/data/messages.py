"""One message of a row in, a Message out: its role, text, reasoning, calls and weight, or exactly what is wrong."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from instil.data.jsontext import kind, parse
from instil.errors import DataError, Problem
from instil.types import REASONING_FIELDS, ROLES, Message

Parts = list[Message | Problem]  # the messages of a row; a Problem in the place of each that cannot be used

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
ALIASES = {
    **dict.fromkeys(("bot", "gpt", "model", "ai", "chatgpt", "chatbot", "answer", "response", "agent"), "assistant"),
    **dict.fromkeys(("human", "prompter", "customer", "client", "instruction", "question"), "user"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
_REASONING_PARTS = ("reasoning", "thinking")
_WEIGHTS = ("weight", "loss_weight", "train")
_CALL = '{"type": "function", "function": {"name": ..., "arguments": {...}}}'


def message_list(raw: Any, place: str, read: Callable[[Any, str], Message | Problem] | None = None) -> Parts:
    """The messages of a list, or of JSON text that is a list (which is how a CSV file holds one)."""
    if isinstance(raw, str) and raw.lstrip()[:1] == "[":
        try:
            raw = parse(raw.encode(errors="surrogatepass"), place)
        except DataError as error:
            return [*error.problems]
    if not isinstance(raw, list):
        return [Problem(place, f"is {kind(raw)}, not a list of messages", "write it as a list", "content")]
    read = read or read_message
    return [read(each, f"{place}[{i}]") for i, each in enumerate(raw)]


def read_message(raw: Any, place: str) -> Message | Problem:
    """OpenAI's form: {"role", "content", ...}; what else it holds is kept in `fields`."""
    if not isinstance(raw, dict):
        return Problem(place, f"is {kind(raw)}, not an object", 'write {"role": ..., "content": ...}', "content")
    role = raw.get("role")
    if role not in ROLES:
        return role_problem(raw, "role", place, ROLES)
    if len(raw) == 2 and type(raw.get("content")) is str:
        return Message(role, raw["content"])
    blocks = _blocks(raw["content"], f"{place}.content", role) if isinstance(raw.get("content"), list) else None
    if isinstance(blocks, Problem):
        return blocks
    calls = _calls_of(raw, blocks, place) if role == "assistant" else []
    if isinstance(calls, Problem):
        return calls
    # OpenAI writes content null beside tool calls; the template then gets "", which is as false as null.
    silent = calls and raw.get("content") is None
    content = blocks[0] if blocks else "" if silent else text_of(raw, "content", place)
    if isinstance(content, Problem):
        return content
    weight = message_weight(raw, place)
    if isinstance(weight, Problem):
        return weight
    fields = {key: value for key, value in raw.items() if key not in ("role", "content", "tool_calls", *_WEIGHTS)}
    if blocks and blocks[1]:
        if any(fields.get(name) for name in REASONING_FIELDS):
            return Problem(f"{place}.content", "holds reasoning beside a field of it", "keep one of the two", "content")
        fields["reasoning_content"] = blocks[1]
    if weight is not None:
        fields["weight"] = weight
    return Message(role, content, {**fields, "tool_calls": calls} if calls else fields)


def sharegpt_message(raw: Any, place: str) -> Message | Problem:
    """ShareGPT's form: {"from", "value"}, with function_call and observation turns; some write {"role", "content"}."""
    if not isinstance(raw, dict):
        return Problem(place, f"is {kind(raw)}, not an object", 'write {"from": ..., "value": ...}', "content")
    if "from" not in raw and "role" in raw and "content" in raw:
        return read_message(raw, place)
    name = raw.get("from")
    if not isinstance(name, str) or name not in SHAREGPT_ROLES:
        return role_problem(raw, "from", place, tuple(SHAREGPT_ROLES))
    content = text_of(raw, "value", place)
    if isinstance(content, Problem):
        return content
    if len(raw) == 2 and name != "function_call":
        return Message(SHAREGPT_ROLES[name], content)
    weight = message_weight(raw, place)
    if isinstance(weight, Problem):
        return weight
    fields = {key: value for key, value in raw.items() if key not in ("from", "value", *_WEIGHTS)}
    if weight is not None:
        fields["weight"] = weight
    if name != "function_call":
        return Message(SHAREGPT_ROLES[name], content, fields)
    calls = bare_calls(content, f"{place}.value")
    return calls if isinstance(calls, Problem) else Message("assistant", "", {**fields, "tool_calls": calls})


def message_weight(raw: Mapping[str, Any], place: str) -> float | Problem | None:
    """What `weight`, `loss_weight` and `train` say together: a number from 0, or None where they say nothing."""
    found: float | None = None
    for key in ("weight", "loss_weight"):
        value = raw.get(key)
        if value is None:
            continue
        if not is_weight(value):
            return Problem(
                f"{place}.{key}",
                f"is {shown(value)}, not 0 or a number from 1e-9 to 1e9",
                "write 0, 1 or a share",
                "weight",
            )
        if found is not None and found != value:
            what = f"is {value} beside a weight of {found}"
            return Problem(f"{place}.{key}", what, "keep one of the two", "weight")
        found = value
    train = raw.get("train")
    if train is None:
        return found
    if not isinstance(train, bool):
        return Problem(f"{place}.train", f"is {kind(train)}, not true or false", "write true or false", "weight")
    if found is not None and train != (found > 0):
        what = f"is {str(train).lower()} beside a weight of {found}"
        return Problem(f"{place}.train", what, "keep one of the two", "weight")
    return found if found is not None else float(train)


def is_weight(value: object) -> bool:
    """Whether it is 0 or a number from 1e-9 to 1e9: beyond that a float32 loss has no digits left for the rest."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value == 0 or 1e-9 <= value <= 1e9


def text_of(raw: Mapping[str, Any], key: str, place: str) -> str | Problem:
    """The text under a key; a list of text parts is joined by a line break, which is what vLLM does with them."""
    content = raw.get(key)
    if isinstance(content, str):
        return content
    place = f"{place}.{key}"
    if key not in raw:
        return Problem(place, f"is missing (keys: {key_names(raw)})", "add it, or remove the row", "content")
    if not isinstance(content, list):
        return Problem(place, f"is {kind(content)}, not text", "write it as text", "content")
    blocks = _blocks(content, place, "user")
    return blocks if isinstance(blocks, Problem) else blocks[0]


def bare_calls(raw: Any, place: str) -> list[dict[str, Any]] | Problem:
    """One or several {"name", "arguments"}, also as JSON text, as tool calls."""
    if isinstance(raw, str):
        try:
            raw = parse(raw.encode(errors="surrogatepass"), place)
        except DataError as error:
            return dataclasses.replace(error.problems[0], rule="tool_call")
    several = [{"type": "function", "function": call} for call in (raw if isinstance(raw, list) else [raw])]
    return tool_calls(several, place, at_index=False)


def tool_calls(raw: Any, place: str, at_index: bool = True) -> list[dict[str, Any]] | Problem:
    """Tool calls, their arguments as objects: templates expect that, and servers such as vLLM parse the text form."""
    if not isinstance(raw, list | None):
        return Problem(place, f"is {kind(raw)}, not a list", "write it as a list of calls", "tool_call")
    calls = []
    for i, each in enumerate(raw or []):
        here = f"{place}[{i}]" if at_index else place
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = f"write {_CALL}" if at_index else 'write {"name": ..., "arguments": {...}}'
            return Problem(here, "is not a call of a named function", remedy, "tool_call")
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str) and arguments.strip():
                arguments = parse(arguments.encode(errors="surrogatepass"), f"{here}.arguments")
        except DataError as error:
            return dataclasses.replace(error.problems[0], rule="tool_call")
        if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
            arguments = {}
        if not isinstance(arguments, dict):
            return Problem(f"{here}.arguments", f"is {kind(arguments)}", "write them as an object", "tool_call")
        calls.append({**each, "function": {**function, "arguments": arguments}})
    return calls


def not_learnt(part: Message | Problem) -> Message | Problem:
    """An assistant message that is context only: weight 0, as OpenAI's fine-tuning format writes it."""
    if isinstance(part, Message) and part.role == "assistant":
        return dataclasses.replace(part, fields={**part.fields, "weight": 0})
    return part


def role_problem(raw: Mapping[str, Any], key: str, place: str, allowed: tuple[str, ...]) -> Problem:
    """A role that is missing or unknown; the remedy names the one that was probably meant."""
    if key not in raw:
        what = f"is missing (keys: {key_names(raw)})"
        return Problem(f"{place}.{key}", what, f"add one of {', '.join(allowed)}", "role")
    role = raw[key]
    nearest = nearest_role(role, allowed) if isinstance(role, str) else None
    remedy = f"did you mean {nearest!r}?" if nearest else f"use one of {', '.join(allowed)}"
    return Problem(f"{place}.{key}", f"{shown(role)} is not a role", remedy, "role")


def nearest_role(role: str, allowed: tuple[str, ...]) -> str | None:
    """The allowed role that `role` is another name or a misspelling of."""
    name = role.strip().casefold()
    if ALIASES.get(name) in allowed:
        return ALIASES[name]
    near = difflib.get_close_matches(name[:40], allowed, n=1)
    return near[0] if near else None


def shown(value: object) -> str:
    """A value in an error message, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def key_names(value: Mapping[str, Any]) -> str:
    """The keys of an object in an error message: at most 12."""
    names = [str(key)[:40] for key in list(value)[:12]]
    return ", ".join([*names, "..."] if len(value) > 12 else names) or "(none)"


Blocks = tuple[str, str, list[dict[str, Any]]]  # the text, the reasoning and the calls of typed content parts


def _blocks(content: list[Any], place: str, role: str) -> Blocks | Problem:
    """Typed parts; reasoning and calls can only stand in an assistant's message."""
    texts, reasoning, calls = [], [], []
    for i, part in enumerate(content):
        here, name, text = f"{place}[{i}]", None, None
        if isinstance(part, dict):
            name = part.get("type")
            text = next((part[key] for key in ("text", "value", "thinking", "reasoning") if key in part), None)
        if name == "text" and isinstance(text, str):
            texts.append(text)
        elif role == "assistant" and name in _REASONING_PARTS and isinstance(text, str):
            reasoning.append(text)
        elif role == "assistant" and name == "tool_call" and text is not None:
            found = bare_calls(text, f"{here}.value")
            if isinstance(found, Problem):
                return found
            calls += found
        else:
            what = f"is {kind(part)}"
            if isinstance(part, dict):
                what = f"is a part of type {shown(name)} with the keys {key_names(part)}"
            return Problem(here, what, 'only {"type": "text", "text": "..."} parts can be learnt', "content")
    return "\n".join(texts), "\n".join(reasoning), calls


def _calls_of(raw: Mapping[str, Any], blocks: Blocks | None, place: str) -> list[dict[str, Any]] | Problem:
    calls = tool_calls(raw.get("tool_calls"), f"{place}.tool_calls")
    if isinstance(calls, Problem) or not blocks or not blocks[2]:
        return calls
    if calls:
        return Problem(f"{place}.tool_calls", "stands beside calls in the content", "keep one of the two", "tool_call")
    return blocks[2]
