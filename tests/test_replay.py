"""Replay repeats the step of an incident: it finds the first place that is not finite, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stories
import tiny
from instil import compiling, footprint
from instil import replay as replaying
from instil.errors import DivergedError, MachineError, UsageError
from instil.replay import replay
from instil.train import loop

AT = 2  # the third step
Plant = Callable[[Any, Any], None]


def diverged(place: Path, plant: Plant, *how: str) -> Path:
    """A run whose third step was poisoned."""
    real = loop.train_step

    def poisoned(net: Any, optimizer: Any, batch: Any, **options: Any) -> Any:
        if batch.step == AT:
            with torch.no_grad():
                plant(net, optimizer)
        return real(net, optimizer, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        said = stories.train(place, *how)
    assert said.code == 6, said.err
    return place / "runs" / "x"


def in_master(name: str, value: float) -> Plant:
    """One element of a master, and with it the model."""

    def plant(_net: Any, optimizer: Any) -> None:
        masters = {n: m.detach().clone() for n, m in optimizer.masters.items()}
        masters[name].view(len(masters[name]), -1)[1, 0] = value
        optimizer.load_masters(masters)

    return plant


MODULES = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
FAST = ("model.layers.0.self_attn.k_proj", "model.layers.1.input_layernorm", "model.layers.1.mlp.down_proj")
NAMES = [f"model.layers.{layer}.{module}" for layer in range(2) for module in MODULES]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES])
def test_the_first_module_is_the_poisoned_one(name: str, place: Path) -> None:
    """NaN in any linear layer or norm of either layer: that module is named, its weight too, and gradients are not finite."""
    found = replay(str(diverged(place, in_master(f"{name}.weight", float("nan")))))
    assert (found.step, found.diverged, found.first_module) == (AT + 1, True, name)
    assert found.weights == [f"{name}.weight"]
    assert found.gradients


def test_nothing_in_the_run_changes(place: Path) -> None:
    """Replayed twice, with the same findings: every file is as it was."""
    run = diverged(place, in_master("lm_head.weight", float("inf")))
    before = stories.contents(run)
    mine, its = (replay(str(run)).as_dict() for _ in range(2))
    assert mine == its
    assert mine["first_module"] == "lm_head"
    assert stories.contents(run) == before


def test_what_was_only_in_memory_does_not_come_again(place: Path) -> None:
    """A frozen weight that flipped in memory, under an adapter: the step is finite this time, and replay says so."""

    def plant(net: Any, _optimizer: Any) -> None:
        net.model.layers[0].mlp.up_proj.base_layer.weight[0, 0] = float("inf")

    run = diverged(place, plant, "adapter.rank=4")
    found = replay(str(run))
    assert (found.diverged, found.weights, found.gradients, found.first_module) == (False, [], [], "")
    assert len(found.problems) == 1
    assert found.problems[0].startswith(f"step {AT + 1}: loss ")
    straight = stories.finished(place, "adapter.rank=4", name="straight")
    record = tiny.metrics_of(straight)[AT]
    assert found.problems[0] == f"step 3: loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}"


def test_the_rows_are_those_of_the_step(place: Path) -> None:
    """Every row of the batch with its loss and its largest logit; what is not finite first."""
    run = diverged(place, in_master("model.embed_tokens.weight", float("nan")))
    found = replay(str(run))
    straight = stories.finished(place, name="straight")
    assert len(found.rows) == tiny.metrics_of(straight)[AT]["examples"]
    assert len({row.origin for row in found.rows}) == len(found.rows)
    assert all(row.loss != row.loss for row in found.rows)  # <|im_start|> is in every row
    written = stories.strict_json(json.dumps(found.as_dict(), allow_nan=False))
    assert {row["loss"] for row in written["rows"]} == {"nan"}


def test_rows_that_are_not_finite_come_first(place: Path) -> None:
    """One row of the step has the poisoned token: it is first, before larger logits of others."""
    tiny.write_rows(place / "a.jsonl", [*tiny.some_rows(16), tiny.row("say ~", "red")])
    token = json.loads((place / "m" / "tokenizer.json").read_text())["model"]["vocab"]["~"]

    def plant(_net: Any, optimizer: Any) -> None:
        masters = {n: m.detach().clone() for n, m in optimizer.masters.items()}
        masters["model.embed_tokens.weight"][token] = float("inf")
        optimizer.load_masters(masters)

    run = diverged(place, plant, "train.batch_examples=17", "train.epochs=4")
    found = replay(str(run))
    assert len(found.rows) == 17
    assert found.rows[0].origin == f"{place / 'a.jsonl'}:17"
    assert found.rows[0].loss != found.rows[0].loss
    assert all(row.loss == row.loss for row in found.rows[1:])
    logits = [row.largest_logit for row in found.rows[1:]]
    assert logits == sorted(logits, reverse=True)
    assert found.first_module == "model.embed_tokens"


def test_a_run_without_an_incident_has_nothing_to_repeat(place: Path) -> None:
    """A run that went well, and what is no run: exit 2."""
    run = stories.finished(place)
    with pytest.raises(UsageError, match="has no incident; a run that diverges keeps one in its folder"):
        replay(str(run))
    with pytest.raises(UsageError, match="is not the folder of a run that has begun"):
        replay(str(place))


def test_a_damaged_incident_is_said(place: Path) -> None:
    """A flipped bit in the state that was kept: exit 5, not a replay of other numbers."""
    run = diverged(place, in_master("model.norm.weight", float("nan")))
    file = run / "incident" / f"step-{AT:06d}" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(MachineError, match=r"weights\.safetensors is not what was saved"):
        replay(str(run))


def test_what_was_drawn_at_random_is_drawn_again(place: Path) -> None:
    """Dropout: the replayed step has the loss and the gradient norm that the step had, as it draws the same numbers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = tiny.write_model(place / "drops", weights=False)
    size = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "eos_token_id": 0}
    drops = {"resid_pdrop": 0.3, "embd_pdrop": 0.1, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**size, **drops, bos_token_id=None)).save_pretrained(model)
    real, made = loop.train_step, []

    def refused(net: Any, optimizer: Any, batch: Any, **options: Any) -> Any:
        if batch.step != AT:
            return real(net, optimizer, batch, **options)
        made.append(real(net, optimizer, batch, **{**options, "most_loss": 0.0}))  # computed, not learnt from
        raise DivergedError.at("step 3", "planted", "")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", refused)
        assert stories.train(place, f"model={model}").code == 6
    found = replay(str(place / "runs" / "x"))
    (step,) = made
    assert found.problems == [f"step 3: loss {step.loss:.4g}, gradient norm {step.grad_norm:.4g}"]


def test_the_step_is_computed_as_it_was(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where layers were compiled, or computed again for want of memory, the replay does so too; else it does not."""
    done: list[str] = []

    def noted(place: Any, name: str) -> None:
        monkeypatch.setattr(place, name, lambda *given: done.append(f"{place.__name__}: {name}"))

    noted(compiling, "compile_layers")
    noted(replaying, "compile_layers")
    noted(replaying, "compute_layers_again")
    poison = in_master("model.norm.weight", float("nan"))
    replay(str(diverged(place, poison)))
    assert done == []
    monkeypatch.setattr(footprint, "machine_bytes", lambda device: 1)
    run = diverged(place, poison, "train.compile=true", "run.name=y").with_name("y")
    assert done == ["instil.compiling: compile_layers"]
    monkeypatch.undo()
    noted(replaying, "compile_layers")
    noted(replaying, "compute_layers_again")
    assert replay(str(run)).diverged
    assert done[1:] == ["instil.replay: compile_layers", "instil.replay: compute_layers_again"]


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "7", '{"lr": "much"}', '{"lr": null}'])
def test_an_incident_that_says_nothing_is_said(place: Path, content: str) -> None:
    """incident.json empty, cut, or another document: exit 5 with its name, no traceback."""
    run = with_incident(place, content)
    said = tiny.command("replay", run)
    assert said.code == 5, said.err
    assert len(said.err) == 1
    assert f"{run / 'incident' / 'incident.json'}: cannot be read (" in said.err[0]
    assert "run the run's command again" in said.err[0]


def with_incident(place: Path, content: str) -> Path:
    """A run with an incident.json."""
    run = stories.finished(place, "train.steps=1")
    (run / "incident").mkdir(exist_ok=True)
    (run / "incident" / "incident.json").write_text(content)
    return run
