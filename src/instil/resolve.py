"""What was left open in a configuration, chosen: rate, epochs, batch, pack; and what a resumed run must not change."""

from __future__ import annotations

import glob
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from instil.config import HARMLESS, UNFORKABLE, Config, SourceConfig, flat, load_config
from instil.errors import InstilError, Problem, UsageError
from instil.folder import RunFolder
from instil.model.adapters import default_alpha
from instil.pack.plan import StepPlan
from instil.pack.store import ExampleStore
from instil.plan import mixed_of, step_plan, total_steps
from instil.train import checkpoint
from instil.train.loop import LoopPlan
from instil.train.schedule import default_batch_examples, default_epochs, default_rate

# Keys whose null is "chosen for you" (resolve below, and compiling.py); elsewhere null is a value as any other.
CHOSEN = (
    "run.name", "pack.tokens", "train.lr", "train.epochs", "train.batch_examples", "train.compile", "adapter.alpha",
    "evaluate.every_steps",
)  # fmt: skip


def recorded(config: Config, run: RunFolder) -> Config:
    """The configuration of a run that is there already: what is to be chosen takes the recorded value.

    Raises UsageError naming each key that differs and would change what is learnt.
    """
    begun = begun_with(run)
    if not begun:
        return config
    now = flat(config.model_dump())
    now |= {key: begun[0].get(key) for key in CHOSEN if now[key] is None}
    changed = {
        key: (before[key], value)
        for before in begun
        for key, value in now.items()
        if key in before and key not in HARMLESS and not _same(key, value, before[key])
    }
    if changed:
        raise refused(run, {key: changed[key] for key in now if key in changed})
    return load_config(None, given=now)


def begun_with(run: RunFolder) -> list[dict[str, Any]]:
    """The settings that a run has been trained with, by key, as each of its checkpoints tells them, the newest first; of
    config.yaml, which anybody may edit, where none does. A fork's first checkpoint is of another run, and tells none."""
    file = flat(load_config(run.config).model_dump()) if run.config.exists() else {}
    told = [manifest["settings"] for manifest in own_manifests(run) if "settings" in manifest]
    return [file | {key: json.loads(text) for key, text in each.items()} for each in told] or ([file] if file else [])


def own_manifests(run: RunFolder) -> list[dict[str, Any]]:
    """Of the checkpoints that the run has saved itself, the newest first."""
    return [manifest for manifest in checkpoint.manifests(run.checkpoints) if "forked_from" not in manifest]


def refused(run: RunFolder, changed: Mapping[str, tuple[Any, Any]]) -> InstilError:
    """The error for settings that are not what the run began with: key -> value then, value now."""
    problems, settings = [], []
    for key, (before, value) in changed.items():
        problems.append(Problem(key, f"the run in {run.path} has {before!r}, now {value!r}", ""))
        settings.append(shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}"))  # JSON is YAML
        if key == "train.batch_tokens" and value and "train.batch_examples" not in changed:
            settings.append("train.batch_examples=null")  # else both are set
    fork = f"`instil fork {run.path} NAME {' '.join(settings)}` goes on from it as another run"
    if any(problem.place in UNFORKABLE for problem in problems):
        fork = f"begin another run with run.name=NAME (`instil fork` keeps {', '.join(UNFORKABLE)})"
    ways = f"set {'it' if len(problems) == 1 else 'them'} back, start over with --fresh, or {fork}"
    return UsageError(*problems[:-1], replace(problems[-1], remedy=ways))


def _same(key: str, value: Any, before: Any) -> bool:
    """Whether a value is what the run began with. Of a model, a template and data not where they are but what they hold
    counts, which is compared by hashes (record.py: refuse_changed); of data also how it is used."""
    if key in ("model", "template") or (key == "data.heldout" and isinstance(value, str) and isinstance(before, str)):
        return True
    if key == "data.train" and isinstance(before, list):
        return [_use(each) for each in value] == [_use(each) for each in before]
    return bool(value == before)


def _use(source: Any) -> dict[str, Any]:
    """A source without its path."""
    full = source if isinstance(source, dict) else {"path": source}
    return {**SourceConfig(**full).model_dump(), "path": ""}


def absolute(config: Config) -> Config:
    """With the paths of all that is on this disk in full, so that they mean the same from every folder."""
    given = flat(config.model_dump())
    given |= {key: full_path(given[key]) for key in ("model", "template", "data.heldout")}
    given["data.train"] = [
        {**each, "path": full_path(each["path"])} if isinstance(each, dict) else full_path(each)
        for each in given["data.train"]
    ]
    return load_config(None, given=given)


def full_path(name: Any) -> Any:
    """An existing path, or a glob that matches, in full; names on the hub, `demo`, and what is no text, as they are."""
    if not isinstance(name, str) or name == "demo":
        return name
    path = os.path.expanduser(name)
    if not (os.path.lexists(path) or glob.glob(path, recursive=True)):
        return name
    return os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)  # a/.. may be behind a link


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
