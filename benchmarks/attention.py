"""Attention over packs: instil's parts against one dense mask and against a call for each document, forward and backward.

    .venv/bin/python benchmarks/attention.py [--rounds 5] [--heads 9] [--keys 3] [--width 64]

bf16, one layer of SmolLM2-135M's shape. Packs of documents of one length, of ragged lengths, and prefix trees; a tree's
documents are also computed each with its own copy of the prefix, as other trainers do. Before any time the outputs must
agree with the dense mask. The least of --rounds counts. Writes results/attention.json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from train_cpu import machine

from instil.model.attention import BACKENDS, Rule
from instil.model.layout import Layout, layout_of
from instil.model.machine import set_up_machine
from instil.types import Pack

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def main() -> None:
    """Compare, time, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rounds", 5), ("heads", 9), ("keys", 3), ("width", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    set_up_machine(None)
    rng = np.random.default_rng(0)
    cases = {f"{1024 // n} documents of {n}": (0, [n] * (1024 // n)) for n in (32, 64, 128, 256, 512, 1024)}
    cases["8 documents of 50 to 400"] = (0, rng.integers(50, 400, 8).tolist())
    cases["16 documents of 256"] = (0, [256] * 16)
    cases["30 tokens shared by 5 of 170"] = (30, [170] * 5)
    cases["512 tokens shared by 8 of 64"] = (512, [64] * 8)
    cases["2000 tokens shared by 4 of 500"] = (2000, [500] * 4)
    found = {name: measured(prefix, lengths, args) for name, (prefix, lengths) in cases.items()}
    for name, row in found.items():
        print(f"{name:32}", "  ".join(f"{kind} {ms:8.1f} ms" for kind, ms in row.items()))
    result = {
        "milliseconds": found, "machine": machine(), "load_average": os.getloadavg()[0], "arguments": vars(args),
    }  # fmt: skip
    (HERE / "results" / "attention.json").write_text(json.dumps(result, indent=2) + "\n")


def measured(prefix: int, lengths: Sequence[int], args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of forward and backward of each way."""
    layout, n = tree(prefix, lengths)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, n, args.width).bfloat16().requires_grad_() for h in (args.heads, args.keys, args.keys))
    grad = torch.randn(1, args.heads, n, args.width).bfloat16()
    rule = Rule(scale=args.width**-0.5)
    i = torch.arange(n)
    mask = (i[None] <= i[:, None]) & (i[:, None] < layout.reach[None])
    copies = apart(prefix, lengths)

    def instil() -> Tensor:
        return BACKENDS["loop"](q, k, v, layout, rule)

    def dense() -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    def documents() -> Tensor:
        """Each document by itself, with the prefix before it; only its own rows are kept."""
        outs = []
        for rows, own in copies:
            out = sdpa(q[:, :, rows], k[:, :, rows], v[:, :, rows], is_causal=True, enable_gqa=True)
            outs.append(out if not outs and prefix else out[:, :, own:])
        return torch.cat(outs, 2)

    ways: dict[str, Callable[[], Tensor]] = {"instil": instil, "documents": documents, "dense": dense}
    with torch.no_grad():
        expected = dense().float()
        for name, way in ways.items():
            error = float((way().float() - expected).norm() / expected.norm())
            if error > 0.02:
                raise SystemExit(f"attention: {name} differs from the dense mask by {error:.3f}")
    best = {name: float("inf") for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way().backward(grad)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: round(1000 * s, 2) for name, s in best.items()}


def tree(prefix: int, lengths: Sequence[int]) -> tuple[Layout, int]:
    """The layout of a prefix and branches of the given lengths, and its number of tokens."""
    n = prefix + sum(lengths)
    ends = prefix + np.cumsum(lengths)
    reach = np.concatenate([np.full(prefix, n), np.repeat(ends, lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(prefix), *(prefix + np.arange(m) for m in lengths)]).astype(np.int32)
    none = np.zeros(0, np.int32)
    return layout_of(Pack(none, positions, reach, none, none, none.astype(np.float32), none, ()), CPU), n


def apart(prefix: int, lengths: Sequence[int]) -> list[tuple[Tensor, int]]:
    """For each document the rows of its own path, and how many of them are the prefix's."""
    begin, found = prefix, []
    for m in lengths:
        found.append((torch.cat([torch.arange(prefix), torch.arange(begin, begin + m)]), prefix))
        begin += m
    return found


if __name__ == "__main__":
    main()
