"""A run that goes on from another run's newest checkpoint under other settings, in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from instil.config import UNFORKABLE, dump_config, flat, load_config
from instil.errors import UsageError
from instil.files import write_atomically
from instil.folder import RunFolder, claim, keep_metrics_through, open_run, read_manifest
from instil.train import checkpoint


def fork(run: str, name: str, settings: Sequence[str] = ()) -> tuple[Path, int]:
    """Make the folder of a run `name` beside `run`, with its configuration under `settings`, its newest checkpoint that
    verifies, and its history so far; returns the folder and the step. `instil train` on the folder goes on from there.

    settings: section.key=value. Raises UsageError for settings under which the checkpoint's tensors mean nothing.
    """
    source = open_run(run)
    at = source.path.resolve() if source.path.is_symlink() or source.path.name in ("", "..") else source.path
    place = {"run.name": name, "run.dir": str(at.parent)}
    named = {text.partition("=")[0] for text in settings}
    config = load_config(source.config, settings, {key: value for key, value in place.items() if key not in named})
    before, now = flat(load_config(source.config).model_dump()), flat(config.model_dump())
    for key in UNFORKABLE:
        if before[key] != now[key]:
            what = f"{run} has {before[key]!r}, and its checkpoint fits nothing else"
            raise UsageError.at(f"{key}={now[key]}", what, "begin a run of its own with `instil train`")
    if (RunFolder(Path(config.run.dir) / str(config.run.name))).path.exists():
        raise UsageError.at(name, "is there already", "choose another name")
    found = checkpoint.load_latest(source.checkpoints)
    if found is None:
        raise UsageError.at(run, "has no checkpoint yet", "let it train for a while, or begin another run")
    origin = {"run": read_manifest(source).get("run"), "path": str(source.path), "step": found.state.step}
    facts = {key: value for key, value in found.manifest.items() if key not in ("files", "sha256")}
    with claim(config, fresh=False) as forked:
        try:
            checkpoint.save(forked.checkpoints, found.state, {**facts, "forked_from": origin}, keep=1)
            if source.metrics.exists():
                shutil.copyfile(source.metrics, forked.metrics)
                keep_metrics_through(forked.metrics, found.state.step)
            write_atomically(forked.config, f"# Forked from {source.path}.\n{dump_config(config)}".encode())
        except BaseException:
            shutil.rmtree(forked.path, ignore_errors=True)
            raise
        return forked.path, found.state.step
