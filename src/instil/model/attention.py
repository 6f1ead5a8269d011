"""Isolated attention behind transformers' attention interface: `loop` (per document, no mask) and `dense` (reference).

Query q may look at key k exactly when k <= q < reach[k]. Nothing else about a pack matters to attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from instil.errors import ModelError
from instil.types import Pack


@dataclass(frozen=True)
class Layout:
    """What attention needs to know of a pack, on the model's device.

    reach [n]; bounds = document boundaries 0 = b0 < b1 < ... = n of a pack without branches, () for a tree.
    """

    reach: Tensor
    bounds: tuple[int, ...]


class Backend(Protocol):
    """query [1, H, n, D], key and value [1, K, n, D] with K dividing H, scale of the logits -> [1, H, n, D]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor: ...


def layout_of(pack: Pack, device: torch.device) -> Layout:
    """The layout of a pack; it is plain when every document is a run of tokens that all reach its end."""
    n = len(pack.tokens)
    starts = np.flatnonzero(pack.positions == 0)
    bounds = (*starts.tolist(), n)
    ends = np.repeat(bounds[1:], np.diff(bounds))
    plain = bool(np.array_equal(ends, pack.reach))
    return Layout(torch.from_numpy(pack.reach.astype(np.int64)).to(device), bounds if plain else ())


def loop(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One causal flash call per document: cost grows with the sum of squared lengths, no mask exists."""
    if not layout.bounds:
        raise ValueError("the loop backend needs a pack without branches; use dense")
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    sizes = np.diff(layout.bounds).tolist()
    parts = zip(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), strict=True)
    return torch.cat([scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale) for q, k, v in parts], dim=2)


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """The definition itself: the [n, n] matrix of who may look at whom. Slow, right for every layout."""
    i = torch.arange(query.shape[2], device=query.device)
    visible = (i[None, :] <= i[:, None]) & (i[:, None] < layout.reach[None, :])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


BACKENDS: dict[str, Backend] = {"loop": loop, "dense": dense}
UNSUPPORTED = {"softcap": "attention soft-capping", "s_aux": "attention sinks"}


def _through_interface(backend: Backend) -> Any:
    """The backend as transformers calls it: (module, q, k, v, mask, ...) -> ([1, n, H, D], None)."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layout: Layout | None = kwargs.get("instil_layout")
        name = type(module).__name__
        if layout is None:
            raise ModelError.at(name, "does not hand the pack's layout to its attention", "use another model class")
        for key_word, what in UNSUPPORTED.items():
            if kwargs.get(key_word) is not None:
                raise ModelError.at(name, f"uses {what}, which is not isolated exactly yet", "use another model")
        window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
        longest = int(max(np.diff(layout.bounds))) if layout.bounds else query.shape[2]
        if window is not None and longest > window:
            what = f"attends through a window of {window} tokens, and an example has {longest}"
            raise ModelError.at(name, what, f"set pack.tokens to at most {window}, or use another model")
        if kwargs.get("dropout"):
            raise ModelError.at(name, "uses attention dropout", "set attention_dropout to 0 in the model's config.json")
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return backend(query, key, value, layout, scale).transpose(1, 2), None

    return attend


for _name, _backend in BACKENDS.items():
    AttentionInterface.register(f"instil_{_name}", _through_interface(_backend))


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the model with another attention ("instil_loop", "instil_dense", "sdpa", "eager") for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
