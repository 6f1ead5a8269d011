"""The loss of a step, sum(weight * nll) / sum(weight) over the whole batch: divided here, once, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instil.model.head import HeadLoss, head_of, weighted_nll
from instil.model.load import hidden_states
from instil.types import Pack


def pack_nll(model: PreTrainedModel, pack: Pack) -> HeadLoss:
    """The summed loss of a pack's triples, in nats: not divided by anything."""
    hidden = hidden_states(model, pack)
    at, target = (torch.from_numpy(x).to(hidden.device, torch.int64) for x in (pack.at, pack.target))
    return weighted_nll(hidden, head_of(model), at, target, torch.from_numpy(pack.weight).to(hidden.device))


@dataclass(frozen=True)
class PackLoss:
    """share: this pack's part of the batch's mean loss (differentiable); nll and right: sums, for the record."""

    share: Tensor
    nll: Tensor
    right: Tensor


def pack_loss(model: PreTrainedModel, pack: Pack, weight_sum: float) -> PackLoss:
    """A pack's part of the step's loss. The parts of all packs of a batch add up to sum(weight * nll) / weight_sum.

    weight_sum: of the whole batch over all packs, accumulation steps and ranks, known before the first backward; so any
    split of a batch gives the same loss and the same gradient.
    """
    found = pack_nll(model, pack)
    return PackLoss(found.nll / weight_sum, found.nll.detach(), found.right)
