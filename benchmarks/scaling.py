"""Time and memory of training against length, rows and model size: straight lines where they should be.

    .venv/bin/python benchmarks/scaling.py [--quick]

Random models of SmolLM2's proportions, bf16 with float32 masters, one process for each point, least of three packs.
lengths: one document of n tokens; attention alone is quadratic. rows: a pack of n documents of 128 tokens. parameters:
models of 4 to 30 layers, a pack of 768 tokens. Each line is fitted by least squares and its largest relative residual
printed: what is called linear stays within a few percent of its line on a quiet machine. Writes results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from train_cpu import machine, own_peak_bytes

HERE = Path(__file__).parent
SERIES = {
    "length": [{"documents": 1, "tokens": n, "layers": 6} for n in (256, 512, 1024, 2048, 4096)],
    "rows": [{"documents": n, "tokens": 128, "layers": 6} for n in (2, 4, 8, 16, 32)],
    "parameters": [{"documents": 6, "tokens": 128, "layers": n} for n in (4, 8, 16, 30)],
}
ALONG = {"length": "tokens", "rows": "documents", "parameters": "layers"}


def main() -> None:
    """Every point in a process of its own; the lines; the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first three points of each series")
    parser.add_argument("--point", help="measure one point, given as JSON, and print it")
    args = parser.parse_args()
    if args.point:
        print(json.dumps(point(**json.loads(args.point))))
        return
    found: dict[str, object] = {}
    for name, points in SERIES.items():
        rows = []
        for each in points[:3] if args.quick else points:
            out = subprocess.check_output([sys.executable, __file__, "--point", json.dumps(each)])
            rows.append(each | json.loads(out))
            print(name, rows[-1], flush=True)
        x = [row[ALONG[name]] for row in rows]
        found[name] = {"points": rows, **{key: line(x, [row[key] for row in rows]) for key in ("seconds", "memory_mb")}}
    result = {"series": found, "machine": machine(), "load_average": os.getloadavg()[0]}
    for name in SERIES:
        print(name, {key: found[name][key] for key in ("seconds", "memory_mb")})  # type: ignore[index]
    (HERE / "results" / "scaling.json").write_text(json.dumps(result, indent=2) + "\n")


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Least squares with relative weights: slope, intercept, largest relative residual."""
    a, b, weight = np.array(x, float), np.array(y, float), 1 / np.array(y, float)
    slope, start = np.polyfit(a, b, 1, w=weight)
    return {"slope": float(slope), "intercept": float(start), "worst": float(np.abs((slope * a + start) / b - 1).max())}


def point(documents: int, tokens: int, layers: int) -> dict[str, float]:
    """Seconds of forward, backward and update of a pack, and the peak memory of the process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from instil.model.machine import set_up_machine
    from instil.pack.tree import build_pack
    from instil.train.optim import MasterAdamW
    from instil.train.step import step
    from instil.types import Batch, Example

    set_up_machine(None)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    net = LlamaForCausalLM(config).train()
    net.set_attn_implementation("instil_loop")
    optimizer = MasterAdamW(net, dtype=torch.bfloat16, weight_decay=0.0)
    rng = np.random.default_rng(0)

    def example(i: int) -> Example:
        drawn, half = rng.integers(0, 8192, tokens + 1).astype(np.int32), tokens // 2
        return Example(drawn[:half], drawn[half:], np.ones(tokens + 1 - half, np.float32), f"x:{i}", 0)

    pack = build_pack([example(i) for i in range(documents)], range(documents))
    best = float("inf")
    for turn in range(4):
        start = time.perf_counter()
        step(net, optimizer, Batch(turn, 0, (pack,), float(pack.weight.sum())), lr=1e-5, clip_norm=1.0)
        best = min(best, time.perf_counter() - start)
    return {"seconds": best, "memory_mb": own_peak_bytes() / 2**20}


if __name__ == "__main__":
    main()
