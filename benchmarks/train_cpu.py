"""Full fine-tuning of SmolLM2-135M on the CPU: computed and target tokens/s, and peak resident memory.

    .venv/bin/python benchmarks/train_cpu.py [--steps 8] [--batch 16] [--allocator keep|default]

The demo's own training rows, bf16 with float32 masters, AdamW included, held-out measurement and checkpoints left out.
Two warm-up steps are not counted. Prints the median step and writes results/train_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
WARM_UP_STEPS = 2


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="examples a step")
    parser.add_argument("--allocator", choices=("keep", "default"), default="keep")
    args = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    result = measure(args.steps, args.batch, args.allocator)
    result |= {"machine": machine(), "load_average": os.getloadavg()[0], "arguments": vars(args)}
    print(json.dumps(result, indent=2))
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "train_cpu.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(steps: int, batch: int, allocator: str) -> dict[str, object]:
    """Median seconds of a step, and what it computed."""
    from instil.cli.console import share_cores

    share_cores()
    import torch

    from instil.model.load import load_model
    from instil.model.locate import locate
    from instil.model.machine import peak_memory_bytes, release_free_memory, set_up_machine
    from instil.model.memory import fitting_tokens
    from instil.pack.loader import Loader
    from instil.pack.plan import plan_steps
    from instil.pack.store import open_store, publish_examples
    from instil.prepare import examples
    from instil.train.loop import RELEASE_EVERY_STEPS
    from instil.train.optim import MasterAdamW
    from instil.train.step import step

    if allocator == "keep":
        set_up_machine(None)
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        generator = HERE.parent / "examples" / "demo" / "data.py"
        subprocess.run([sys.executable, generator, folder, "--train", "1280", "--heldout", "20"], check=True)
        publish_examples(Path(folder) / "packs", {"train": examples([f"{folder}/train.jsonl"], "demo")}, {})
        train = open_store(Path(folder) / "packs")[0]["train"]
        net = load_model(locate("demo", need_weights=True).path, dtype=torch.float32, device=cpu).train()
        optimizer = MasterAdamW(net, dtype=torch.bfloat16, weight_decay=0.0)
        plan = plan_steps(train.prefixes, batch, fitting_tokens(net, torch.bfloat16, cpu))
        loader = Loader(train, train.prefixes, plan, seed=0)
        seconds, cpu_seconds, computed, targets = [], [], [], []
        for i in range(WARM_UP_STEPS + steps):
            data = loader.batch(i)
            wall, process = time.perf_counter(), time.process_time()
            stats = step(net, optimizer, data, lr=1e-5, clip_norm=1.0)
            if i % RELEASE_EVERY_STEPS == 0:
                release_free_memory()
            seconds.append(time.perf_counter() - wall)
            cpu_seconds.append(time.process_time() - process)
            computed.append(stats.computed_tokens)
            targets.append(stats.target_tokens)
            print(f"step {i + 1}: {seconds[-1]:.2f} s, {computed[-1] / seconds[-1]:.0f} computed tokens/s", flush=True)
    rates = [c / s for c, s in zip(computed, seconds, strict=True)][WARM_UP_STEPS:]
    return {
        "computed_tokens_per_s": round(statistics.median(rates), 1),
        "computed_tokens_per_s_best": round(max(rates), 1),
        "target_tokens_per_s": round(sum(targets[WARM_UP_STEPS:]) / sum(seconds[WARM_UP_STEPS:]), 1),
        "step_seconds": round(statistics.median(seconds[WARM_UP_STEPS:]), 3),
        "step_cpu_seconds": round(statistics.median(cpu_seconds[WARM_UP_STEPS:]), 3),
        "peak_memory_gb": round(peak_memory_bytes() / 1e9, 2),
    }


def own_peak_bytes() -> int:
    """The most resident memory of this process since it began; ru_maxrss would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def machine() -> str:
    """Processor, cores, and whether it has AMX, which decides the speed of bf16."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in text]
    return f"{name or platform.processor()}, {os.cpu_count()} cores, {', '.join(flags) or 'no bf16 instructions'}"


if __name__ == "__main__":
    main()
