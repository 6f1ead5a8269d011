"""A run that goes on from another run's newest checkpoint under other settings, in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from instil.config import UNFORKABLE, Config, dump_config, flat, load_config
from instil.errors import UsageError
from instil.files import publish
from instil.folder import (
    LOCK,
    RunFolder,
    claim,
    keep_metrics_through,
    keep_out_of_git,
    open_run,
    read_manifest,
    run_folder,
)
from instil.pack.store import open_store
from instil.plan import loader_of, total_steps
from instil.record import is_its_model
from instil.train import checkpoint

EXAMPLES = ("data.", "chat.", "targets.", "pack.", "template")  # keys of which the examples, and their number, depend


def fork(run: str, name: str, settings: Sequence[str] = ()) -> tuple[Path, int]:
    """Make the folder of a run `name` beside `run`, with its configuration under `settings`, its newest checkpoint that
    verifies, and its history so far; returns the folder and the step. `instil train` on the folder goes on from there.

    settings: section.key=value. Raises UsageError for settings under which the checkpoint's tensors mean nothing.
    """
    source = RunFolder(Path(run))
    if not (source.config.is_file() and source.checkpoints.is_dir()):  # what a fork has before it is trained
        source = open_run(run)
    at = source.path.resolve() if source.path.is_symlink() or source.path.name in ("", "..") else source.path
    place = {"run.name": name, "run.dir": str(at.parent)}
    named = {text.partition("=")[0] for text in settings}
    config = load_config(source.config, settings, {key: value for key, value in place.items() if key not in named})
    before, now = flat(load_config(source.config).model_dump()), flat(config.model_dump())
    changed = {key for key in now if before[key] != now[key]}
    for key in UNFORKABLE:
        if key in changed and not (key == "model" and is_its_model(source, config.model)):
            what = f"{run} has {before[key]!r}, and its checkpoint fits nothing else"
            raise UsageError.at(f"{key}={now[key]}", what, "begin a run of its own with `instil train`")
    if _taken(run_folder(config).path):
        raise UsageError.at(name, "is there already", "choose another name")
    found = checkpoint.load_latest(source.checkpoints)
    if found is None:
        raise UsageError.at(run, "has no checkpoint yet", "let it train for a while, or begin another run")
    step = found.state.step
    manifest = read_manifest(source)
    if manifest and not any(key.startswith(EXAMPLES) for key in changed):
        _refuse_done(run, source.packs / manifest["packs"], config, step)
    origin = {"run": manifest.get("run"), "path": str(source.path), "step": step}
    facts = {key: value for key, value in found.manifest.items() if key not in ("files", "sha256")}

    def fill(partial: Path) -> None:
        made = RunFolder(partial)
        checkpoint.save(made.checkpoints, found.state, {**facts, "forked_from": origin}, keep=1)
        if source.metrics.exists():
            shutil.copyfile(source.metrics, made.metrics)
            keep_metrics_through(made.metrics, step)
        made.config.write_text(f"# Forked from {source.path}.\n{dump_config(config)}", encoding="utf-8")
        (partial / LOCK).touch()
        keep_out_of_git(partial)

    with claim(config, fresh=False) as forked:
        publish(forked.path, fill)
        return forked.path, step


def _taken(folder: Path) -> bool:
    """Whether there is anything but what a fork that was killed has left: its lock."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return folder.exists() and not {LOCK} <= names <= {LOCK, ".gitignore"}


def _refuse_done(run: str, packs: Path, config: Config, step: int) -> None:
    """Raise UsageError where the same examples under these settings give no step more than are done."""
    if config.train.epochs is None or not (packs / "record.json").is_file():
        return
    steps = total_steps(config, loader_of(config, open_store(packs)[0]["train"]).plan)
    if steps <= step:
        what = f"{step:,} steps are done, and these settings give {steps:,}: nothing would be learnt"
        raise UsageError.at(run, what, "raise train.epochs or train.steps in the fork's settings")
