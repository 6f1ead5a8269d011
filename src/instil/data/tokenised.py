"""A row that is tokenised already in, its pair of token lists out."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from instil.data.jsontext import kind
from instil.data.messages import is_weight, shown
from instil.errors import Problem
from instil.types import TokenPair

IGNORED = -100  # the label of a token that is not learnt, as torch's cross entropy and transformers have it


def read_token_pair(value: Mapping[str, Any], origin: str) -> TokenPair | list[Problem]:
    """{"prompt_tokens", "answer_tokens"} and, if not all 1, "weights": one for each answer token."""
    prompt, answer = value["prompt_tokens"], value["answer_tokens"]
    problems = [*_ids(prompt, f"{origin}: prompt_tokens"), *_ids(answer, f"{origin}: answer_tokens")]
    if not problems and not prompt:
        problems.append(Problem(f"{origin}: prompt_tokens", "is empty", "begin it with a token", "tokens"))
    if problems:
        return problems
    weights = value.get("weights")
    if weights is None:
        return TokenPair(tuple(prompt), tuple(answer), (1.0,) * len(answer))
    place = f"{origin}: weights"
    if not isinstance(weights, list):
        return [Problem(place, f"is {kind(weights)}, not a list", "give a number for each answer token", "weight")]
    if len(weights) != len(answer):
        what = f"holds {len(weights):,} numbers for {len(answer):,} answer tokens"
        return [Problem(place, what, "give a number for each answer token", "weight")]
    bad = next((i for i, weight in enumerate(weights) if not is_weight(weight)), None)
    if bad is not None:
        what = f"is {shown(weights[bad])}, not 0 or a number from 1e-9 to 1e9"
        return [Problem(f"{place}[{bad}]", what, "write 0, 1 or a share", "weight")]
    return TokenPair(tuple(prompt), tuple(answer), tuple(map(float, weights)))


def read_labels(value: Mapping[str, Any], origin: str) -> TokenPair | list[Problem]:
    """{"input_ids", "labels"}: what has a label is the answer; it must be the end of the row, in one piece."""
    ids, labels = value["input_ids"], value["labels"]
    place = f"{origin}: labels"
    if problems := _ids(ids, f"{origin}: input_ids"):
        return problems
    if not isinstance(labels, list) or len(labels) != len(ids):
        what = f"holds {len(labels):,} for {len(ids):,} input_ids" if isinstance(labels, list) else f"is {kind(labels)}"
        return [Problem(place, what, "give one for each of input_ids", "tokens")]
    learnt = len(list(takewhile(lambda label: label != IGNORED, reversed(labels))))
    start = len(ids) - learnt
    differ = next((i for i in range(start, len(ids)) if labels[i] != ids[i] or type(labels[i]) is not int), None)
    outside = next((i for i in range(start) if labels[i] != IGNORED), None)
    if outside is not None:
        what = f"are not one piece at the end: {shown(labels[outside])} at {outside} stands before {IGNORED}"
        return [Problem(place, what, "give a row for each answer, without padding after it", "tokens")]
    if differ is not None:
        what = f"{shown(labels[differ])} at {differ} is not the token there ({ids[differ]})"
        return [Problem(place, what, "labels are not shifted: give the same numbers as input_ids", "tokens")]
    if not start:
        return [Problem(place, "the first token has no prompt before it", f"label it {IGNORED}", "tokens")]
    return TokenPair(tuple(ids[:start]), tuple(ids[start:]), (1.0,) * learnt)


def _ids(raw: Any, place: str) -> list[Problem]:
    """What is wrong with a list of token ids, if anything is."""
    if not isinstance(raw, list):
        return [Problem(place, f"is {kind(raw)}, not a list", "give the token ids", "tokens")]
    if set(map(type, raw)) <= {int} and (not raw or (min(raw) >= 0 and max(raw) < 2**31)):
        return []
    bad = next(i for i, token in enumerate(raw) if type(token) is not int or not 0 <= token < 2**31)
    return [Problem(f"{place}[{bad}]", f"{shown(raw[bad])} is not a token id", "give whole numbers from 0", "tokens")]
