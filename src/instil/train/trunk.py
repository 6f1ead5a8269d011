"""A pack too large to be computed at once: its trunk first, its branches in turn, and the trunk's gradient from all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from instil.model.head import HeadLoss, Triples, head_of, weighted_nll
from instil.model.layout import KeysAndValues, layout_of, layout_of_branches
from instil.model.load import hidden_states
from instil.types import Pack


def trunk_and_branches(net: PreTrainedModel, pack: Pack, share_of: Callable[[Tensor], Tensor]) -> HeadLoss:
    """The summed losses of a pack with cuts; where gradients are wanted, those of share_of(nll) are added to `.grad`.

    With K, V = all keys and values of the trunk, loss = L_0(trunk) + sum_g L_g(branches of group g, K, V). Each group is
    computed and differentiated by itself; d loss / d (K, V) = sum_g d L_g / d (K, V) is added up in float32 and goes into the
    trunk's own backward: the chain rule, so the gradient is that of the whole pack, in the memory of the trunk and a group.
    """
    learning = torch.is_grad_enabled()
    device = next(net.parameters()).device
    kept = KeysAndValues()
    trunk = _between(pack, 0, pack.cuts[0])
    hidden = hidden_states(net, trunk, replace(layout_of(trunk, device), keep=kept))
    kept.closed = True
    own = weighted_nll(hidden, head_of(net), Triples.of_pack(trunk, device))
    sums = [own.nll.detach(), own.right, own.entropy]
    leaves = {layer: _Leaf(*each) for layer, each in kept.items()}
    given = KeysAndValues({layer: leaf.tensors for layer, leaf in leaves.items()})
    for begin, end in pairwise(pack.cuts):
        branches = _between(pack, begin, end)
        layout = layout_of_branches(pack, begin, end, given, device)
        hidden = hidden_states(net, branches, layout)
        part = weighted_nll(hidden, head_of(net), Triples.of_pack(branches, device))
        if learning:
            share_of(part.nll).backward()
        sums = [a + b for a, b in zip(sums, (part.nll.detach(), part.right, part.entropy), strict=True)]
    if learning:
        pairs = [pair for leaf in leaves.values() for pair in leaf.gradients()]
        above = [tensor for tensor, _ in pairs] + [share_of(own.nll)]
        torch.autograd.backward(above, [*(gradient for _, gradient in pairs), None])
    return HeadLoss(*sums)


class _Leaf:
    """Keys and values of a layer's trunk, cut off from its graph; their gradients add up in float32."""

    def __init__(self, key: Tensor, value: Tensor):
        self.made = key, value
        self.tensors = (_cut_off(key), _cut_off(value))
        self.sums: list[Tensor | None] = [None, None]
        for i, leaf in enumerate(self.tensors):
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(self._collector(i))

    def _collector(self, i: int):  # type: ignore[no-untyped-def]
        def collect(leaf: Tensor) -> None:
            wide = torch.promote_types(leaf.dtype, torch.float32)
            so_far, gradient = self.sums[i], leaf.grad.to(wide)  # type: ignore[union-attr]
            self.sums[i] = gradient.clone() if so_far is None else so_far.add_(gradient)
            leaf.grad = None

        return collect

    def gradients(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The tensors of the trunk's graph that have one, and it."""
        for made, total in zip(self.made, self.sums, strict=True):
            if total is not None:
                yield made, total.to(made.dtype)


def _cut_off(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _between(pack: Pack, begin: int, end: int) -> Pack:
    """The tokens [begin, end) of a pack as one, with their triples; the trunk's reach ends with it."""
    inside = (pack.at >= begin) & (pack.at < end)
    return Pack(
        tokens=pack.tokens[begin:end], positions=pack.positions[begin:end],
        reach=np.minimum(pack.reach[begin:end], end) - begin, at=pack.at[inside] - begin, target=pack.target[inside],
        weight=pack.weight[inside], owner=pack.owner[inside], examples=pack.examples,
    )  # fmt: skip
