"""The story of a run: locate, prepare, load, plan, train, export, sum up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instil.compiling import settled
from instil.config import Config
from instil.difference import first_difference
from instil.errors import InstilError
from instil.files import publish
from instil.folder import RunFolder, append_metrics, claim, read_metrics, write_json
from instil.footprint import fitted_memory, resident_bytes
from instil.measure import heldout_measure
from instil.model.adapters import add_lora, merged, save_adapter
from instil.model.export import export_model
from instil.model.load import device_named, load_model, probe_training
from instil.model.locate import locate
from instil.model.machine import set_up_machine
from instil.plan import mix_of
from instil.planned import DTYPES, compared, planned, predicted
from instil.prepare import data_digests, open_chat, prepare, sources
from instil.record import announcement, began_on, facts_of, identity, numerics_of, refuse_changed, summary, write_record
from instil.report.page import write_report
from instil.resolve import loop_plan, recorded
from instil.resume import flush_metrics, logged, put_back, refuse_done, refuse_small_disk
from instil.train.loop import Told
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
    tell = listener or Listener()
    with claim(config, fresh=fresh, say=tell.say) as run:
        say = logged(run.log, tell.say)
        try:
            return _train(config, run, tell, say)
        except InstilError as error:
            for line in error.lines() if run.manifest.exists() else ():
                logged(run.log, lambda line: None)(line)
            raise


def _train(config: Config, run: RunFolder, tell: Listener, say: Callable[[str], None]) -> Path:
    began, device, dtype = time.monotonic(), device_named(config.run.device), DTYPES[config.train.precision]
    set_up_machine(config.run.threads)
    model = locate(config.model, need_weights=True)
    config = recorded(config, run)
    chat = open_chat(model.path, config.template, began_on(run), config.chat.template_args)
    mix_of(sources(config))
    digests = data_digests(config)
    what = identity(model, chat, digests)
    refuse_changed(run, what, config, lambda file, was: first_difference(run, config, file, was))
    if run.finished:
        tell.say(f"{run.path} is finished already; --fresh starts it over")
        return run.path if run.report.exists() else write_report(run.path).parent
    if run.summary.exists():
        say(f"{run.path}: its result or summary.json is not what was written: it goes on, and makes them again")
    data = prepare(config, model.path, chat, digests, run, tell.on_rows, say)
    resident = resident_bytes()
    net = load_model(
        model.path, dtype=dtype if config.adapter.rank else DTYPES["fp32"], device=device,
        longest_tokens=data.longest_tokens, highest_token=data.highest_token,
    )  # fmt: skip
    drawn = probe_training(net, model.path)
    adapted = add_lora(net, config.adapter, model.name, config.train.seed) if config.adapter.rank else None
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=config.train.weight_decay)
    refuse_small_disk(run, optimizer, net, config)
    work = settled(planned(config, data, net, device, run.path.name), net, optimizer, say)
    config, steps = work.config, work.steps
    expected = predicted(work, fitted_memory(work, net, device, say, resident_bytes=resident))
    for line in (*announcement(config, data, net, work.loader, steps), *drawn):
        say(line)
    facts = facts_of(what, config, data, net)
    progress = put_back(run, optimizer, config.train.seed, facts["measured"], say)
    refuse_done(run, progress.step, steps)
    for change in write_record(run, config, what, data, numerics_of(config, net), progress.step):
        say(f"warning: {change} since the run began: from here on it is not the same to the bit")

    def log(record: dict[str, Any]) -> None:
        append_metrics(run.metrics, record)
        tell.on_step(record, steps)

    loop_tell = Told(log, say, lambda: flush_metrics(run))
    train_loop(
        net, optimizer, work.loader, loop_plan(config, run, steps), progress,
        measure=heldout_measure(net, data, config), tell=loop_tell, facts=facts,
    )  # fmt: skip
    if adapted is not None:
        publish(run.adapter, lambda folder: save_adapter(adapted, folder))
        net = merged(adapted)
    stops = data.record["certificate"]["train"]["terminators"]
    export_model(net.eval(), run.model, source=model.path, template=chat.template.source, terminators=stops)
    found = summary(config, progress, data, time.monotonic() - began, expected, run)
    write_json(run.summary, {**found, "plan": compared(expected, found, read_metrics(run.metrics))})
    return write_report(run.path).parent
