"""How large a pack the machine holds: saved activations per token against free memory."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

CPU_BUDGET_BYTES = 0.8e9  # of activations; larger packs are not faster on a CPU
CPU_MOST_TOKENS = 1024
GPU_MOST_TOKENS = 32768
LEAST_TOKENS = 256
EAGER = 2.0  # eager norms and activations keep float32 and intermediate copies: measured 2.1 on SmolLM2-135M


def activation_bytes_per_token(net: PreTrainedModel, dtype: torch.dtype) -> float:
    """Saved activations of all layers without checkpointing: EAGER * bytes * L * (4d + (2H + 2K)h + 3f)."""
    c = net.config.get_text_config()
    d, heads = c.hidden_size, c.num_attention_heads
    kv = getattr(c, "num_key_value_heads", None) or heads
    head_dim, wide = head_width(c), feed_width(c)
    size = torch.empty((), dtype=dtype).element_size()
    return EAGER * size * c.num_hidden_layers * (4 * d + (2 * heads + 2 * kv) * head_dim + 3 * wide)


def head_width(c: Any) -> float:
    """Of an attention head; where keys are compressed (MLA), the mean of its width in queries and keys and in values."""
    if rope := getattr(c, "qk_rope_head_dim", None):
        return (c.qk_nope_head_dim + rope + c.v_head_dim) / 2
    return getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads


def feed_width(c: Any) -> float:
    """Of the feed-forward of a layer; where each layer has its own, their mean."""
    wide = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * c.hidden_size
    return sum(wide) / len(wide) if isinstance(wide, list | tuple) else wide


def machine_bytes(device: torch.device) -> int:
    """The memory that a run may use: of the GPU, or of the machine, less where the process's control group has less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int(Path(file).read_text()))
    return total


def compute_layers_again(net: PreTrainedModel) -> None:
    """Keep of each layer only its input; the backward pass computes the layer again (Chen et al. 2016): the same numbers,
    1.3 times the time."""
    enable = getattr(net, "activation_checkpointing_enable", None) or net.gradient_checkpointing_enable  # of older ones
    enable({"use_reentrant": False})


def computes_layers_again(net: PreTrainedModel) -> bool:
    """Whether `compute_layers_again` was called."""
    return any(getattr(module, "gradient_checkpointing", False) for module in net.modules())


def fitting_tokens(net: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> int:
    """The largest pack whose activations fit: on a GPU in half of what the weights and optimizer leave free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
        budget, most = 0.5 * (free - 16.0 * trainable), GPU_MOST_TOKENS
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # of the machine: the same at every start
        budget, most = min(CPU_BUDGET_BYTES, 0.1 * memory), CPU_MOST_TOKENS
    return int(min(most, max(LEAST_TOKENS, budget / activation_bytes_per_token(net, dtype))))
