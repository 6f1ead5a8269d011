"""Exact-rule scoring: an answer and the expected answer in, right or wrong and in what way out; no judge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn


@dataclass(frozen=True, slots=True)
class Score:
    """How one answer compares with the expected one.

    rule: "json" where the expected answer is a JSON object, else "exact".
    exact: all of it is right. The other three belong to rule "json" and are None under "exact":
    valid: the answer is one JSON object and nothing else; keys: it has exactly the expected keys, in any order;
    values: right values / expected keys, in [0, 1] (0 if not valid; 1 if no key is expected).
    """

    rule: Literal["json", "exact"]
    exact: bool
    valid: bool | None = None
    keys: bool | None = None
    values: float | None = None


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """The scores of one task as sums and counts.

    rows = all scores, of which exact_rows are right in full; json_rows = those under rule "json", of which valid_rows
    are JSON objects and keys_rows have the expected keys; values = sum of `values` / json_rows (None without any).
    """

    task: str
    rows: int
    exact_rows: int
    json_rows: int
    valid_rows: int
    keys_rows: int
    values: float | None

    @property
    def exact_share(self) -> float | None:
        """exact_rows / rows; None without rows."""
        return self.exact_rows / self.rows if self.rows else None


def score(answer: str, expected: str) -> Score:
    """Compare an answer with the expected one by the rule that the expected answer calls for.

    Rule "json", if `expected` is a JSON object: strings must be equal character by character, numbers in value
    (24.5 is 24.50, but "24.5" and true are no numbers), null only null, lists and objects in every part; the order of
    keys and white space do not count. exact = valid and keys and every value right.
    Rule "exact", otherwise: `answer.strip() == expected.strip()`.
    Any answer is scored; none raises.
    """
    wanted = _json_object(expected)
    if wanted is None:
        return Score(rule="exact", exact=answer.strip() == expected.strip())
    given = _json_object(answer)
    if given is None:
        return Score(rule="json", exact=False, valid=False, keys=False, values=0.0)
    keys = given.keys() == wanted.keys()
    right = sum(key in given and _same(given[key], value) for key, value in wanted.items())
    values = right / len(wanted) if wanted else 1.0
    return Score(rule="json", exact=keys and right == len(wanted), valid=True, keys=keys, values=values)


def summarise(scores: Mapping[str, Iterable[Score]]) -> dict[str, TaskSummary]:
    """One TaskSummary a task, in the order given."""
    return {task: _summary(task, list(group)) for task, group in scores.items()}


def _summary(task: str, scores: list[Score]) -> TaskSummary:
    shares = [one.values for one in scores if one.values is not None]
    return TaskSummary(
        task=task,
        rows=len(scores),
        exact_rows=sum(one.exact for one in scores),
        json_rows=len(shares),
        valid_rows=sum(one.valid is True for one in scores),
        keys_rows=sum(one.keys is True for one in scores),
        values=sum(shares) / len(shares) if shares else None,
    )


def _json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole text is (white space around it allowed), or None.

    Stricter than the standard library's reader, for a server would be: no NaN or Infinity, no key given twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError):  # RecursionError: a model that repeats "[" without end
        return None
    return value if isinstance(value, dict) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _same(left: Any, right: Any) -> bool:
    """Equality of JSON values. Python's own would take true for 1. No recursion, so no depth is too much."""
    pairs = [(left, right)]
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            pairs += zip(a, b, strict=True)
        elif _kind(a) is not _kind(b) or a != b:
            return False
    return True


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)
