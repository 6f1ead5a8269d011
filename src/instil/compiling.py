"""Whether the layers of a run are compiled: tried on the run's own packs, where the run is long enough to pay for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from transformers import PreTrainedModel

from instil.config import flat, load_config
from instil.costs import costs_of
from instil.model.compiled import can_compile, compile_layers, run_eagerly
from instil.model.locate import cache_folder
from instil.pace import now
from instil.plan import work_of_run
from instil.planned import Planned
from instil.train.loss import learn
from instil.train.optim import MasterAdamW

# A run of fewer FLOPs does not try: the trial takes one to two minutes.
LEAST_FLOPS = {"cpu": 2e15, "cuda": 5e17}
LEAST_GAIN = 1.05
WARM_UP_PACKS, TIMED_PACKS = 2, 3


def settled(
    work: Planned, net: PreTrainedModel, optimizer: MasterAdamW, say: Callable[[str], None] = lambda line: None
) -> Planned:
    """The plan with train.compile chosen where it was null, and the model's layers compiled where it is true.

    The choice is recorded with the configuration: a resumed run computes as it began.
    """
    chosen = work.config.train.compile
    if chosen is None:
        chosen = _pays(work, net, optimizer, say)
        work = replace(
            work, config=load_config(None, given={**flat(work.config.model_dump()), "train.compile": chosen})
        )
    elif chosen:
        compile_layers(net, cache_folder() / "compiled")
    return work


def _pays(work: Planned, net: PreTrainedModel, optimizer: MasterAdamW, say: Callable[[str], None]) -> bool:
    """Whether compiled layers are at least LEAST_GAIN times as fast on packs of this run; they stay compiled if so."""
    device = next(net.parameters()).device
    adapted = bool(work.config.adapter.rank)
    flops = costs_of(net, adapted=adapted).training_flops(work_of_run(work.loader, work.data.train, work.steps))
    if flops < LEAST_FLOPS["cuda" if device.type == "cuda" else "cpu"] or not can_compile(device):
        return False
    say("a long run: trying whether compiled layers are faster (train.compile=true or false skips the trial)")
    eager = _seconds(work, net, optimizer)
    compile_layers(net, cache_folder() / "compiled")
    gain = eager / _seconds(work, net, optimizer)
    if gain < LEAST_GAIN:
        run_eagerly(net)
    say(f"compiled layers are {gain:.2f} times as fast on this machine: {'used' if gain >= LEAST_GAIN else 'not used'}")
    return gain >= LEAST_GAIN


def _seconds(work: Planned, net: PreTrainedModel, optimizer: MasterAdamW) -> float:
    """The least time that each of some packs takes, added up; no weight changes."""
    net.train()
    device = next(net.parameters()).device
    packs = [pack for step in work.loader.packs(0) for pack in step][:TIMED_PACKS]
    best = [float("inf")] * len(packs)
    for turn in range(WARM_UP_PACKS + 2):
        for i, indices in enumerate(packs):
            pack, start = work.loader.pack(indices), now(device)
            learn(net, pack, float(pack.weight.sum()))
            optimizer.zero()
            if turn >= WARM_UP_PACKS // len(packs):
                best[i] = min(best[i], now(device) - start)
    return sum(best)
