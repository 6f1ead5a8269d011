"""kinds: every token of every example is counted once, as what it is for."""

from __future__ import annotations

import numpy as np
import pytest

from instil.report.kinds import answer_kinds, token_account
from instil.types import Example


def example(prompt: int, weights: list[float], kinds: list[int] | None = None, cut: int = 0) -> Example:
    return Example(
        np.zeros(prompt, np.int32), np.zeros(len(weights), np.int32), np.array(weights, np.float32), "a:1", 0,
        kinds=np.array(kinds or [], np.int8), cut_tokens=cut,
    )  # fmt: skip


def test_every_token_is_counted_once():
    "Prompt, targets by kind, weight 0, cut and dropped add up to all there were."
    account = token_account(
        [example(5, [1, 0.5, 1, 1], [1, 2, 0, 3]), example(2, [0, 0, 1], [0, 0, 3], cut=7), example(1, [1, 1])],
        dropped_tokens=11,
    )
    assert account.prompt == 8
    assert account.targets == {"answer": 2, "reasoning": 1, "tool_call": 1, "terminator": 3, "prompt": 0}
    assert (account.unlearnt, account.cut, account.dropped) == (2, 7, 11)
    assert account.target_tokens == 7
    assert account.tokens == 8 + 9 + 7 + 11


def test_without_kinds_the_last_token_ends_the_answer():
    "An example made by hand has none, and still is told apart."
    assert answer_kinds(example(1, [1, 1, 1])).tolist() == [0, 0, 3]
    assert answer_kinds(example(1, [])).tolist() == []


def test_nothing_is_an_account_too():
    "No example, no token."
    assert token_account([]).tokens == 0


def test_kinds_of_another_answer_are_refused():
    "As many kinds as answer tokens, or none."
    with pytest.raises(ValueError, match="1 kinds for 2 answer tokens of a:1"):
        answer_kinds(example(1, [1, 1], [0]))
