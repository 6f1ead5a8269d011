"""One optimizer update: the batch's packs forward and backward, one norm, one refusal, one update."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from instil.errors import DivergedError
from instil.train.optim import MasterAdamW
from instil.train.room import Room
from instil.types import Batch


@dataclass(frozen=True, slots=True)
class StepStats:
    """loss: nats per target token over the whole batch; accuracy: share of targets that were the first choice; entropy: of
    the model's choice where targets are, nats per target token. skipped: the loss was above what was allowed, and no
    weight has changed."""

    loss: float
    grad_norm: float
    accuracy: float
    entropy: float
    target_tokens: int
    computed_tokens: int
    skipped: bool = False


def step(
    net: PreTrainedModel,
    optimizer: MasterAdamW,
    batch: Batch,
    *,
    lr: float,
    clip_norm: float,
    most_loss: float = math.inf,
    room: Room | None = None,
) -> StepStats:
    """Train on one batch. Gradients are scaled to norm `clip_norm` when longer (0 = never).

    most_loss: a batch whose loss is above it is not learnt from. room: what to do where memory does not suffice.
    Raises DivergedError, with the weights as they were, when the loss or the gradient is not finite.
    """
    losses = (room or Room()).learn(net, optimizer, batch)
    norm = optimizer.grad_norm()
    sums = torch.stack(losses).sum(0)
    learnt = torch.isfinite(norm) & torch.isfinite(sums[0]) & (sums[0] / batch.weight_sum <= most_loss)
    divisor = (norm / clip_norm).clamp(min=1.0) if clip_norm else torch.ones_like(norm)
    optimizer.update(lr=lr, divisor=divisor, skip=(~learnt).float())
    nll, right, entropy, grad_norm = [*sums.tolist(), float(norm)]  # here, and only here, the host waits for the device
    loss, targets = nll / batch.weight_sum, batch.target_tokens
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise DivergedError.at(
            f"step {batch.step + 1}",
            f"loss {loss:.4g}, gradient norm {grad_norm:.4g}, rate {lr:g}: not finite; the update was not applied",
            "lower train.lr, or look at the rows of this step with `instil inspect`",
        )
    return StepStats(
        loss, grad_norm, right / targets, entropy / batch.weight_sum, targets, batch.computed_tokens, loss > most_loss
    )
