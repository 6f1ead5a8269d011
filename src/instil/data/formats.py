"""A row in, a conversation out: one function a format, one table of formats."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from instil.data.jsontext import kind, parse
from instil.data.ledger import LedgerEntry, Side
from instil.data.sources import Row, Source
from instil.errors import DataError, Problem
from instil.types import ROLES, Conversation, Message

Parts = list[Message | Problem]  # the messages of a row; a Problem in the place of each that cannot be used

_ALIASES = {
    **dict.fromkeys(("bot", "gpt", "model", "ai", "chatgpt", "chatbot", "answer", "response"), "assistant"),
    **dict.fromkeys(("human", "prompter", "customer", "client", "instruction", "question"), "user"),
    **dict.fromkeys(("function", "observation", "ipython", "tool_response"), "tool"),
}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a conversation as a row. needs: the keys that identify it. shape: an example for people."""

    name: str
    needs: tuple[str, ...]
    shape: str
    read: Callable[[Mapping[str, Any], str], Parts]


@dataclass(frozen=True, slots=True)
class Parsed:
    """The rows of a source: each is a conversation, a dropped entry, or has at least one problem."""

    format_name: str
    conversations: tuple[Conversation, ...]
    dropped: tuple[LedgerEntry, ...]
    problems: tuple[Problem, ...]


def parse_rows(source: Source, side: Side) -> Parsed:
    """The conversations of a file whose first row decides the format; never raises for what the rows hold."""
    if not source.rows:
        return Parsed("no rows", (), (), ())
    format = recognise(source.rows[0].value)
    if format is None:
        return Parsed("unknown format", (), (), (_unknown_format(source.rows[0]),))
    conversations, dropped, problems = [], [], []
    for row in source.rows:
        match parse_row(row, format, side):
            case Conversation() as conversation:
                conversations.append(conversation)
            case LedgerEntry() as entry:
                dropped.append(entry)
            case found:
                problems += found
    return Parsed(format.name, tuple(conversations), tuple(dropped), tuple(problems))


def recognise(value: Mapping[str, Any]) -> Format | None:
    """The first format of the table whose keys the row has."""
    return next((format for format in FORMATS if all(key in value for key in format.needs)), None)


def parse_row(row: Row, format: Format, side: Side) -> Conversation | LedgerEntry | list[Problem]:
    """The conversation of one row; an entry when a rule drops the row; or everything that is wrong with it."""
    missing = [key for key in format.needs if key not in row.value]
    if missing:
        return [_missing_key(row, key, format) for key in missing]
    messages = format.read(row.value, row.origin)
    parts: list[Any] = [*_system(row, messages), *messages]
    tools = _tools(row, wrap=format.name == "conversations")
    task = row.value.get("task")
    if task is not None and not isinstance(task, str):
        parts.append(Problem(f"{row.origin}: task", f"is {kind(task)}, not text", "write it as text", "field"))
    problems = [part for part in (*parts, *tools) if isinstance(part, Problem)] or _order_problems(parts, row.origin)
    if problems:
        return problems
    for number, message in enumerate(parts, start=1):
        if message.role == "assistant" and not message.content.strip() and "tool_calls" not in message.fields:
            reason = f"the assistant says nothing in message {number} of {len(parts)}"
            return LedgerEntry(row.origin, "dropped", side, rule="empty_answer", reason=reason)
    return Conversation(tuple(parts), row.origin, tuple(tools), task or "")


# One function a format: the row and its origin in, its messages out.


def read_messages(value: Mapping[str, Any], origin: str) -> Parts:
    """OpenAI: {"messages": [{"role", "content", ...}]}. Other keys of a message are kept for the template."""
    return _message_list(value["messages"], f"{origin}: messages")


def read_sharegpt(value: Mapping[str, Any], origin: str) -> Parts:
    """ShareGPT: {"conversations": [{"from", "value"}]}, with function_call and observation turns."""
    return _message_list(value["conversations"], f"{origin}: conversations", _sharegpt_message)


def read_prompt_completion(value: Mapping[str, Any], origin: str) -> Parts:
    """{"prompt", "completion"}: two texts, or two lists of messages of which only the completion is learnt."""
    prompt, completion = value["prompt"], value["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return [_text_message("user", "prompt", value, origin), _text_message("assistant", "completion", value, origin)]
    if not isinstance(prompt, list) or not isinstance(completion, list):
        what = f"is {kind(completion)} while prompt is {kind(prompt)}"
        return [Problem(f"{origin}: completion", what, "make both text, or both lists of messages", "content")]
    if not completion:
        return [Problem(f"{origin}: completion", "is an empty list", "add the answer, or remove the row", "no_answer")]
    answers = _message_list(completion, f"{origin}: completion")
    if answers and isinstance(answers[0], Message) and answers[0].role != "assistant":
        what = f"{answers[0].role!r} cannot begin an answer"
        answers[0] = Problem(f"{origin}: completion[0].role", what, "move the message to the prompt", "role")
    return [*(_not_learnt(part) for part in _message_list(prompt, f"{origin}: prompt")), *answers]


def read_alpaca(value: Mapping[str, Any], origin: str) -> Parts:
    """Alpaca: {"instruction", "input", "output"}; the input, if any, follows the instruction after an empty line."""
    parts: Parts = [
        _text_message("user", "instruction", value, origin),
        _text_message("assistant", "output", value, origin),
    ]
    extra = value.get("input")
    if isinstance(extra, str):
        if extra.strip() and isinstance(parts[0], Message):
            parts[0] = Message("user", f"{parts[0].content}\n\n{extra}")
    elif extra is not None:
        parts.append(Problem(f"{origin}: input", f"is {kind(extra)}, not text", "write it as text", "content"))
    if value.get("history"):
        what = "earlier turns in `history` would be lost"
        parts.append(Problem(f"{origin}: history", what, "write the row as messages", "field"))
    return parts


FORMATS = (
    Format(
        "messages",
        ("messages",),
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        read_messages,
    ),
    Format(
        "conversations",
        ("conversations",),
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        read_sharegpt,
    ),
    Format(
        "prompt-completion", ("prompt", "completion"), '{"prompt": "...", "completion": "..."}', read_prompt_completion
    ),
    Format("alpaca", ("instruction", "output"), '{"instruction": "...", "input": "...", "output": "..."}', read_alpaca),
)


# What the formats share.


def _message_list(raw: Any, place: str, read: Callable[[Any, str], Message | Problem] | None = None) -> Parts:
    if not isinstance(raw, list):
        return [Problem(place, f"is {kind(raw)}, not a list of messages", "write it as a list", "content")]
    return [(read or _message)(each, f"{place}[{i}]") for i, each in enumerate(raw)]


def _message(raw: Any, place: str) -> Message | Problem:
    if not isinstance(raw, dict):
        return Problem(place, f"is {kind(raw)}, not an object", 'write {"role": ..., "content": ...}', "content")
    role = raw.get("role")
    if role not in ROLES:
        return _role_problem(raw, "role", place, ROLES)
    calls = _tool_calls(raw.get("tool_calls"), f"{place}.tool_calls") if role == "assistant" else []
    if isinstance(calls, Problem):
        return calls
    # OpenAI writes content null beside tool calls; the template then gets "", which is as false as null.
    content = "" if calls and raw.get("content") is None else _content(raw, "content", place)
    if isinstance(content, Problem):
        return content
    weight = raw.get("weight")
    if weight is not None and (
        isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < 1e9
    ):
        return Problem(
            f"{place}.weight", f"is {_shown(weight)}, not a number from 0", "write 0, 1 or a share", "weight"
        )
    hidden = ("role", "content", "tool_calls", *(["weight"] if weight is None else []))
    fields = {key: value for key, value in raw.items() if key not in hidden}
    return Message(role, content, {**fields, "tool_calls": calls} if calls else fields)


def _sharegpt_message(raw: Any, place: str) -> Message | Problem:
    if not isinstance(raw, dict):
        return Problem(place, f"is {kind(raw)}, not an object", 'write {"from": ..., "value": ...}', "content")
    name = raw.get("from")
    if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
        return _role_problem(raw, "from", place, tuple(_SHAREGPT_ROLES))
    content = _content(raw, "value", place)
    if isinstance(content, Problem):
        return content
    fields = {key: value for key, value in raw.items() if key not in ("from", "value")}
    if name != "function_call":
        return Message(_SHAREGPT_ROLES[name], content, fields)
    try:
        call = parse(content.encode(), f"{place}.value")
    except DataError as error:
        return dataclasses.replace(error.problems[0], rule="tool_call")
    calls = _tool_calls([{"type": "function", "function": call}], f"{place}.value", at_index=False)
    return calls if isinstance(calls, Problem) else Message("assistant", "", {**fields, "tool_calls": calls})


def _tool_calls(raw: Any, place: str, at_index: bool = True) -> list[dict[str, Any]] | Problem:
    """Tool calls, their arguments as objects: templates expect that, and servers such as vLLM parse the text form."""
    if not isinstance(raw, list | None):
        return Problem(place, f"is {kind(raw)}, not a list", "write it as a list of calls", "tool_call")
    calls = []
    for i, each in enumerate(raw or []):
        here = f"{place}[{i}]" if at_index else place
        function = each.get("function") if isinstance(each, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            remedy = 'write {"type": "function", "function": {"name": ..., "arguments": {...}}}'
            if not at_index:
                remedy = 'write {"name": ..., "arguments": {...}}'
            return Problem(here, "is not a call of a named function", remedy, "tool_call")
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str) and arguments.strip():
                arguments = parse(arguments.encode(), f"{here}.arguments")
        except DataError as error:
            return dataclasses.replace(error.problems[0], rule="tool_call")
        if arguments in (None, ""):
            arguments = {}
        if not isinstance(arguments, dict):
            return Problem(f"{here}.arguments", f"is {kind(arguments)}", "write them as an object", "tool_call")
        calls.append({**each, "function": {**function, "arguments": arguments}})
    return calls


def _content(raw: Mapping[str, Any], key: str, place: str) -> str | Problem:
    """Text, or a list of text parts joined by a line break, which is what vLLM does with them."""
    place = f"{place}.{key}"
    if key not in raw:
        return Problem(place, f"is missing (keys: {_keys(raw)})", "add it, or remove the row", "content")
    content = raw[key]
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return Problem(place, f"is {kind(content)}, not text", "write it as text", "content")
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            what = f"is {kind(part)}"
            if isinstance(part, dict):
                what = f"is a part of type {_shown(part.get('type'))} with the keys {_keys(part)}"
            return Problem(f"{place}[{i}]", what, 'only {"type": "text", "text": "..."} parts can be learnt', "content")
    return "\n".join(part["text"] for part in content)


def _text_message(role: str, key: str, value: Mapping[str, Any], origin: str) -> Message | Problem:
    if not isinstance(value[key], str):
        return Problem(f"{origin}: {key}", f"is {kind(value[key])}, not text", "write it as text", "content")
    return Message(role, value[key])


def _not_learnt(part: Message | Problem) -> Message | Problem:
    """An assistant message of a prompt is context: weight 0, as OpenAI's fine-tuning format writes it."""
    if isinstance(part, Message) and part.role == "assistant":
        return dataclasses.replace(part, fields={**part.fields, "weight": 0})
    return part


def _system(row: Row, messages: Parts) -> Parts:
    """The row's own `system` text as its first message."""
    text = row.value.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        return [Problem(f"{row.origin}: system", f"is {kind(text)}, not text", "write it as text", "content")]
    if messages and isinstance(messages[0], Message) and messages[0].role == "system":
        what = "stands beside a system message"
        return [Problem(f"{row.origin}: system", what, "keep one of the two", "system")]
    return [Message("system", text)]


def _tools(row: Row, wrap: bool) -> list[Any]:
    """The tool schemas, also from JSON text. wrap: put a bare schema into the form that a server's request has."""
    raw, place = row.value.get("tools"), f"{row.origin}: tools"
    if isinstance(raw, str):
        try:
            raw = parse(raw.encode(), place) if raw.strip() else None
        except DataError as error:
            return [dataclasses.replace(error.problems[0], rule="tools")]
    if not isinstance(raw, list | None):
        return [Problem(place, f"is {kind(raw)}, not a list", "write it as a list of schemas", "tools")]
    tools: list[Any] = []
    for i, tool in enumerate(raw or []):
        if not isinstance(tool, dict):
            tool = Problem(f"{place}[{i}]", f"is {kind(tool)}, not an object", "write it as a schema", "tools")
        elif wrap and "name" in tool and "function" not in tool:
            tool = {"type": "function", "function": tool}
        tools.append(tool)
    return tools


def _order_problems(messages: list[Message], origin: str) -> list[Problem]:
    """What no single message shows: no answer, a tool result out of nowhere."""
    roles = [message.role for message in messages]
    problems = []
    if "assistant" not in roles:
        what = "the row has no answer (no assistant message)"
        problems.append(Problem(origin, what, "add the answer, or remove the row", "no_answer"))
    for i, role in enumerate(roles):
        if role == "tool" and (i == 0 or roles[i - 1] not in ("assistant", "tool")):
            what = f"message {i + 1} is a tool result, but no assistant message comes before it"
            problems.append(Problem(origin, what, "put the call before its result", "tool_result"))
    return problems


def _role_problem(raw: Mapping[str, Any], key: str, place: str, allowed: tuple[str, ...]) -> Problem:
    if key not in raw:
        what = f"is missing (keys: {_keys(raw)})"
        return Problem(f"{place}.{key}", what, f"add one of {', '.join(allowed)}", "role")
    role = raw[key]
    nearest = _nearest_role(role, allowed) if isinstance(role, str) else None
    remedy = f"did you mean {nearest!r}?" if nearest else f"use one of {', '.join(allowed)}"
    return Problem(f"{place}.{key}", f"{_shown(role)} is not a role", remedy, "role")


def _nearest_role(role: str, allowed: tuple[str, ...]) -> str | None:
    name = role.strip().casefold()
    if _ALIASES.get(name) in allowed:
        return _ALIASES[name]
    near = difflib.get_close_matches(name[:40], allowed, n=1)
    return near[0] if near else None


def _missing_key(row: Row, key: str, format: Format) -> Problem:
    near = difflib.get_close_matches(key, map(str, row.value), n=1)
    remedy = f"did you write it as {near[0]!r}?" if near else "add it, or remove the row"
    what = f"is missing (keys: {_keys(row.value)}; the first row has the format {format.name})"
    return Problem(f"{row.origin}: {key}", what, remedy, "missing_field")


def _unknown_format(row: Row) -> Problem:
    shapes = " or ".join(format.shape for format in FORMATS)
    what = f"no known format has the keys {_keys(row.value)}"
    return Problem(row.origin, what, f"write the rows as {shapes}", "unknown_format")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _keys(value: Mapping[str, Any]) -> str:
    names = [str(key)[:40] for key in list(value)[:12]]
    return ", ".join([*names, "..."] if len(value) > 12 else names) or "(none)"
