"""What a run writes down beside the weights, and compares when it resumes: manifest, announcement, summary."""

from __future__ import annotations

import hashlib
import itertools
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from instil.config import Config, dump_config, flat, shaping
from instil.errors import DataError, InstilError, ModelError, Problem, UsageError
from instil.files import sha256_of, sha256_of_files, write_atomically
from instil.folder import RunFolder, machine_facts, read_manifest, write_json
from instil.model.locate import ModelFolder, locate
from instil.model.machine import peak_memory_bytes
from instil.pack.loader import Loader
from instil.pack.plan import PACKING
from instil.plan import SourceUse, source_uses
from instil.prepare import Chat, Prepared
from instil.resolve import absolute, begun_with, full_path, own_manifests, refused
from instil.train.loop import Progress
from instil.train.schedule import rate_warning


def identity(model: ModelFolder, chat: Chat, digests: dict[str, str]) -> dict[str, Any]:
    """What a run learns from and with: a resumed run must find all of it unchanged."""
    return {
        "model": {"name": full_path(model.name), "revision": model.revision, "fingerprint": _fingerprint(model.path)},
        "tokenizer_sha256": chat.tokenizer.digest,
        "template_sha256": chat.template.digest,
        "data_sha256": digests,
        "date": str(chat.template.today),
        "packing": PACKING,
    }


def _fingerprint(folder: Path) -> str:
    """sha256 over config.json and every weight file, all of it: a run never goes on from other weights unnoticed."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    named = zip((file.name for file in files), sha256_of_files(files), strict=True)
    return hashlib.sha256(" ".join(f"{name} {digest}" for name, digest in named).encode()).hexdigest()


def began_on(run: RunFolder) -> str | None:
    """The date that a template saw when the run began, for templates that ask."""
    return next((told["date"] for told in (read_manifest(run), *own_manifests(run)) if "date" in told), None)


def refuse_changed(
    run: RunFolder, now: Mapping[str, Any], config: Config, difference: Callable[[str, str], str]
) -> None:
    """Raise where the data (exit 3), the model, tokenizer or template (exit 4), or how examples are packed (exit 2) is not
    what the run began with; exit 2 too where a setting names another model, template or file of data, which holds
    something else. What its checkpoints tell counts as much as what its manifest does. The same content elsewhere, or
    under another name, is the same.

    difference: where the rows of a file begin to differ from those of a file as it was called then, in words.
    """
    manifest, begun = read_manifest(run), next(iter(begun_with(run)), {})
    for before in (*([{"packing": 1, **manifest}] if manifest else []), *own_manifests(run)):
        if before.get("packing", now["packing"]) != now["packing"]:
            what = (
                "was begun by a version of instil that packs examples otherwise, so it would go on with other batches"
            )
            remedy = "finish it with that version, choose another run.name, or start over with --fresh"
            raise UsageError.at(run.path, what, remedy)
        _refuse_model(run, before, now, config, begun)
        if "data_sha256" in before:
            old, new = before["data_sha256"], now["data_sha256"]
            if "data_files" in before:
                old = {file: old[file] for file in before["data_files"]}
            elif "packs" not in before and sorted(old.values()) == sorted(new.values()):
                continue  # a checkpoint from before its manifest, whose keys are sorted, told the order of the files
            _refuse_data(run, old, new, config, begun, difference)


def _refuse_model(
    run: RunFolder, before: Mapping[str, Any], now: Mapping[str, Any], config: Config, begun: Mapping[str, Any]
) -> None:
    """begun: the settings that the run began with."""
    parts = (("model", "model"), ("tokenizer_sha256", "tokenizer"), ("template_sha256", "template"))
    for key, name in parts:
        if key not in before or content(before[key]) == content(now[key]):
            continue
        given = flat(config.model_dump()).get(name)
        if name in begun and full_path(begun[name]) != full_path(given):
            raise refused(run, {name: (begun[name], given)})
        what = f"the {name} has changed since the run began ({_differing(before[key], now[key])})"
        raise ModelError(Problem(str(run.path), what, ways_out(run)))


def is_its_model(run: RunFolder, name: str) -> bool:
    """Whether a name stands for what a run learns from, wherever that is now."""
    try:
        found = locate(name, need_weights=True)
    except InstilError:
        return False
    return bool(content(read_manifest(run).get("model")) == _fingerprint(found.path))


def content(part: Any) -> Any:
    """Of a model what it holds, not what it is called."""
    return part.get("fingerprint", part) if isinstance(part, dict) else part


def _refuse_data(
    run: RunFolder, old: Mapping[str, str], new: Mapping[str, str], config: Config, begun: Mapping[str, Any],
    difference: Callable[[str, str], str],
) -> None:  # fmt: skip
    """old, new: sha256 by file. begun: the settings that the run began with."""
    if list(old.values()) == list(new.values()):
        return
    given = flat(config.model_dump())
    other = any(_paths(begun[key]) != _paths(given[key]) for key in ("data.train", "data.heldout") if key in begun)
    was = {file: file for file in new}
    if not other and [Path(file).name for file in old] == [Path(file).name for file in new]:
        was = dict(zip(new, old, strict=True))  # the same files, seen from another folder
    files = [file for file, digest in new.items() if old.get(was[file], digest) != digest]
    gone, come = [file for file in old if file not in was.values()], [file for file in new if was[file] not in old]
    if other and not files:
        what = f"the run in {run.path} has {', '.join(old)}, now {', '.join(new)}, which hold other rows"
        raise UsageError.at("data.train", what, ways_out(run, "data.train=..."))
    ways = ways_out(run)
    problems = [
        Problem(f, f"has changed since the run in {run.path} began: {difference(f, was[f])}", ways) for f in files
    ]
    problems += [Problem(f, f"is gone since the run in {run.path} began", ways) for f in gone]
    problems += [Problem(f, f"is new since the run in {run.path} began", ways) for f in come]
    order = Problem(str(run.path), "its data files are in another order than when it began", ways)
    raise DataError(*(problems or [order]))


def _paths(value: Any) -> list[Any]:
    """The files that data.train or data.heldout names."""
    sources = value if isinstance(value, list) else [value]
    return [full_path(each["path"] if isinstance(each, dict) else each) for each in sources]


def _differing(before: Any, now: Any) -> str:
    """What differs of two identities, in a few characters."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in now if key != "name" and before.get(key) != now[key]]
        return ", ".join(f"{key} {_short(before.get(key))} -> {_short(now[key])}" for key in keys)
    return f"sha256 {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def ways_out(run: RunFolder, setting: str = "") -> str:
    """What one can do about a run that would not be the same run any more."""
    fork = f"`instil fork {run.path} NAME{' ' + setting if setting else ''}` goes on from it as another run"
    return f"put it back, start over with --fresh, or {fork}"


def write_record(
    run: RunFolder, config: Config, now: Mapping[str, Any], data: Prepared, numerics: Mapping[str, Any], step: int
) -> list[str]:
    """config.yaml and manifest.json; returns what has changed of the machine and the libraries since the run began, which
    is said once and kept in the manifest. step: updates done so far."""
    head = "# The resolved configuration of this run; `instil train` on it makes the same run again.\n"
    before = read_manifest(run)
    current = {"numerics": dict(numerics), **machine_facts()}
    changed = _changed(before, current) if step else []
    changes = [*before.get("changes", []), *([{"after_step": step, "what": changed}] if changed else [])]
    record = {"certificate": data.record["certificate"], "rows": data.record["rows"], "packs": data.key}
    write_atomically(run.config, (head + dump_config(absolute(config))).encode())
    write_json(run.manifest, {**now, **record, **current, "run": _itself(run, before), "changes": changes})
    return changed


def numerics_of(config: Config, net: PreTrainedModel) -> dict[str, Any]:
    """What the numbers of a run depend on beside the libraries: the same on resume, the same bits."""
    device = next(net.parameters()).device
    found = {"device": str(device), "precision": config.train.precision, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
    return found


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each version, and each part of the machine, that is not what it was."""
    pairs = []
    for part in ("versions", "numerics"):
        old = before.get(part, {})
        pairs += [(key, old.get(key), value) for key, value in now[part].items() if old.get(key, value) != value]
    return [f"{key} {old} -> {new}" for key, old, new in pairs]


def _itself(run: RunFolder, before: Mapping[str, Any]) -> dict[str, Any]:
    """The run's id. A folder that was moved keeps it, a copy gets its own: a copy is another inode."""
    inode = run.path.stat().st_ino
    known = before.get("run") or {}
    if known.get("inode") == inode:
        return dict(known)
    made = {"id": secrets.token_hex(8), "inode": inode}
    return {**made, "copied_from": known["id"]} if known else made


def facts_of(what: Mapping[str, Any], config: Config, data: Prepared, net: PreTrainedModel) -> dict[str, Any]:
    """What a checkpoint's manifest tells of its run: what it learns from and with, its settings, the examples that its
    held-out losses are measured on, versions, machine."""
    settings, measured = shaping(absolute(config)), _measured_on(config, data)
    numerics = numerics_of(config, net)
    more = {"data_files": list(what["data_sha256"]), "settings": settings, "measured": measured}
    return {**what, **machine_facts(), "numerics": numerics, **more}


def _measured_on(config: Config, data: Prepared) -> str:
    """sha256 of the held-out examples that count."""
    digest = hashlib.sha256()
    for example in itertools.islice(data.heldout or (), config.evaluate.examples):
        for part in (example.prompt_tokens, example.answer_tokens, example.weights):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
    return digest.hexdigest()


def announcement(config: Config, data: Prepared, net: PreTrainedModel, loader: Loader, steps: int) -> list[str]:
    """What will be done, in a few lines, before it is."""
    rows, t = data.record["rows"], config.train
    parameters = sum(p.numel() for p in net.parameters())
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    kind = f"LoRA rank {config.adapter.rank}" if config.adapter.rank else "all"
    batch = f"{t.batch_tokens:,} target tokens" if t.batch_tokens else f"{t.batch_examples:,} examples"
    heldout = 0 if data.heldout is None else len(data.heldout)
    lines = [
        *data.record["recognised"],
        f"{rows['used_rows']:,} rows used, {rows['dropped_rows']:,} dropped; {len(data.train):,} examples to learn, "
        f"{heldout:,} held out; {int(data.train.prompt_tokens.sum()):,} prompt and "
        f"{int(data.train.answer_tokens.sum()):,} answer tokens",
        f"{parameters / 1e6:,.1f}M parameters, {trainable / 1e6:,.1f}M trained ({kind}); rate {t.lr:g} {t.schedule}, "
        f"{t.epochs} epoch{'' if t.epochs == 1 else 's'}, {steps:,} steps of about {batch}, packs of up to "
        f"{config.pack.tokens:,} tokens",
    ]
    lines += mix_lines(source_uses(config, loader, data.train)) if loader.mixed is not None else []
    lines += [f"note: {note}" for note in data.record["notes"]]
    if rows["dropped_by_rule"]:
        lines.append("dropped: " + ", ".join(f"{rule} {n:,}" for rule, n in rows["dropped_by_rule"].items()))
    warning = rate_warning(t.lr or 0.0, parameters, config.adapter.rank)
    return [*lines, f"warning: {warning}"] if warning else lines


def mix_lines(uses: Sequence[SourceUse]) -> list[str]:
    """What an epoch takes of each source."""
    return [
        f"mix: {use.path}: {use.used.share:.1%} of the target tokens ({use.asked} asked), "
        f"{use.used.examples:,} of {use.examples:,} examples an epoch"
        for use in uses
    ]


def summary(
    config: Config, progress: Progress, data: Prepared, seconds: float, expected: Mapping[str, Any], run: RunFolder
) -> dict[str, Any]:
    """The final numbers. expected: what was planned; files: sha256 of the result. loss_before and loss_after: nats per
    target token on the held-out examples of the run."""
    losses = {int(step): loss for step, loss in progress.heldout.items()}
    return {
        "steps": progress.step,
        "epochs": config.train.epochs,
        "loss_before": losses.get(0),
        "loss_after": losses.get(progress.step),
        "heldout_losses": losses and {str(step): losses[step] for step in sorted(losses)},
        "target_tokens": progress.target_tokens,
        "computed_tokens": progress.computed_tokens,
        "target_tokens_per_s": progress.target_tokens / progress.seconds if progress.seconds else None,
        "computed_tokens_per_s": progress.computed_tokens / progress.seconds if progress.seconds else None,
        "train_seconds": progress.seconds,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "spikes": {"steps": progress.spikes, "left_out": progress.skipped},
        "rows": data.record["rows"],
        "files": result_files(run),
        "account": {**data.record["account"], "run": _run_account(progress, expected)},
    }


def result_files(run: RunFolder) -> dict[str, str]:
    """sha256 of every file of the result, by its path in the run folder."""
    return {
        f"{folder.name}/{name}": digest
        for folder in (run.model, run.adapter)
        if folder.is_dir()
        for name, digest in sorted(sha256_of(folder).items())
    }


def _run_account(progress: Progress, expected: Mapping[str, Any]) -> dict[str, int]:
    """What the steps computed: unshared = computed + shared, where shared tokens are those of common prefixes, computed
    once for several examples of a pack. Packs are not padded: there is no other token."""
    unshared = int(expected["unshared_tokens"])
    return {
        "unshared_tokens": unshared,
        "computed_tokens": progress.computed_tokens,
        "shared_tokens": unshared - progress.computed_tokens,
    }
