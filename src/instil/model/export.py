"""The result in Hugging Face layout: weights, tokenizer, template, and a generation_config that stops where we taught."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from instil.files import publish
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

    publish(out, write)


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
