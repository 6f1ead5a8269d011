"""Rows in, conversations out: which rows are used, which a rule drops, which are wrong, and what to say of them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from instil.data.fields import NOTHING, RowFields, read_fields
from instil.data.formats import FORMATS, HANDLED, SHOWN_FORMATS, Dialogue, Format, mapped, recognise
from instil.data.jsontext import kind
from instil.data.ledger import LedgerEntry, Side
from instil.data.mapping import BROKEN_CALL, columns
from instil.data.messages import ALIASES, Parts, key_names
from instil.data.notes import Tally, control_characters, control_problem
from instil.data.sources import Row, Source
from instil.data.spec import override, says_dialogue
from instil.data.suggest import CONTEXT_NAMES, suggest
from instil.errors import Problem
from instil.types import ROLES, Conversation, Message, TokenPair

TRAILING = "{} rows end with messages after the last answer, from which nothing is learnt"
NO_ANSWER_WEIGHT = "{} rows give a weight to messages that are no answers; only answers are learnt"
PARTLY = "{} conversations without an answer left out of rows that have others"


@dataclass(frozen=True, slots=True)
class Parsed:
    """The rows of a source: each is one or more conversations, a dropped entry, or has at least one problem."""

    format_name: str
    conversations: tuple[Conversation, ...]
    dropped: tuple[LedgerEntry, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of one source are read; kinds: of the columns that the format needs, as its first row has them."""

    format: Format
    side: Side
    first: Row
    strict: bool = False
    mapping: Mapping[str, Any] = field(default_factory=dict)
    source: int = 0
    tally: Tally = field(default_factory=Tally)


def parse_rows(
    source: Source, side: Side, mapping: Mapping[str, Any] | None = None, *, strict: bool = False, number: int = 0
) -> Parsed:
    """The conversations of a file whose first row decides the format; never raises for what the rows hold.

    mapping: what the columns mean (spec.py). strict: a row without an answer is a problem, not dropped. number: of the
    source, for its conversations.
    """
    if not source.rows:
        return Parsed("no rows", (), (), ())
    mapping, first = mapping or {}, source.rows[0]
    format = mapped(mapping) if says_dialogue(mapping) else recognise(first.value)
    if format is None:
        return Parsed("unknown format", (), (), (_unknown_format(source),))
    reading = Reading(format, side, first, strict, mapping, number)
    conversations: list[Conversation] = []
    dropped: list[LedgerEntry] = []
    problems: list[Problem] = []
    for row in source.rows:
        outcome = parse_row(row, reading)
        if isinstance(outcome, LedgerEntry):
            dropped.append(outcome)
        elif isinstance(outcome, tuple):
            conversations += outcome
        else:
            problems += outcome
    if any(problem.rule == "role" for problem in problems):
        problems = _offered(problems, source, format)
    controls = control_characters(conversations, reading.tally)
    problems += control_problem(source.path, controls, len(source.rows))
    notes = [*_unread(source.path, first.value, format), *reading.tally.sentences(source.path)]
    return Parsed(format.name, tuple(conversations), tuple(dropped), tuple(problems), tuple(notes))


def parse_row(row: Row, reading: Reading) -> tuple[Conversation, ...] | LedgerEntry | list[Problem]:
    """The conversations of one row; an entry when a rule drops the row; or everything that is wrong with it."""
    value, format = row.value, reading.format
    if problems := _shape_problems(row, reading):
        return problems
    dialogues = format.read(value, row.origin, reading.tally)
    fields = NOTHING
    if len(value) > len(format.needs):
        fields = read_fields(value, row.origin, _columns(reading.mapping), wrap=format.name == "conversations")
    made: list[Conversation] = []
    reasons: list[tuple[str, str]] = []
    turn = 0
    for dialogue in dialogues:
        messages, pair, problems = _checked(dialogue, row.origin, fields)
        if problems:
            return _fate(problems, row, reading)
        if nothing := _nothing_to_learn(messages, pair):
            reasons.append(nothing)
            continue
        made.append(
            Conversation(messages, row.origin, fields.tools, fields.task, fields.weight, fields.template_args, turn,
                         reading.source, pair)
        )  # fmt: skip
        turn += 1 if pair else sum(message.role == "assistant" for message in messages)
    if not made:
        rule, reason = reasons[0] if reasons else ("no_answer", "the row has no answer")
        return _dropped(row, reading, rule, reason)
    if reasons:
        reading.tally.add(PARTLY, row.origin, len(reasons))
    _remark(made, reading.tally)
    return tuple(made)


def _shape_problems(row: Row, reading: Reading) -> list[Problem]:
    """Columns that are missing, or of another type than in the first row."""
    problems: list[Problem] = []
    value, first = row.value, reading.first.value
    for key in reading.format.needs:
        if key not in value:
            problems.append(_missing_key(row, key, reading.format))
        elif type(value[key]) is not type(first[key]):
            what = f"is {kind(value[key])} here, but {kind(first[key])} in {reading.first.origin}"
            problems.append(Problem(f"{row.origin}: {key}", what, "write it the same way in every row", "schema"))
    return problems


def _checked(
    dialogue: Dialogue, origin: str, fields: RowFields
) -> tuple[tuple[Message, ...], TokenPair | None, list[Problem]]:
    """The messages of a dialogue under the row's system text, or its pair; and what is wrong with either."""
    if isinstance(dialogue, TokenPair):
        return (), dialogue, list(fields.problems)
    parts = dialogue
    if fields.system:
        parts = [*_system(fields.system, parts, origin), *parts]
    problems = [part for part in parts if isinstance(part, Problem)]
    problems += fields.problems
    messages = () if problems else tuple(parts)
    return messages, None, problems or _order_problems(messages, origin)  # type: ignore[arg-type, return-value]


def _fate(problems: list[Problem], row: Row, reading: Reading) -> LedgerEntry | list[Problem]:
    """What becomes of a row with problems: dropped where all of them are of the one rule that allows it."""
    if reading.strict or any(problem.rule != BROKEN_CALL for problem in problems):
        return problems
    return _dropped(row, reading, BROKEN_CALL, f"{problems[0].place}: {problems[0].what}")  # type: ignore[return-value]


def _dropped(row: Row, reading: Reading, rule: str, reason: str) -> LedgerEntry | list[Problem]:
    if reading.strict:
        return [Problem(row.origin, reason, "add the answer, or remove the row", rule)]
    reading.tally.add(f"{{}} rows dropped ({rule})", row.origin)
    return LedgerEntry(row.origin, "dropped", reading.side, rule=rule, reason=reason)


def _nothing_to_learn(messages: tuple[Message, ...], pair: TokenPair | None) -> tuple[str, str] | None:
    """(rule, reason) where there is nothing to learn."""
    if pair is not None:
        return None if pair.answer_tokens else ("empty_answer", "the answer has no tokens")
    answered = False
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant":
            answered = True
            if not message.content.strip() and "tool_calls" not in message.fields:
                return "empty_answer", f"the assistant says nothing in message {number} of {len(messages)}"
    return None if answered else ("no_answer", "the row has no answer (no assistant message)")


def _remark(made: list[Conversation], tally: Tally) -> None:
    """What is worth saying of conversations that are used."""
    for each in made:
        if each.messages and each.messages[-1].role != "assistant":
            tally.add(TRAILING, each.origin)
        for message in each.messages:
            if message.fields and message.role != "assistant" and message.fields.get("weight"):
                tally.add(NO_ANSWER_WEIGHT, each.origin)
                break


def _system(text: str, messages: Parts, origin: str) -> Parts:
    """The row's own system text as its first message."""
    if messages and isinstance(messages[0], Message) and messages[0].role == "system":
        return [Problem(f"{origin}: system", "stands beside a system message", "keep one of the two", "system")]
    return [Message("system", text)]


def _order_problems(messages: tuple[Message, ...], origin: str) -> list[Problem]:
    """What no single message shows: a tool result out of nowhere."""
    problems = []
    for i, message in enumerate(messages):
        if message.role == "tool" and (i == 0 or messages[i - 1].role not in ("assistant", "tool")):
            what = f"message {i + 1} is a tool result, but no assistant message comes before it"
            problems.append(Problem(origin, what, "put the call before its result", "tool_result"))
    return problems


def _columns(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Where the row's fields stand: under their own names, but for those that the mapping says or uses otherwise."""
    if not mapping:
        return {}
    used = {name.split(".")[0] for key in ("prompt", "completion", "text", "system") if key in mapping
            for name in columns(mapping[key])}  # fmt: skip
    names = {name: mapping[name] for name in ("tools", "task", "weight") if name in mapping}
    if "system" in mapping and not says_dialogue(mapping):
        names["system"] = columns(mapping["system"])[0]
    return {**dict.fromkeys(used & HANDLED, ""), **names}


def _missing_key(row: Row, key: str, format: Format) -> Problem:
    near = difflib.get_close_matches(key, map(str, row.value), n=1)
    remedy = f"did you write it as {near[0]!r}?" if near else "add it, or remove the row"
    what = f"is missing (keys: {key_names(row.value)}; the first row has the format {format.name})"
    return Problem(f"{row.origin}: {key}", what, remedy, "missing_field")


def _unread(path: str, value: Mapping[str, Any], format: Format) -> list[str]:
    """A sentence about columns that look as if they belonged to the prompt, but that the format does not read."""
    if not format.shape:
        return []
    read = {*format.needs, "input", "history"} if format.name == "alpaca" else set(format.needs)
    unread = [name for name in value if name in CONTEXT_NAMES and name not in read]
    return [f"{path}: {format.name} does not read the columns {', '.join(unread)}"] if unread else []


def _offered(problems: list[Problem], source: Source, format: Format) -> list[Problem]:
    """The problems, the first unknown role with the mapping that would make all of the file's roles known."""
    guess = suggest(source.rows) if format.name in ("messages", "conversations") else None
    roles = guess.get("roles", {}) if guess else {}
    other = [name.strip().casefold() for name, role in roles.items() if name != role]
    if not other or "function_call" in other or not all(name in ALIASES or name in ROLES for name in other):
        return problems
    first = next(i for i, problem in enumerate(problems) if problem.rule == "role")
    remedy = f"{problems[first].remedy} or, for the whole file, {override(guess or {})}"
    return [*problems[:first], replace(problems[first], remedy=remedy), *problems[first + 1 :]]


def _unknown_format(source: Source) -> Problem:
    """The mapping to write, where one can be guessed, else the shapes that need none."""
    row, guess = source.rows[0], suggest(source.rows)
    what = f"no known format has the keys {key_names(row.value)}"
    say = override(guess) if guess else "'data.mapping={prompt: COLUMN, completion: COLUMN}'"
    shapes = " or ".join(format.shape for format in FORMATS if format.name in SHOWN_FORMATS[: 1 if guess else None])
    return Problem(row.origin, what, f"say what they are: {say}; or write the rows as {shapes}", "unknown_format")
