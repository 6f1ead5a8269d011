"""A pack, token by token: answers are targets, each predicted from the position before it, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instil.pack.tree import build_pack
from instil.types import Batch


def test_a_pack_by_hand(make_example: Any) -> None:
    """Two examples: prompt 1 2 3 with answer 4 5, and prompt 6 with answer 7 8 9 whose middle token does not count."""
    pack = build_pack([make_example([1, 2, 3], [4, 5]), make_example([6], [7, 8, 9], [1, 0, 0.5])], [12, 7])
    assert pack.tokens.tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert pack.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert pack.reach.tolist() == [4, 4, 4, 4, 7, 7, 7]
    assert pack.at.tolist() == [2, 3, 4, 6]
    assert pack.target.tolist() == [4, 5, 7, 9]
    assert pack.weight.tolist() == [1, 1, 1, 0.5]
    assert pack.owner.tolist() == [12, 12, 7, 7]
    assert pack.examples == (12, 7)


def test_a_packs_counts(make_example: Any) -> None:
    """Computed tokens leave out each example's last token; target tokens those of weight 0."""
    pack = build_pack([make_example([1, 2, 3], [4, 5]), make_example([6], [7, 8, 9], [1, 0, 0.5])], [0, 1])
    batch = Batch(0, 0, (pack, pack), 7.0)
    assert batch.computed_tokens == 2 * 7
    assert batch.target_tokens == 2 * 4


def test_the_kinds_of_numbers(make_example: Any) -> None:
    """32 bits everywhere, whatever the examples came in."""
    example = make_example([1, 2], [3])
    pack = build_pack([example], np.array([5]))
    for name in ("tokens", "positions", "reach", "at", "target", "owner"):
        assert getattr(pack, name).dtype == np.int32, name
    assert pack.weight.dtype == np.float32
    assert pack.examples == (5,)
    assert type(pack.examples[0]) is int


def test_an_answer_of_one_token(make_example: Any) -> None:
    """It is predicted from the last prompt token and never computed."""
    pack = build_pack([make_example([1, 2], [3])], [0])
    assert pack.tokens.tolist() == [1, 2]
    assert (pack.at.tolist(), pack.target.tolist()) == ([1], [3])


@pytest.mark.parametrize("seed", range(3))
def test_every_answer_token_is_a_target_and_no_prompt_token_is(seed: int, some_examples: Any) -> None:
    """Read back from the triples, each example's answer is complete, in order, and predicted from its own tokens."""
    examples = some_examples(6, seed=seed)
    pack = build_pack(examples, range(6))
    starts = np.flatnonzero(pack.positions == 0)
    for i, example in enumerate(examples):
        mine = pack.owner == i
        assert pack.target[mine].tolist() == example.answer_tokens.tolist()
        assert pack.positions[pack.at[mine]].tolist() == list(
            range(len(example.prompt_tokens) - 1, example.length_tokens)
        )
        assert (pack.at[mine] >= starts[i]).all()
        whole = [*example.prompt_tokens, *example.answer_tokens]
        assert pack.tokens[starts[i] : starts[i] + example.length_tokens].tolist() == whole[:-1]
