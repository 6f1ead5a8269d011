"""The FLOPs of a run by formula, from the shapes of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from instil.model.memory import head_width
from instil.plan import Work


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a forward pass: body = elements of the layers' matrices that a computed token goes through;
    attention = layers * heads * head width, twice a pair of tokens; head = vocabulary * width, a target;
    adapter = elements of the adapter, a computed token (0 = full tuning)."""

    body: int
    attention: int
    head: int
    adapter: int

    def forward_flops(self, work: Work) -> int:
        """2 FLOP a multiply-add: a token costs 4 * heads * width in a layer for every token that it looks at."""
        tokens = 2 * (self.body + self.adapter) * work.computed_tokens
        return tokens + 4 * self.attention * work.attended_pairs + 2 * self.head * work.target_tokens

    def training_flops(self, work: Work) -> int:
        """Forward and backward: three times the forward, less the gradients of weights that an adapter leaves frozen."""
        frozen = 2 * (self.body * work.computed_tokens + self.head * work.target_tokens) if self.adapter else 0
        return 3 * self.forward_flops(work) - frozen


def costs_of(net: PreTrainedModel, *, adapted: bool) -> Costs:
    """The costs of a decoder, from its shapes: all its matrices but the embeddings and the head take part, of experts as
    large a share as a token is sent to (all of them, where the configuration does not say how many that is)."""
    c = net.config.get_text_config()
    outside = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    projection: Any = net.get_output_embeddings()
    outside.add(id(projection.weight))
    taken = {True: 0.0, False: 0.0}  # by whether it is the adapter's
    for name, p in net.named_parameters():
        if p.dim() > 1 and id(p) not in outside and not name.endswith("bias"):
            of_experts = p.dim() == 3 or ".experts." in name
            taken[adapted and p.requires_grad] += p.numel() * (_active_share(c) if of_experts else 1.0)
    heads = c.num_hidden_layers * c.num_attention_heads
    return Costs(round(taken[False]), round(heads * head_width(c)), projection.weight.numel(), round(taken[True]))


def _active_share(c: Any) -> float:
    """The experts that a token is sent to, of all of a layer."""
    every = _first(c, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    active = _first(c, "num_experts_per_tok", "moe_k", "top_k_experts")
    return active / every if active and every else 1.0


def _first(c: Any, *keys: str) -> int:
    """What a configuration has under the first of these keys, 0 where there is none."""
    return next((n for key in keys if (n := getattr(c, key, None))), 0)
