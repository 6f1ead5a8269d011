"""Held-out answer loss: nats per target token, on the same packs and head as training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from instil.pack.plan import plan_packs
from instil.pack.tree import build_pack
from instil.train.loss import pack_nll
from instil.types import Example


@dataclass(frozen=True, slots=True)
class AnswerLoss:
    """loss = sum(weight * nll) / sum(weight), nats per target token; accuracy = targets that were the first choice."""

    loss: float
    accuracy: float
    target_tokens: int
    examples: int


@torch.no_grad()
def answer_loss(net: PreTrainedModel, examples: Sequence[Example], *, pack_tokens: int) -> AnswerLoss:
    """The loss of the answers given their prompts; no gradient, no update. Needs at least one example."""
    lengths = np.array([e.length_tokens for e in examples])
    nll = right = weights = 0.0
    targets = 0
    for indices in plan_packs(lengths, pack_tokens, np.arange(len(examples))):
        pack = build_pack([examples[i] for i in indices], indices.tolist())
        found = pack_nll(net, pack)
        nll += float(found.nll)
        right += int(found.right)
        weights += float(pack.weight.sum(dtype=np.float64))
        targets += len(pack.target)
    return AnswerLoss(nll / weights, right / targets, targets, len(examples))
