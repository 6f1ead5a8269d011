"""Weights are exact: a step's loss is the hand-weighted mean of textbook cross-entropies, from the row's words to the number.

Prompts, answers and the kind of every character are written out here by hand; tokens come from transformers' tokenizer,
losses from a log_softmax over transformers' own logits, one example at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import instil
import tiny
from instil.chat import pairs
from instil.config import load_config
from instil.errors import ModelError
from instil.pack import loader

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "jade", "arguments": {"say": "teal"}}}
CALLED = '<call>jade {"say": "teal"}</call>'


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ROWS = [
    {"messages": [said("user", "say red"), said("assistant", "lime and plum")]},
    {"messages": [said("user", "say blue"), said("assistant", "rose", reasoning_content="is it gold or white")],
     "weight": 3.0},
    {"messages": [said("user", "give gold"), said("assistant", "ruby", tool_calls=[CALL], weight=0.5)], "weight": 0.2},
    {"messages": [said("user", "say navy"), said("assistant", "grey", weight=0.5), said("user", "more"),
                  said("assistant", "not learnt", weight=0), said("user", "again"), said("assistant", "black", weight=2)]},
]  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A prompt, an answer as (text, kind) pieces, and the weight of message times row; all written by hand."""

    prompt: str
    pieces: tuple[tuple[str, str], ...]
    factor: float


def asked(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


END = ("<|im_end|>", "terminator")
PAIRS = [
    Pair(asked("say red"), (("lime and plum", "answer"), END), 1.0),
    Pair(asked("say blue"), (("<think>is it gold or white</think>", "reasoning"), ("rose", "answer"), END), 3.0),
    Pair(asked("give gold"), (("ruby", "answer"), (CALLED, "tool_call"), END), 0.5 * 0.2),
    Pair(asked("say navy"), (("grey", "answer"), END), 0.5),
    Pair(
        f"{asked('say navy')}grey<|im_end|>\n{asked('more')}not learnt<|im_end|>\n{asked('again')}",
        (("black", "answer"), END),
        2.0,
    ),
]
KINDS = {"answer": 0.5, "reasoning": 0.25, "tool_call": 2.0, "terminator": 1.5}
PLAIN = dict.fromkeys(KINDS, 1.0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and the rows."""
    folder = tmp_path_factory.mktemp("weights")
    tiny.write_model(folder / "m", template=TEMPLATE)
    tiny.write_rows(folder / "a.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def textbook_losses(place: Path) -> list[tuple[list[str], list[float]]]:
    """Of each pair: the kind and the cross-entropy, in nats, of every answer token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(place / "m", attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "m")
    found = []
    for pair in PAIRS:
        prompt = tokenizer(pair.prompt, add_special_tokens=False)["input_ids"]
        text = "".join(piece for piece, _ in pair.pieces)
        answer = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        kinds = [kind for piece, kind in pair.pieces for _ in piece]  # of each character
        with torch.no_grad():
            logits = net(torch.tensor([[*prompt, *answer["input_ids"]]])).logits[0]
        log_p = logits.log_softmax(-1)
        losses = [-float(log_p[len(prompt) - 1 + j, token]) for j, token in enumerate(answer["input_ids"])]
        found.append(([kinds[first] for first, _ in answer["offset_mapping"]], losses))
    return found


def expected(
    found: list[tuple[list[str], list[float]]], chosen: list[Pair], kinds: dict[str, float], per: str
) -> float:
    """sum(w * nll) / sum(w), where w = factor * kind, or that divided by the kinds' sum over the example."""
    total = mass = 0.0
    for pair, (names, losses) in zip(chosen, found, strict=True):
        of_example = sum(kinds[name] for name in names) if per == "example" else 1.0
        for name, loss in zip(names, losses, strict=True):
            weight = pair.factor * kinds[name] / of_example
            total += weight * loss
            mass += weight
    return total / mass


def loss_of_a_step(place: Path, folder: Path, kinds: dict[str, float], per: str, *more: str) -> float:
    """What training on all rows in one step records."""
    weights = [f"targets.{kind}={weight}" for kind, weight in kinds.items()]
    how = ("train.steps=1", "train.epochs=1", "train.batch_examples=99", "data.heldout=0", f"targets.loss_per={per}")
    least = {"model": str(place / "m"), "data.train": [str(place / "a.jsonl")], "run.dir": str(folder), "run.name": "x"}
    run = instil.train(load_config(None, [*tiny.FAST, *how, *weights, *more], least))
    (record,) = tiny.metrics_of(run)
    assert record["examples"] == len(PAIRS)
    return float(record["loss"])


@pytest.mark.parametrize("per", ["token", "example"])
@pytest.mark.parametrize("kinds", [PLAIN, KINDS, {**PLAIN, "answer": 0.0, "reasoning": 0.0}])
@pytest.mark.parametrize("more", [(), ("pack.tokens=90",)])
def test_the_loss_of_a_step_is_the_hand_weighted_one(
    per: str, kinds: dict[str, float], more: tuple[str, ...], place: Path, tmp_path: Path, textbook_losses: Any
) -> None:
    """Row weight times message weight times kind weight, per token or per example, in one pack or several: to 1e-6."""
    loss = loss_of_a_step(place, tmp_path, kinds, per, *more)
    assert loss == pytest.approx(expected(textbook_losses, PAIRS, kinds, per), rel=1e-6)


@pytest.mark.parametrize("per", ["token", "example"])
def test_every_weight_matters(per: str, textbook_losses: Any) -> None:
    """The comparison would see any one weight of a row, a message or a kind that is doubled: ten tolerances at least."""
    right = expected(textbook_losses, PAIRS, KINDS, per)
    for wrong in range(len(PAIRS)):
        off = [replace(p, factor=2 * p.factor) if i == wrong else p for i, p in enumerate(PAIRS)]
        assert abs(expected(textbook_losses, off, KINDS, per) / right - 1) > 1e-5
    for kind in KINDS:
        assert abs(expected(textbook_losses, PAIRS, KINDS | {kind: 2 * KINDS[kind]}, per) / right - 1) > 1e-5


@pytest.mark.parametrize("per", ["token", "example"])
def test_one_wrong_weight_is_caught(
    per: str, place: Path, tmp_path: Path, textbook_losses: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planted fault: one target of one pack counts a tenth more than it should, and the comparison fails."""
    build = loader.build_pack

    def wrong(*args: Any) -> Any:
        pack = build(*args)
        return replace(pack, weight=pack.weight * np.where(np.arange(len(pack.weight)) == 1, 1.1, 1).astype(np.float32))

    monkeypatch.setattr(loader, "build_pack", wrong)
    loss = loss_of_a_step(place, tmp_path, KINDS, per)
    assert loss != pytest.approx(expected(textbook_losses, PAIRS, KINDS, per), rel=1e-5)


def test_the_certificate_knows_the_weights_too(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that goes wrong while the examples are made is found before anything is trained, with its row."""
    weigh, seen = pairs.weigh, []

    def wrong(examples: Any, policy: Any) -> Any:
        seen.append(examples)
        found = weigh(examples, policy)
        if len(seen) == 2:  # the second row
            found[0].weights[0] *= np.float32(1.1)
        return found

    monkeypatch.setattr(pairs, "weigh", wrong)
    with pytest.raises(ModelError, match=r"a\.jsonl:2: turn 0: the weights are not those of the row"):
        loss_of_a_step(place, tmp_path, KINDS, "token")
    assert len(seen) == len(ROWS)
