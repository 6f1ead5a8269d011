"""Whether tensors hold NaN or infinity: told by their extremes, without a copy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors with NaN or infinity in them."""
    return [name for name, tensor in tensors if not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """aminmax hands NaN on, and infinity is an extreme."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in tensor.detach().aminmax())
