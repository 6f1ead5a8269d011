"""The memory of a run by formula: weights, optimizer, and what the largest pack keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from instil.model.head import BLOCK_ROWS, chunk_rows
from instil.model.machine import release_free_memory
from instil.model.memory import compute_layers_again, feed_width, head_width, machine_bytes
from instil.pack.plan import computed_tokens
from instil.planned import CPU, DTYPES, Planned
from instil.report.quantities import size

# Resident memory beyond the tensors of a CPU run: what oneDNN's kernels keep, and the holes that blocks of changing size
# leave in the heap between two releases. Fitted together with FROZEN_SHARE to seven runs of 13M to 135M parameters,
# measured by hand, all within 9%, with oneDNN's caches limited to 128 kernels.
OVERHEAD_BYTES = {torch.bfloat16: 300e6, torch.float32: 150e6}
OVERHEAD_PER_ACTIVATION = 0.6
FROZEN_SHARE = 0.93  # with an adapter, of the activations of full tuning: frozen layers keep less, adapters add theirs


def weight_bytes(net: PreTrainedModel, dtype: torch.dtype) -> int:
    """Weights, gradients and AdamW's state (train/optim.py).

    A trainable parameter in bfloat16 has its copy 2, master 4, gradient sum 4 and two moments 8 bytes; in float32 itself
    4, gradient 4 and moments 8; a frozen one is only itself.
    """
    size = dtype.itemsize
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters()) - trainable
    return frozen * size + trainable * (18 if size == 2 else 16)


def saved_bytes_per_token(net: PreTrainedModel, dtype: torch.dtype) -> float:
    """What the layers keep of a token for the backward pass: size * L * (nd + 2(H + K)h + 4f); n = 10 in bfloat16, else 7.

    Two norms (with float32 copies where that is another type) and the inputs of the projections nd; q, k, v and the output
    2(H + K)h; gate, up, SiLU and product 4f.
    """
    c = net.config.get_text_config()
    d, heads = c.hidden_size, c.num_attention_heads
    width, wide = head_width(c), feed_width(c)
    norms = 7 if dtype == torch.float32 else 10
    shared = getattr(c, "num_key_value_heads", None) or heads
    return dtype.itemsize * c.num_hidden_layers * (norms * d + 2 * (heads + shared) * width + 4 * wide)


def activation_bytes(
    net: PreTrainedModel,
    dtype: torch.dtype,
    pack_tokens: int,
    target_tokens: int,
    *,
    adapted: bool,
    device: torch.device = CPU,
    again: bool = False,
) -> float:
    """Of a pack: what the layers save, a chunk of logits, and the head's gradient (in float32 too where it has chunks).

    again: only the inputs of the layers are kept, and one layer's activations at a time.
    """
    projection: Any = net.get_output_embeddings()
    vocabulary = projection.weight.shape[0]
    saved = saved_bytes_per_token(net, dtype) * pack_tokens * (FROZEN_SHARE if adapted else 1.0)
    if again:
        c = net.config.get_text_config()
        saved = saved / c.num_hidden_layers + dtype.itemsize * c.num_hidden_layers * c.hidden_size * pack_tokens
    rows = min(chunk_rows(vocabulary, device), target_tokens)
    logits = vocabulary * (dtype.itemsize * rows + 4 * 2 * (rows if device.type == "cuda" else min(rows, BLOCK_ROWS)))
    chunks = target_tokens > chunk_rows(vocabulary, device)  # whose shares of the head's gradient add up in float32
    return saved + logits + (0 if adapted else projection.weight.numel() * (dtype.itemsize + 4 * chunks))


MOST_OF_MACHINE = 0.9


def fitted_memory(
    work: Planned,
    net: PreTrainedModel,
    device: torch.device,
    say: Callable[[str], None],
    *,
    resident_bytes: int,
    file_bytes: int = 0,
) -> int:
    """`peak_memory`; where that is more than the machine has, the layers are computed again in the backward pass."""
    needed = peak_memory(work, net, device, resident_bytes=resident_bytes, file_bytes=file_bytes)
    room = machine_bytes(device)
    if needed <= MOST_OF_MACHINE * room:
        return needed
    compute_layers_again(net)
    less = peak_memory(work, net, device, resident_bytes=resident_bytes, file_bytes=file_bytes, again=True)
    say(
        f"activations would need {size(needed)} of the machine's {size(room)}: layers are computed again in the backward "
        f"pass, which needs about {size(less)} and takes about 1.3 times as long"
    )
    return less


def peak_memory(
    work: Planned,
    net: PreTrainedModel,
    device: torch.device,
    *,
    resident_bytes: int,
    file_bytes: int = 0,
    again: bool = False,
) -> int:
    """The most memory of the run: of the GPU its tensors, of the CPU the whole process. again: as of `activation_bytes`.

    resident_bytes: of the process before the model is loaded; file_bytes: of the weights, mapped while they are converted.
    """
    config, adapted = work.config, bool(work.config.adapter.rank)
    dtype = DTYPES[config.train.precision]
    tokens, targets = most_at_once(work)
    activations = activation_bytes(net, dtype, tokens, targets, adapted=adapted, device=device, again=again)
    weights = weight_bytes(net, dtype)
    if device.type == "cuda":
        return int(weights + activations)
    loaded = sum(p.numel() for p in net.parameters()) * (dtype.itemsize if adapted else 4)
    loading = file_bytes if 0.95 * file_bytes < loaded < 1.05 * file_bytes else file_bytes + loaded  # else converted
    training = weights + activations * (1 + OVERHEAD_PER_ACTIVATION) + OVERHEAD_BYTES[dtype]
    return int(resident_bytes + max(loading, training))


LARGE_PACKS = 16  # that are looked at: the largest need not be the one with the largest part


def most_at_once(work: Planned) -> tuple[int, int]:
    """The tokens, and the targets among them, that are in memory together at most: of a pack, or of its trunk and a group
    of its branches (pack/tree.py)."""
    packs = [pack for step in work.loader.packs(0) for pack in step]
    largest = np.argsort(-computed_tokens(work.loader.prefixes, packs), kind="stable")[:LARGE_PACKS]
    found = []
    for indices in (packs[i] for i in largest.tolist()):
        pack = work.loader.pack(indices)
        trunk = pack.cuts[0] if pack.cuts else 0
        for a, b in pairwise(pack.cuts or (0, len(pack.tokens))):
            found.append((trunk + b - a, int(((pack.at >= a) & (pack.at < b)).sum())))
    return max(found)


def resident_bytes() -> int:
    """Memory of this process now, less what can be given back; 0 where the system does not tell."""
    release_free_memory()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0
