"""What was left open in a configuration, chosen: rate, epochs, batch, pack; and what a resumed run must not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from instil.config import HARMLESS, Config, flat, load_config
from instil.errors import Problem, UsageError
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
    problems = []
    for key, value in now.items():
        if value is None:
            now[key] = before.get(key)
        elif value != before.get(key) and not key.startswith(HARMLESS):
            what = f"the run in {file.parent} has {before.get(key)!r}, now {value!r}"
            problems.append(Problem(key, what, "set it back, choose another run.name, or start over with --fresh"))
    if problems:
        raise UsageError(*problems)
    return load_config(None, given=now)


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


def loop_plan(config: Config, checkpoints: Path, steps: int) -> LoopPlan:
    """What a resolved configuration tells the loop."""
    t, c = config.train, config.checkpoint
    return LoopPlan(
        steps=steps, peak_lr=t.lr or 0.0, schedule=t.schedule, warmup=t.warmup, clip_norm=t.clip_norm,
        measure_every_steps=config.evaluate.every_steps or steps, save_every_steps=c.every_steps,
        save_every_s=c.every_s, keep=c.keep, checkpoints=checkpoints,
    )  # fmt: skip
