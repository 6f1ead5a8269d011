"""A pack is its examples one by one: losses and gradients agree, and no document can touch another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from instil.model.attention import Layout, Rule, _through_interface, best, dense, layout_of
from instil.model.head import head_of
from instil.model.layout import Segment
from instil.model.load import hidden_states
from instil.pack.tree import build_pack
from instil.types import Example, Pack

MODELS = ["llama", "llama-tied", "qwen2", "qwen3", "gpt2", "gpt2-untied", "granite", "cohere"]
BACKENDS = ["instil_loop", "instil_dense"]


def everybody_sees_all(query: Any, key: Any, value: Any, layout: Layout, rule: Rule) -> Any:
    """The planted fault: plain causal attention over the whole pack, as packing without isolation does it."""
    n = query.shape[2]
    return best(query, key, value, Layout(layout.reach, layout.positions, (Segment(0, n, n, 0, 0),), n), rule)


AttentionInterface.register("instil_planted_leak", _through_interface(everybody_sees_all))


def positions_run_on(pack: Pack) -> Pack:
    """The planted fault: positions are not restarted at each document, though attention is isolated."""
    return replace(pack, positions=np.arange(len(pack.tokens), dtype=np.int32))


@contextmanager
def caught() -> Iterator[None]:
    with pytest.raises(AssertionError):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", MODELS)
def test_packed_loss_and_gradients_are_those_of_one_by_one(
    kind: str, backend: str, tiny: Any, some_examples: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """Training on a pack gives every parameter the gradient of training its examples alone, to 1e-6."""
    net = tiny(kind, attention=backend)
    examples = some_examples(lengths=[(5, 4), (1, 3), (9, 1), (3, 7)], weighted=True)
    expected = textbook(net, examples)
    assert_same(gradients_of(net, [build_pack(examples, range(4))]), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_leak_between_documents_is_caught(
    kind: str, tiny: Any, some_examples: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails for attention that reaches over the whole pack."""
    net = tiny(kind, attention="instil_planted_leak")
    examples = some_examples(3)
    with caught():
        assert_same(gradients_of(net, [build_pack(examples, range(3))]), textbook(net, examples), tolerance=1e-2)


def test_a_long_reach_is_caught(
    tiny: Any, some_examples: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails for a pack whose `reach` says that everybody may look back at everything."""
    net = tiny(attention="instil_dense")
    examples = some_examples(3)
    pack = build_pack(examples, range(3))
    pack = replace(pack, reach=np.full_like(pack.reach, len(pack.tokens)))
    with caught():
        assert_same(gradients_of(net, [pack]), textbook(net, examples), tolerance=1e-2)


def test_positions_that_run_on_are_caught(
    tiny: Any, some_examples: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails for learned positions that are not restarted.

    (Rotary positions are relative: there a shift of a whole isolated document changes nothing, by design.)
    """
    net = tiny("gpt2", attention="instil_dense")
    examples = some_examples(3)
    pack = positions_run_on(build_pack(examples, range(3)))
    with caught():
        assert_same(gradients_of(net, [pack]), textbook(net, examples), tolerance=1e-2)


def check_isolation(net: Any, pack: Pack, examples: list[Example]) -> None:
    """Change the tokens of each document in turn: the logits of all others stay the same to the bit."""
    with torch.no_grad():
        before = head_of(net).logits(hidden_states(net, pack))
        start = 0
        for i in pack.examples:
            end = start + examples[i].length_tokens
            tokens = pack.tokens.copy()
            tokens[start:end] = (tokens[start:end] + 1) % 97
            after = head_of(net).logits(hidden_states(net, replace(pack, tokens=tokens)))
            assert torch.equal(after[:start], before[:start])
            assert torch.equal(after[end:], before[end:])
            assert not torch.equal(after[start:end], before[start:end])
            start = end
    assert start == len(pack.tokens), "the examples have nothing in common"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_changing_one_document_changes_no_other(kind: str, backend: str, tiny: Any, some_examples: Any) -> None:
    """The influence of a document on the logits of another is exactly 0, not merely small."""
    examples = some_examples(4)
    check_isolation(tiny(kind, attention=backend), build_pack(examples, range(4)), examples)


def test_the_isolation_check_catches_a_leak(tiny: Any, some_examples: Any) -> None:
    """The same check fails for attention over the whole pack."""
    examples = some_examples(4)
    with caught():
        check_isolation(tiny(attention="instil_planted_leak"), build_pack(examples, range(4)), examples)


def tree_pack(first: Example, second: Example, shared: int) -> Pack:
    """By hand: two examples whose first `shared` tokens, their whole prompt, are computed once.

    Laid out as prompt, rest of the first, rest of the second. The prompt is reached by all; each branch by itself only.
    """
    a, b = len(first.answer_tokens) - 1, len(second.answer_tokens) - 1
    n = shared + a + b
    return Pack(
        tokens=np.concatenate([first.prompt_tokens, first.answer_tokens[:-1], second.answer_tokens[:-1]]),
        positions=np.array([*range(shared), *range(shared, shared + a), *range(shared, shared + b)], np.int32),
        reach=np.array([n] * shared + [shared + a] * a + [n] * b, np.int32),
        at=np.array(
            [*range(shared - 1, shared + a), shared - 1, *range(shared + a, n)], np.int32
        ),  # both first answer tokens are predicted from the last prompt token
        target=np.concatenate([first.answer_tokens, second.answer_tokens]),
        weight=np.concatenate([first.weights, second.weights]),
        owner=np.array([0] * (a + 1) + [1] * (b + 1), np.int32),
        examples=(0, 1),
    )


def branches(make_example: Callable[..., Example]) -> tuple[Example, Example]:
    """Two answers to one prompt."""
    prompt = [11, 12, 13, 14, 15]
    return make_example(prompt, [21, 22, 23], [1, 0.5, 2]), make_example(prompt, [31, 32, 33, 34, 35])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_a_shared_prefix_trains_as_its_pairs_alone(
    kind: str, backend: str, tiny: Any, make_example: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The one-line rule holds for trees: a prompt computed once for two answers gives the gradient of both pairs alone."""
    net = tiny(kind, attention=backend)
    pair = branches(make_example)
    pack = tree_pack(*pair, shared=5)
    assert len(pack.tokens) == 5 + 2 + 4  # 14 computed tokens alone
    assert_same(gradients_of(net, [pack]), textbook(net, pair))


def test_a_branch_that_sees_its_sibling_is_caught(
    tiny: Any, make_example: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails when the first branch's reach extends over the second."""
    net = tiny(attention="instil_dense")
    pair = branches(make_example)
    pack = tree_pack(*pair, shared=5)
    with caught():
        leaking = replace(pack, reach=np.full_like(pack.reach, len(pack.tokens)))
        assert_same(gradients_of(net, [leaking]), textbook(net, pair), tolerance=1e-2)


def test_a_branch_without_its_own_depth_is_caught(
    tiny: Any, make_example: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails when the second branch's positions count on from the first."""
    net = tiny(attention="instil_dense")
    pair = branches(make_example)
    with caught():
        pack = positions_run_on(tree_pack(*pair, shared=5))
        assert_same(gradients_of(net, [pack]), textbook(net, pair), tolerance=1e-2)


def test_dense_and_loop_agree(some_examples: Any) -> None:
    """The fast backend is the reference backend on every plain pack."""
    torch.manual_seed(1)
    layout = layout_of(build_pack(some_examples(lengths=[(1, 1), (3, 6), (9, 6)]), range(3)), torch.device("cpu"))
    n = len(layout.reach)
    q, k, v = torch.randn(1, 4, n, 8), torch.randn(1, 2, n, 8), torch.randn(1, 2, n, 8)
    rule = Rule(0.3)
    torch.testing.assert_close(best(q, k, v, layout, rule), dense(q, k, v, layout, rule), rtol=1e-5, atol=1e-6)
