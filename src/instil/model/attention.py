"""Attention over packs behind transformers' attention interface: which kernel for what, and what is refused.

Query q may look at key k exactly when k <= q < reach[k], and within a window w when position[q] - position[k] < w.
Nothing else about a pack matters to attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from instil.errors import ModelError
from instil.model.flex import flex
from instil.model.kernels import FlashCPU, Kernel, Matmul, Varlen
from instil.model.layout import KeysAndValues, Layout, layout_of
from instil.model.tree_attention import tree_attention

__all__ = ["BACKENDS", "Backend", "Layout", "Rule", "attention", "best", "dense", "layout_of"]


@dataclass(frozen=True)
class Rule:
    """What a layer asks of attention besides who sees whom: logits = scale * q k', capped to cap * tanh(logits / cap);
    window: of positions; sinks [H]: one more logit per head that takes weight and gives no value. None = without."""

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks: Tensor | None = None


class Backend(Protocol):
    """query [1, H, n, D], key [1, K, n, D], value [1, K, n, E] with K dividing H -> [1, H, n, E]."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor: ...


def best(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """The fastest exact way for this device, these tensors and this rule."""
    kernel = kernel_for(query, value, layout, rule)
    if kernel is None:
        return flexible(query, key, value, layout, rule)
    return in_parts(query, key, value, layout, rule, kernel)


def kernel_for(query: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Kernel | None:
    """The kernel whose parts make up the whole; None = FlexAttention, which has no parts.

    The CPU's flash kernels do everything but soft caps. CUDA's want 16-bit floats, heads of at most 256, an Ampere or
    newer device, no cap, and windows only in packs without branches. Other devices get plain matrix products.
    """
    device = query.device.type
    if device != "cuda":
        return FlashCPU() if device == "cpu" and rule.cap is None else Matmul(rule.cap)
    flash = (
        query.dtype in (torch.bfloat16, torch.float16)
        and max(query.shape[-1], value.shape[-1]) <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )
    if flash and rule.cap is None and (layout.plain or layout.window(rule.window) is None):
        return Varlen()
    return None


def in_parts(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernel: Kernel) -> Tensor:
    """Attention of parts that are merged."""
    return tree_attention(query, key, value, layout, kernel, scale=rule.scale, window=rule.window, sinks=rule.sinks)


def matmul(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """Parts by plain matrix products: on every device, for every rule, in bounded memory."""
    return in_parts(query, key, value, layout, rule, Matmul(rule.cap))


def flexible(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """FlexAttention."""
    return flex(query, key, value, layout, scale=rule.scale, window=rule.window, cap=rule.cap, sinks=rule.sinks)


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Tensor:
    """The definition itself: the [n, n] matrix of who may look at whom, then a softmax. Slow, right for every layout."""
    i = torch.arange(query.shape[2], device=query.device)
    visible = (i[None, :] <= i[:, None]) & (i[:, None] < layout.reach[None, :])
    if rule.window is not None:
        visible &= layout.positions[:, None] - layout.positions[None, :] < rule.window
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    logits = (query @ key.mT * rule.scale).to(torch.promote_types(query.dtype, torch.float32))
    if rule.cap is not None:
        logits = rule.cap * torch.tanh(logits / rule.cap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if rule.sinks is not None:
        sinks = rule.sinks[None, :, None, None].to(logits.dtype).expand(-1, -1, len(i), 1)
        logits = torch.cat([logits, sinks], dim=-1)
    return logits.softmax(-1)[..., : len(i)].to(value.dtype) @ value


# `loop` is named from when a pack was a loop over documents; it is the best there is.
BACKENDS: dict[str, Backend] = {"loop": best, "dense": dense, "matmul": matmul, "flex": flexible}

# What models hand to their attention that changes who sees whom or how much, and that no backend does.
UNSUPPORTED = {
    "position_bias": "position biases",
    "indices": "attention to selected tokens only",
    "block_indices": "attention to selected blocks only",
    "sinks": "attention sinks of a kind of its own",
}


def _through_interface(backend: Backend) -> Any:
    """The backend as transformers calls it: (module, q, k, v, mask, ...) -> ([1, n, H, E], None).

    The one door to attention; torch.compile leaves it alone, because the parts differ from pack to pack.
    """

    @torch.compiler.disable
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        layout: Layout | None = kwargs.get("instil_layout")
        if layout is None:
            raise _refused(module, "does not hand the pack's layout to its attention", "use another model class")
        _refuse(module, query, key, attention_mask, kwargs)
        scale = kwargs.get("scaling")
        rule = Rule(
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            window=_window(module, kwargs),
            cap=kwargs.get("softcap") or None,
            sinks=kwargs.get("s_aux"),
        )
        if layout.keep is not None:
            _put(layout.keep, module, key, value)
        if layout.given is None:
            return backend(query, key, value, layout, rule).transpose(1, 2), None
        trunk = layout.given[id(module)]
        key, value = (torch.cat([above, own], dim=2) for above, own in zip(trunk, (key, value), strict=True))
        query = torch.nn.functional.pad(query, (0, 0, layout.given_tokens, 0))
        return backend(query, key, value, layout, rule)[:, :, layout.given_tokens :].transpose(1, 2), None

    return attend


def _put(keep: KeysAndValues, module: nn.Module, key: Tensor, value: Tensor) -> None:
    if keep.closed:
        return
    if id(module) in keep:
        raise _refused(module, "is used twice in one pass, so a trunk cannot be computed once", "use another model")
    keep[id(module)] = key, value


def _window(module: nn.Module, given: dict[str, Any]) -> int | None:
    """The layer's window: what it hands over, or what it keeps, as some models do."""
    return (given["sliding_window"] if "sliding_window" in given else getattr(module, "sliding_window", None)) or None


def _refuse(module: nn.Module, query: Tensor, key: Tensor, mask: Any, given: dict[str, Any]) -> None:
    """Raise ModelError for what no backend does exactly."""
    for key_word, what in UNSUPPORTED.items():
        if given.get(key_word) is not None:
            raise _refused(module, f"uses {what}, which is not exact in a pack yet", "use another model")
    if share := given.get("dropout"):
        what = f"uses attention dropout ({share:g}), which is not exact in a pack"
        raise _refused(module, what, "set its attention's dropout to 0 in config.json", "dropout")
    if mask is not None:
        raise _refused(module, "brings an attention mask of its own", "use another model")
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise _refused(
            module, "attends to other tokens than those of the pack", "use a decoder without cross-attention"
        )
    causal = given.get("is_causal")
    if (getattr(module, "is_causal", True) if causal is None else causal) is False:
        raise _refused(module, "lets tokens look at later ones", "use a causal language model")


def _refused(module: nn.Module, what: str, remedy: str, rule: str = "invalid") -> ModelError:
    error = ModelError.at(type(module).__name__, what, remedy, rule)
    assert isinstance(error, ModelError)
    return error


for _name, _backend in BACKENDS.items():
    AttentionInterface.register(f"instil_{_name}", _through_interface(_backend))


@contextmanager
def attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Run the model with another attention ("instil_loop", "instil_dense", "sdpa", "eager") for a while.

    "sdpa" is "eager" for models that torch's attention does not serve (sinks; soft caps, which transformers 5.17 leaves
    out in silence).
    """
    before = model.config._attn_implementation
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    unfit = implementation == "sdpa" and (capped or not model._supports_sdpa)
    model.set_attn_implementation("eager" if unfit else implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
