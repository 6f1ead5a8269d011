"""What a run will need, before it begins: steps, FLOPs, memory and seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from instil.config import Config, flat
from instil.costs import Costs, costs_of
from instil.data.ledger import read_ledger
from instil.errors import InstilError
from instil.folder import RunFolder, run_name
from instil.footprint import fitted_memory, resident_bytes
from instil.model.load import device_named
from instil.model.locate import check_folder, locate
from instil.model.machine import set_up_machine
from instil.model.memory import computes_layers_again
from instil.pace import Pace, measured_pace
from instil.pack.plan import packs_in_order
from instil.pack.prefixes import Prefixes
from instil.plan import (
    SourceUse,
    Work,
    source_uses,
    work_of_each,
    work_of_epoch,
    work_of_packs,
    work_of_run,
)
from instil.planned import Planned, planned, shapes
from instil.prepare import data_digests, open_chat, prepare


def measuring_passes(every_steps: int, steps: int) -> int:
    """How often the held-out loss is measured: before the first step, every `every_steps`, and after the last."""
    return len({0, steps, *range(every_steps, steps, every_steps)})


# ── the forecast ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Forecast:
    """All of it, for people and --json. epoch: the first; run: every step; chosen: settings that were left open.

    seconds: of the whole run, train_seconds: of its steps; None where they were not measured, and `untimed` says why.
    """

    rows: int
    heldout_examples: int
    once: Work
    epoch: Work
    run: Work
    capacity_tokens: int
    flops: int
    peak_memory_bytes: int
    train_seconds: float | None
    seconds: float | None
    untimed: str
    mix: list[SourceUse]
    chosen: dict[str, Any]
    ledger: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """rows, examples, prompt and answer tokens: what there is to learn from, once; the other counts: of the run."""
        return {
            "rows": self.rows, "examples": self.once.examples, "prompt_tokens": self.once.prompt_tokens,
            "answer_tokens": self.once.answer_tokens, "target_tokens": self.run.target_tokens,
            "computed_tokens": self.run.computed_tokens, "unshared_tokens": self.run.unshared_tokens,
            "packs": self.run.packs, "steps": self.run.steps,
            "packing_efficiency": self.packing_efficiency, "pack_capacity_tokens": self.capacity_tokens,
            "flops": self.flops, "peak_memory_bytes": self.peak_memory_bytes, "seconds": self.seconds,
            "train_seconds": self.train_seconds, "untimed": self.untimed, "epoch": asdict(self.epoch),
            "heldout_examples": self.heldout_examples, "mix": [use.as_dict() for use in self.mix],
            "chosen": self.chosen, "ledger": self.ledger,
        }  # fmt: skip

    @property
    def packing_efficiency(self) -> float:
        """Computed tokens of what the packs of the run could hold."""
        return self.run.computed_tokens / self.run.room_tokens


def forecast(config: Config, *, measure: bool = True, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """What `train` with this configuration will do and need, from a fresh start; nothing is left on disk.

    measure: run some packs through the real model for the time (about 20 s for a small one); it needs the weights.
    """
    device = device_named(config.run.device)
    set_up_machine(config.run.threads)
    began = time.monotonic()
    model = locate(config.model, need_weights=False)
    with tempfile.TemporaryDirectory(prefix="instil-plan-") as folder:
        chat = open_chat(model.path, config.template, args=config.chat.template_args)
        run = RunFolder(Path(folder))
        data = prepare(config, model.path, chat, data_digests(config), run)
        rows = sum(entry.side == "train" and entry.examples > 0 for entry in read_ledger(run.ledger))
        prepare_s, resident = time.monotonic() - began, resident_bytes()
        net = shapes(model.path, config, data.longest_tokens)
        work = planned(config, data, net, device, run_name(config))
        costs = costs_of(net, adapted=bool(config.adapter.rank))
        stored = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
        memory = fitted_memory(work, net, device, say, resident_bytes=resident, file_bytes=stored)
        untimed = _untimed(model.path, measure)
        pace = None
        if not untimed:
            say("measuring some packs with the model on this machine (--no-measure leaves it out)")
            pace = measured_pace(work, model.path, costs, device, again=computes_layers_again(net))
        return _forecast(config, work, costs, memory, pace, untimed, rows, prepare_s)


def _untimed(folder: Path, measure: bool) -> str:
    """Why there will be no time; "" if there will be."""
    if not measure:
        return "not measured (--no-measure)"
    try:
        check_folder(folder, need_weights=True)
    except InstilError as error:
        return f"not measured: {error.problems[0].what}"
    return ""


def _forecast(
    config: Config,
    work: Planned,
    costs: Costs,
    memory: int,
    pace: Pace | None,
    untimed: str,
    rows: int,
    prepare_s: float,
) -> Forecast:
    train, heldout, loader = work.data.train, work.data.heldout, work.loader
    whole = work_of_run(loader, train, work.steps)
    flops = costs.training_flops(whole)
    train_s = seconds = None
    if pace is not None:
        train_s = flops / pace.flops_per_s + work.steps * pace.update_s
        seconds = prepare_s + pace.load_s + train_s + _heldout_flops(work, costs) / pace.flops_per_s
    now, then = flat(work.config.model_dump()), flat(config.model_dump())
    chosen = {key: value for key, value in now.items() if then.get(key) is None and value is not None}
    return Forecast(
        rows=rows, heldout_examples=0 if heldout is None else len(heldout),
        once=work_of_each(train), epoch=work_of_epoch(loader, train, 0), run=whole,
        capacity_tokens=loader.plan.capacity_tokens, flops=flops, peak_memory_bytes=memory, train_seconds=train_s,
        seconds=seconds, untimed=untimed, mix=source_uses(work.config, loader, train), chosen=chosen,
        ledger=work.data.record["rows"],
    )  # fmt: skip


def _heldout_flops(work: Planned, costs: Costs) -> int:
    """Of all measurements of the held-out loss during the run."""
    if work.data.heldout is None:
        return 0
    n = min(work.config.evaluate.examples, len(work.data.heldout))
    prefixes = Prefixes.of([work.data.heldout[i] for i in range(n)])
    once = work_of_packs(work.data.heldout, packs_in_order(prefixes, work.config.pack.tokens or 1))
    return measuring_passes(work.config.evaluate.every_steps or work.steps, work.steps) * costs.forward_flops(once)
