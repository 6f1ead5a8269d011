"""Decoder layers through torch.compile: one compilation for all layers and all lengths, kept in the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from instil.errors import MachineError


def decoder_layers(net: PreTrainedModel) -> list[nn.Module]:
    """The blocks that transformers never splits over devices, which are the decoder layers."""
    names = set(getattr(net, "_no_split_modules", None) or ())
    return [module for module in net.modules() if type(module).__name__ in names]


def can_compile(device: torch.device) -> bool:
    """Whether what torch.compile needs is here: for a CPU a C++ compiler."""
    compiler = os.environ.get("CXX", "")
    return device.type == "cuda" or any(shutil.which(name) for name in (compiler, "g++", "clang++", "c++") if name)


def compile_layers(net: PreTrainedModel, cache: Path) -> None:
    """Compile every decoder layer, attention left out (model/attention.py); compiled code is kept in the folder `cache`.

    Raises MachineError where there is no compiler.
    """
    device = next(net.parameters()).device
    if not can_compile(device):
        raise MachineError.at("train.compile", "there is no C++ compiler", "install g++, or set train.compile=false")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    for layer in decoder_layers(net):
        layer.compile(dynamic=True)


def run_eagerly(net: PreTrainedModel) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(net):
        layer._compiled_call_impl = None
