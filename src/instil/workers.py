"""Rows to certified examples on all cores: each worker takes a run of rows, and the results are joined in order."""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import orjson

from instil.chat.certificate import certify
from instil.chat.endings import Terminator
from instil.chat.pairs import Dropped, Pairs, pairs_of, refuse_template
from instil.chat.template import Template
from instil.chat.tokenizer import Tokenizer
from instil.chat.turns import ChatOptions
from instil.errors import DataError, InstilError, MachineError, ModelError, Problem, TemplateError
from instil.pack.store import ExampleStore, write_examples
from instil.types import Conversation

SERIAL_ROWS = 4_000  # fewer are done in a second or two; a worker costs 0.1 s
STARTS = 2  # of a worker for the same rows
ROWS_AT_ONCE = 2_048  # certified and reported together
STOPS = {signal.SIGINT, signal.SIGTERM}
LISTEN_S = 1.0  # a signal that comes just before a wait is handled behind it
PR_SET_PDEATHSIG = 1  # linux/prctl.h
KINDS_OF_ERROR: dict[str, type[InstilError]] = {kind.__name__: kind for kind in (DataError, ModelError, TemplateError)}

Progress = Callable[[int, int], None]


@dataclass
class Certified:
    """Examples with their certificate. faults: what is wrong with pairs; pairs.problems: what is wrong with rows."""

    pairs: Pairs
    certificate: dict[str, Any]
    faults: list[Problem]


def certified(
    rows: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template,
    options: ChatOptions,
    digests: Mapping[str, str],
    progress: Progress | None = None,
    workers: int | None = None,
) -> Certified:
    """Make and certify the examples of `rows`. workers: processes, as many as there are cores unless given.

    The result is the same whatever their number. progress: called with (rows done, all rows).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(workers or cores, len(rows) // (SERIAL_ROWS // 4) or 1)
    if count < 2 or len(rows) < SERIAL_ROWS or not sys.platform.startswith("linux"):
        starts = _ticking(range(0, len(rows), ROWS_AT_ONCE), len(rows), progress)
        found = _joined([_some(rows[at : at + ROWS_AT_ONCE], tokenizer, template, options, digests) for at in starts])
        refuse_template(found.pairs, template.place)
        return found
    with tempfile.TemporaryDirectory(prefix="instil-") as folder:
        cuts = [round(i * len(rows) / count) for i in range(count + 1)]
        jobs = [
            _Job(rows[a:b], Path(folder) / str(i), tokenizer, template, options, digests)
            for i, (a, b) in enumerate(itertools.pairwise(cuts))
        ]
        found = _joined([part for job in _finished(jobs, len(rows), progress) for part in job.parts])
        refuse_template(found.pairs, template.place)
        return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection in between: nothing here goes in circles, and looking for circles takes 7% of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _some(
    rows: Sequence[Conversation],
    tokenizer: Tokenizer,
    template: Template,
    options: ChatOptions,
    digests: Mapping[str, str],
) -> Certified:
    """One run of rows, in this process."""
    with _uncollected():
        pairs = pairs_of(rows, tokenizer, template, options)
        certificate, faults = certify(pairs.examples, rows, tokenizer, template, digests, options)
    return Certified(pairs, certificate, faults)


def _ticking(starts: range, whole: int, progress: Progress | None) -> Any:
    for start in starts:
        yield start
        if progress is not None:
            progress(min(start + starts.step, whole), whole)


class _Job:
    """A worker process. It is a fork: the rows need not be sent. Results come back as JSON, examples as Arrow files."""

    def __init__(self, rows: Sequence[Conversation], folder: Path, *with_: Any):
        self.rows, self.folder, self._with = rows, folder, with_
        self.parts: list[Certified] = []
        self.done_rows = self.starts = 0
        self.process: Any = None
        folder.mkdir()

    def start(self) -> None:
        """Let a new process take the rows that are not done."""
        self.starts += 1
        self.reader, writer = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        arguments = (self.rows, self.done_rows, self.folder, writer, self._with)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # what a handler raises in a hook of fork, Python passes over
        try:
            self.process = context.Process(target=_work, args=arguments, daemon=True)
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        writer.close()

    def end(self) -> None:
        """No process is left."""
        if self.process is not None and self.process.pid is not None:
            self.process.terminate()
            self.process.join()

    @property
    def short(self) -> bool:
        """Whether rows are left that no process did."""
        return self.done_rows < len(self.rows)

    def hear(self) -> bool:
        """Take one message; false when the worker has ended. Raises what the worker raised."""
        try:
            said = orjson.loads(self.reader.recv_bytes())
        except (EOFError, OSError):  # it ended, perhaps in the middle of a message
            return False
        problems = [Problem(**each) for each in said["problems"]]
        if kind := said.get("error"):
            raise KINDS_OF_ERROR.get(kind, InstilError)(*problems)
        store = ExampleStore(self.folder / said["file"])
        pairs = Pairs(
            list(store), problems, [Dropped(**each) for each in said["dropped"]], said["notes"],
            tuple(Terminator(**{**each, "token_ids": tuple(each["token_ids"])}) for each in said["terminators"]),
        )  # fmt: skip
        self.parts.append(Certified(pairs, said["certificate"], [Problem(**each) for each in said["faults"]]))
        self.done_rows += said["rows"]
        return True


def _work(rows: Sequence[Conversation], begin: int, folder: Path, writer: Connection, with_: tuple[Any, ...]) -> None:
    """The life of a worker: the rows from `begin` on. It ends with its parent, by the parent's word alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # else it would hold the lock of a run that was killed
    for start in range(begin, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        try:
            made = _some(some, *with_)
        except InstilError as error:
            said = {"error": type(error).__name__, "problems": [asdict(problem) for problem in error.problems]}
            writer.send_bytes(orjson.dumps(said))
            return
        file = f"{start}.arrow"
        write_examples(folder / file, made.pairs.examples)
        writer.send_bytes(
            orjson.dumps(
                {
                    "rows": len(some),
                    "file": file,
                    "problems": [asdict(problem) for problem in made.pairs.problems],
                    "dropped": [asdict(each) for each in made.pairs.dropped],
                    "notes": made.pairs.notes,
                    "terminators": [asdict(ending) for ending in made.pairs.terminators],
                    "certificate": made.certificate,
                    "faults": [asdict(problem) for problem in made.faults],
                }
            )
        )


def _finished(jobs: list[_Job], whole: int, progress: Progress | None) -> list[_Job]:
    """The jobs when all have ended; an error of the earliest rows is raised first."""
    errors: dict[int, InstilError] = {}
    running: dict[int, tuple[int, _Job]] = {}
    try:
        for number, job in enumerate(jobs):
            job.start()
            running[id(job.reader)] = (number, job)
        while running:
            for reader in wait([job.reader for _, job in running.values()], LISTEN_S):
                number, job = running[id(reader)]
                try:
                    more = job.hear()
                except InstilError as error:
                    errors[number], more = error, False
                if not more:
                    del running[id(reader)]
                    job.process.join()
                    if job.short and number not in errors and job.starts < STARTS:
                        job.start()  # it was killed, or died; what it had done is here
                        running[id(job.reader)] = (number, job)
                if progress is not None:
                    progress(sum(each.done_rows for each in jobs), whole)
    finally:
        for job in jobs:
            job.end()
    if errors:
        raise errors[min(errors)]
    for job in jobs:
        if job.short:
            code = job.process.exitcode or 0
            what = f"a worker that prepares examples ended early {STARTS} times (exit {code})"
            if code < 0:  # by a signal: the system's, most often for memory
                raise MachineError.at("memory", what, "free memory and run the same command again", "worker")
            raise InstilError.at(job.rows[job.done_rows].origin, what, "please report it, with this row", "worker")
    return jobs


def _joined(parts: Sequence[Certified]) -> Certified:
    """The parts as one: counts added, lists joined, the rest as in the first."""
    pairs = Pairs()
    certificate: dict[str, Any] = {}
    faults: list[Problem] = []
    for part in parts:
        pairs.examples += part.pairs.examples
        pairs.problems += part.pairs.problems
        pairs.dropped += part.pairs.dropped
        pairs.notes = _added(pairs.notes, part.pairs.notes)
        pairs.terminators = tuple({e.text: e for e in (*pairs.terminators, *part.pairs.terminators)}.values())
        certificate = _added(certificate, part.certificate)
        faults += part.faults
    return Certified(pairs, certificate, faults)


def _added(left: dict[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Two records added up."""
    both = dict(left)
    for key, value in right.items():
        old = both.get(key)
        if old is None or isinstance(value, bool | str) or key == "terminator" or key.endswith("_sha256"):
            both[key] = old or value
        elif isinstance(value, dict):
            both[key] = _added(old, value)
        elif isinstance(value, list):
            both[key] = old + [each for each in value if each not in old]
        else:
            both[key] = old + value
    return both
