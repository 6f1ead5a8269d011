"""What a run writes down beside the weights, and compares when it resumes: manifest, announcement, summary."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
import torch
from transformers import PreTrainedModel

from instil.config import Config, dump_config
from instil.errors import DataError, ModelError, Problem, UsageError
from instil.folder import RunFolder, machine_facts, write_atomically, write_json
from instil.model.locate import ModelFolder
from instil.model.machine import peak_memory_bytes
from instil.pack.loader import Loader
from instil.pack.plan import PACKING
from instil.plan import SourceUse, source_uses
from instil.prepare import Chat, Prepared
from instil.train.loop import Progress
from instil.train.schedule import rate_warning

GO_BACK = "put it back, choose another run.name, or start over with --fresh"


def identity(model: ModelFolder, chat: Chat, digests: dict[str, str]) -> dict[str, Any]:
    """What a run learns from and with: a resumed run must find all of it unchanged."""
    return {
        "model": {"name": model.name, "revision": model.revision, "fingerprint": _fingerprint(model.path)},
        "tokenizer_sha256": chat.tokenizer.digest,
        "template_sha256": chat.template.digest,
        "data_sha256": digests,
        "date": str(chat.template.today),
        "packing": PACKING,
    }


def _fingerprint(folder: Path) -> str:
    """sha256 over config.json and the name, size and header of each weight file: cheap, and blind only to value edits."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as f:
            size = int.from_bytes(f.read(8), "little") if file.suffix == ".safetensors" else file.stat().st_size
            f.seek(0)
            digest.update(f"{file.name} {file.stat().st_size} ".encode() + f.read(8 + size))
    return digest.hexdigest()


def began_on(run: RunFolder) -> str | None:
    """The date that a template saw when the run began, for templates that ask."""
    return orjson.loads(run.manifest.read_bytes())["date"] if run.manifest.exists() else None


def refuse_changed(run: RunFolder, now: dict[str, Any]) -> None:
    """Raise where the data (exit 3), the model, tokenizer or template (exit 4), or how examples are packed (exit 2) is not
    what the run began with."""
    if not run.manifest.exists():
        return
    before = orjson.loads(run.manifest.read_bytes())
    if before.get("packing", 1) != now["packing"]:
        what = "was begun by a version of instil that packs examples otherwise, so it would go on with other batches"
        raise UsageError.at(
            run.path, what, "finish it with that version, choose another run.name, or start over with --fresh"
        )
    for key, name in (("model", "model"), ("tokenizer_sha256", "tokenizer"), ("template_sha256", "template")):
        if before[key] != now[key]:
            raise ModelError(Problem(str(run.path), f"the {name} has changed since the run began", GO_BACK))
    changed = [f for f, digest in now["data_sha256"].items() if before["data_sha256"].get(f, digest) != digest]
    if changed:
        raise DataError(*(Problem(f, f"has changed since the run in {run.path} began", GO_BACK) for f in changed))


def write_record(run: RunFolder, config: Config, now: dict[str, Any], data: Prepared, net: PreTrainedModel) -> None:
    """config.yaml and manifest.json."""
    head = "# The resolved configuration of this run; `instil train` on it makes the same run again.\n"
    write_atomically(run.config, (head + dump_config(config)).encode())
    device = next(net.parameters()).device
    numerics = {"device": str(device), "precision": config.train.precision, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        numerics["device_name"] = torch.cuda.get_device_name(device)
    record = {"certificate": data.record["certificate"], "rows": data.record["rows"], "packs": data.key}
    write_json(run.manifest, {**now, **record, "numerics": numerics, **machine_facts()})


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
        f"{t.epochs} epochs, {steps:,} steps of about {batch}, packs of up to {config.pack.tokens:,} tokens",
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
    config: Config, progress: Progress, data: Prepared, seconds: float, expected: Mapping[str, Any]
) -> dict[str, Any]:
    """The final numbers. expected: what was planned. loss_before and loss_after: nats per target token on the held-out
    examples of the run."""
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
        "rows": data.record["rows"],
        "account": {**data.record["account"], "run": _run_account(progress, expected)},
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
