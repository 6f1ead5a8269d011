"""What was left open in a configuration, chosen: rate, epochs, batch, pack; and what a resumed run must not change."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from instil.config import HARMLESS, UNFORKABLE, Config, SourceConfig, flat, load_config
from instil.errors import Problem, UsageError
from instil.folder import RunFolder
from instil.model.adapters import default_alpha
from instil.pack.plan import StepPlan
from instil.pack.store import ExampleStore
from instil.plan import mixed_of, step_plan, total_steps
from instil.train.loop import LoopPlan
from instil.train.schedule import default_batch_examples, default_epochs, default_rate


def recorded(config: Config, file: Path) -> Config:
    """The configuration of a run that is there already: what is null takes the recorded value.

    Raises UsageError naming each key that differs and would change what is learnt.
    """
    if not file.exists():
        return config
    before = flat(load_config(file).model_dump())
    now = flat(config.model_dump())
    problems, settings = [], []
    for key, value in now.items():
        if value is None:
            now[key] = before.get(key)
        elif not (key in HARMLESS or _same(key, value, before.get(key))):
            problems.append(Problem(key, f"the run in {file.parent} has {before.get(key)!r}, now {value!r}", ""))
            settings.append(shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}"))  # JSON is YAML
    if problems:
        fork = f"`instil fork {file.parent} NAME {' '.join(settings)}` goes on from it as another run"
        if any(problem.place in UNFORKABLE for problem in problems):
            fork = f"begin another run with run.name=NAME (`instil fork` keeps {', '.join(UNFORKABLE)})"
        ways = f"set {'it' if len(problems) == 1 else 'them'} back, start over with --fresh, or {fork}"
        raise UsageError(*problems[:-1], replace(problems[-1], remedy=ways))
    return load_config(None, given=now)


def _same(key: str, value: Any, before: Any) -> bool:
    """Whether a value is what the run began with; of data only how it is used, as what the files hold is compared by
    their hashes (record.py: refuse_changed)."""
    if key == "data.heldout" and isinstance(value, str) and isinstance(before, str):
        return True
    if key == "data.train" and isinstance(before, list):
        return [_use(each) for each in value] == [_use(each) for each in before]
    return bool(value == before)


def _use(source: Any) -> dict[str, Any]:
    """A source without its path."""
    full = source if isinstance(source, dict) else {"path": source}
    return {**SourceConfig(**full).model_dump(), "path": ""}


def resolve(config: Config, train: ExampleStore, fitting_tokens: int, name: str) -> tuple[Config, StepPlan]:
    """Every null chosen, and the plan of steps that follows. Explicit values stay as they are."""
    t = config.train
    chosen: dict[str, Any] = {
        "run.name": name,
        "train.lr": t.lr or default_rate(config.adapter.rank),
        "train.epochs": t.epochs or default_epochs(len(train)),
        "pack.tokens": config.pack.tokens or max(fitting_tokens, int(train.lengths.max())),
    }
    if not t.batch_tokens:
        chosen["train.batch_examples"] = t.batch_examples or default_batch_examples(len(train))
    if config.adapter.rank:
        chosen["adapter.alpha"] = config.adapter.alpha or default_alpha(config.adapter.rank)
    full = load_config(None, given={**flat(config.model_dump()), **chosen})
    plan = step_plan(full, train, mixed_of(full, train))
    if full.evaluate.every_steps is None:
        every = max(1, round(total_steps(full, plan) / 4))
        full = load_config(None, given={**flat(full.model_dump()), "evaluate.every_steps": every})
    return full, plan


def loop_plan(config: Config, run: RunFolder, steps: int) -> LoopPlan:
    """What a resolved configuration tells the loop."""
    t, c = config.train, config.checkpoint
    return LoopPlan(
        steps=steps, peak_lr=t.lr or 0.0, schedule=t.schedule, warmup=t.warmup, clip_norm=t.clip_norm,
        measure_every_steps=config.evaluate.every_steps or steps, save_every_steps=c.every_steps,
        save_every_s=c.every_s, keep=c.keep, checkpoints=run.checkpoints,
        skip_spikes=t.spikes == "skip", incidents=run.incident,
    )  # fmt: skip
