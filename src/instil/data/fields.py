"""What a row may say in any format: system text, tools, task, weight, variables of the template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from instil.data.jsontext import kind, parse
from instil.data.messages import is_weight, shown
from instil.errors import DataError, Problem

_ARGUMENTS = ("template_args", "chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class RowFields:
    """The fields of one row, and what is wrong with them."""

    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str = ""
    weight: float = 1.0
    template_args: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


NOTHING = RowFields()


def read_fields(value: Mapping[str, Any], origin: str, columns: Mapping[str, str], *, wrap: bool) -> RowFields:
    """The fields of a row. columns: other names for them. wrap: put bare tool schemas into the form of a request."""
    problems: list[Problem] = []
    names = {name: columns.get(name, name) for name in ("system", "tools", "task", "weight")}
    found = _tools(value.get(names["tools"]), f"{origin}: {names['tools']}", wrap)
    problems += [tool for tool in found if isinstance(tool, Problem)]
    tools = tuple(tool for tool in found if not isinstance(tool, Problem))
    texts = {}
    for name in ("system", "task"):
        text = value.get(names[name])
        if text is not None and not isinstance(text, str):
            what = f"is {kind(text)}, not text"
            problems.append(
                Problem(
                    f"{origin}: {names[name]}", what, "write it as text", "content" if name == "system" else "field"
                )
            )
        texts[name] = text if isinstance(text, str) else ""
    weight = _weight(value.get(names["weight"]))
    if weight is None:
        what = f"is {shown(value.get(names['weight']))}, not 0 or a number from 1e-9 to 1e9"
        problems.append(Problem(f"{origin}: {names['weight']}", what, "write 0, 1 or a share", "weight"))
    arguments = _template_args(value, origin)
    if isinstance(arguments, Problem):
        problems.append(arguments)
        arguments = {}
    return RowFields(texts["system"], tools, texts["task"], weight or 0.0, arguments, tuple(problems))


def _weight(raw: Any) -> float | None:
    """1 where the row says nothing; None where it is no weight. A CSV file holds numbers as text."""
    if raw is None or raw == "":
        return 1.0
    if isinstance(raw, str):
        try:
            raw = float(raw)
        except ValueError:
            return None
    return float(raw) if is_weight(raw) else None


def _template_args(value: Mapping[str, Any], origin: str) -> Mapping[str, Any] | Problem:
    given = [name for name in _ARGUMENTS if value.get(name) not in (None, "")]
    if len(given) > 1 and value[given[0]] != value[given[1]]:
        return Problem(f"{origin}: {given[1]}", f"differs from {given[0]}", "keep one of the two", "field")
    if not given:
        return {}
    raw, place = value[given[0]], f"{origin}: {given[0]}"
    if isinstance(raw, str):
        try:
            raw = parse(raw.encode(errors="surrogatepass"), place)
        except DataError as error:
            return dataclasses.replace(error.problems[0], rule="field")
    if not isinstance(raw, dict):
        return Problem(place, f"is {kind(raw)}, not an object", 'write it as {"name": value}', "field")
    return raw


def _tools(raw: Any, place: str, wrap: bool) -> list[Any]:
    """The tool schemas, also from JSON text, or a Problem in their place."""
    if isinstance(raw, str):
        try:
            raw = parse(raw.encode(errors="surrogatepass"), place) if raw.strip() else None
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
