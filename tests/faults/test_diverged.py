"""Poisoned runs end before the update: nothing has changed, the rows are named, the step is kept and can be repeated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stories
import tiny
from instil import run as story
from instil.errors import DivergedError
from instil.train import loop
from instil.train.optim import MasterAdamW
from instil.train.step import StepStats
from instil.train.step import step as real_step
from instil.types import Batch

AT = 2  # the poison is planted before the step that is counted so from 0: two good steps, then the third
LORA = "adapter.rank=4"
BF16 = "train.precision=bf16"
LORA_A, LORA_B = ("model.layers.{}.{}.lora_{}.default.weight".format(*where) for where in (
    (0, "self_attn.q_proj", "A"), (1, "mlp.up_proj", "B"),
))  # fmt: skip
Masters = dict[str, torch.Tensor]


def one_number(name: str, value: float) -> Callable[[Masters], None]:
    """A single element of one weight; of embeddings and head that of <|im_start|>, which every row has."""

    def plant(masters: Masters) -> None:
        masters[name].view(len(masters[name]), -1)[1, 0] = value

    return plant


def factors(**of: float) -> Callable[[Masters], None]:
    """Whole weights, each times a number; a double underscore stands for a dot."""

    def plant(masters: Masters) -> None:
        for name, factor in of.items():
            masters[f"{name.replace('__', '.')}.weight"] *= factor

    return plant


@dataclass(frozen=True)
class Case:
    """A poison: what it does to the masters, or a rate instead; the settings of the run; what replay must find."""

    label: str
    plant: Callable[[Masters], None] | None = None
    rate: float = 0.0
    how: tuple[str, ...] = ()
    module: str | None = None  # the first whose output is not finite; "": all are; None: not known beforehand
    weights: tuple[str, ...] = ()
    fast: bool = False


def weight_cases() -> Iterator[Case]:
    places = ["model.embed_tokens", "model.layers.0.input_layernorm", "model.layers.0.self_attn.q_proj",
              "model.layers.1.mlp.down_proj", "model.norm", "lm_head"]  # fmt: skip
    full = [(f"{place}.weight", place) for place in places]
    lora = [(name, name.removesuffix(".weight")) for name in (LORA_A, LORA_B)]
    for i, (name, module) in enumerate([*full, *lora]):
        for j, value in enumerate((float("nan"), float("inf"), float("-inf"))):
            how = (*((BF16,) if (i + j) % 2 else ()), *((LORA,) if "lora" in name else ()))
            label = f"{value}-{module}-{'-'.join(how) or 'full'}"
            yield Case(label, one_number(name, value), how=how, module=module, weights=(name,), fast=i % 3 == j)


SCORES = factors(model__layers__1__self_attn__q_proj=1e20, model__layers__1__self_attn__k_proj=1e20)
PRODUCT = factors(model__layers__0__mlp__up_proj=1e30, model__layers__0__mlp__gate_proj=1e30)
CASES = [
    *weight_cases(),
    Case("gradient", factors(model__norm=1e20, lm_head=1e-21), module="", fast=True),
    Case("gradient-bf16", factors(model__norm=1e20, lm_head=1e-21), how=(BF16,), module=""),
    Case("logits", factors(lm_head=1.5e38), module="lm_head", fast=True),
    Case("logits-bf16", factors(lm_head=1.5e38), how=(BF16,), module="lm_head"),
    Case("attention-scores", SCORES, module="model.layers.1.self_attn.o_proj"),
    Case("attention-scores-bf16", SCORES, how=(BF16,), module="model.layers.1.self_attn.o_proj"),
    Case("gated-product", PRODUCT, module="model.layers.0.mlp.down_proj"),
    *(Case(f"rate-{rate:g}-{'-'.join(how) or 'full'}", rate=rate, how=("train.clip_norm=0", *how), fast=rate > 1e20)
      for rate in (1e30, 1e10) for how in ((), (BF16,), (LORA,))),
]  # fmt: skip


@dataclass
class Watched:
    """The real step, with the poison planted before it, and what masters and moments were just before and after."""

    plant: Callable[[Masters], None] | None
    before: dict[str, bytes] = field(default_factory=dict)
    after: dict[str, bytes] = field(default_factory=dict)
    batch: Batch | None = None

    def __call__(self, net: Any, optimizer: MasterAdamW, batch: Batch, **options: Any) -> StepStats:
        if batch.step == AT and self.plant is not None:
            masters = {name: master.detach().clone() for name, master in optimizer.masters.items()}
            self.plant(masters)
            optimizer.load_masters(masters)
        self.before, self.batch = snapshot(net, optimizer), batch
        try:
            return real_step(net, optimizer, batch, **options)
        except DivergedError:
            self.after = snapshot(net, optimizer)
            raise


def snapshot(net: Any, optimizer: MasterAdamW) -> dict[str, bytes]:
    """Every number that an update would change, and the model's own weights."""
    own = {f"model {name}": p.float() for name, p in net.named_parameters()}
    moments = {name: t for name, t in optimizer.state().items() if not (t.dim() == 0 or not t.any())}
    return {name: t.detach().numpy().tobytes() for name, t in {**own, **optimizer.masters, **moments}.items()}


@pytest.fixture
def poisoned(place: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[tiny.Said, Watched]]:
    """Train by the command line with a poison; a checkpoint after every step."""
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(16))

    def run(case: Case) -> tuple[tiny.Said, Watched]:
        watched = Watched(case.plant)
        monkeypatch.setattr(loop, "train_step", watched)
        if case.rate:
            plan = story.loop_plan
            monkeypatch.setattr(story, "loop_plan", lambda *given: replace(plan(*given), peak_lr=case.rate))
        said = stories.train(
            place, "checkpoint.every_steps=1", "train.epochs=5", "train.schedule=constant", "train.warmup=0", *case.how
        )
        return said, watched

    return run


@pytest.mark.parametrize("case", [pytest.param(c, id=c.label, marks=() if c.fast else pytest.mark.slow) for c in CASES])
def test_a_poison_is_stopped_before_the_update(
    case: Case, place: Path, poisoned: Callable[..., tuple[tiny.Said, Watched]]
) -> None:
    """Exit 6; masters, moments and model as they were; step, rate, loss, rows and logits named; a finite checkpoint; and
    replay repeats the step and finds what was poisoned."""
    said, watched = poisoned(case)
    run = place / "runs" / "x"
    assert said.code == 6, said.err
    assert watched.batch is not None
    assert watched.after == watched.before
    step = watched.batch.step + 1
    assert step == AT + 1 if case.plant else step > 1

    first, rows, kept = said.err[-3:]
    assert first.startswith(f"step {step}: loss ")
    assert "gradient norm " in first
    assert f"rate {case.rate or 1e-2:g}: not finite; the update was not applied; " in first
    assert first.endswith("lower train.lr, or look at the rows of this step with `instil inspect`")
    named = [f"{place / 'a.jsonl'}:{i + 1}" for pack in watched.batch.packs for i in pack.examples]
    assert rows.startswith(f"step {step}: its rows, the worst first: ")
    assert len(named) >= 6
    assert all(f"{origin} (loss " in rows for origin in named)
    assert rows.count("largest logit ") == len(named)
    assert kept.startswith(f"{run / 'incident'}: holds the step that diverged; `instil replay {run}` ")

    assert [record["step"] for record in tiny.metrics_of(run)] == list(range(1, step))
    assert not (run / "model").exists()
    assert not (run / "summary.json").exists()
    good = stories.newest(run)
    assert good.step == step - 1
    assert all(bool(torch.isfinite(t).all()) for t in (*good.weights.values(), *good.optimizer.values()))
    incident = stories.strict_json((run / "incident" / "incident.json").read_text())
    assert (incident["step"], tuple(incident["not_finite"])) == (step, case.weights)

    before = stories.contents(run)
    replayed = tiny.command("replay", run, "--json")
    assert replayed.code == 0, replayed.err
    found = stories.strict_json(replayed.out)
    assert (found["step"], found["diverged"]) == (step, True)
    assert found["problems"][0].split(" (")[0] == first.split(" (")[0].partition("; lower")[0] + (
        "; lower train.lr, or look at the rows of this step with `instil inspect`"
    )
    assert tuple(found["weights"]) == case.weights
    assert case.module is None or found["first_module"] == case.module
    assert not case.weights or found["gradients"]
    assert sorted(row["origin"] for row in found["rows"]) == sorted(named)
    assert stories.contents(run) == before


def test_there_are_thirty_poisons() -> None:
    """Each another one: by name, and no two alike in what they do."""
    assert len(CASES) >= 30
    assert len({case.label for case in CASES}) == len(CASES)


def test_an_update_that_is_applied_all_the_same_is_caught(
    place: Path, poisoned: Callable[..., tuple[tiny.Said, Watched]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: an optimizer that does not look at `skip`. The comparison of before and after fires."""
    update = MasterAdamW.update
    monkeypatch.setattr(MasterAdamW, "update", lambda self, *, lr, divisor=None, skip=None: update(self, lr=lr))
    said, watched = poisoned(Case("planted", one_number("model.norm.weight", float("nan"))))
    assert said.code == 6
    assert watched.after != watched.before


def test_the_same_command_goes_on_from_before_the_poison(
    place: Path, poisoned: Callable[..., tuple[tiny.Said, Watched]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bit that flipped in memory is gone with the process: the run ends as the one that was never poisoned."""
    assert poisoned(Case("flip", one_number("lm_head.weight", float("inf"))))[0].code == 6
    monkeypatch.setattr(loop, "train_step", real_step)
    how = ("checkpoint.every_steps=1", "train.epochs=5", "train.schedule=constant", "train.warmup=0")
    said = stories.train(place, *how)
    assert said.code == 0
    assert f"resumed after step {AT}" in said.err
    whole = stories.finished(place, *how, name="whole")
    assert stories.differing(place / "runs" / "x", whole) == []


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def token_of(place: Path, text: str) -> int:
    """The id of a token of the tiny model."""
    return int(json.loads((place / "m" / "tokenizer.json").read_text())["model"]["vocab"][text])


def change_weights(place: Path, change: Callable[[Masters], None]) -> None:
    """Change the tensors of the model's file."""
    from safetensors.torch import load_file, save_file

    path = place / "m" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_that_poisons_ends_the_run_at_its_step(precision: str, place: Path) -> None:
    """One row has a token whose embedding is finite but overflows when squared: exit 6 at that row's step, naming it."""
    token = token_of(place, "~")
    change_weights(place, lambda tensors: tensors["model.embed_tokens.weight"][token].fill_(3e38))
    rows = tiny.some_rows(24)
    rows[10] = tiny.row("say ~", "red")
    tiny.write_rows(place / "a.jsonl", rows)
    said = stories.train(place, "train.batch_examples=2", f"train.precision={precision}")
    assert said.code == 6, said.err
    first, second, _ = said.err[-3:]
    assert f"{place / 'a.jsonl'}:11 (loss " in second
    assert second.count("largest logit") == 2
    step = int(first.split(":")[0].removeprefix("step "))
    run = place / "runs" / "x"
    assert [record["step"] for record in tiny.metrics_of(run)] == list(range(1, step))
    found = stories.strict_json(tiny.command("replay", run, "--json").out)
    assert (found["step"], found["diverged"], found["weights"]) == (step, True, [])
    assert f"{place / 'a.jsonl'}:11" in [row["origin"] for row in found["rows"]]


@pytest.mark.parametrize("weight", [1.1e9, 1e38, 1e308])
def test_a_weight_that_would_overflow_is_refused(weight: float, place: Path) -> None:
    """A row cannot poison the sum by its weight: exit 3, with the row."""
    rows = tiny.some_rows(8)
    rows[4]["weight"] = weight
    tiny.write_rows(place / "a.jsonl", rows)
    said = stories.train(place)
    assert said.code == 3
    assert any(line.startswith(f"{place / 'a.jsonl'}:5: weight") for line in said.err), said.err
    assert not (place / "runs").exists()


def test_the_largest_weight_overflows_nothing(place: Path) -> None:
    """The most that row, message and kind can weigh together, 1e21, in one row: the run trains to its end."""
    rows = tiny.some_rows(16)
    rows[4] |= {"weight": 0.99e9}
    rows[4]["messages"][1]["weight"] = 0.99e9
    tiny.write_rows(place / "a.jsonl", rows)
    run = stories.finished(place, "targets.answer=1000", "targets.terminator=1000")
    assert all(record["loss"] < 1e3 for record in tiny.metrics_of(run))


def nothing_weighs(row: dict[str, Any], how: str) -> dict[str, Any]:
    """The row with no target at all."""
    if how == "row":
        return row | {"weight": 0}
    answer = row["messages"][1] | ({"weight": 0} if how == "message" else {"train": False})
    return {"messages": [row["messages"][0], answer]}


@pytest.mark.parametrize("how", ["row", "message", "train"])
def test_rows_without_targets_are_dropped_with_a_count(how: str, place: Path) -> None:
    """A micro-batch without targets cannot come to be: rows of weight 0 are dropped and counted, all packs have targets."""
    rows = tiny.some_rows(16)
    for i in (2, 7, 11):
        rows[i] = nothing_weighs(rows[i], how)
    tiny.write_rows(place / "a.jsonl", rows)
    run = stories.finished(place, "data.drop_most=0.5", "train.batch_examples=1")
    counts = json.loads((run / "summary.json").read_text())["rows"]
    assert (counts["dropped_rows"], counts["used_rows"], sum(counts["dropped_by_rule"].values())) == (3, 13, 3)
    records = tiny.metrics_of(run)
    assert len(records) == 26
    assert all(record["target_tokens"] > 0 for record in records)
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    gone = [line["origin"].rpartition(":")[2] for line in ledger if line["fate"] == "dropped"]
    assert gone == ["3", "8", "12"]


def test_only_rows_without_targets_are_no_data(place: Path) -> None:
    """Nothing is left to learn: exit 3 before anything is trained, and no folder."""
    tiny.write_rows(place / "a.jsonl", [nothing_weighs(row, "row") for row in tiny.some_rows(6)])
    said = stories.train(place, "data.drop_most=1")
    assert said.code == 3, said.err
    assert any("0 of 6 rows left" in line for line in said.err), said.err
    assert not (place / "runs").exists()


# ── the base model ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [(), (LORA, BF16)], ids=["full", "lora-bf16"])
def test_a_base_model_that_is_not_finite_is_refused(value: float, how: tuple[str, ...], place: Path) -> None:
    """One number of one tensor: exit 4 before the first step, naming the tensor, and nothing is left behind."""
    change_weights(place, one_number("model.layers.1.mlp.down_proj.weight", value))
    said = stories.train(place, *how)
    assert said.code == 4
    (line,) = [line for line in said.err if "NaN or infinity" in line]
    assert line.startswith(f"{place / 'm'}: model.layers.1.mlp.down_proj.weight holds NaN or infinity; ")
    assert not any("step " in line for line in said.err)
    assert not (place / "runs").exists()


def test_other_tensors_that_are_not_finite_are_counted(place: Path) -> None:
    """Three poisoned tensors: the first by name, the others as a number."""
    names = [f"model.layers.{i}.self_attn.{which}_proj.weight" for i, which in ((0, "k"), (0, "v"), (1, "q"))]
    change_weights(place, lambda tensors: [one_number(name, float("nan"))(tensors) for name in names] and None)
    said = stories.train(place)
    assert said.code == 4
    assert any("self_attn" in line and "and so do 2 more tensors" in line for line in said.err), said.err
