"""duplicates: rows that agree in everything are found, others never."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from instil.data.duplicates import duplicates, repeated
from instil.types import Conversation, Message, TokenPair

ROWS = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.sampled_from([None, 1, True]), st.booleans()),
    max_size=12,
)


def talks(rows, start=0):
    return [
        Conversation(
            (Message("user", q), Message("assistant", a, {} if extra is None else {"n": extra})),
            f"f:{i}",
            ({"name": "t"},) if tool else (),
        )
        for i, (q, a, extra, tool) in enumerate(rows, start)
    ]


@given(ROWS, ROWS)
def test_the_same_rows_as_a_slow_comparison_of_everything(first, second):
    """The oracle compares each row with each as JSON text, in which 1 and true differ."""

    def firsts(rows, among):
        return [
            next((j for j in range(among(i)) if json.dumps(rows[i]) == json.dumps(rows[j])), None)
            for i in range(len(rows))
        ]

    expected = [(f"f:{i}", f"f:{j}") for i, j in enumerate(firsts(first, lambda i: i)) if j is not None]
    assert duplicates(talks(first)) == expected
    both = [*first, *second]
    found = firsts(both, lambda i: len(first))[len(first) :]
    expected = [(f"f:{i}", f"f:{j}") for i, j in enumerate(found, len(first)) if j is not None]
    assert repeated(talks(first), talks(second, len(first))) == expected


def test_token_pairs_and_branches():
    """Pairs are compared by their tokens; two branches of one row are no duplicates of each other."""
    pairs = [Conversation((), f"f:{i}", pair=TokenPair((1,), (i % 2,), (1.0,))) for i in range(3)]
    assert duplicates(pairs) == [("f:2", "f:0")]
    assert duplicates([*talks([("a", "x", None, False)]), *talks([("a", "x", None, False)])]) == []


def test_rows_with_one_text_do_not_take_quadratic_time():
    """4,000 rows with one text and different tools: each is compared once, not with all before it."""
    rows = [Conversation((Message("user", "q"),), f"f:{i}", ({"n": i},)) for i in range(4_000)]
    assert duplicates(rows) == []
    assert len(duplicates([*rows, *[Conversation(r.messages, "g:1", r.tools) for r in rows]])) == 4_000
