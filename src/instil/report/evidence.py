"""A run folder's files read into one value: what is missing or torn is noted, never guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from instil.errors import MachineError, UsageError
from instil.report.quantities import number
from instil.types import FATES, Fate

FILES = ("config.yaml", "manifest.json", "ledger.jsonl", "metrics.jsonl", "summary.json")
SERIES = ("loss", "accuracy", "lr", "grad_norm", "target_tokens", "computed_tokens", "seconds")
EXAMPLES_PER_RULE = 3  # rows named for each rule


@dataclass
class Side:
    """Sums over the ledger's rows of one side; `tokens` and `examples` are those of its used rows."""

    used_rows: int = 0
    dropped_rows: int = 0
    examples: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0


@dataclass
class Rule:
    """Rows that one rule dropped, split or cut (data/ledger.py): how many, and the first few of them."""

    name: str
    fate: Fate
    rows: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Ledger:
    """What became of the rows: sides `train` and `heldout`; the rules, dropping ones and frequent ones first."""

    sides: Mapping[str, Side]
    rules: tuple[Rule, ...]

    def total(self, name: str) -> int:
        """A field summed over the sides."""
        return sum(getattr(side, name) for side in self.sides.values())


@dataclass(frozen=True)
class Evidence:
    """A run folder as read. series[name] [steps] is NaN where a step has no such number; heldout: step -> loss.

    notes: what the reader of the page must know about the files. Missing files are empty values.
    """

    name: str
    finished: bool
    config: str
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    ledger: Ledger | None
    steps: NDArray[np.int64]
    series: Mapping[str, NDArray[np.float64]]
    heldout: Mapping[int, float]
    notes: tuple[str, ...]


def read_evidence(folder: Path) -> Evidence:
    """Read a run folder. Raises UsageError where no file of a run is there, MachineError for an unreadable one."""
    if not any((folder / name).is_file() for name in FILES):
        what = "is not a run folder" if folder.is_dir() else "is not there"
        raise UsageError.at(folder, what, "name a folder that `instil train` made")
    notes: list[str] = []
    summary, manifest = (_document(folder / name, notes) for name in ("summary.json", "manifest.json"))
    records = _records(folder / "metrics.jsonl", notes)
    steps = sorted(records)
    if not summary:
        at = f"it is at step {steps[-1]:,}" if steps else "it has made no step"
        notes.insert(0, f"This run is not finished: {at}. The same `instil train` command goes on with it.")
    series = {name: np.array([_value(records[step], name) for step in steps], float) for name in SERIES}
    config = _bytes(folder / "config.yaml").decode("utf-8", "replace")
    ledger = _ledger(folder / "ledger.jsonl", notes)
    return Evidence(
        name=folder.resolve().name,
        finished=bool(summary),
        config=config,
        manifest=manifest,
        summary=summary,
        ledger=ledger,
        steps=np.array(steps, np.int64),
        series=series,
        heldout=_heldout(summary, records),
        notes=tuple(notes),
    )


def inside(value: Any, *names: str) -> Mapping[str, Any]:
    """The mapping at a path of keys in a document; empty where it is not there."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _value(record: Mapping[str, Any], name: str) -> float:
    found = number(record.get(name))
    return float("nan") if found is None else found


def _heldout(summary: Mapping[str, Any], records: Mapping[int, Mapping[str, Any]]) -> dict[int, float]:
    """The held-out losses by step: those of the summary, which alone knows step 0, over those of the metrics."""
    found = {step: number(record.get("heldout_loss")) for step, record in records.items()}
    found |= {int(s): number(v) for s, v in inside(summary, "heldout_losses").items() if s.isdecimal()}
    return {step: value for step, value in sorted(found.items()) if value is not None}


def _records(path: Path, notes: list[str]) -> dict[int, Mapping[str, Any]]:
    """The steps of metrics.jsonl; of a step that is there twice, the later line counts."""
    records: dict[int, Mapping[str, Any]] = {}
    bad = []
    lines = _bytes(path).splitlines()
    for at, line in enumerate(lines, start=1):
        record = _object(line)
        step = record.get("step") if record else None
        if record and isinstance(step, int) and step >= 0:
            records[step] = record
        elif line.strip():
            bad.append(at)
    if bad and bad[-1] == len(lines):
        notes.append(f"The last line of {path.name} is torn (the run ended while writing it); it is left out here.")
        bad.pop()
    if bad:
        named = ", ".join(str(at) for at in bad[:5])
        notes.append(f"{path.name}: {len(bad):,} unreadable lines are left out here (line {named}).")
    return records


def _ledger(path: Path, notes: list[str]) -> Ledger | None:
    """The ledger's sums, line by line; None where there is no ledger."""
    sides: dict[str, Side] = {"train": Side(), "heldout": Side()}
    rules: dict[tuple[str, str], Rule] = {}
    lines = bad = 0
    for line in _lines(path):
        entry = _object(line)
        lines += 1
        if not entry or entry.get("fate") not in FATES or entry.get("side") not in sides:
            bad += 1
            continue
        fate, side, rule = entry["fate"], sides[entry["side"]], str(entry.get("rule") or "")
        if fate == "dropped":
            side.dropped_rows += 1
        else:
            side.used_rows += 1
        side.examples += int(number(entry.get("examples")) or 0)
        side.prompt_tokens += int(number(entry.get("prompt_tokens")) or 0)
        side.answer_tokens += int(number(entry.get("answer_tokens")) or 0)
        if rule or fate == "dropped":
            found = rules.setdefault((fate, rule), Rule(rule or "no rule given", fate))
            found.rows += 1
            if len(found.first) < EXAMPLES_PER_RULE:
                found.first.append((str(entry.get("origin", "")), str(entry.get("reason", ""))))
    if bad:
        notes.append(f"{path.name}: {bad:,} of {lines:,} lines are no ledger entries; they are left out here.")
    ordered = sorted(rules.values(), key=lambda rule: (rule.fate != "dropped", -rule.rows))
    return Ledger(sides, tuple(ordered)) if lines else None


def _document(path: Path, notes: list[str]) -> Mapping[str, Any]:
    content = _bytes(path)
    found = _object(content)
    if content and found is None:
        notes.append(f"{path.name} is not a JSON document; what it says is left out here.")
    return found or {}


def _object(content: bytes) -> dict[str, Any] | None:
    """The JSON object in `content`, or None."""
    try:
        found = orjson.loads(content)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _bytes(path: Path) -> bytes:
    """A file's content; empty where it is absent."""
    return b"".join(_lines(path))


def _lines(path: Path) -> Iterator[bytes]:
    """A file's lines, one in memory at a time; none where it is absent."""
    try:
        with path.open("rb") as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise MachineError.at(path, f"cannot be read ({error.strerror})", "fix the permissions") from None
