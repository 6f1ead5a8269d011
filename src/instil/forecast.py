"""What a run will need, before it begins: FLOPs by formula, memory from shapes, seconds from a measurement on this machine."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from instil.config import Config, flat
from instil.data.ledger import read_ledger
from instil.errors import InstilError
from instil.folder import RunFolder, run_name
from instil.model.adapters import add_lora
from instil.model.head import BLOCK_ROWS, chunk_rows
from instil.model.load import device_named, load_model, read_config, refuse_lengths, refuse_recurrent
from instil.model.locate import check_folder, locate
from instil.model.machine import release_free_memory, set_up_machine
from instil.model.memory import compute_layers_again, computes_layers_again, fitting_tokens, machine_bytes
from instil.pack.bins import Indices
from instil.pack.loader import Loader
from instil.pack.plan import computed_tokens, packs_in_order
from instil.pack.prefixes import Prefixes
from instil.pack.tree import build_pack
from instil.plan import (
    SourceUse,
    Work,
    loader_of,
    source_uses,
    total_steps,
    work_of_each,
    work_of_epoch,
    work_of_packs,
    work_of_run,
)
from instil.prepare import Prepared, data_digests, open_chat, prepare
from instil.report.quantities import size
from instil.resolve import resolve
from instil.train.loss import learn
from instil.train.optim import MasterAdamW
from instil.types import Pack

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# Resident memory beyond the tensors of a CPU run: what oneDNN's kernels keep, and the holes that blocks of changing size
# leave in the heap between two releases. Fitted together with FROZEN_SHARE to seven measured runs of 13M to 135M
# parameters, all within 9%, with oneDNN's caches limited to 128 kernels.
OVERHEAD_BYTES = {torch.bfloat16: 300e6, torch.float32: 150e6}
OVERHEAD_PER_ACTIVATION = 0.6
FROZEN_SHARE = 0.93  # with an adapter, of the activations of full tuning: frozen layers keep less, adapters add theirs
WARM_UP_PACKS = 2  # took 1.6 and 1.4 times as long as the others: memory is new, kernels are made
TIMED_PACKS = 4


# ── what a run does before it trains ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Planned:
    """A run as it will be: every setting chosen, its examples, the loader of its batches, its number of steps."""

    config: Config
    data: Prepared
    loader: Loader
    steps: int


def planned(config: Config, data: Prepared, net: PreTrainedModel, device: torch.device, name: str) -> Planned:
    """Choose what the configuration leaves open, and cut the epochs into steps. net: of shapes alone, or loaded."""
    fitting = fitting_tokens(net, DTYPES[config.train.precision], device)
    full, _ = resolve(config, data.train, fitting, name)
    loader = loader_of(full, data.train)
    return Planned(full, data, loader, total_steps(full, loader.plan))


def shapes(folder: Path, config: Config, longest_tokens: int = 0) -> PreTrainedModel:
    """The model of a folder, adapter included, without its weights: on torch's meta device, from config.json alone.

    Raises ModelError for a model that could not be trained (model/load.py) or has no config.json.
    """
    found = read_config(folder)
    refuse_recurrent(found, folder)
    refuse_lengths(found, longest_tokens, folder)
    with torch.device("meta"):
        net: PreTrainedModel = AutoModelForCausalLM.from_config(found, dtype=DTYPES[config.train.precision])
    if config.adapter.rank:
        add_lora(net, config.adapter, config.model, config.train.seed)
    return net


# ── FLOPs ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Costs:
    """Multiply-adds of a forward pass: body = elements of all matrices of the layers, a computed token;
    attention = layers * heads * head width, twice a pair of tokens; head = vocabulary * width, a target;
    adapter = elements of the adapter, a computed token (0 = full tuning)."""

    body: int
    attention: int
    head: int
    adapter: int

    def forward_flops(self, work: Work) -> int:
        """2 FLOP a multiply-add: a token costs 4 * heads * width in a layer for every token that it looks at."""
        tokens = 2 * (self.body + self.adapter) * work.computed_tokens
        return tokens + 4 * self.attention * work.attended_pairs + 2 * self.head * work.target_tokens

    def training_flops(self, work: Work) -> int:
        """Forward and backward: three times the forward, less the gradients of weights that an adapter leaves frozen."""
        frozen = 2 * (self.body * work.computed_tokens + self.head * work.target_tokens) if self.adapter else 0
        return 3 * self.forward_flops(work) - frozen


def costs_of(net: PreTrainedModel, *, adapted: bool) -> Costs:
    """The costs of a dense decoder, from its shapes: all its matrices but the embeddings and the head take part."""
    c = net.config.get_text_config()
    heads = c.num_attention_heads
    width = getattr(c, "head_dim", None) or c.hidden_size // heads
    outside = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    projection: Any = net.get_output_embeddings()
    outside.add(id(projection.weight))
    matrices = [p for p in net.parameters() if p.dim() > 1 and id(p) not in outside]
    adapter = sum(p.numel() for p in matrices if p.requires_grad) if adapted else 0
    body = sum(p.numel() for p in matrices) - adapter
    return Costs(body, c.num_hidden_layers * heads * width, projection.weight.numel(), adapter)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def weight_bytes(net: PreTrainedModel, dtype: torch.dtype) -> int:
    """Weights, gradients and AdamW's state (train/optim.py).

    A trainable parameter in bfloat16 has its copy 2, master 4, gradient sum 4 and two moments 8 bytes; in float32 itself
    4, gradient 4 and moments 8; a frozen one is only itself.
    """
    size = dtype.itemsize
    trainable = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters()) - trainable
    return frozen * size + trainable * (18 if size == 2 else 16)


def saved_bytes_per_token(net: PreTrainedModel, dtype: torch.dtype) -> float:
    """What the layers keep of a token for the backward pass: size * L * (nd + 2(H + K)h + 4f); n = 10 in bfloat16, else 7.

    Two norms (with float32 copies where that is another type) and the inputs of the projections nd; q, k, v and the output
    2(H + K)h; gate, up, SiLU and product 4f.
    """
    c = net.config.get_text_config()
    d, heads = c.hidden_size, c.num_attention_heads
    width = getattr(c, "head_dim", None) or d // heads
    wide = getattr(c, "intermediate_size", None) or getattr(c, "n_inner", None) or 4 * d
    norms = 7 if dtype == torch.float32 else 10
    shared = getattr(c, "num_key_value_heads", None) or heads
    return dtype.itemsize * c.num_hidden_layers * (norms * d + 2 * (heads + shared) * width + 4 * wide)


def activation_bytes(
    net: PreTrainedModel,
    dtype: torch.dtype,
    pack_tokens: int,
    target_tokens: int,
    *,
    adapted: bool,
    device: torch.device = CPU,
    again: bool = False,
) -> float:
    """Of a pack: what the layers save, a chunk of logits, and the head's gradient (in float32 too where it has chunks).

    again: only the inputs of the layers are kept, and one layer's activations at a time.
    """
    projection: Any = net.get_output_embeddings()
    vocabulary = projection.weight.shape[0]
    saved = saved_bytes_per_token(net, dtype) * pack_tokens * (FROZEN_SHARE if adapted else 1.0)
    if again:
        c = net.config.get_text_config()
        saved = saved / c.num_hidden_layers + dtype.itemsize * c.num_hidden_layers * c.hidden_size * pack_tokens
    rows = min(chunk_rows(vocabulary, device), target_tokens)
    logits = vocabulary * (dtype.itemsize * rows + 4 * 2 * (rows if device.type == "cuda" else min(rows, BLOCK_ROWS)))
    chunks = target_tokens > chunk_rows(vocabulary, device)  # whose shares of the head's gradient add up in float32
    return saved + logits + (0 if adapted else projection.weight.numel() * (dtype.itemsize + 4 * chunks))


MOST_OF_MACHINE = 0.9


def fitted_memory(
    work: Planned,
    net: PreTrainedModel,
    device: torch.device,
    say: Callable[[str], None],
    *,
    resident_bytes: int,
    file_bytes: int = 0,
) -> int:
    """`peak_memory`; where that is more than the machine has, the layers are computed again in the backward pass."""
    needed = peak_memory(work, net, device, resident_bytes=resident_bytes, file_bytes=file_bytes)
    room = machine_bytes(device)
    if needed <= MOST_OF_MACHINE * room:
        return needed
    compute_layers_again(net)
    less = peak_memory(work, net, device, resident_bytes=resident_bytes, file_bytes=file_bytes, again=True)
    say(
        f"activations would need {size(needed)} of the machine's {size(room)}: layers are computed again in the backward "
        f"pass, which needs about {size(less)} and takes about 1.3 times as long"
    )
    return less


def peak_memory(
    work: Planned,
    net: PreTrainedModel,
    device: torch.device,
    *,
    resident_bytes: int,
    file_bytes: int = 0,
    again: bool = False,
) -> int:
    """The most memory of the run: of the GPU its tensors, of the CPU the whole process. again: as of `activation_bytes`.

    resident_bytes: of the process before the model is loaded; file_bytes: of the weights, mapped while they are converted.
    """
    config, adapted = work.config, bool(work.config.adapter.rank)
    dtype = DTYPES[config.train.precision]
    tokens, targets = most_at_once(work)
    activations = activation_bytes(net, dtype, tokens, targets, adapted=adapted, device=device, again=again)
    weights = weight_bytes(net, dtype)
    if device.type == "cuda":
        return int(weights + activations)
    loaded = sum(p.numel() for p in net.parameters()) * (dtype.itemsize if adapted else 4)
    loading = file_bytes if 0.95 * file_bytes < loaded < 1.05 * file_bytes else file_bytes + loaded  # else converted
    training = weights + activations * (1 + OVERHEAD_PER_ACTIVATION) + OVERHEAD_BYTES[dtype]
    return int(resident_bytes + max(loading, training))


LARGE_PACKS = 16  # that are looked at: the largest need not be the one with the largest part


def most_at_once(work: Planned) -> tuple[int, int]:
    """The tokens, and the targets among them, that are in memory together at most: of a pack, or of its trunk and a group
    of its branches (pack/tree.py)."""
    packs = [pack for step in work.loader.packs(0) for pack in step]
    largest = np.argsort(-computed_tokens(work.loader.prefixes, packs), kind="stable")[:LARGE_PACKS]
    found = []
    for indices in (packs[i] for i in largest.tolist()):
        pack = built(work, indices)
        trunk = pack.cuts[0] if pack.cuts else 0
        for a, b in pairwise(pack.cuts or (0, len(pack.tokens))):
            found.append((trunk + b - a, int(((pack.at >= a) & (pack.at < b)).sum())))
    return max(found)


def built(work: Planned, indices: Indices) -> Pack:
    """The pack of some examples, as the loader makes it."""
    return build_pack([work.data.train[int(e)] for e in indices], indices.tolist(), work.loader.plan.limit_tokens)


def resident_bytes() -> int:
    """Memory of this process now, less what can be given back; 0 where the system does not tell."""
    release_free_memory()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
        longest_tokens=int(work.data.train.lengths.max()), highest_token=work.data.highest_token,
    )  # fmt: skip
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
        pack = built(work, indices)
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


def measuring_passes(every_steps: int, steps: int) -> int:
    """How often the held-out loss is measured: before the first step, every `every_steps`, and after the last."""
    return len({0, steps, *range(every_steps, steps, every_steps)})


# ── the forecast ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Forecast:
    """All of it, for people and --json. epoch: the first; run: every step; chosen: settings that were left open.

    seconds: of the whole run, train_seconds: of its steps; None where they were not measured, and `untimed` says why.
    """

    rows: int
    heldout_examples: int
    once: Work
    epoch: Work
    run: Work
    capacity_tokens: int
    flops: int
    peak_memory_bytes: int
    train_seconds: float | None
    seconds: float | None
    untimed: str
    mix: list[SourceUse]
    chosen: dict[str, Any]
    ledger: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """rows, examples, prompt and answer tokens: what there is to learn from, once; the other counts: of the run."""
        return {
            "rows": self.rows, "examples": self.once.examples, "prompt_tokens": self.once.prompt_tokens,
            "answer_tokens": self.once.answer_tokens, "target_tokens": self.run.target_tokens,
            "computed_tokens": self.run.computed_tokens, "unshared_tokens": self.run.unshared_tokens,
            "packs": self.run.packs, "steps": self.run.steps,
            "packing_efficiency": self.packing_efficiency, "pack_capacity_tokens": self.capacity_tokens,
            "flops": self.flops, "peak_memory_bytes": self.peak_memory_bytes, "seconds": self.seconds,
            "train_seconds": self.train_seconds, "untimed": self.untimed, "epoch": asdict(self.epoch),
            "heldout_examples": self.heldout_examples, "mix": [use.as_dict() for use in self.mix],
            "chosen": self.chosen, "ledger": self.ledger,
        }  # fmt: skip

    @property
    def packing_efficiency(self) -> float:
        """Computed tokens of what the packs of the run could hold."""
        return self.run.computed_tokens / self.run.room_tokens


def forecast(config: Config, *, measure: bool = True, say: Callable[[str], None] = lambda line: None) -> Forecast:
    """What `train` with this configuration will do and need, from a fresh start; nothing is left on disk.

    measure: run three packs through the real model for the time (about 20 s for a small one); it needs the weights.
    """
    device = device_named(config.run.device)
    set_up_machine(config.run.threads)
    began = time.monotonic()
    model = locate(config.model, need_weights=False)
    with tempfile.TemporaryDirectory(prefix="instil-plan-") as folder:
        chat = open_chat(model.path, config.template, args=config.chat.template_args)
        run = RunFolder(Path(folder))
        data = prepare(config, model.path, chat, data_digests(config), run)
        rows = sum(entry.side == "train" and entry.examples > 0 for entry in read_ledger(run.ledger))
        prepare_s, resident = time.monotonic() - began, resident_bytes()
        net = shapes(model.path, config, int(data.train.lengths.max()))
        work = planned(config, data, net, device, run_name(config))
        costs = costs_of(net, adapted=bool(config.adapter.rank))
        stored = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
        memory = fitted_memory(work, net, device, say, resident_bytes=resident, file_bytes=stored)
        untimed = _untimed(model.path, measure)
        pace = None
        if not untimed:
            say("measuring some packs with the model on this machine (--no-measure leaves it out)")
            pace = measured_pace(work, model.path, costs, device, again=computes_layers_again(net))
        return _forecast(config, work, costs, memory, pace, untimed, rows, prepare_s)


def _untimed(folder: Path, measure: bool) -> str:
    """Why there will be no time; "" if there will be."""
    if not measure:
        return "not measured (--no-measure)"
    try:
        check_folder(folder, need_weights=True)
    except InstilError as error:
        return f"not measured: {error.problems[0].what}"
    return ""


def _forecast(
    config: Config,
    work: Planned,
    costs: Costs,
    memory: int,
    pace: Pace | None,
    untimed: str,
    rows: int,
    prepare_s: float,
) -> Forecast:
    train, heldout, loader = work.data.train, work.data.heldout, work.loader
    whole = work_of_run(loader, train, work.steps)
    flops = costs.training_flops(whole)
    train_s = seconds = None
    if pace is not None:
        train_s = flops / pace.flops_per_s + work.steps * pace.update_s
        seconds = prepare_s + pace.load_s + train_s + _heldout_flops(work, costs) / pace.flops_per_s
    now, then = flat(work.config.model_dump()), flat(config.model_dump())
    chosen = {key: value for key, value in now.items() if then.get(key) is None and value is not None}
    return Forecast(
        rows=rows, heldout_examples=0 if heldout is None else len(heldout),
        once=work_of_each(train), epoch=work_of_epoch(loader, train, 0), run=whole,
        capacity_tokens=loader.plan.capacity_tokens, flops=flops, peak_memory_bytes=memory, train_seconds=train_s,
        seconds=seconds, untimed=untimed, mix=source_uses(work.config, loader, train), chosen=chosen,
        ledger=work.data.record["rows"],
    )  # fmt: skip


def _heldout_flops(work: Planned, costs: Costs) -> int:
    """Of all measurements of the held-out loss during the run."""
    if work.data.heldout is None:
        return 0
    n = min(work.config.evaluate.examples, len(work.data.heldout))
    prefixes = Prefixes.of([work.data.heldout[i] for i in range(n)])
    once = work_of_packs(work.data.heldout, packs_in_order(prefixes, work.config.pack.tokens or 1))
    return measuring_passes(work.config.evaluate.every_steps or work.steps, work.steps) * costs.forward_flops(once)


# ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────────

COMPARED = ("steps", "target_tokens", "computed_tokens", "train_seconds", "peak_memory_bytes")
EARLY_STEPS = slice(1, 4)  # the second to the fourth: their pace predicts the time of all


def predicted(work: Planned, memory_bytes: int) -> dict[str, Any]:
    """What a run expects of itself before its first step; its time is known only once it has begun (see `compared`)."""
    whole = work_of_run(work.loader, work.data.train, work.steps)
    return {
        "steps": work.steps, "target_tokens": whole.target_tokens, "computed_tokens": whole.computed_tokens,
        "unshared_tokens": whole.unshared_tokens, "peak_memory_bytes": memory_bytes,
    }  # fmt: skip


def compared(
    expected: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """`plan` of summary.json: what was predicted, and the error of each figure, (predicted - found) / found.

    records: of metrics.jsonl; train_seconds is predicted from the pace of the second to the fourth step.
    """
    early = records[EARLY_STEPS]
    guess = dict(expected)
    if seconds := sum(r["seconds"] for r in early):
        tokens = sum(r["computed_tokens"] for r in early)
        guess["train_seconds"] = expected["computed_tokens"] * seconds / tokens
    error = {key: guess[key] / summary[key] - 1 for key in COMPARED if guess.get(key) and summary.get(key)}
    return {"predicted": guess, "error": error}
