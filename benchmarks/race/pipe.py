"""A worker's side of the race: waits for a run's number on stdin, times its steps, answers with one line of JSON."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Pipe:
    """Lines in and out. What libraries print goes to stderr, so that stdout holds answers and nothing else."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
        limit = int(self.job["memory_bytes"])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # a setting that does not fit fails here, alone

    def wait(self) -> int | None:
        """The number of the run that is asked for; None = no more. Sleeps in a read meanwhile."""
        line = sys.stdin.readline().strip()
        return int(line) if line else None

    def send(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self._out, flush=True)


class Meter:
    """Wall and processor seconds of one run, step by step; processor time counts every thread of the process."""

    def __init__(self) -> None:
        self._idle_from: float | None = None
        self.begin()

    def begin(self) -> None:
        self._cpu, self._wall = time.process_time(), time.perf_counter()
        self._idle_cpu = self._cpu - (self._idle_from or self._cpu)
        self._ends: list[float] = []
        self.losses: list[float] = []
        self.target_tokens = self.computed_tokens = 0

    def step(self, loss: float, target_tokens: int, computed_tokens: int) -> None:
        """One optimizer step is done. computed_tokens: that went through the model, padding included."""
        self._ends.append(time.perf_counter())
        self.losses.append(loss)
        self.target_tokens += target_tokens
        self.computed_tokens += computed_tokens

    def result(self) -> dict[str, Any]:
        """What the run took; afterwards the worker is idle."""
        self._idle_from = ended = time.process_time()
        starts = [self._wall, *self._ends]
        return {
            "wall_s": self._ends[-1] - self._wall,
            "cpu_s": ended - self._cpu,
            "idle_cpu_s": self._idle_cpu,
            "step_s": [end - start for start, end in zip(starts, self._ends, strict=False)],
            "target_tokens": self.target_tokens,
            "computed_tokens": self.computed_tokens,
            "losses": self.losses,
            "peak_rss_bytes": peak_rss_bytes(),
        }


def peak_rss_bytes() -> int:
    """The most resident memory of this process since it began; ru_maxrss would begin with its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
