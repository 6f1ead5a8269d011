"""Any split of a batch into packs gives the gradient of the whole batch, because the sum is divided once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instil.pack.tree import build_pack
from instil.train.loss import PackLoss, pack_nll
from instil.train.optim import MasterAdamW
from instil.train.step import step
from instil.types import Batch, Pack

LENGTHS = [(3, 1), (2, 9), (6, 2), (1, 14), (8, 1), (4, 5)]  # answers of very different lengths


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """The six examples in any order, cut anywhere into non-empty packs."""
    order = draw(st.permutations(range(len(LENGTHS))))
    cuts = sorted(draw(st.sets(st.integers(1, len(LENGTHS) - 1))))
    return [order[a:b] for a, b in zip([0, *cuts], [*cuts, len(LENGTHS)], strict=True)]


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(splits())
def test_any_split_gives_the_gradient_of_one_batch(
    tiny: Any, some_examples: Any, textbook: Any, gradients_of: Any, assert_same: Any, split: list[list[int]]
) -> None:
    """Loss and gradients are those of all examples one by one over the one count, however they are split."""
    net = tiny()
    examples = some_examples(lengths=LENGTHS, weighted=True)
    packs = [build_pack([examples[i] for i in part], part) for part in split]
    assert_same(gradients_of(net, packs), textbook(net, examples))


def mean_of_means(packs: list[Pack]) -> Any:
    """The planted fault: each micro-batch is divided by its own count, then the micro-batches are averaged.

    (transformers' Trainer did this until October 2024.)
    """

    def loss(net: Any, pack: Pack, weight_sum: float) -> PackLoss:
        found = pack_nll(net, pack)
        share = found.nll / float(pack.weight.sum()) / len(packs)
        return PackLoss(share, found.nll.detach(), found.right, found.entropy)

    return loss


def test_dividing_by_the_count_of_each_pack_is_caught(
    tiny: Any, some_examples: Any, textbook: Any, gradients_of: Any, assert_same: Any
) -> None:
    """The same comparison fails for the mean of the packs' means, by far more than rounding."""
    net = tiny()
    examples = some_examples(lengths=LENGTHS)
    packs = [build_pack([examples[i] for i in part], part) for part in ([0, 1], [2], [3, 4, 5])]
    expected = textbook(net, examples)
    with pytest.raises(AssertionError):
        assert_same(gradients_of(net, packs, mean_of_means(packs)), expected, tolerance=1e-2)
    whole = [build_pack(examples, range(len(examples)))]  # with a single pack the fault is invisible
    assert_same(gradients_of(net, whole, mean_of_means(whole)), expected)


def test_a_step_over_three_packs_has_the_loss_and_norm_of_one_batch(
    tiny: Any, some_examples: Any, textbook: Any
) -> None:
    """What `step` reports, the mean loss and the gradient's norm, is the textbook's for the whole batch."""
    net = tiny()
    examples = some_examples(lengths=LENGTHS, weighted=True)
    packs = tuple(build_pack([examples[i] for i in part], part) for part in ([4, 1], [2], [3, 0, 5]))
    weight_sum = float(sum(np.sum(pack.weight, dtype=np.float64) for pack in packs))
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    stats = step(net, optimizer, Batch(0, 0, packs, weight_sum), lr=0.0, clip_norm=0.0)
    loss, gradients = textbook(net, examples)
    assert stats.loss == pytest.approx(loss, rel=1e-6)
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    assert stats.grad_norm == pytest.approx(norm, rel=1e-6)
    assert stats.target_tokens == sum(int((e.weights > 0).sum()) for e in examples)
