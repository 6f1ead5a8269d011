"""Kernels of a part of attention: from q, k, v to output and log-sum-exp, and back from those of the whole row.

The gradient of a part needs its q, k, v and, of the whole softmax of each query, the output and the log-sum-exp: with
P = exp(s - lse), dV = P' dO, dS = P * (dO V' - rowsum(dO * O)), dQ = scale * dS K, dK = scale * dS' Q. So the parts of a
row can be computed apart, merged, and differentiated apart (tree_attention.py).

Shapes, tokens first: q, out [n, K, G, D]; k, v [m, K, D]; lse [n, K, G], float32 (float64 for float64); K = heads of the
keys, G = queries that share one. Kernels get the tensors of the whole pack and a Group, and return the group's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from instil.model.layout import Group, Layout, Part

# The CPU's flash backward pays about 12 us for each small matrix product in bf16, in float32 almost nothing: up to this
# many (query, key) pairs a part float32 is up to three times as fast, and more exact. Measured without matrix units
# (AMX); with them the products themselves are faster in bf16, and the limit is where the two are estimated to meet.
FLOAT32_PAIRS = {False: 1 << 17, True: 1 << 15}
MATMUL_BYTES = 32 << 20  # of logits that the plain kernel has in memory at one time


class Kernel(Protocol):
    """forward -> out, lse of the group's query rows; backward -> dq of its query rows, dk and dv of its key rows."""

    def groups(self, layout: Layout, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]: ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, group: Group, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, group: Group,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


def _mask(layout: Layout, group: Group, dtype: torch.dtype) -> Tensor | None:
    """The additive mask [queries, keys] of the band of a group's one part, None where it has none."""
    (part,) = group.parts
    if part.offset is None or group.window is None:
        return None
    return layout.band(part.offset, group.window, dtype)[: part.q1 - part.q0, : part.k1 - part.k0]


@dataclass(frozen=True)
class FlashCPU:
    """torch's flash kernels for the CPU, of any float type. No key is copied for the queries that share it."""

    def groups(self, layout: Layout, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        return layout.single(window)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, group: Group, scale: float
    ) -> tuple[Tensor, Tensor]:
        if len(group.parts) > 1:
            return _rectangle_forward(q, k, v, group, scale)
        (part,) = group.parts
        q, k, v = _by_head(q[part.q0 : part.q1]), *(_shared(x[part.k0 : part.k1], q.shape[2]) for x in (k, v))
        mask = _mask(layout, group, _wide(q.dtype))
        out, lse = _forward(q, k, v, 0.0, part.causal, attn_mask=mask, scale=scale)
        return out.permute(2, 0, 1, 3), lse.permute(2, 0, 1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, group: Group,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if len(group.parts) > 1:
            return _rectangle_backward(grad, q, k, v, out, lse, group, scale)
        (part,) = group.parts
        wide = _backward_dtype(q, group)
        here, there = slice(part.q0, part.q1), slice(part.k0, part.k1)
        g, q, out = (_by_head(x[here].to(wide)) for x in (grad, q, out))
        k, v = (_shared(x[there].to(wide), q.shape[1]) for x in (k, v))
        mask = _mask(layout, group, _wide(q.dtype))
        dq, dk, dv = _backward(
            g, q, k, v, out, lse[here].permute(1, 2, 0), 0.0, part.causal, attn_mask=mask, scale=scale
        )
        dk, dv = (x.sum(1, dtype=_wide(x.dtype)).transpose(0, 1) for x in (dk, dv))
        return dq.permute(2, 0, 1, 3), dk, dv


_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums over tokens are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _backward_dtype(q: Tensor, group: Group) -> torch.dtype:
    """The type in which the backward of a group's parts is fastest."""
    few = group.most_queries * group.most_keys <= FLOAT32_PAIRS[_has_matrix_units()]
    return _wide(q.dtype) if few else q.dtype


@cache
def _has_matrix_units() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())


def _by_head(x: Tensor) -> Tensor:
    """[n, K, G, D] -> [K, G, n, D]: to the kernel, K is the batch and G its heads."""
    return x.permute(1, 2, 0, 3)


def _shared(x: Tensor, group: int) -> Tensor:
    """[m, K, D] -> [K, G, m, D] without a copy: the stride over G is 0."""
    return x.transpose(0, 1)[:, None].expand(-1, group, -1, -1)


@cache
def _shares_natively() -> bool:
    """Whether the CPU kernel takes fewer heads of keys than of queries (torch >= 2.9). What a kernel that does not know of
    it would read lies within `keys`, so asking is safe."""
    keys = torch.tensor([[0.0, 1.0], [0.0, 3.0]]).view(1, 2, 2, 1)
    out, _ = _forward(torch.ones(1, 2, 1, 1), keys[:, :1], keys[:, :1], 0.0, False, scale=1.0)
    return bool(out[0, 0] == out[0, 1])


def _rectangle(x: Tensor, group: Group, wide: torch.dtype, *, zeros: bool = False) -> Tensor:
    """[n, ..., D] -> [parts, heads, width, D], in the type `wide`."""
    return group.padded.of(x.flatten(1, -2), zeros=zeros).to(wide).transpose(1, 2)


def _rectangle_keys(x: Tensor, group: Group, wide: torch.dtype, shared: int) -> Tensor:
    """As `_rectangle`, each head repeated where the kernel needs as many as there are of the queries."""
    rows = _rectangle(x, group, wide)
    return rows if shared == 1 or _shares_natively() else rows.repeat_interleave(shared, 1)


def _rectangle_forward(q: Tensor, k: Tensor, v: Tensor, group: Group, scale: float) -> tuple[Tensor, Tensor]:
    """Causal parts of nearly one length in one call. Filling comes after a part's tokens, so none of them looks at it."""
    shared = q.shape[2]
    keys, values = (_rectangle_keys(x, group, x.dtype, shared) for x in (k, v))
    out, lse = _forward(_rectangle(q, group, q.dtype), keys, values, 0.0, True, scale=scale)
    rows = group.padded.back(out.transpose(1, 2))
    return rows.unflatten(1, q.shape[1:3]), group.padded.back(lse.transpose(1, 2)).unflatten(1, q.shape[1:3])


def _rectangle_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: Group, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The filling's gradient is 0 where it is a query, and nothing looks at it where it is a key."""
    wide = _backward_dtype(q, group)
    shared = q.shape[2]
    keys, values = (_rectangle_keys(x, group, wide, shared) for x in (k, v))
    dq, dk, dv = _backward(
        _rectangle(grad, group, wide, zeros=True), _rectangle(q, group, wide), keys, values,
        _rectangle(out, group, wide), group.padded.of(lse.flatten(1)).transpose(1, 2), 0.0, True, scale=scale,
    )  # fmt: skip
    dq, dk, dv = (group.padded.back(x.transpose(1, 2)) for x in (dq, dk, dv))
    if dk.shape[1] != k.shape[1]:
        dk, dv = (x.unflatten(1, (-1, shared)).sum(2, dtype=_wide(x.dtype)) for x in (dk, dv))
    return dq.unflatten(1, q.shape[1:3]), dk, dv


@dataclass(frozen=True)
class Matmul:
    """Plain matrix products in float32 (float64), a block of queries at a time; on any device, with any head sizes.

    cap: logits become cap * tanh(logits / cap); None = they stay.
    """

    cap: float | None = None

    def groups(self, layout: Layout, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        return layout.once(("alone", layout.window(window)), lambda: _alone(layout, window))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, group: Group, scale: float
    ) -> tuple[Tensor, Tensor]:
        (part,) = group.parts
        out = q.new_empty(part.q1 - part.q0, *q.shape[1:3], v.shape[-1])
        lse = q.new_empty(out.shape[:3], dtype=_wide(q.dtype))
        values = self._wide_keys(v, part)
        for a, b, logits, _ in self._blocks(q, k, layout, group, scale):
            norm = logits.logsumexp(-1, keepdim=True)
            out[a:b] = ((logits - norm).exp_() @ values).permute(2, 0, 1, 3)
            lse[a:b] = norm[..., 0].permute(2, 0, 1)
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, group: Group,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        (part,) = group.parts
        keys, values = self._wide_keys(k, part), self._wide_keys(v, part)
        dq = q.new_empty(part.q1 - part.q0, *q.shape[1:], dtype=keys.dtype)
        dk, dv = (x.new_zeros(x.shape[0], x.shape[2], x.shape[3]) for x in (keys, values))
        for a, b, logits, slope in self._blocks(q, k, layout, group, scale):
            here = slice(part.q0 + a, part.q0 + b)
            g, o, query = (_by_head(x[here].to(keys.dtype)) for x in (grad, out, q))
            p = logits.sub_(_by_head(lse[here][..., None])).exp_()
            dv += (p.mT @ g).sum(1)
            ds = (g @ values.mT).sub_((g * o).sum(-1, keepdim=True)).mul_(p)
            if slope is not None:
                ds *= slope
            dq[a:b] = (ds @ keys).mul_(scale).permute(2, 0, 1, 3)
            dk += (ds.mT @ query).sum(1).mul_(scale)
        return dq, dk.transpose(0, 1), dv.transpose(0, 1)

    def _wide_keys(self, x: Tensor, part: Part) -> Tensor:
        """[m, K, D] -> [K, 1, keys, D] in the wide type."""
        return x[part.k0 : part.k1].to(_wide(x.dtype)).transpose(0, 1)[:, None]

    def _blocks(self, q: Tensor, k: Tensor, layout: Layout, group: Group, scale: float) -> Any:
        """(a, b, logits [K, G, b - a, keys], d logits / d uncapped logits or None) for blocks [a, b) of the queries."""
        (part,) = group.parts
        n, m = part.q1 - part.q0, part.k1 - part.k0
        keys = self._wide_keys(k, part)
        mask = _mask(layout, group, keys.dtype)
        rows = max(1, MATMUL_BYTES // (keys.element_size() * q.shape[1] * q.shape[2] * m))
        for a in range(0, n, rows):
            b = min(n, a + rows)
            query = _by_head(q[part.q0 + a : part.q0 + b].to(keys.dtype))
            logits = (query @ keys.mT).mul_(scale)
            slope = None
            if self.cap is not None:
                logits.div_(self.cap).tanh_()
                slope = 1 - logits.square()
                logits *= self.cap
            if mask is not None:
                logits += mask[a:b]
            if part.causal:
                i = torch.arange(a, b, device=q.device)[:, None]
                logits.masked_fill_(torch.arange(m, device=q.device) > i, float("-inf"))
            yield a, b, logits, slope


def _alone(layout: Layout, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
    """Each part in a group of its own."""
    own, above = layout.single(window)
    return tuple(Group([part], g.device, g.window) for g in own for part in g.parts), above


@dataclass(frozen=True)
class Varlen:
    """Flash attention for ranges of a pack given by their bounds: torch's own CUDA kernels, or others of their signature.

    q, k, v go in as [rows, heads, D]; lse comes out as [heads, rows]. Windows only without branches, where the kernel's
    `window_size_left` = window - 1 is exact.
    """

    forward_call: Callable[..., Any] = torch.ops.aten._flash_attention_forward
    backward_call: Callable[..., Any] = torch.ops.aten._flash_attention_backward

    def groups(self, layout: Layout, window: int | None) -> tuple[tuple[Group, ...], tuple[Group, ...]]:
        return layout.levels(window)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, group: Group, scale: float
    ) -> tuple[Tensor, Tensor]:
        rows = group.queries.of(q).flatten(1, 2), group.keys.of(k), group.keys.of(v)
        causal, left, right = _sides(group)
        out, lse, *_ = self.forward_call(
            *rows, *_bounds(group), 0.0, causal, False, scale=scale, window_size_left=left, window_size_right=right
        )
        return out.unflatten(1, q.shape[1:3]), lse.t().unflatten(1, q.shape[1:3])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, group: Group,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        causal, left, right = _sides(group)
        dq, dk, dv = self.backward_call(
            group.queries.of(grad).flatten(1, 2), group.queries.of(q).flatten(1, 2), group.keys.of(k), group.keys.of(v),
            group.queries.of(out).flatten(1, 2), group.queries.of(lse).flatten(1, 2).t().contiguous(), *_bounds(group),
            0.0, causal, torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device),
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return dq.unflatten(1, q.shape[1:3]), dk, dv


def _sides(group: Group) -> tuple[bool, int, int]:
    """(is_causal, window_size_left, window_size_right) as torch.nn.attention.varlen hands them on; -1 = no bound."""
    if group.window is not None:
        return False, group.window - 1, 0
    return group.causal, -1, 0 if group.causal else -1


def _bounds(group: Group) -> tuple[Tensor, Tensor, int, int]:
    """At least 2 queries are announced: for 1 the forward takes a shortcut that gives lse in another order."""
    return group.query_bounds, group.key_bounds, max(2, group.most_queries), group.most_keys


def widened(x: Tensor, width: int) -> Tensor:
    """x [..., D] with zeros up to `width`: logits and gradients stay, and further outputs are 0."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))
