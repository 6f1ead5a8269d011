"""Exact attention over a pack's prefix tree: parts computed apart, merged by log-sum-exp, differentiated with the merged.

Forward: a query's softmax over several sets of keys is sum_p exp(lse_p - lse) * out_p with lse = logsumexp_p lse_p.
Backward: each part's kernel gets the *merged* out and lse, and dq, dk, dv add up. (Differentiating the parts' own outputs
would miss that each lse moves the weights of all the others.) A sink, one more logit per head without a value, is one
more set of keys: lse' = logaddexp(lse, sink), and d sink = -sum_q exp(sink - lse'_q) * (dO_q . O_q).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instil.model.kernels import Kernel, widened
from instil.model.layout import Layout


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    kernel: Kernel,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [1, H, n, D], key [1, K, n, D], value [1, K, n, E], sinks [H] -> [1, H, n, E], differentiable in all four.

    window: of positions, a query sees keys less than this before it; None = all.
    """
    heads, shared, width = query.shape[1], key.shape[1], value.shape[-1]
    room = -(-max(query.shape[-1], width) // 8) * 8  # the CUDA kernels want one head size, a multiple of 8
    q, k, v = (_rows(widened(x, room)[0].transpose(0, 1)) for x in (query, key, value))
    if sinks is not None:
        sinks = sinks.view(shared, heads // shared)
    out = _Tree.apply(q.unflatten(1, (shared, heads // shared)), k, v, sinks, layout, kernel, scale, window)
    return out.flatten(1, 2)[..., :width].transpose(0, 1)[None]


def _rows(x: Tensor) -> Tensor:
    """As it is where the last dimension is contiguous, which is all that the kernels want."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Tree(torch.autograd.Function):
    """q [n, K, G, D], k, v [n, K, D], sinks [K, G] or None -> [n, K, G, D]."""

    @staticmethod
    def forward(ctx: Any, q, k, v, sinks, layout, kernel, scale, window):  # type: ignore[no-untyped-def]
        own, above = kernel.groups(layout, window)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        merged = bool(above) or sinks is not None
        out = torch.empty_like(q, dtype=wide if merged else q.dtype, memory_format=torch.contiguous_format)
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        out[: layout.given_tokens], lse[: layout.given_tokens] = 0, 0  # rows that nobody asks for
        for group in own:
            part_out, part_lse = kernel.forward(q, k, v, layout, group, scale)
            group.queries.put(out, part_out)
            group.queries.put(lse, part_lse)
        for group in above:
            part_out, part_lse = kernel.forward(q, k, v, layout, group, scale)
            before, rows = group.queries.of(lse), group.queries.of(out)
            both = torch.logaddexp(before, part_lse)
            rows.mul_((before - both).exp_()[..., None])
            rows.addcmul_(part_out.to(wide), (part_lse - both).exp_()[..., None])
            group.queries.put_back(out, rows)
            group.queries.put(lse, both)
        if sinks is not None:
            both = torch.logaddexp(lse, sinks.to(wide))
            out *= (lse - both).exp_()[..., None]
            lse = both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.given = layout, kernel, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        q, k, v, sinks, out, lse = ctx.saved_tensors
        layout, kernel, scale, window = ctx.given
        grad = _rows(grad)
        own, above = kernel.groups(layout, window)
        d_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            share = (sinks.to(lse.dtype) - lse).exp_()
            d_sinks = -(share * (grad.to(lse.dtype) * out).sum(-1)).sum(0).to(sinks.dtype)
        if not any(ctx.needs_input_grad[:3]):
            return None, None, None, d_sinks, None, None, None, None
        # Where no token is in two parts and each is in one, there is nothing to add up.
        once = not above and not layout.given_tokens and all(group.causal for group in own)
        if once:
            sums = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        else:
            sums = tuple(torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
        for group in (*own, *above):
            parts = kernel.backward(grad, q, k, v, out, lse, layout, group, scale)
            for total, part, rows in zip(sums, parts, (group.queries, group.keys, group.keys), strict=True):
                if once:
                    rows.put(total, part)
                else:
                    rows.add(total, part)
        dq, dk, dv = (total.to(x.dtype) for total, x in zip(sums, (q, k, v), strict=True))
        return dq, dk, dv, d_sinks, None, None, None, None
