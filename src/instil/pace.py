"""The speed of a run, measured: some packs of the plan through its model, on this machine."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from instil.costs import Costs
from instil.model.adapters import add_lora
from instil.model.load import load_model, probe_training
from instil.model.memory import compute_layers_again
from instil.plan import work_of_packs
from instil.planned import DTYPES, Planned
from instil.train.loss import learn
from instil.train.optim import MasterAdamW

WARM_UP_PACKS = 2  # took 1.6 and 1.4 times as long as the others: memory is new, kernels are made
TIMED_PACKS = 4


@dataclass(frozen=True)
class Pace:
    """This machine with this model: FLOP/s of forward and backward passes, seconds of an update and of loading."""

    flops_per_s: float
    update_s: float
    load_s: float


def measured_pace(work: Planned, folder: Path, costs: Costs, device: torch.device, *, again: bool = False) -> Pace:
    """Load the model as a run does, and train on some packs of the plan at rate 0: the median pace after the first."""
    began = time.perf_counter()
    config, adapted = work.config, bool(work.config.adapter.rank)
    dtype = DTYPES[config.train.precision]
    net = load_model(
        folder, dtype=dtype if adapted else torch.float32, device=device,
        longest_tokens=work.data.longest_tokens, highest_token=work.data.highest_token,
    )  # fmt: skip
    probe_training(net, folder)
    if adapted:
        add_lora(net, config.adapter, config.model, config.train.seed)
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.0)
    net.train()
    if again:
        compute_layers_again(net)
    load_s = time.perf_counter() - began
    packs = [pack for step in work.loader.packs(0) for pack in step]
    paces, updates = [], []
    for i in range(WARM_UP_PACKS + TIMED_PACKS):
        indices = packs[i % len(packs)]
        pack = work.loader.pack(indices)
        start = now(device)
        optimizer.zero()
        learn(net, pack, float(pack.weight.sum()))
        middle = now(device)
        optimizer.grad_norm()
        optimizer.update(lr=0.0)
        if i >= WARM_UP_PACKS:
            paces.append(costs.training_flops(work_of_packs(work.data.train, [indices])) / (middle - start))
            updates.append(now(device) - middle)
    return Pace(statistics.median(paces), statistics.median(updates), load_s)


def now(device: torch.device) -> float:
    """A clock, read when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
