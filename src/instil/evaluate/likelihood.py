"""Held-out answer loss: nats per target token, on the same packs and head as training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from instil.pack.plan import packs_in_order
from instil.pack.prefixes import Prefixes
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
    nll = right = weights = 0.0
    targets = 0
    for indices in packs_in_order(Prefixes.of(examples), pack_tokens):
        pack = build_pack([examples[i] for i in indices], indices.tolist(), pack_tokens)
        found = pack_nll(net, pack)
        nll += float(found.nll)
        right += int(found.right)
        weights += float(pack.weight.sum(dtype=np.float64))
        targets += len(pack.target)
    return AnswerLoss(nll / weights, right / targets, targets, len(examples))
