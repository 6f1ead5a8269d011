"""What a checkpoint costs: saving, and verifying at resume, the whole training state of SmolLM2-135M.

    .venv/bin/python benchmarks/checkpoint.py [--folder DIR] [--rounds 3]

Weights and both moments in float32, 1.6 GB, in a folder of the disk that runs are written to. A save flushes to the disk
and reads everything back; verifying reads from memory what was just written (warm). Writes results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from train_cpu import machine

from instil.model.load import load_model
from instil.model.locate import locate
from instil.train import checkpoint
from instil.train.optim import MasterAdamW

EVERY_S = 300  # checkpoint.every_s as it comes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; the system's temporary folder without")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    net = load_model(
        locate("demo", need_weights=True).path, dtype=torch.float32, device=torch.device("cpu"), probe=False
    )
    optimizer = MasterAdamW(net, dtype=torch.bfloat16, weight_decay=0.0)
    for master in optimizer.masters.values():
        master.grad = torch.zeros_like(master)
    optimizer.update(lr=1e-5)
    saves, checks = [], []
    with tempfile.TemporaryDirectory(prefix="instil-", dir=given.folder) as place:
        for step in range(1, given.rounds + 1):
            state = checkpoint.TrainState(step, optimizer.masters, optimizer.state(), checkpoint.rng_state(), {})
            start = time.monotonic()
            saved = checkpoint.save(Path(place), state, {}, keep=2)
            middle = time.monotonic()
            assert checkpoint.verify(saved) is None
            saves.append(middle - start)
            checks.append(time.monotonic() - middle)
            print(f"{state.bytes / 1e9:.2f} GB: saved in {saves[-1]:.2f} s, verified in {checks[-1]:.2f} s", flush=True)
    found = {
        "machine": machine(), "threads": torch.get_num_threads(), "bytes": state.bytes, "save_s": saves,
        "verify_s": checks, "share_of_run": statistics.median(saves) / (EVERY_S + statistics.median(saves)),
    }  # fmt: skip
    print(f"every {EVERY_S} s: {found['share_of_run']:.2%} of a run")
    (Path(__file__).parent / "results" / "checkpoint.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
