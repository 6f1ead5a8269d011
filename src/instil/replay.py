"""The step of an incident once more: the run as it was before it, the same batch, and where a number is first not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from instil.config import load_config
from instil.errors import DivergedError, UsageError
from instil.explain import stored_sides
from instil.folder import open_run
from instil.model.adapters import add_lora
from instil.model.compiled import compile_layers
from instil.model.finite import is_finite, not_finite
from instil.model.head import chunk_rows, head_of
from instil.model.load import device_named, hidden_states, load_model
from instil.model.locate import cache_folder, locate
from instil.model.machine import set_up_machine
from instil.model.memory import compute_layers_again
from instil.pack.tree import build_pack
from instil.plan import loader_of
from instil.planned import DTYPES
from instil.train import checkpoint
from instil.train.incident import Seen, examples_of, looked_at, read_incident
from instil.train.optim import MasterAdamW
from instil.train.room import Room
from instil.train.step import step as train_step
from instil.types import Example


@dataclass(frozen=True)
class Replayed:
    """What the step did this time. diverged: it was not finite again; problems: what it said; weights: the names of those
    that are not finite before it; first_module: the first whose output is not; gradients: the names of those that are not."""

    step: int
    diverged: bool
    problems: list[str]
    weights: list[str]
    first_module: str
    gradients: list[str]
    rows: list[Seen]

    def as_dict(self) -> dict[str, Any]:
        """For --json; numbers that are not finite as text, which JSON has not."""
        rows = [{key: _written(value) for key, value in asdict(row).items()} for row in self.rows]
        return {**asdict(self), "rows": rows}


def _written(value: Any) -> Any:
    return str(value) if isinstance(value, float) and value - value != 0 else value


def replay(run: str) -> Replayed:
    """Repeat the step that ended a run, from its weights, moments and random state, and with layers compiled or computed
    again as they were. Nothing in the run changes.

    Raises UsageError where no incident was kept, MachineError where it cannot be read.
    """
    folder = open_run(run)
    if not (folder.incident / "incident.json").is_file():
        raise UsageError.at(run, "has no incident", "a run that diverges keeps one in its folder")
    how = read_incident(folder.incident)
    found = checkpoint.load_latest(folder.incident)
    if found is None:
        raise UsageError.at(folder.incident, "has no state to begin from", "run the same command again")
    config = load_config(folder.config)
    set_up_machine(config.run.threads)
    dtype = DTYPES[config.train.precision]
    net = load_model(
        locate(config.model, need_weights=True).path, dtype=dtype if config.adapter.rank else torch.float32,
        device=device_named(config.run.device), probe=False,
    )  # fmt: skip
    if config.adapter.rank:
        add_lora(net, config.adapter, config.model, config.train.seed)
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=config.train.weight_decay)
    optimizer.load_masters(found.state.weights)
    optimizer.load_state(found.state.optimizer)
    train = stored_sides(folder)["train"]
    loader = loader_of(config, train)
    batch = loader.batch(found.state.step)
    rows = looked_at(net, examples_of(batch, train))
    module = _first_not_finite(net, [train[i] for pack in batch.packs for i in pack.examples])
    net.train()
    if config.train.compile:
        compile_layers(net, cache_folder() / "compiled")
    if how.again:
        compute_layers_again(net)
    room = Room(train, loader.plan.limit_tokens)
    checkpoint.restore_rng(found.state.rng)
    try:
        stats = train_step(net, optimizer, batch, lr=how.lr, clip_norm=config.train.clip_norm, room=room)
        diverged, said = False, [f"step {batch.step + 1}: loss {stats.loss:.4g}, gradient norm {stats.grad_norm:.4g}"]
    except DivergedError as error:
        diverged, said = True, error.lines()
    gradients = not_finite((name, m.grad) for name, m in optimizer.masters.items() if m.grad is not None)
    weights = not_finite(found.state.weights.items())
    return Replayed(batch.step + 1, diverged, said, weights, module, gradients, rows)


@torch.no_grad()
def _first_not_finite(net: PreTrainedModel, examples: Sequence[Example]) -> str:
    """The name of the first module, in the order of computation, whose output is not finite for one of the examples."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and not is_finite(first):
                found.append(name)

        return look

    head, head_name = head_of(net), next(n for n, m in net.named_modules() if m is net.get_output_embeddings())
    hooks = [module.register_forward_hook(watch(name)) for name, module in net.named_modules() if name]
    try:
        for i, example in enumerate(examples):
            hidden = hidden_states(net, build_pack([example], [i]))
            parts = hidden.split(chunk_rows(head.weight.shape[0], hidden.device))
            if not found and not all(is_finite(head.logits(part)) for part in parts):
                found.append(head_name)
            if found:
                break
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""
