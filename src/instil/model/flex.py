"""FlexAttention over a pack, for what flash attention cannot do on CUDA: soft caps, and windows in trees.

The mask is the rule itself; blocks that nobody looks into are skipped. A sink is applied to the output by the returned
log-sum-exp, which autograd differentiates.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from instil.model.layout import Layout


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query [1, H, n, D], key [1, K, n, D], value [1, K, n, E], sinks [H] -> [1, H, n, E].

    cap: logits become cap * tanh(logits / cap). Compiled on CUDA; elsewhere torch runs it as written, for tests.
    """
    shared = query.shape[1] // key.shape[1]
    if shared & (shared - 1):  # the kernel shares heads of keys only among a power of two of queries
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        assert cap is not None
        return cap * torch.tanh(score / cap)

    run = _compiled() if query.is_cuda else flex_attention
    found: Any = run(
        query, key, value, score_mod=capped if cap is not None else None, block_mask=block_mask(layout, window),
        scale=scale, enable_gqa=key.shape[1] != query.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is None:
        return found
    out, lse = found[0], found[1].lse
    kept = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])  # exp(lse) / (exp(lse) + exp(sink))
    return (out * kept[..., None]).to(query.dtype)


def block_mask(layout: Layout, window: int | None) -> Any:
    """Who may look at whom, as FlexAttention wants it; made once for a layout and window."""
    cut = layout.window(window)

    def make() -> Any:
        reach, positions = layout.reach, layout.positions
        n = len(reach)

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (k <= q) & (q < reach[k])
            return seen if cut is None else seen & (positions[q] - positions[k] < cut)

        return create_block_mask(visible, None, None, n, n, device=reach.device, _compile=reach.is_cuda)

    return layout.once(("flex", cut), make)


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)
