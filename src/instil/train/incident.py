"""A step that diverged, kept: its state, its rows with their losses and largest logits, the rate; enough to repeat it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import PreTrainedModel

from instil.errors import DivergedError, InstilError, MachineError, Problem
from instil.files import write_atomically
from instil.model.finite import not_finite
from instil.model.head import chunk_rows, head_of
from instil.model.load import hidden_states
from instil.pack.tree import build_pack
from instil.train import checkpoint
from instil.train.loss import pack_nll
from instil.types import Batch, Example

SHOWN = 20


@dataclass(frozen=True, slots=True)
class Seen:
    """An example as the present weights see it: loss in nats per target token, largest_logit = max |logit| at targets."""

    origin: str
    turn: int
    loss: float
    largest_logit: float

    def __str__(self) -> str:
        return f"{self.origin} (loss {self.loss:.4g}, largest logit {self.largest_logit:.4g})"


@dataclass(frozen=True, slots=True)
class How:
    """How the step was made, beside the configuration: its rate; again: layers were computed again in the backward pass."""

    lr: float
    again: bool


def examples_of(batch: Batch, examples: Sequence[Example]) -> list[Example]:
    """Those that a batch trains on."""
    return [examples[i] for pack in batch.packs for i in pack.examples]


@torch.no_grad()
def looked_at(net: PreTrainedModel, examples: Sequence[Example]) -> list[Seen]:
    """Each example alone, without an update: what is not finite first, then by its largest logit."""
    found = []
    head = head_of(net)
    for i, example in enumerate(examples):
        pack = build_pack([example], [i])
        loss = float(pack_nll(net, pack).nll) / float(pack.weight.sum())
        rows = hidden_states(net, pack)[torch.from_numpy(pack.at).long().unique().to(head.weight.device)]
        parts = rows.split(chunk_rows(head.weight.shape[0], rows.device))
        largest = torch.stack([head.logits(part).abs().max() for part in parts]).max()
        found.append(Seen(example.origin, example.turn, loss, float(largest)))
    return sorted(found, key=lambda each: (_finite(each), -each.largest_logit if _finite(each) else 0.0))


def _finite(seen: Seen) -> bool:
    return math.isfinite(seen.loss) and math.isfinite(seen.largest_logit)


def rows_line(found: Sequence[Seen]) -> str:
    """Rows with their losses and largest logits, in a line."""
    told = list(dict.fromkeys(map(str, found)))
    return ", ".join(told[:SHOWN]) + (f" and {len(told) - SHOWN} more" if told[SHOWN:] else "")


def record_incident(
    folder: Path, error: DivergedError, rows: Sequence[Seen], state: checkpoint.TrainState, how: How,
    facts: Mapping[str, Any],
) -> Problem:  # fmt: skip
    """Keep the step in `folder`: the state before it, as a checkpoint, and incident.json; returns where, and what for.

    state.step: updates done before the step; the update of the step was not applied, so weights and moments are those
    before it; the random state must be that before it too.
    """
    step = state.step + 1
    told = {
        "step": step, "problems": [str(problem) for problem in error.problems], **asdict(how),
        "rows": [asdict(each) for each in rows], "not_finite": not_finite(state.weights.items()),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    try:
        checkpoint.save(folder, state, facts, keep=1)
        write_atomically(folder / "incident.json", orjson.dumps(_plain(told), option=orjson.OPT_INDENT_2))
    except (InstilError, OSError) as refused:
        return Problem(f"step {step}", f"could not be kept: {refused}", "")
    remedy = f"`instil replay {folder.parent}` repeats the step and finds where it first is not finite"
    return Problem(str(folder), "holds the step that diverged", remedy)


def read_incident(folder: Path) -> How:
    """How the step in `folder` was made. Raises MachineError where incident.json does not say it."""
    path = folder / "incident.json"
    try:
        found = orjson.loads(path.read_bytes())
        return How(float(found["lr"]), bool(found.get("again", False)))  # older ones do not have the second
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        remedy = "run the run's command again: where the step diverges again, it is kept anew"
        raise MachineError.at(path, f"cannot be read ({why})", remedy) from None


def _plain(value: Any) -> Any:
    """JSON has no NaN: written as text."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
