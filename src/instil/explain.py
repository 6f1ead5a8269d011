"""What became of one row of a run: its line in the ledger, its examples, and every step and pack that trains on them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instil.config import load_config
from instil.data.ledger import LedgerEntry, read_ledger
from instil.errors import DataError, MachineError
from instil.folder import RunFolder, open_run, read_manifest, read_metrics
from instil.pack.loader import Loader
from instil.pack.store import ExampleStore, open_store
from instil.plan import loader_of, total_steps


@dataclass(frozen=True, slots=True)
class Use:
    """One time that an example is trained on: pack `pack` of the `packs` of a step, beside `others` other examples.

    epoch counts from 0 and step from 1, as in metrics.jsonl; pack from 1. loss: of the whole step, None before it is done.
    """

    epoch: int
    step: int
    pack: int
    packs: int
    others: int
    loss: float | None


@dataclass(frozen=True, slots=True)
class ExplainedExample:
    """An example of the row, and when it is trained on. weight_sum: of its targets, beside their number."""

    turn: int
    task: str
    prompt_tokens: int
    answer_tokens: int
    target_tokens: int
    weight_sum: float
    cut_tokens: int
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """A row of a run that has done steps_done of its steps. measured_examples: of a held-out row, in the loss of the run."""

    origin: str
    ledger: LedgerEntry
    examples: tuple[ExplainedExample, ...]
    measured_examples: int
    steps_done: int
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def explain(run: str, row: str) -> Explanation:
    """What became of `row` (`file:line`, as in the ledger or another path of the same file) in a run folder.

    Raises UsageError for what is not a run, DataError, with the nearest row, for a row that is not in its ledger.
    """
    folder = open_run(run)
    config = load_config(folder.config)
    entry = _entry(read_ledger(folder.ledger), row)
    sides = stored_sides(folder)
    loader = loader_of(config, sides["train"])
    losses = _losses(folder.metrics)
    steps = total_steps(config, loader.plan)
    found = _with_origin(sides[entry.side], entry.origin)
    uses = _uses(loader, found, steps, losses) if entry.side == "train" else {}
    examples = tuple(_explained(sides[entry.side], i, uses.get(i, ())) for i in found)
    measured = sum(i < config.evaluate.examples for i in found) if entry.side == "heldout" else 0
    return Explanation(entry.origin, entry, examples, measured, max(losses, default=0), steps)


def stored_sides(run: RunFolder) -> dict[str, ExampleStore]:
    """The stored examples, `train` and `heldout`, of a run that has begun. Raises MachineError where they are gone."""
    stored = run.packs / read_manifest(run)["packs"]
    if not (stored / "record.json").is_file():
        again = "put them back from a copy, or start over with --fresh"  # as a finished run prepares nothing
        remedy = again if run.finished else "run its command again to prepare them anew"
        raise MachineError.at(stored, "the prepared examples are gone", remedy)
    return open_store(stored)[0]


def _entry(entries: Sequence[LedgerEntry], row: str) -> LedgerEntry:
    """The ledger's line of a row; what is dropped from one side may be used on the other: what is used comes first."""
    same = [e for e in entries if e.origin == row]
    if not same:
        file, _, line = row.rpartition(":")
        at_line = [e for e in entries if e.origin.endswith(f":{line}")]
        same = [e for e in at_line if os.path.realpath(e.origin.rpartition(":")[0]) == os.path.realpath(file)]
    if not same:
        near = _nearest(entries, row)
        remedy = f"did you mean {near}? " if near else ""
        raise DataError.at(row, "is not a row of this run", f"{remedy}see ledger.jsonl for all of them", "no_row")
    return max(same, key=lambda e: e.examples)


def _nearest(entries: Sequence[LedgerEntry], row: str) -> str | None:
    """The origin with the most similar file, and in it the nearest line."""
    file, _, line = row.rpartition(":")
    files = list(dict.fromkeys(e.origin.rpartition(":")[0] for e in entries))
    by_name = {os.path.basename(name): name for name in reversed(files)}
    close = difflib.get_close_matches(os.path.basename(file or row), list(by_name), 1, 0.0)
    if not close:
        return None
    lines = [int(e.origin.rpartition(":")[2]) for e in entries if e.origin.rpartition(":")[0] == by_name[close[0]]]
    wanted = int(line) if line.isascii() and line.isdigit() else 0
    return f"{by_name[close[0]]}:{min(lines, key=lambda n: abs(n - wanted))}"


def _with_origin(store: ExampleStore, origin: str) -> list[int]:
    return [i for i in range(len(store)) if store[i].origin == origin]


def _explained(store: ExampleStore, i: int, uses: Sequence[Use]) -> ExplainedExample:
    e = store[i]
    targets, weights = int(np.count_nonzero(e.weights > 0)), float(e.weights.sum(dtype=np.float64))
    sizes = len(e.prompt_tokens), len(e.answer_tokens), targets
    return ExplainedExample(e.turn, e.task, *sizes, weights, e.cut_tokens, tuple(uses))


def _uses(loader: Loader, examples: Sequence[int], steps: int, losses: dict[int, float]) -> dict[int, list[Use]]:
    """When each of the examples is trained on, over all steps of the run."""
    found: dict[int, list[Use]] = {i: [] for i in examples}
    for first in range(0, steps if examples else 0, loader.plan.steps_per_epoch):
        epoch = first // loader.plan.steps_per_epoch
        for within, packs in enumerate(loader.packs(epoch)[: steps - first]):
            for number, pack in enumerate(packs, start=1):
                for i in pack[np.isin(pack, examples)].tolist():
                    step = first + within + 1
                    found[i].append(Use(epoch, step, number, len(packs), len(pack) - 1, losses.get(step)))
    return found


def _losses(metrics: Path) -> dict[int, float]:
    """The loss of every step that is done; a torn last line is none."""
    return {record["step"]: record["loss"] for record in read_metrics(metrics) if "loss" in record}
