"""A long run watched: does its memory grow, do its open files, as steps and checkpoints go by?

    .venv/bin/python benchmarks/soak.py [--minutes 480] [--model demo] [--threads 2] [key=value ...]

Trains on generated questions in a process of its own with a checkpoint every 20 seconds, reads its resident memory and open
files twice a minute, stops it with SIGTERM, and compares the second half of the time with the first (without its first
five minutes, in which a run takes what it needs). Writes results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from race.workloads import long_tail
from train_cpu import machine

WARM_UP_S, EVERY_S = 300.0, 30.0
CHILD = "from instil.cli.main import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=480)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("settings", nargs="*", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="instil-") as place:
        rng, data, run = random.Random(0), Path(place) / "rows.jsonl", Path(place) / "runs" / "soak"
        rows = [row for _ in range(400) for row in long_tail(rng)]
        data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        words = [
            "train", "--model", given.model, "--data", str(data), "train.epochs=1000", "checkpoint.every_s=20",
            f"run.dir={run.parent}", "run.name=soak", f"run.threads={given.threads}", *given.settings,
        ]  # fmt: skip
        process = subprocess.Popen([sys.executable, "-c", CHILD, *words], stderr=subprocess.DEVNULL)
        begun, samples = time.monotonic(), []
        while process.poll() is None and time.monotonic() - begun < 60 * given.minutes:
            time.sleep(EVERY_S)
            samples.append((time.monotonic() - begun, *watched(process.pid)))
            if len(samples) % 10 == 0:
                print(
                    f"{samples[-1][0] / 60:.0f} min: {samples[-1][1] / 1e9:.2f} GB, {samples[-1][2]} files", flush=True
                )
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        steps = (run / "metrics.jsonl").read_bytes().count(b"\n")
    late = [sample for sample in samples if sample[0] > WARM_UP_S]
    halves = late[: len(late) // 2], late[len(late) // 2 :]
    memory = [statistics.median(sample[1] for sample in half) for half in halves]
    files = [max(sample[2] for sample in half) for half in halves]
    found = {
        "machine": machine(), "model": given.model, "minutes": samples[-1][0] / 60, "steps": steps, "exit": code,
        "memory_bytes_by_half": memory, "memory_growth": memory[1] / memory[0] - 1, "open_files_by_half": files,
        "samples": samples[:: max(1, len(samples) // 50)],
    }  # fmt: skip
    print(
        f"{found['minutes']:.0f} minutes, {steps:,} steps, exit {code}: memory {memory[0] / 1e9:.2f} -> "
        f"{memory[1] / 1e9:.2f} GB ({found['memory_growth']:+.2%}), open files {files[0]} -> {files[1]}"
    )
    (Path(__file__).parent / "results" / "soak.json").write_text(json.dumps(found, indent=1) + "\n")


def watched(process: int) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    place = Path("/proc") / str(process)
    return int((place / "statm").read_text().split()[1]) * 4096, len(list((place / "fd").iterdir()))


if __name__ == "__main__":
    main()
