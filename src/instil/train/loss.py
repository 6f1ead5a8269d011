"""The loss of a step, sum(weight * nll) / sum(weight) over the whole batch: divided here, once, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instil.model.head import HeadLoss, Triples, head_of, weighted_nll
from instil.model.load import hidden_states
from instil.train.trunk import trunk_and_branches
from instil.types import Pack


def pack_nll(model: PreTrainedModel, pack: Pack) -> HeadLoss:
    """The summed loss of a pack's triples, in nats: not divided by anything."""
    if pack.cuts and not torch.is_grad_enabled():
        return trunk_and_branches(model, pack, lambda nll: nll)
    hidden = hidden_states(model, pack)
    return weighted_nll(hidden, head_of(model), Triples.of_pack(pack, hidden.device))


def share_of(nll: Tensor, weight_sum: float) -> Tensor:
    """A summed loss as its part of the batch's mean: the one division."""
    return nll / weight_sum


@dataclass(frozen=True)
class PackLoss:
    """share: this pack's part of the batch's mean loss (differentiable); nll, right, entropy: sums, for the record."""

    share: Tensor
    nll: Tensor
    right: Tensor
    entropy: Tensor


def pack_loss(model: PreTrainedModel, pack: Pack, weight_sum: float) -> PackLoss:
    """A pack's part of the step's loss. The parts of all packs of a batch add up to sum(weight * nll) / weight_sum.

    weight_sum: of the whole batch over all packs, accumulation steps and ranks, known before the first backward; so any
    split of a batch gives the same loss and the same gradient.
    """
    found = pack_nll(model, pack)
    return PackLoss(share_of(found.nll, weight_sum), found.nll.detach(), found.right, found.entropy)


def learn(model: PreTrainedModel, pack: Pack, weight_sum: float) -> PackLoss:
    """`pack_loss` and its backward; of a pack with cuts part by part (trunk.py), to the same gradient."""
    if not pack.cuts:
        part = pack_loss(model, pack, weight_sum)
        part.share.backward()
        return part
    found = trunk_and_branches(model, pack, lambda nll: share_of(nll, weight_sum))
    return PackLoss(share_of(found.nll, weight_sum), found.nll, found.right, found.entropy)
