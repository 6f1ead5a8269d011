"""pairs: rows that are tokenised already come through as they are, or say what is wrong with them."""

from __future__ import annotations

import pytest

from instil.data.rows import parse_rows
from instil.data.sources import Row, Source
from instil.types import TokenPair


def parsed(value):
    return parse_rows(Source("f", "JSONL", (Row(value, "f:1"),), 0, ()), "train")


@pytest.mark.parametrize(
    ("value", "weights"),
    [
        ({"prompt_tokens": [1, 2], "answer_tokens": [3, 4]}, (1.0, 1.0)),
        ({"prompt_tokens": [1, 2], "answer_tokens": [3, 4], "weights": None}, (1.0, 1.0)),
        ({"prompt_tokens": [1, 2], "answer_tokens": [3, 4], "weights": [0, 0.5]}, (0.0, 0.5)),
        ({"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4], "attention_mask": [1, 1, 1, 1]}, (1.0, 1.0)),
    ],
)
def test_a_pair_is_taken_as_it_is(value, weights):
    """Token lists, or one list with labels at its end."""
    (conversation,) = parsed(value).conversations
    assert conversation.pair == TokenPair((1, 2), (3, 4), weights)
    assert conversation.messages == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"prompt_tokens": [], "answer_tokens": [1]}, "prompt_tokens: is empty"),
        ({"prompt_tokens": [1, -1], "answer_tokens": [1]}, "prompt_tokens[1]: -1 is not a token id"),
        ({"prompt_tokens": [1], "answer_tokens": [True]}, "answer_tokens[0]: True is not a token id"),
        ({"prompt_tokens": [1], "answer_tokens": [2.0]}, "answer_tokens[0]: 2.0 is not a token id"),
        ({"prompt_tokens": [1], "answer_tokens": [2**31]}, "answer_tokens[0]: 2147483648 is not a token id"),
        ({"prompt_tokens": "1", "answer_tokens": [2]}, "prompt_tokens: is text, not a list"),
        (
            {"prompt_tokens": [1], "answer_tokens": [2], "weights": [1, 1]},
            "weights: holds 2 numbers for 1 answer tokens",
        ),
        (
            {"prompt_tokens": [1], "answer_tokens": [2], "weights": [-1]},
            "weights[0]: is -1, not 0 or a number from 1e-9 to 1e9",
        ),
        ({"prompt_tokens": [1], "answer_tokens": [2], "weights": 1}, "weights: is a number, not a list"),
        ({"input_ids": [1, 2], "labels": [-100]}, "labels: holds 1 for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": "x"}, "labels: is text; give one for each"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, -100]}, "labels: are not one piece at the end: 2 at 1"),
        ({"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4]}, "labels: are not one piece at the end: 2 at 1"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 3, 4]}, "labels: 3 at 1 is not the token there (2)"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "labels: the first token has no prompt before it"),
    ],
)
def test_a_bad_pair_is_named(value, expected):
    """Labels that are shifted, padded or in pieces are never trained on."""
    (line,) = map(str, parsed(value).problems)
    assert line.startswith(f"f:1: {expected}")


def test_a_row_with_nothing_labelled_is_dropped():
    """There is no answer in it."""
    assert [entry.rule for entry in parsed({"input_ids": [1], "labels": [-100]}).dropped] == ["empty_answer"]
