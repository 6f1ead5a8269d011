"""The vocabulary projection and its loss, for the positions in the triples only; the gradient is made in the forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from instil.types import Float32, Int32, Pack

CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # of logits in float32 that a chunk of rows would have
BLOCK_ROWS = 16  # of logits that are in float32 at one time on a CPU: they stay in its cache (docs/speed.md)


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
class Triples:
    """A pack's triples by the position that they are predicted from: a position is projected once, however many it has.

    rows [r]: the positions, ascending. row [m], target [m], weight [m]: of each triple, ascending by row. ends [r] (on the
    host): the triples of rows 0 .. i are those before ends[i].
    """

    rows: Tensor
    row: Tensor
    target: Tensor
    weight: Tensor
    ends: Int32

    @classmethod
    def of(cls, at: Int32, target: Int32, weight: Float32, device: torch.device | None = None) -> Triples:
        """Sorted on the host, then sent to the device."""
        order = np.argsort(at, kind="stable")
        rows, row, counts = np.unique(at[order], return_inverse=True, return_counts=True)

        def sent(x: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)

        whole = [sent(x.astype(np.int64)) for x in (rows, row, target[order])]
        return cls(whole[0], whole[1], whole[2], sent(weight[order]), np.cumsum(counts, dtype=np.int32))

    @classmethod
    def of_pack(cls, pack: Pack, device: torch.device) -> Triples:
        """Those of a pack."""
        return cls.of(pack.at, pack.target, pack.weight, device)

    def block(self, a: int, b: int) -> slice:
        """The triples of the rows a .. b - 1."""
        return slice(int(self.ends[a - 1]) if a else 0, int(self.ends[b - 1]))


@dataclass(frozen=True)
class HeadLoss:
    """Sums over triples, on the device: nll = weight * -log p(target), differentiable; right = how many targets are the
    model's first choice; entropy = weight * the entropy of the model's choice, nats."""

    nll: Tensor
    right: Tensor
    entropy: Tensor


def weighted_nll(hidden: Tensor, head: Head, triples: Triples) -> HeadLoss:
    """Sum of weighted negative log-likelihoods of a pack's triples, in nats.

    hidden [n, d]. d nll / d logits = sum over a position's triples of weight * (softmax(logits) - onehot(target)); no other
    position has logits at all. Logits exist for a chunk of positions at a time, in float32 on a CPU for a block of those.
    """
    return HeadLoss(*_TargetsOnly.apply(hidden, head.weight, head.bias, triples, head.scale, head.cap))


class _TargetsOnly(torch.autograd.Function):
    """Three matmuls: logits, the hidden states' gradient, the weight's gradient; backward only scales what is there."""

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, triples, scale, cap):  # type: ignore[no-untyped-def]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_any = needs_hidden or needs_weight or needs_bias
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count, device = len(triples.rows), hidden.device
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight: Tensor | None = None
        d_bias = torch.zeros(bias.shape, dtype=wide, device=device) if needs_bias else None
        sums = torch.zeros(2, dtype=wide, device=device)  # of nll and entropy
        right = torch.zeros((), dtype=torch.int64, device=device)
        chunk = chunk_rows(weight.shape[0], device)
        block = chunk if device.type == "cuda" else BLOCK_ROWS
        for a in range(0, count, chunk):
            b = min(a + chunk, count)
            h = hidden.index_select(0, triples.rows[a:b])
            z = nn.functional.linear(h, weight, bias)
            for c in range(a, b, block):
                d = min(c + block, b)
                grad = _rows(z[c - a : d - a].to(wide), triples, c, d, scale, cap, sums, right, needs_any)
                if needs_any:
                    z[c - a : d - a] = grad
                    if d_bias is not None:
                        d_bias += grad.sum(0)
            if d_hidden is not None:
                d_hidden.index_copy_(0, triples.rows[a:b], z @ weight)
            if needs_weight:
                share = z.t() @ h
                if count <= chunk:
                    d_weight = share
                else:
                    d_weight = share.to(wide) if d_weight is None else d_weight.add_(share)
        if needs_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        ctx.save_for_backward(
            *(None if d is None else d.to(x.dtype) for d, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias)))
        )
        nll, entropy = sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(right, entropy)
        return nll, right, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_nll, *_):  # type: ignore[no-untyped-def]
        return (*(None if d is None else d.mul_(d_nll) for d in ctx.saved_tensors), None, None, None)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many positions have logits at one time."""
    return max(1, CHUNK_BYTES["cuda" if device.type == "cuda" else "cpu"] // (4 * vocabulary))


def _rows(  # type: ignore[no-untyped-def]
    z: Tensor, triples: Triples, a: int, b: int, scale: float, cap: float, sums: Tensor, right: Tensor, wanted: bool
):
    """Add the rows a .. b - 1 to the sums; z, their raw logits, becomes the gradient of these, which is returned."""
    inside = triples.block(a, b)
    row, target, weight = triples.row[inside] - a, triples.target[inside], triples.weight[inside].to(z.dtype)
    if scale != 1.0:
        z.mul_(scale)
    slope = None
    if cap:
        z.div_(cap).tanh_()
        slope = 1 - z.square() if wanted else None
        z.mul_(cap)
    top, first = z.max(1, keepdim=True)
    right += (first[row, 0] == target).sum()
    z.sub_(top)
    own = z[row, target]
    p = z.exp()
    norm = p.sum(1)
    log_norm = norm.log()
    mean = torch.linalg.vecdot(p, z) / norm
    of_row = torch.zeros_like(norm).index_add_(0, row, weight)
    sums[0] += (weight * (log_norm[row] - own)).sum()
    sums[1] += (of_row * (log_norm - mean)).sum()
    if not wanted:
        return None
    p.mul_((of_row * scale / norm)[:, None])
    p.index_put_((row, target), weight * -scale, accumulate=True)
    return p if slope is None else p.mul_(slope)
