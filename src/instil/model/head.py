"""The vocabulary projection and its loss, for the positions in the triples only; the gradient is made in the forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

CHUNK_BYTES = 64 << 20  # of float32 logits that exist at one time


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale * (weight @ h + bias)), softcap(z) = cap * tanh(z / cap), as the model's config says.

    weight [V, d]; bias [V] or None; scale: a factor of all logits; cap: 0 = none.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    cap: float = 0.0

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., d] -> float32 logits [..., V]."""
        z = nn.functional.linear(hidden, self.weight, self.bias).float() * self.scale
        return self.cap * torch.tanh(z / self.cap) if self.cap else z


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model. That it equals the model's own logits is checked at load (model/load.py)."""
    projection: Any = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    cap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    return Head(projection.weight, getattr(projection, "bias", None), scale, cap)


@dataclass(frozen=True)
class HeadLoss:
    """nll = sum(weight * -log p(target)), float32, differentiable; right = how many targets are the model's first choice."""

    nll: Tensor
    right: Tensor


def weighted_nll(hidden: Tensor, head: Head, at: Tensor, target: Tensor, weight: Tensor) -> HeadLoss:
    """Sum of weighted negative log-likelihoods of a pack's triples, in nats.

    hidden [n, d]; at, target, weight [m] as in Pack. d nll / d logits = weight * (softmax(logits) - onehot(target)) at the
    triples; no other position has logits at all. Logits exist for a chunk of triples at a time.
    """
    nll, right = _TargetsOnly.apply(hidden, head.weight, head.bias, at, target, weight, head.scale, head.cap)
    return HeadLoss(nll, right)


class _TargetsOnly(torch.autograd.Function):
    """Three matmuls: logits, the hidden states' gradient, the weight's gradient; backward only scales what is there."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, at, target, counted, scale, cap):  # type: ignore[no-untyped-def]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_any = needs_hidden or needs_weight or needs_bias
        d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if needs_bias else None
        nll = torch.zeros((), dtype=torch.float32, device=hidden.device)
        right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        for a in range(0, len(at), rows):
            here, wanted, w = at[a : a + rows], target[a : a + rows], counted[a : a + rows, None]
            h = hidden.index_select(0, here)
            z = nn.functional.linear(h, weight, bias).float()
            if scale != 1.0:
                z *= scale
            if cap:
                z = (z / cap).tanh_()
                slope = 1 - z.square()
                z *= cap
            right += (z.argmax(1) == wanted).sum()
            log_norm = z.logsumexp(1, keepdim=True)
            nll += (w * (log_norm - z.gather(1, wanted[:, None]))).sum()
            if not needs_any:
                continue
            grad = z.sub_(log_norm).exp_()
            grad.scatter_add_(1, wanted[:, None], torch.full_like(w, -1.0, dtype=torch.float32))
            grad *= w * scale
            if cap:
                grad *= slope
            if d_bias is not None:
                d_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if d_hidden is not None:
                d_hidden.index_add_(0, here, (grad @ weight).float())
            if d_weight is not None:
                d_weight += grad.t() @ h
        ctx.save_for_backward(
            *(None if d is None else d.to(x.dtype) for d, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias)))
        )
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll, _):  # type: ignore[no-untyped-def]
        return (*(None if d is None else d * d_nll for d in ctx.saved_tensors), None, None, None, None, None)
