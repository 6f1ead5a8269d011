"""The race's side of a worker: starts the process, asks for runs one at a time, turns its death into one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class RaceError(Exception):
    """What went wrong, in one line."""


class EndedError(RaceError):
    """A worker was told to end from outside (Ctrl-C, SIGTERM): that says nothing about its settings."""


class Worker:
    """A trainer in a process of its own, alive until `close`; it sleeps while the other one runs."""

    def __init__(self, name: str, python: str, script: str, job: dict[str, Any]):
        self.name = name
        self._folder = tempfile.TemporaryDirectory(prefix="race-")
        scratch = Path(self._folder.name)
        file = scratch / "job.json"
        file.write_text(json.dumps(job | {"scratch": str(scratch / "scratch")}))
        self._errors = (scratch / "stderr").open("w+")
        threads = str(job["threads"])
        self._process = subprocess.Popen(
            [python, str(HERE / script), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env=os.environ | {
                "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
                "GOMP_SPINCOUNT": "100000",  # threads that wait sleep after 0.1 ms, in both trainers
                "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "",
                "HF_DATASETS_CACHE": str(scratch / "datasets"),
            },
        )  # fmt: skip
        try:
            self.settings: dict[str, Any] = self._answer()["settings"]
        except BaseException:
            self.close()
            raise

    def run(self, number: int) -> dict[str, Any]:
        """Train the run of that number; returns what pipe.Meter measured. Raises RaceError when the worker dies."""
        try:
            self._process.stdin.write(f"{number}\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it says why on stderr
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        code = self._process.wait()
        if code in (-signal.SIGINT, -signal.SIGTERM):
            raise EndedError(f"{self.name}: was ended by {signal.Signals(-code).name}")
        if code < 0:
            raise RaceError(f"{self.name}: was ended by {signal.Signals(-code).name} (SIGKILL: most often for memory)")
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        raise RaceError(f"{self.name}: {said[-1][:300] if said else f'ended with code {code}, saying nothing'}")

    def close(self) -> None:
        """End the process and forget its files."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
        self._folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


VERSIONS = """
import importlib.metadata as m, json
print(json.dumps({n: m.version(n) for n in %r if any(d.name == n for d in m.distributions(name=n))}))
"""
PACKAGES = ["trl", "torch", "transformers", "accelerate", "datasets", "peft"]


def versions(python: str) -> dict[str, str]:
    """Of the packages that matter, in an environment. Raises RaceError when it does not run."""
    try:
        done = subprocess.run([python, "-c", VERSIONS % PACKAGES], capture_output=True, text=True)
    except OSError as error:
        raise RaceError(f"{python}: {error.strerror}; give the python of an environment with TRL") from error
    if done.returncode:
        raise RaceError(f"{python}: {(done.stderr.strip().splitlines() or ['does not run'])[-1]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def trl_python(given: str | None, requirements: Path, constraints: Path, *, lora: bool) -> str:
    """The python of TRL's environment: the one given, or one made once in the user's cache from the requirements.

    Raises RaceError when it is not there, cannot be made, or holds another TRL than the requirements name.
    """
    python = given or _made(requirements, constraints)
    found = versions(python)
    wanted = dict(line.split("==") for line in requirements.read_text().split() if "==" in line)
    if found.get("trl") != wanted["trl"]:
        has = f"TRL {found['trl']}" if "trl" in found else "no TRL"
        raise RaceError(f"{python}: has {has}, the race is with {wanted['trl']}: pip install -r {requirements.name}")
    if lora and "peft" not in found:
        raise RaceError(f"{python}: has no peft, which TRL needs for LoRA: pip install peft=={wanted['peft']}")
    return python


def _made(requirements: Path, constraints: Path) -> str:
    """The cached environment; made where there is none yet for these requirements."""
    import hashlib

    from instil.model.locate import cache_folder

    pins = [line for file in (requirements, constraints) for line in file.read_text().splitlines() if "==" in line]
    key = hashlib.sha256("\n".join(pins).encode()).hexdigest()[:12]
    folder = cache_folder() / "benchmarks" / f"trl-{key}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return str(python)
    print(f"making an environment with TRL in {folder} (once, some minutes)", file=sys.stderr, flush=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(constraints)]
    # torch first and alone, as in the Makefile, so that pip takes the one version that the constraints name
    for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [*install, "torch"],
                    [*install, "-r", str(requirements)]):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["failed"])[-1]
            raise RaceError(f"TRL's environment cannot be made: {last}; make one yourself and give --trl-python")
    ready.touch()
    return str(python)
