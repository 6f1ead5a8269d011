"""The story of a run: locate, prepare, load, plan, train, export, sum up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from instil.compiling import settled
from instil.config import Config
from instil.evaluate.likelihood import answer_loss
from instil.folder import RunFolder, append_metrics, claim, keep_metrics_through, read_metrics, write_json
from instil.forecast import DTYPES, compared, fitted_memory, planned, predicted, resident_bytes
from instil.model.adapters import add_lora, merged, save_adapter
from instil.model.export import export_model, write_folder
from instil.model.load import device_named, load_model
from instil.model.locate import locate
from instil.model.machine import set_up_machine
from instil.plan import mix_of
from instil.prepare import Prepared, data_digests, open_chat, prepare, sources
from instil.record import announcement, began_on, identity, refuse_changed, summary, write_record
from instil.report.page import write_report
from instil.resolve import loop_plan, recorded
from instil.train import checkpoint
from instil.train.loop import Progress
from instil.train.loop import train as train_loop
from instil.train.optim import MasterAdamW


@dataclass(frozen=True)
class Listener:
    """Whom a run tells what it does: say(line), on_step(record of the step, steps), on_rows(rows prepared, rows)."""

    say: Callable[[str], None] = lambda line: None
    on_step: Callable[[dict[str, Any], int], None] = lambda record, steps: None
    on_rows: Callable[[int, int], None] = lambda done, rows: None


def train(config: Config, *, fresh: bool = False, listener: Listener | None = None) -> Path:
    """Fine-tune as configured; returns the run folder. The same call resumes an unfinished run exactly.

    fresh: move an older run of that name aside and start over.
    Raises subclasses of InstilError (see errors.py); Stopped after a signal and a verified save.
    """
    tell, began = listener or Listener(), time.monotonic()
    device, dtype = device_named(config.run.device), DTYPES[config.train.precision]
    set_up_machine(config.run.threads)
    model = locate(config.model, need_weights=True)
    with claim(config, fresh=fresh) as run:
        config = recorded(config, run.config)
        chat = open_chat(model.path, config.template, began_on(run), config.chat.template_args)
        mix_of(sources(config))
        digests = data_digests(config)
        what = identity(model, chat, digests)
        refuse_changed(run, what)
        if run.finished:
            tell.say(f"{run.path} is finished already; --fresh starts it over")
            return run.path if run.report.exists() else write_report(run.path).parent
        data = prepare(config, model.path, chat, digests, run, tell.on_rows)
        resident = resident_bytes()
        net = load_model(
            model.path, dtype=dtype if config.adapter.rank else DTYPES["fp32"], device=device,
            longest_tokens=int(data.train.lengths.max()),
        )  # fmt: skip
        adapted = add_lora(net, config.adapter, model.name, config.train.seed) if config.adapter.rank else None
        optimizer = MasterAdamW(net, dtype=dtype, weight_decay=config.train.weight_decay)
        work = settled(planned(config, data, net, device, run.path.name), net, optimizer, tell.say)
        config, steps = work.config, work.steps
        expected = predicted(work, fitted_memory(work, net, device, tell.say, resident_bytes=resident))
        write_record(run, config, what, data, net)
        for line in announcement(config, data, net, work.loader, steps):
            tell.say(line)
        progress = _resume(run, optimizer, tell)

        def log(record: dict[str, Any]) -> None:
            append_metrics(run.metrics, record)
            tell.on_step(record, steps)

        plan_of_loop, measure = loop_plan(config, run.checkpoints, steps), _measure(net, data, config)
        train_loop(net, optimizer, work.loader, plan_of_loop, progress, measure=measure, log=log, facts=what)
        if adapted is not None:
            write_folder(run.adapter, lambda folder: save_adapter(adapted, folder))
            net = merged(adapted)
        stops = data.record["certificate"]["train"]["terminators"]
        export_model(net.eval(), run.model, source=model.path, template=chat.template.source, terminators=stops)
        found = summary(config, progress, data, time.monotonic() - began, expected)
        write_json(run.summary, {**found, "plan": compared(expected, found, read_metrics(run.metrics))})
        return write_report(run.path).parent


def _resume(run: RunFolder, optimizer: MasterAdamW, tell: Listener) -> Progress:
    """Put back the newest checkpoint that verifies, if there is one; the metrics after it are dropped."""
    found = checkpoint.load_latest(run.checkpoints)
    if found is None:
        keep_metrics_through(run.metrics, 0)
        return Progress()
    state, _, damaged = found
    for line in damaged:
        tell.say(f"passed over: {line}")
    optimizer.load_masters(state.weights)
    optimizer.load_state(state.optimizer)
    checkpoint.restore_rng(state.rng)
    keep_metrics_through(run.metrics, state.step)
    tell.say(f"resumed after step {state.step:,}")
    return Progress(state.step, **state.counters)


def _measure(net: PreTrainedModel, data: Prepared, config: Config) -> Callable[[], float] | None:
    """The held-out loss during the run, always on the same first examples; None when nothing is held out."""
    if data.heldout is None:
        return None
    some = [data.heldout[i] for i in range(min(config.evaluate.examples, len(data.heldout)))]
    return lambda: answer_loss(net, some, pack_tokens=config.pack.tokens or 1).loss
