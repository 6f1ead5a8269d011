"""What is planned is what a run then does: counts to the token, FLOPs as torch counts them, memory as the tensors have it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

import instil
import tiny
from architectures import DECODER, architecture
from instil.config import load_config
from instil.costs import costs_of
from instil.data.spec import SourceSpec
from instil.errors import ModelError, UsageError
from instil.footprint import saved_bytes_per_token, weight_bytes
from instil.forecast import forecast, measuring_passes
from instil.model.attention import attention
from instil.model.load import hidden_states, load_model
from instil.model.memory import activation_bytes_per_token
from instil.pack.mix import Mix
from instil.pack.tree import build_pack
from instil.plan import Work, mix_of
from instil.planned import DTYPES, compared, shapes
from instil.run import Listener
from instil.train import loop
from instil.train.loss import pack_loss
from instil.train.optim import MasterAdamW
from instil.train.step import step
from instil.types import Batch

Configure = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture
def configure(place: Path) -> Configure:
    def make(*words: str, **given: Any) -> Any:
        least = {"model": str(place / "m"), "data.train": [str(place / "a.jsonl")], "run.dir": str(place / "runs")}
        fixed = (*tiny.FAST, "train.lr=1e-3", "pack.tokens=90", "run.name=x")
        batch = () if any("train.batch" in word for word in words) else ("train.batch_examples=8",)
        return load_config(None, [*fixed, *batch, *words], least | given)

    return make


# ── counts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

HOW = [
    (), ("train.epochs=3",), ("train.steps=7",), ("train.steps=3", "data.heldout=0"), ("train.batch_tokens=30",),
    ("adapter.rank=2", "train.batch_examples=19"), ("train.precision=bf16", "pack.tokens=null"),
]  # fmt: skip


@pytest.mark.parametrize("how", HOW, ids=" ".join)
def test_the_counts_are_those_of_the_run(
    how: tuple[str, ...], place: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps, packs and tokens, as the training steps themselves and summary.json count them; rows as inspect shows them."""
    found = forecast(configure(*how), measure=False).as_dict()
    packs: list[int] = []
    train_step = loop.train_step

    def spy(net: Any, optimizer: Any, batch: Batch, **named: Any) -> Any:
        packs.append(len(batch.packs))
        return train_step(net, optimizer, batch, **named)

    monkeypatch.setattr(loop, "train_step", spy)
    run = instil.train(configure(*how))
    summary = json.loads((run / "summary.json").read_text())
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    trained = [row for row in ledger if row["side"] == "train" and row["fate"] == "used"]
    assert (found["steps"], found["packs"]) == (len(packs), sum(packs))
    assert [found[k] for k in ("steps", "target_tokens", "computed_tokens")] == [
        summary[k] for k in ("steps", "target_tokens", "computed_tokens")
    ]
    assert found["rows"] == len(trained)
    for key in ("examples", "prompt_tokens", "answer_tokens"):
        assert found[key] == sum(row[key] for row in trained)
    assert found["heldout_examples"] == sum(row["examples"] for row in ledger if row["side"] == "heldout")
    assert found["ledger"] == summary["rows"]
    assert found["packing_efficiency"] == summary["computed_tokens"] / (sum(packs) * found["pack_capacity_tokens"])


SHARING = [
    (), ("train.epochs=3",), ("train.steps=4",), ("train.batch_tokens=40",), ("adapter.rank=2", "pack.tokens=240"),
    ("data.heldout=0", "pack.tokens=null"),
]  # fmt: skip


def rows_that_share() -> list[dict[str, Any]]:
    """Three answers to each of eight prompts, conversations of up to four turns, all below a system prompt; and others."""
    system = {"role": "system", "content": "the user says what to say and the assistant says the colour " * 2}
    rows = [tiny.row(f"say a colour, number {i // 3}", tiny.WORDS[i % 16]) for i in range(24)]
    for i in range(10):
        rows.append(tiny.row(f"talk {i}", tiny.WORDS[i]))
        for turn in range(i % 4):
            rows[-1]["messages"] += [{"role": "user", "content": f"and {turn}"},
                                     {"role": "assistant", "content": tiny.WORDS[(i + turn) % 16]}]  # fmt: skip
    for row in rows:
        row["messages"].insert(0, system)
    return [*rows, *tiny.some_rows(8)]


@pytest.mark.parametrize("how", SHARING, ids=" ".join)
def test_what_prompts_share_is_planned_to_the_token(
    how: tuple[str, ...], place: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """computed_tokens = the distinct prefixes of each pack that a step was given, unshared_tokens = its examples' lengths,
    and summary.json has both and what is between them."""
    tiny.write_rows(place / "a.jsonl", rows_that_share())
    how = ("pack.tokens=400", *how)
    found = forecast(configure(*how), measure=False).as_dict()
    distinct: list[int] = []
    lengths: list[int] = []
    train_step = loop.train_step

    def spy(net: Any, optimizer: Any, batch: Batch, **named: Any) -> Any:
        for pack in batch.packs:
            streams = [seen_from(pack, int(pack.at[pack.owner == i].max())) for i in pack.examples]
            distinct.append(len({stream[:k] for stream in streams for k in range(1, len(stream) + 1)}))
            lengths.append(sum(map(len, streams)))
        return train_step(net, optimizer, batch, **named)

    monkeypatch.setattr(loop, "train_step", spy)
    run = instil.train(configure(*how))
    summary = json.loads((run / "summary.json").read_text())
    assert found["computed_tokens"] == summary["computed_tokens"] == sum(distinct)
    assert found["unshared_tokens"] == sum(lengths)
    assert summary["account"]["run"] == {
        "unshared_tokens": sum(lengths), "computed_tokens": sum(distinct), "shared_tokens": sum(lengths) - sum(distinct),
    }  # fmt: skip
    assert summary["plan"]["error"]["computed_tokens"] == 0
    assert sum(distinct) < 0.7 * sum(lengths), "the oracle must see something shared"


def seen_from(pack: Any, query: int) -> tuple[int, ...]:
    """The tokens that an index of a pack sees; from where the last token of an answer is predicted: the example."""
    return tuple(int(pack.tokens[k]) for k in range(query + 1) if query < pack.reach[k])


def test_what_was_left_open_is_told(configure: Configure) -> None:
    """The settings that a run would choose, and its config.yaml records."""
    config = configure("train.lr=null", "pack.tokens=null")
    found = forecast(config, measure=False)
    run = instil.train(config)
    recorded = load_config(run / "config.yaml")
    assert found.chosen["train.lr"] == recorded.train.lr
    assert found.chosen["pack.tokens"] == recorded.pack.tokens
    assert found.chosen["evaluate.every_steps"] == recorded.evaluate.every_steps
    assert "train.epochs" in found.chosen
    assert "train.seed" not in found.chosen


def test_planning_leaves_nothing_behind(place: Path, configure: Configure) -> None:
    """No run folder, no file."""
    before = tiny.tree(place)
    forecast(configure(), measure=False)
    assert tiny.tree(place) == before


def test_without_weights_there_is_all_but_the_time(place: Path, configure: Configure) -> None:
    """The same figures from config.json and tokenizer.json alone, and the reason why there is no time."""
    whole = forecast(configure(), measure=False).as_dict()
    (place / "m" / "model.safetensors").unlink()
    found = forecast(configure()).as_dict()
    assert found["seconds"] is None
    assert "no weights in it" in found["untimed"]
    assert found["peak_memory_bytes"] == pytest.approx(whole["peak_memory_bytes"], rel=0.05)
    for key in whole.keys() - {"untimed", "peak_memory_bytes"}:
        assert found[key] == whole[key]


def test_without_a_config_there_is_no_plan(place: Path, configure: Configure) -> None:
    """Exit 4: what a model computes is in its config.json."""
    for name in ("config.json", "model.safetensors"):
        (place / "m" / name).unlink()
    with pytest.raises(ModelError, match=r"config\.json"):
        forecast(configure(), measure=False)


def test_a_measured_plan_has_a_time(place: Path, configure: Configure) -> None:
    """The time of the run is more than that of its steps, and the model on disk is not touched."""
    before = (place / "m" / "model.safetensors").read_bytes()
    lines: list[str] = []
    found = forecast(configure(), say=lines.append)
    assert found.train_seconds is not None
    assert found.seconds is not None
    assert 0 < found.train_seconds < found.seconds < 60
    assert found.untimed == ""
    assert lines == ["measuring some packs with the model on this machine (--no-measure leaves it out)"]
    assert (place / "m" / "model.safetensors").read_bytes() == before


# ── FLOPs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "vocab_size": 300}


def flops_by_torch(net: Any, packs: Any) -> dict[str, int]:
    """torch's own count of a forward and backward, by operation."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        for pack in packs:
            pack_loss(net, pack, 1.0).share.backward()
    counts = counter.get_flop_counts()
    rotary = sum(n for module, ops in counts.items() if module.endswith("rotary_emb") for n in ops.values())
    found = {str(op): n for op, n in counts["Global"].items()}
    found["aten.bmm"] = found.get("aten.bmm", 0) - rotary  # transformers 5.17 makes the angles by a matrix product
    return found


@pytest.mark.parametrize(("rank", "tolerance"), [(0, 0.0), (4, 0.02)])
def test_flops_are_what_torch_counts(rank: int, tolerance: float, place: Path, some_examples: Any) -> None:
    """Full tuning exactly; with an adapter within 2% (the first layer needs no gradient of its input)."""
    tiny.write_model(place / "w", **WIDE)
    config = load_config(None, [f"adapter.rank={rank}", "train.precision=fp32"],
                         {"model": str(place / "w"), "data.train": ["x"]})  # fmt: skip
    costs = costs_of(shapes(place / "w", config), adapted=bool(rank))
    net = load_model(place / "w", dtype=torch.float32, device=CPU)
    if rank:
        from instil.model.adapters import add_lora

        add_lora(net, config.adapter, "w", 0)
    examples = some_examples(lengths=[(30, 10), (5, 60), (17, 1)])
    found = flops_by_torch(net, [build_pack(examples[:2], [0, 1]), build_pack(examples[2:], [2])])
    expected = costs.training_flops(Work(computed_tokens=39 + 64 + 17, target_tokens=71))
    assert expected == pytest.approx(sum(found.values()), rel=tolerance or 1e-12)


def test_attention_is_half_of_the_square_and_the_diagonal(place: Path, some_examples: Any) -> None:
    """torch counts eager attention over the whole square; of n tokens, n (n + 1) / 2 pairs are looked at."""
    tiny.write_model(place / "w", **WIDE)
    config = load_config(None, ["train.precision=fp32"], {"model": str(place / "w"), "data.train": ["x"]})
    net = load_model(place / "w", dtype=torch.float32, device=CPU)
    with attention(net, "eager"):
        found = flops_by_torch(net, [build_pack(some_examples(lengths=[(70, 31)]), [0])])
    square = sum(n for op, n in found.items() if "bmm" in op)
    costs = costs_of(shapes(place / "w", config), adapted=False)
    assert costs.training_flops(Work(attended_pairs=100 * 101 // 2)) == pytest.approx(square / 2 * 1.01, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mixtral", {}),
        ("Mixtral", {"num_local_experts": 32}),
        ("gpt-oss, window and sinks", {"num_local_experts": 32}),
        ("Qwen3-MoE", {"num_experts": 8}),
        ("Phi-3.5-MoE, window", {}),
        ("DeepSeek-V3, compressed keys", {"v_head_dim": 12}),
    ],
)
def test_flops_of_experts_and_compressed_keys_are_what_torch_counts(
    name: str, changes: dict[str, int], some_examples: Any
) -> None:
    """A token is sent to two experts, however many there are; heads of compressed keys have widths of their own. torch
    counts whole squares of attention, and experts only where each is a matrix product."""
    net = architecture(name, attention="instil_dense", experts_implementation="eager", **changes)
    found = flops_by_torch(net, [build_pack(some_examples(lengths=[(10, 31)]), [0])])
    work = Work(computed_tokens=40, target_tokens=31, attended_pairs=40 * 40)
    assert costs_of(net, adapted=False).training_flops(work) == pytest.approx(sum(found.values()), rel=1e-3)


@pytest.mark.parametrize("rank", [0, 4])
def test_flops_by_the_formula_of_the_book(rank: int, place: Path) -> None:
    """3(2 P_b + A) + 6 d V r for full tuning, 4 P_b + 3 A + 4 d V r + 6 P_lora with an adapter, a computed token."""
    tiny.write_model(place / "w", **WIDE)
    config = load_config(None, [f"adapter.rank={rank}"], {"model": str(place / "w"), "data.train": ["x"]})
    d, heads, kv, h, f, layers, vocabulary = 64, 4, 2, 16, 160, 8, 300
    body = layers * (2 * d * heads * h + 2 * d * kv * h + 3 * d * f)
    ins_and_outs = [(d, d), (d, kv * h), (d, kv * h), (d, d), (d, f), (d, f), (f, d)]
    lora = layers * sum(rank * (a + b) for a, b in ins_and_outs)
    lengths, targets = np.array([100, 50]), 30
    pairs = sum(n * (n + 1) // 2 for n in (100, 50))
    n, attention = lengths.sum(), 4 * heads * h * layers * pairs
    full = n * 6 * body + 3 * attention + 6 * d * vocabulary * targets
    adapted = n * 4 * body + 3 * attention + 4 * d * vocabulary * targets + 6 * lora * n
    work = Work(computed_tokens=150, target_tokens=targets, attended_pairs=pairs)
    found = costs_of(shapes(place / "w", config), adapted=bool(rank)).training_flops(work)
    assert found == (adapted if rank else full)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("rank", [0, 4])
def test_weights_and_state_are_as_many_bytes_as_the_tensors(
    rank: int, precision: str, place: Path, some_examples: Any
) -> None:
    """After a step: every storage of parameters, masters, gradients and moments, each once."""
    tiny.write_model(place / "w", **WIDE, tie_word_embeddings=True)
    config = load_config(None, [f"adapter.rank={rank}", f"train.precision={precision}"],
                         {"model": str(place / "w"), "data.train": ["x"]})  # fmt: skip
    dtype = DTYPES[precision]
    net = load_model(place / "w", dtype=dtype if rank else torch.float32, device=CPU)
    if rank:
        from instil.model.adapters import add_lora

        add_lora(net, config.adapter, "w", 0)
    optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.0)
    pack = build_pack(some_examples(4), range(4))
    step(net, optimizer, Batch(0, 0, (pack,), float(pack.weight.sum())), lr=1e-3, clip_norm=0.0)
    masters = optimizer.masters.values()
    tensors = [*net.parameters(), *masters, *(m.grad for m in masters), *optimizer.state().values()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.dim()}
    assert weight_bytes(shapes(place / "w", config), dtype) == sum(storages.values())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "changes", [{}, {"num_key_value_heads": 4}, {"intermediate_size": 320}, {"num_hidden_layers": 3}], ids=str
)
def test_saved_activations_are_those_that_torch_saves(
    precision: str, changes: dict[str, int], place: Path, some_examples: Any
) -> None:
    """Every tensor that autograd keeps for the backward of the layers, each storage once, within a fifth."""
    tiny.write_model(place / "w", **{**WIDE, **changes})
    dtype = DTYPES[precision]
    net = load_model(place / "w", dtype=dtype, device=CPU).train()
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    pack = build_pack(some_examples(lengths=[(50, 20), (100, 35), (60, 38)]), range(3))
    kept: dict[int, tuple[int, Any]] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)  # held: no reuse
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        hidden_states(net, pack)
    found = sum(size for pointer, (size, _) in kept.items() if pointer not in weights)
    assert saved_bytes_per_token(net, dtype) * len(pack.tokens) == pytest.approx(found, rel=0.2)


def test_layers_of_different_widths_are_planned_by_their_mean(place: Path, configure: Configure) -> None:
    """Gemma 3n has a list of widths; four layers of 96 keep what two of 64 and two of 128 do, and a plan is made."""
    kept = []
    for wide in ([96] * 4, [64, 128, 128, 64]):
        config = AutoConfig.for_model("gemma3n_text", **{
            **DECODER, "vocab_size": 300, "head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 300, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": wide,
        })  # fmt: skip
        config.save_pretrained(place / "m")
        net = shapes(place / "m", configure())
        kept.append((saved_bytes_per_token(net, torch.bfloat16), activation_bytes_per_token(net, torch.bfloat16)))
    assert kept[0] == kept[1]
    assert forecast(configure("pack.tokens=null"), measure=False).peak_memory_bytes > 0


# ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_is_compared_with_what_it_expected() -> None:
    """Ten steps of 100 tokens; the first is slow, the next three take 2 s each: 20 s expected, 25 s found."""
    records = [{"seconds": s, "computed_tokens": 100} for s in (9, 2, 2, 2, 2, 2, 2, 2, 1, 1)]
    expected = {"steps": 10, "computed_tokens": 1000, "target_tokens": 300, "peak_memory_bytes": 90}
    summary = {
        "steps": 10,
        "computed_tokens": 1000,
        "target_tokens": 300,
        "peak_memory_bytes": 100,
        "train_seconds": 25,
    }
    found = compared(expected, summary, records)
    assert found["predicted"] == {**expected, "train_seconds": 20}
    error = {"steps": 0, "target_tokens": 0, "computed_tokens": 0, "train_seconds": -0.2, "peak_memory_bytes": -0.1}
    assert found["error"] == pytest.approx(error)


def test_a_run_of_one_step_has_no_time_to_compare() -> None:
    """The first step is not like the others."""
    expected = {"steps": 1, "computed_tokens": 10, "target_tokens": 3, "peak_memory_bytes": 90}
    found = compared(expected, {**expected, "train_seconds": 5.0}, [{"seconds": 5.0, "computed_tokens": 10}])
    assert "train_seconds" not in found["predicted"] | found["error"]


@pytest.mark.parametrize(("every", "steps", "passes"), [(4, 10, 4), (5, 10, 3), (100, 10, 2), (1, 3, 4)])
def test_measurements_are_as_many_as_a_run_makes(every: int, steps: int, passes: int, configure: Configure) -> None:
    """Before the first step, every so many, and after the last, each once."""
    assert measuring_passes(every, steps) == passes
    if steps == 10:
        run = instil.train(configure(f"evaluate.every_steps={every}", "train.epochs=2"))
        assert len(json.loads((run / "summary.json").read_text())["heldout_losses"]) == passes


# ── the mix ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mix_is_planned_and_told(place: Path, configure: Configure) -> None:
    """Forty rows at a half and ten three times: the epoch's examples, and each source's share of the target tokens."""
    tiny.write_rows(place / "b.jsonl", [tiny.row(f"tell {i}", "red green blue black") for i in range(10)])
    sources = [{"path": str(place / "a.jsonl"), "repeat": 0.5}, {"path": str(place / "b.jsonl"), "repeat": 3.0}]
    config = configure("data.heldout=0", **{"data.train": sources})
    found = forecast(config, measure=False).as_dict()
    assert found["examples"] == 50
    assert found["epoch"]["examples"] == sum(use["epoch_examples"] for use in found["mix"])
    first, second = found["mix"]
    assert (first["path"], first["examples"], first["asked"]) == (sources[0]["path"], 40, "0.5x")
    assert (second["examples"], second["epoch_examples"]) == (10, 30)
    assert first["epoch_examples"] == pytest.approx(20, abs=1)
    tokens = {"a": 0, "b": 0}
    for example in instil.examples([str(place / "a.jsonl"), str(place / "b.jsonl")], str(place / "m")):
        tokens[Path(example.origin).name[0]] += len(example.answer_tokens)
    share = 3 * tokens["b"] / (3 * tokens["b"] + tokens["a"] / 2)
    assert second["share"] == pytest.approx(share, abs=0.02)


def test_sources_are_mixed_by_weight_or_by_repeat() -> None:
    """All weights, or none."""
    plain, twice = SourceSpec("a"), SourceSpec("b", repeat=2.0)
    light, heavy = SourceSpec("a", weight=1.0), SourceSpec("b", weight=3.0)
    assert mix_of([plain, twice]) == Mix(repeats=(1.0, 2.0))
    assert mix_of([light, heavy]) == Mix(weights=(1.0, 3.0))
    with pytest.raises(UsageError, match=r"data.train\[1\]: b has no weight, and other sources have one"):
        mix_of([light, twice])
    with pytest.raises(UsageError, match=r"data.train\[0\]: a has a weight and a repeat of 2"):
        mix_of([SourceSpec("a", weight=1.0, repeat=2.0), heavy])
    with pytest.raises(UsageError, match="every source is left out"):
        mix_of([SourceSpec("a", repeat=0.0)])


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_takes_what_train_takes(place: Path) -> None:
    """The contract's keys with --json, alone on stdout."""
    words = ("plan", "--model", place / "m", "--data", place / "a.jsonl", "--heldout", "0", "train.batch_examples=8")
    said = tiny.command(*words, "--no-measure", "--json")
    found = json.loads(said.out)
    assert (said.code, said.err) == (0, [])
    contract = {"rows", "examples", "prompt_tokens", "answer_tokens", "computed_tokens", "packs", "steps",
                "packing_efficiency", "flops", "peak_memory_bytes", "seconds"}  # fmt: skip
    assert contract <= found.keys()
    assert found["rows"] == found["examples"] == 40


def test_what_does_not_fit_is_computed_again(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with less memory than a run needs, layers keep only their inputs; plan and run say so; the result is
    the same to the bit."""
    whole = instil.train(configure("run.name=whole"))
    usual = forecast(configure(), measure=False)
    monkeypatch.setattr(sys.modules["instil.footprint"], "machine_bytes", lambda device: 1_000_000)
    lines: list[str] = []
    less = forecast(configure(), measure=False, say=lines.append)
    said: list[str] = []
    run = instil.train(configure(), listener=Listener(say=said.append))
    for each in (lines, said):
        assert any("layers are computed again in the backward pass" in line for line in each), each
    assert less.peak_memory_bytes < usual.peak_memory_bytes
    assert tiny.same(run / "model" / "model.safetensors", whole / "model" / "model.safetensors")


def test_people_see_a_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of the document, and the mix where there is one."""
    monkeypatch.setenv("COLUMNS", "120")
    other = tiny.write_rows(place / "b.jsonl", [tiny.row(f"tell {i}", "red") for i in range(10)])
    words = ("plan", "--model", place / "m", "--data", place / "a.jsonl", "--data", other, "--heldout", "0")
    said = tiny.command(*words, "--no-measure")
    found = json.loads(tiny.command(*words, "--no-measure", "--json").out)
    assert said.code == 0
    cells = {line.split("  ")[0].strip(): line.split()[-1] for line in said.out.splitlines() if line.strip()}
    assert cells["computed tokens"] == f"{found['computed_tokens']:,}"
    assert cells["steps"] == f"{found['steps']:,}"
    assert "not measured (--no-measure)" in said.out
    assert f"{found['mix'][1]['share']:.1%}" in said.out
