"""The result in Hugging Face layout: weights, tokenizer, template, and a generation_config that stops where we taught."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from instil.model.attention import attention

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt",
)  # fmt: skip


def export_model(
    net: PreTrainedModel, out: Path, *, source: Path, template: str, terminators: Sequence[Mapping[str, Any]]
) -> None:
    """Make `out`, complete or absent: AutoModelForCausalLM.from_pretrained(out) gives the same logits.

    source: the base model's folder, whose tokenizer files are copied. terminators: {"text", "id"} of what ends an answer;
    the ids join the generation config's eos ids, so that every server stops there. One that is not a single token (id
    None) becomes a stop string.
    """

    def write(folder: Path) -> None:
        before = net.generation_config
        net.generation_config = _stopping(net, terminators)
        try:
            with attention(net, "sdpa"):
                net.save_pretrained(folder, safe_serialization=True)
        finally:
            net.generation_config = before
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    write_folder(out, write)


def _stopping(net: PreTrainedModel, terminators: Sequence[Mapping[str, Any]]) -> GenerationConfig:
    """The model's generation config with the terminators first among its eos ids."""
    known_fields = (net.generation_config or GenerationConfig()).to_dict()
    known_fields.pop("_from_model_config", None)  # it is no longer what the model's config alone says
    config = GenerationConfig.from_dict(known_fields)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ids = dict.fromkeys(i for i in [*(ending["id"] for ending in terminators), *known] if i is not None)
    config.eos_token_id = list(ids) or None
    if texts := [ending["text"] for ending in terminators if ending["id"] is None]:
        config.stop_strings = texts
    return config


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a sibling of `out`, flush it to disk, and rename it: `out` is the old, the new, never between."""
    partial = out.with_name(f".partial-{out.name}-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        write(partial)
        for file in partial.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        if out.exists():
            trash = out.with_name(f".trash-{out.name}-{secrets.token_hex(4)}")
            out.rename(trash)
            partial.rename(out)
            shutil.rmtree(trash)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
