"""A run checked on this machine: every hash holds, and k steps + a kill + a resume are the straight run to the bit."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instil.config import Config, load_config
from instil.errors import InstilError, MachineError
from instil.files import sha256_of
from instil.folder import RunFolder, locked, open_run, read_manifest, read_metrics, read_summary
from instil.model.locate import locate
from instil.pack.store import damage
from instil.prepare import data_digests, open_chat
from instil.record import began_on, content, identity, result_files
from instil.train.checkpoint import steps_newest_first
from instil.train.checkpoint import verify as verify_checkpoint

CHILD = "from instil.cli.main import main; main()"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, whether it holds, and what was found."""

    what: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Verified:
    """All checks of a run."""

    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether all of them hold."""
        return all(check.ok for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def verify(run: str, *, steps: int, say: Callable[[str], None] = lambda line: None) -> Verified:
    """Look at every hash of a run; then train `steps` steps twice in folders of their own, the second time killed (SIGKILL)
    at a random moment and resumed, and compare. steps: 0 = only the hashes."""
    folder = open_run(run)
    config = load_config(folder.config)
    checks = []
    for check in hashes_of(folder, config):
        say(f"{'ok' if check.ok else 'WRONG'}: {check.what}: {check.detail}")
        checks.append(check)
    if steps:
        say(f"training {steps} steps, then the same with a kill and a resume")
        check = resumes(folder, steps)
        say(f"{'ok' if check.ok else 'WRONG'}: {check.what}: {check.detail}")
        checks.append(check)
    return Verified(checks)


def hashes_of(run: RunFolder, config: Config) -> Iterator[Check]:
    """Of what the run learns from and with, of its prepared examples, its checkpoints and its result."""
    manifest = read_manifest(run)
    try:
        model = locate(config.model, need_weights=True)
        now = identity(model, open_chat(model.path, config.template, began_on(run)), data_digests(config))
        for key, name in (
            ("model", "base model"), ("tokenizer_sha256", "tokenizer"), ("template_sha256", "template"),
            ("data_sha256", "data"),
        ):  # fmt: skip
            same = content(manifest[key]) == content(now[key]) or (
                key == "data_sha256" and list(manifest[key].values()) == list(now[key].values())
            )
            yield Check(name, same, "as when the run began" if same else "not what the run began with")
    except InstilError as error:
        yield Check("model and data", False, error.lines()[0])
    wrong = damage(run.packs / manifest["packs"])
    yield Check("prepared examples", wrong is None, wrong or "as written")
    for path in steps_newest_first(run.checkpoints):
        wrong = verify_checkpoint(path)
        yield Check(path.name, wrong is None, wrong or "every file is what was saved")
    summary = read_summary(run)
    if summary is None and run.summary.exists():
        yield Check("result", False, "summary.json cannot be read")
    elif summary is not None:
        expected, found = summary["files"], result_files(run)
        bad = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        yield Check("result", not bad, f"{bad[0]} is not what was written" if bad else f"{len(found)} files as written")


def resumes(run: RunFolder, steps: int) -> Check:
    """Whether a killed and resumed run ends as the straight one: checkpoint, model and metrics, to the bit."""
    what = f"{steps} steps + kill + resume"
    with _trial(run) as place:
        given = [
            "train", str(run.config), f"run.dir={place}", f"train.steps={steps}", "checkpoint.every_steps=1",
            "evaluate.examples=2", "checkpoint.keep=2",
        ]  # fmt: skip
        _to_the_end([*given, "run.name=straight"])
        for wait in (1.0, 0.3, 0.0):  # where it was through before it could be killed, sooner
            done, killed_in_time = _killed([*given, "run.name=killed", "--fresh"], place / "killed", steps, wait)
            if killed_in_time:
                break
        else:
            return Check(
                what, False, "its steps are too short: it was through before it could be killed; try --steps 50"
            )
        _to_the_end([*given, "run.name=killed"])
        straight, killed = (RunFolder(place / name) for name in ("straight", "killed"))
        different = list(_differences(straight, killed))
        if different:
            return Check(what, False, f"killed after step {done}: {', '.join(different)} differ")
        return Check(what, True, f"killed after step {done} of {steps}; weights, optimizer, metrics equal to the bit")


@contextlib.contextmanager
def _trial(run: RunFolder) -> Iterator[Path]:
    """A folder beside the run for the runs of a trial, without what a trial that died left in it; it goes in the end."""
    at = run.path.resolve()
    place = at.parent / f".verify-{at.name}"
    with locked(place):
        try:
            for left in (path for path in place.iterdir() if path.is_dir()):
                shutil.rmtree(left, ignore_errors=True)
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _differences(a: RunFolder, b: RunFolder) -> Iterator[str]:
    """What is not the same of two finished runs."""
    for kind in ("checkpoints", "model"):
        one, other = (_hashes_below(run.path / kind) for run in (a, b))
        yield from sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    mine, its = (
        [{key: value for key, value in record.items() if key != "seconds"} for record in read_metrics(run.metrics)]
        for run in (a, b)
    )
    if mine != its:
        yield "metrics.jsonl"


def _hashes_below(folder: Path) -> dict[str, str]:
    """Of the tensors in a folder, and of all in a result."""
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    return {
        f"{place.name}/{name}": digest
        for place in places
        for name, digest in sha256_of(place).items()
        if name != "state.json"  # holds the seconds that a clock counted
    }


def _start(words: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _to_the_end(words: Sequence[str]) -> None:
    with _start(words) as process:
        try:
            said = process.communicate()[1]
        finally:
            process.kill()  # nothing where it has ended; what ends a verify ends its trial
    if process.returncode:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        raise MachineError.at("verify", f"a run of it ended with exit {process.returncode}: {last}", "see why first")


def _killed(words: Sequence[str], folder: Path, steps: int, wait: float) -> tuple[int, bool]:
    """Kill a run at a random moment between its first checkpoint and its end; the steps that it had logged, and whether the
    kill came before its end. wait: share of the time that its other steps should take."""
    run = RunFolder(folder)
    with _start(words) as process:
        try:
            while process.poll() is None and not steps_newest_first(run.checkpoints):
                time.sleep(0.002)
            done = read_metrics(run.metrics)
            time.sleep(random.random() * wait * (steps - 1) * (done[0]["seconds"] if done else 0.0))
        finally:
            process.kill()
        process.communicate()
    return len(read_metrics(run.metrics)), process.returncode == -signal.SIGKILL and not run.summary.exists()
