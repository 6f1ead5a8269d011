"""A process that has imported torch and instil once, and forks a child for every trial: a run begins within milliseconds.

`python forks.py` is the server: one JSON order a line on stdin, one JSON answer a line on stdout. `Forks` is its other end.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).parent
SLOWED = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir")  # what a save, a prune and an export are made of
WARM_S = 240.0  # importing torch and transformers, on a machine that does other things too


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code (negative = the signal that ended it) and the processor time it took."""

    code: int
    cpu_s: float


class Child:
    """A trial that runs."""

    def __init__(self, forks: Forks, pid: int, log: Path):
        self.pid, self.log, self._forks = pid, log, forks
        self._ended: Ended | None = None

    def ended(self) -> Ended | None:
        """How it ended, or None while it runs."""
        self._ended = self._ended or self._forks.ended(self.pid, wait=False)
        return self._ended

    def wait(self) -> Ended:
        """Wait for its end."""
        while (found := self.ended()) is None:
            time.sleep(0.001)
        return found

    def send(self, number: int) -> None:
        """A signal. A child that has ended is a zombie until `ended` was told so: its number is nobody else's."""
        if self._ended is None:
            os.kill(self.pid, number)

    def kill(self) -> Ended:
        """SIGKILL, at once."""
        self.send(signal.SIGKILL)
        return self.wait()

    def cpu_s(self) -> float:
        """The processor time it has taken so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def said(self) -> list[str]:
        """The lines that it and those before it wrote into the log."""
        return self.log.read_text().splitlines() if self.log.exists() else []


class Forks:
    """The server, and how to have it start children."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(HERE.parent), str(HERE)])
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**os.environ, **one, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", str(HERE / "forks.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server has ended"
        found: dict[str, Any] = json.loads(answer)
        return found

    def call(self, function: str, *arguments: Any, log: Path) -> Child:
        """Fork a child that calls `module:function` with plain arguments; what it returns (None = 0) is its exit code."""
        return Child(self, self._ask(call=function, arguments=arguments, log=str(log))["pid"], log)

    def instil(self, words: Sequence[object], log: Path, *, seed: int | None = None, plant: str = "") -> Child:
        """Fork a child that is `instil WORDS`. seed: of delays between the calls that change files; plant: see PLANTS."""
        return self.call("forks:instil", [str(word) for word in words], seed, plant, log=log)

    def ended(self, pid: int, *, wait: bool) -> Ended | None:
        """How a child ended; None while it runs, unless `wait`."""
        found = self._ask(ended=pid, wait=wait)
        return Ended(found["code"], found["cpu_s"]) if found else None

    def warm(self, words: Sequence[object], log: Path) -> None:
        """Run `instil WORDS` in a child, and import here what it has imported, so that the next ones need not."""
        with tempfile.TemporaryDirectory() as folder:
            names = Path(folder) / "modules.json"
            child = self.call("forks:instil_and_modules", [str(word) for word in words], str(names), log=log)
            assert child.wait().code == 0, child.said()
            heavy = ("instil", "torch", "transformers", "peft", "pyarrow", "rich", "jinja2", "pydantic")
            self.load(*(name for name in json.loads(names.read_text()) if name.partition(".")[0] in heavy))

    def load(self, *modules: str) -> None:
        """Have the server import modules, so that children need not."""
        self._ask(modules=modules)


# --- in the server and its children


def instil(words: list[str], seed: int | None, plant: str) -> None:
    """What a child does: `instil WORDS`, with random pauses where files change, and maybe a planted fault."""
    from instil.cli.main import main

    if seed is not None:
        _slow_down(random.Random(seed))
    if plant:
        PLANTS[plant]()
    sys.argv = ["instil", *words]
    main()


def instil_and_modules(words: list[str], names: str) -> None:
    """As `instil`; the names of all modules that were imported are left in a file."""
    try:
        instil(words, None, "")
    finally:
        Path(names).write_text(json.dumps(sorted(sys.modules)))


def _slow_down(rng: random.Random) -> None:
    """Up to 3 ms before each call that changes files, so that a kill finds the process between any two of them."""

    def slowed(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            time.sleep(rng.random() * 0.003)
            return real(*arguments, **named)

        return call

    for name in SLOWED:
        setattr(os, name, slowed(getattr(os, name)))


def _forget_moments() -> None:
    from instil.train.optim import MasterAdamW

    MasterAdamW.load_state = lambda self, tensors: None  # type: ignore[method-assign]


def _keep_all_metrics() -> None:
    from instil import resume

    resume.keep_metrics_through = lambda path, step: []


PLANTS: dict[str, Callable[[], None]] = {"moments are lost": _forget_moments, "metrics stay": _keep_all_metrics}


def _serve() -> None:
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no answer
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        if "modules" in order:
            answer: dict[str, Any] = _imported(order["modules"])
        elif "ended" in order:
            pid, status, usage = os.wait4(order["ended"], 0 if order["wait"] else os.WNOHANG)
            taken = {"code": os.waitstatus_to_exitcode(status), "cpu_s": usage.ru_utime + usage.ru_stime}
            answer = taken if pid else {}
        else:
            answer = {"pid": _forked(order)}
        os.write(answers, json.dumps(answer).encode() + b"\n")


def _imported(names: Sequence[str]) -> dict[str, Any]:
    done = 0
    for name in names:
        try:
            importlib.import_module(name)
            done += 1
        except Exception:  # some can only be imported by others
            continue
    return {"imported": done}


def _forked(order: dict[str, Any]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; here are none that hold locks
        pid = os.fork()
    if pid == 0:
        _child(order)
    return pid


def _child(order: dict[str, Any]) -> NoReturn:
    code: Any = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        module, _, name = order["call"].partition(":")
        own = "__main__" if module == "forks" else module
        code = getattr(importlib.import_module(own), name)(*order["arguments"]) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    _serve()
