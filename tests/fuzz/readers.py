"""What is fuzzed: each reader on bytes that may be anything. It reads them or raises an InstilError; all else is a fault."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from instil.config import load_config
from instil.data.mixture import load_conversations
from instil.errors import InstilError
from instil.folder import RunFolder, keep_metrics_through, read_manifest, read_metrics
from instil.train.checkpoint import load_latest, verify

SHARED_MEMORY = Path("/dev/shm")


@contextmanager
def place() -> Iterator[Path]:
    """A folder in memory, where the system has that."""
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_jsonl(data: bytes) -> None:
    """A data file: conversations, or what is wrong with it."""
    with place() as folder, suppress(InstilError):
        (folder / "a.jsonl").write_bytes(data)
        load_conversations([str(folder / "a.jsonl")])


def read_yaml(data: bytes) -> None:
    """A configuration file."""
    with place() as folder, suppress(InstilError):
        (folder / "c.yaml").write_bytes(data)
        load_config(folder / "c.yaml")


def read_run_files(data: bytes) -> None:
    """A run's manifest and metrics, and a checkpoint's manifest."""
    with place() as folder:
        run = RunFolder(folder)
        for file in (run.manifest, run.metrics):
            file.write_bytes(data)
        with suppress(InstilError):
            read_manifest(run)
        read_metrics(run.metrics)
        keep_metrics_through(run.metrics, 3)
        with suppress(InstilError):
            assert verify(folder), "bytes that nobody saved are no checkpoint"


def read_checkpoint(data: bytes) -> None:
    """A checkpoint whose hashes are right and whose weights are anything: read, or refused."""
    with place() as folder:
        step = folder / "step-000001"
        step.mkdir()
        (step / "state.json").write_bytes(b'{"counters":{},"step":1}')
        for name in ("weights", "optimizer", "rng"):
            (step / f"{name}.safetensors").write_bytes(data)
        files = {
            path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}
            for path in step.iterdir()
        }
        manifest = {"files": files, "format": 2, "step": 1}
        manifest["sha256"] = hashlib.sha256(_canonical(manifest)).hexdigest()
        (step / "manifest.json").write_bytes(_canonical(manifest))
        assert verify(step) is None
        with suppress(InstilError):
            load_latest(folder)


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


READERS: dict[str, Callable[[bytes], None]] = {
    "jsonl": read_jsonl, "yaml": read_yaml, "manifest": read_run_files, "checkpoint": read_checkpoint,
}  # fmt: skip
