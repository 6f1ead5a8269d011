"""A run as it will be: settings chosen, examples in steps, the model by its shapes alone; and afterwards, how it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from instil.config import Config
from instil.model.adapters import add_lora
from instil.model.load import read_config, refuse_lengths, refuse_recurrent
from instil.model.memory import fitting_tokens
from instil.pack.loader import Loader
from instil.plan import loader_of, total_steps, work_of_run
from instil.prepare import Prepared
from instil.resolve import resolve

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Planned:
    """A run as it will be: every setting chosen, its examples, the loader of its batches, its number of steps."""

    config: Config
    data: Prepared
    loader: Loader
    steps: int


def planned(config: Config, data: Prepared, net: PreTrainedModel, device: torch.device, name: str) -> Planned:
    """Choose what the configuration leaves open, and cut the epochs into steps. net: of shapes alone, or loaded."""
    fitting = fitting_tokens(net, DTYPES[config.train.precision], device)
    full, _ = resolve(config, data.train, fitting, name)
    loader = loader_of(full, data.train)
    return Planned(full, data, loader, total_steps(full, loader.plan))


def shapes(folder: Path, config: Config, longest_tokens: int = 0) -> PreTrainedModel:
    """The model of a folder, adapter included, without its weights: on torch's meta device, from config.json alone.

    Raises ModelError for a model that could not be trained (model/load.py) or has no config.json.
    """
    found = read_config(folder)
    refuse_recurrent(found, folder)
    refuse_lengths(found, longest_tokens, folder)
    with torch.device("meta"):
        net: PreTrainedModel = AutoModelForCausalLM.from_config(found, dtype=DTYPES[config.train.precision])
    if config.adapter.rank:
        add_lora(net, config.adapter, config.model, config.train.seed)
    return net


COMPARED = ("steps", "target_tokens", "computed_tokens", "train_seconds", "peak_memory_bytes")
EARLY_STEPS = slice(1, 4)  # the second to the fourth: their pace predicts the time of all


def predicted(work: Planned, memory_bytes: int) -> dict[str, Any]:
    """What a run expects of itself before its first step; its time is known only once it has begun (see `compared`)."""
    whole = work_of_run(work.loader, work.data.train, work.steps)
    return {
        "steps": work.steps, "target_tokens": whole.target_tokens, "computed_tokens": whole.computed_tokens,
        "unshared_tokens": whole.unshared_tokens, "peak_memory_bytes": memory_bytes,
    }  # fmt: skip


def compared(
    expected: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`plan` of summary.json: what was predicted, and the error of each figure, (predicted - found) / found.

    records: of metrics.jsonl; train_seconds is predicted from the pace of the second to the fourth step.
    """
    early = records[EARLY_STEPS]
    guess = dict(expected)
    if seconds := sum(r["seconds"] for r in early):
        tokens = sum(r["computed_tokens"] for r in early)
        guess["train_seconds"] = expected["computed_tokens"] * seconds / tokens
    error = {key: guess[key] / summary[key] - 1 for key in COMPARED if guess.get(key) and summary.get(key)}
    return {"predicted": guess, "error": error}
