"""LoRA through peft: add it to a model, save it in PEFT's layout, merge it into the weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Protocol

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from instil.errors import UsageError


def default_alpha(rank: int) -> float:
    """Twice the rank: the usual scale of 2."""
    return 2.0 * rank


class Lora(Protocol):
    """What an adapter is made from; the configuration's section has it."""

    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def targets(self) -> list[str]: ...


def add_lora(net: PreTrainedModel, lora: Lora, name: str, seed: int) -> PeftModel:
    """Freeze the model and add W + (alpha / rank) * B A to its linear layers (Hu et al. 2021), B = 0 at the start.

    alpha None = 2 * rank. targets: last parts of module names (`q_proj`), or none for every linear layer but the head.
    name: the base model as the adapter's config will name it. seed: of A.
    """
    # By their exact type: a router may be a linear layer that returns more than its product, which no adapter adds to.
    head = net.get_output_embeddings()
    adaptable = {m: name for name, m in net.named_modules() if type(m) in (nn.Linear, Conv1D) and m is not head}
    plain = list(adaptable.values())
    linear = {name.rsplit(".", 1)[-1] for name in plain}
    if not linear:
        raise UsageError.at(
            "adapter.rank", "the model has no linear layers of a kind that adapters know", "set it to 0"
        )
    for target in lora.targets:
        if target not in linear:
            is_head = any(m is head and name.rsplit(".", 1)[-1] == target for name, m in net.named_modules())
            what = "is the head, which adapters leave as it is" if is_head else "is no linear layer of the model"
            raise UsageError.at("adapter.targets", f"{target!r} {what}", f"use some of: {', '.join(sorted(linear))}")
    others = {name.rsplit(".", 1)[-1] for name, m in net.named_modules() if m not in adaptable}
    every = plain if linear & others else sorted(linear)  # by last parts, as servers know them, where these say enough
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or default_alpha(lora.rank),  # type: ignore[arg-type]  # peft divides, floats do
        target_modules=list(lora.targets) or every,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a name that goes in v6
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set")  # peft sets it right for GPT-2's layers
        adapted = get_peft_model(net, config, autocast_adapter_dtype=False)  # bf16 copies; our masters are fp32
    adapted.peft_config["default"].base_model_name_or_path = name  # given before, peft would warn that it renames it
    return adapted


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors."""
    # "auto", the default for embedding layers, asks the hub about the base model; none of ours are adapted
    adapted.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The model with the adapter added into its weights; the adapted model must not be used afterwards."""
    return adapted.merge_and_unload()  # type: ignore[operator,no-any-return]
