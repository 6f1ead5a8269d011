"""Every key of the configuration changes something that can be seen from outside; one proof a key, none left out."""

from __future__ import annotations

import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import instil
import tiny
from instil import compiling
from instil.config import keys, load_config
from instil.errors import DataError, MachineError, UsageError
from instil.model.compiled import decoder_layers
from instil.pack.store import open_store
from instil.plan import loader_of
from instil.train.spikes import Spikes
from instil.types import KINDS, Example

STEPS_PER_EPOCH = 5  # 38 training rows of 40, 8 examples a step
ONE_STEP = ("data.heldout=0", "train.steps=1")
# ChatML that also writes reasoning and tool calls.
RICH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}"
    "</think>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Bench:
    """Runs on one tiny model and forty rows, each setting trained once. `base` is the run with no further setting."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = tiny.write_model(folder / "m")
        self.data = tiny.write_rows(folder / "a.jsonl", tiny.some_rows(40))
        self.names = (f"run-{i}" for i in itertools.count())
        self.run = cache(self._run)

    def _run(self, *overrides: str) -> Path:
        least = {"model": str(self.model), "data.train": [str(self.data)], "run.dir": str(self.folder / "runs")}
        least["run.name"] = next(self.names)  # the made name is the same where only harmless keys differ
        given = {} if any(o.startswith("train.batch_tokens") for o in overrides) else {"train.batch_examples": 8}
        words = (*tiny.FAST, "train.lr=1e-2", "train.epochs=2", *overrides)
        said = {word.partition("=")[0] for word in overrides}
        merged = {k: v for k, v in (least | given).items() if k not in said}
        return instil.train(load_config(None, words, merged))

    @property
    def base(self) -> Path:
        return self.run()

    @property
    def rich(self) -> Path:
        """Where the template RICH is written."""
        return self.folder / "rich.jinja"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("knobs"))


PROOFS: dict[str, Callable[[Bench], None]] = {}


def knob(key: str) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Register the proof of a key."""

    def register(proof: Callable[[Bench], None]) -> Callable[[Bench], None]:
        assert key not in PROOFS
        PROOFS[key] = proof
        return proof

    return register


def test_every_key_has_a_proof() -> None:
    """A new key needs a proof that it does something; a proof without key is dead."""
    assert set(PROOFS) == set(keys())


@pytest.mark.parametrize("key", list(keys()))
def test_the_knob_changes_something(key: str, bench: Bench) -> None:
    """See the proof of the key."""
    PROOFS[key](bench)


def tensors(run: Path, file: str = "model/model.safetensors") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run / file)


def same_weights(run: Path, other: Path) -> bool:
    import torch

    mine, its = tensors(run), tensors(other)
    return mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine)


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text())


def rates(run: Path) -> list[float]:
    return [record["lr"] for record in tiny.metrics_of(run)]


def learnt(run: Path) -> list[Example]:
    """The stored training examples of a run."""
    (folder,) = (run / "packs").iterdir()
    return list(open_store(folder)[0]["train"])


def weights_of(run: Path) -> list[list[float]]:
    return [example.weights.tolist() for example in learnt(run)]


def of_kind(bench: Bench, kind: str, key: str) -> None:
    """`key` is the weight of every stored target token of a kind, and of no other; at 1, all weigh 1."""
    data = f"data.train=[{tiny.write_rows(bench.folder / 'rich.jsonl', RICH_ROWS)}]"
    bench.rich.write_text(RICH)
    said = (data, f"template={bench.rich}", *ONE_STEP)
    plain, changed = learnt(bench.run(*said)), learnt(bench.run(*said, f"{key}=0.25"))
    seen = set()
    for before, after in zip(plain, changed, strict=True):
        assert set(before.weights.tolist()) == {1.0}
        names = [KINDS[kind] for kind in after.kinds]
        assert after.weights.tolist() == [0.25 if name == kind else 1.0 for name in names]
        seen |= set(names)
    assert seen == {"answer", "reasoning", "tool_call", "terminator"}


RICH_ROWS = [
    tiny.row("say red", "lime"),
    {"messages": [{"role": "user", "content": "say blue"},
                  {"role": "assistant", "content": "plum", "reasoning_content": "is it rose"}]},
    {"messages": [{"role": "user", "content": "give gold"},
                  {"role": "assistant", "content": "ruby", "tool_calls": [
                      {"type": "function", "function": {"name": "jade", "arguments": {"say": "teal"}}}]}]},
]  # fmt: skip


def checkpoints(run: Path) -> list[str]:
    return sorted(folder.name for folder in (run / "checkpoints").iterdir())


# ── model and data ───────────────────────────────────────────────────────────────────────────────────────────────────


@knob("model")
def _(bench: Bench) -> None:
    other = tiny.write_model(bench.folder / "wide", hidden_size=64)
    run = bench.run(f"model={other}")
    assert read(run, "model/config.json")["hidden_size"] == 64
    assert read(bench.base, "model/config.json")["hidden_size"] == 32


@knob("template")
def _(bench: Bench) -> None:
    file = bench.folder / "t.jinja"
    file.write_text("<|endoftext|>" + tiny.CHATML)  # one token more in each prompt
    run = bench.run(f"template={file}")
    assert (run / "model" / "chat_template.jinja").read_text() == file.read_text()
    more = (
        read(run, "summary.json")["rows"]["prompt_tokens"] - read(bench.base, "summary.json")["rows"]["prompt_tokens"]
    )
    assert more == 40


@knob("data.train")
def _(bench: Bench) -> None:
    other = tiny.write_rows(bench.folder / "b.jsonl", tiny.some_rows(60)[40:])
    run = bench.run(f"data.train=[{bench.data}, {other}]")
    assert read(run, "summary.json")["rows"]["rows"] == 60
    assert str(other) in (run / "ledger.jsonl").read_text()
    assert read(bench.base, "summary.json")["rows"]["rows"] == 40


def used(run: Path) -> dict[int, tuple[int, int]]:
    """(examples, target tokens) of each source in the first epoch of a run, with repetition."""
    config = load_config(run / "config.yaml")
    (folder,) = (run / "packs").iterdir()
    store = open_store(folder)[0]["train"]
    chosen = loader_of(config, store).chosen(0)
    return {
        s: (int((store.source[chosen] == s).sum()), int(store.target_tokens[chosen][store.source[chosen] == s].sum()))
        for s in sorted(set(store.source.tolist()))
    }


def test_a_source_may_be_repeated(bench: Bench) -> None:
    """repeat: 2 shows each row of the source twice in an epoch, and of no other source."""
    other = tiny.write_rows(bench.folder / "twenty.jsonl", tiny.some_rows(60)[40:])
    how = ("data.heldout=0", "train.epochs=1")
    once, twice, half = (
        bench.run(f"data.train=[{{path: {bench.data}, repeat: {n}}}, {other}]", *how) for n in (1, 2, 0.5)
    )
    for run, examples in ((once, 60), (twice, 100), (half, 40)):
        assert sum(record["examples"] for record in tiny.metrics_of(run)) == pytest.approx(examples, abs=1)
        assert used(run)[1][0] == 20
        tokens = sum(record["target_tokens"] for record in tiny.metrics_of(run))
        assert tokens == sum(n for _, n in used(run).values())
    assert used(twice)[0] == tuple(2 * n for n in used(once)[0])


def test_sources_may_be_weighted(bench: Bench) -> None:
    """weight: shares of the target tokens of an epoch, whose size stays; all sources have one, or none has."""
    other = tiny.write_rows(bench.folder / "twenty.jsonl", tiny.some_rows(60)[40:])
    how = ("data.heldout=0", "train.epochs=1")
    plain = bench.run(f"data.train=[{bench.data}, {other}]", *how)
    for first, second in ((3, 1), (0.2, 0.8)):
        train = f"data.train=[{{path: {bench.data}, weight: {first}}}, {{path: {other}, weight: {second}}}]"
        found = used(bench.run(train, *how))
        whole = sum(n for _, n in found.values())
        assert whole == pytest.approx(sum(n for _, n in used(plain).values()), rel=0.05)
        assert found[0][1] / whole == pytest.approx(first / (first + second), abs=0.03)
    with pytest.raises(UsageError, match="give all sources a weight, or none"):
        bench.run(f"data.train=[{{path: {bench.data}, weight: 1}}, {other}]", *how)


@knob("data.heldout")
def _(bench: Bench) -> None:
    assert read(bench.run("data.heldout=0.5"), "summary.json")["rows"]["heldout_rows"] == 20
    none = read(bench.run("data.heldout=0"), "summary.json")
    assert (none["rows"]["heldout_rows"], none["loss_before"], none["loss_after"]) == (0, None, None)
    file = tiny.write_rows(bench.folder / "h.jsonl", [tiny.row("what", "else")])
    assert read(bench.run(f"data.heldout={file}"), "summary.json")["rows"]["heldout_rows"] == 1


@knob("data.heldout_most")
def _(bench: Bench) -> None:
    run = bench.run("data.heldout=0.5", "data.heldout_most=3")
    assert read(run, "summary.json")["rows"]["heldout_rows"] == 3


@knob("data.mapping")
def _(bench: Bench) -> None:
    rows = [{"frage": f"say {word}", "antwort": word} for word in tiny.WORDS]
    file = tiny.write_rows(bench.folder / "de.jsonl", rows)
    with pytest.raises(DataError, match=r"data\.mapping="):  # which proposes the mapping
        bench.run(f"data.train=[{file}]", *ONE_STEP)
    mapped = bench.run(f"data.train=[{file}]", "data.mapping={prompt: frage, completion: antwort}", *ONE_STEP)
    known = tiny.write_rows(bench.folder / "en.jsonl", [tiny.row(r["frage"], r["antwort"]) for r in rows])
    same = learnt(bench.run(f"data.train=[{known}]", *ONE_STEP))
    assert [(e.prompt_tokens.tolist(), e.answer_tokens.tolist()) for e in learnt(mapped)] == [
        (e.prompt_tokens.tolist(), e.answer_tokens.tolist()) for e in same
    ]


@knob("data.too_long")
def _(bench: Bench) -> None:
    talk = [message for word in ("red", "green", "blue") for message in tiny.row(f"say {word} 0", word)["messages"]]
    file = tiny.write_rows(bench.folder / "talk.jsonl", [{"messages": talk}])
    whole = learnt(bench.run(f"data.train=[{file}]", *ONE_STEP))
    limit = whole[1].length_tokens
    said = (f"data.train=[{file}]", f"pack.tokens={limit}", *ONE_STEP)
    dropped, trimmed = bench.run(*said), bench.run(*said, "data.too_long=trim-context")
    assert [e.turn for e in learnt(dropped)] == [0, 1]
    kept = learnt(trimmed)
    assert [e.turn for e in kept] == [0, 1, 2]
    assert [e.answer_tokens.tolist() for e in kept] == [e.answer_tokens.tolist() for e in whole]  # answers stay whole
    assert [e.cut_tokens for e in kept] == [0, 0, len(whole[2].prompt_tokens) - len(kept[2].prompt_tokens)]
    assert kept[2].cut_tokens > 0
    with pytest.raises(DataError, match=r"talk\.jsonl:1: answer 2 needs"):
        bench.run(*said, "data.too_long=error")
    assert [json.loads((run / "ledger.jsonl").read_text())["fate"] for run in (dropped, trimmed)] == ["split", "cut"]


@knob("data.drop_most")
def _(bench: Bench) -> None:
    file = tiny.write_rows(bench.folder / "quarter.jsonl", [*tiny.some_rows(3), tiny.row("say", "")])
    for most in ("", "data.drop_most=0.24"):
        with pytest.raises(DataError, match="1 of 4 rows would be dropped"):
            bench.run(*filter(None, (f"data.train=[{file}]", most)), *ONE_STEP)
    run = bench.run(f"data.train=[{file}]", "data.drop_most=0.25", *ONE_STEP)
    assert read(run, "summary.json")["rows"]["dropped_by_rule"] == {"empty_answer": 1}


@knob("data.strict")
def _(bench: Bench) -> None:
    file = tiny.write_rows(bench.folder / "one.jsonl", [*tiny.some_rows(39), tiny.row("say", " ")])
    run = bench.run(f"data.train=[{file}]", *ONE_STEP)  # one of forty may be dropped
    assert read(run, "summary.json")["rows"]["dropped_by_rule"] == {"empty_answer": 1}
    with pytest.raises(DataError, match=r"one\.jsonl:40: "):
        bench.run(f"data.train=[{file}]", "data.strict=true", *ONE_STEP)


@knob("data.leak")
def _(bench: Bench) -> None:
    file = tiny.write_rows(bench.folder / "leak.jsonl", [tiny.row("what", "else"), tiny.some_rows(40)[6]])
    said = (f"data.heldout={file}", "train.steps=1")
    with pytest.raises(DataError, match=r"leak\.jsonl:2: this held-out row is also trained on"):
        bench.run(*said)
    drop, allow = (bench.run(*said, f"data.leak={word}") for word in ("drop", "allow"))
    assert [len(learnt(run)) for run in (drop, allow)] == [39, 40]
    assert f"{bench.data}:7" not in {e.origin for e in learnt(drop)}
    assert read(drop, "summary.json")["rows"]["dropped_by_rule"] == {"leak": 1}


# ── chat and targets ─────────────────────────────────────────────────────────────────────────────────────────────────


@knob("chat.control_text")
def _(bench: Bench) -> None:
    rows = [tiny.row("say <|im_start|> red", "lime"), tiny.row("say blue", "plum")]
    file = tiny.write_rows(bench.folder / "typed.jsonl", rows)
    plain, served = (
        learnt(bench.run(f"data.train=[{file}]", f"chat.control_text={policy}", *ONE_STEP))
        for policy in ("plain", "as-served")
    )
    assert [(e.prompt_tokens == 1).sum() for e in plain] == [2, 2]  # those of the template
    assert [(e.prompt_tokens == 1).sum() for e in served] == [3, 2]
    with pytest.raises(DataError, match=r"typed\.jsonl:1: messages\[0\]\.content: contains the control token"):
        bench.run(f"data.train=[{file}]", "chat.control_text=reject", *ONE_STEP)


@knob("chat.terminator")
def _(bench: Bench) -> None:
    run = bench.run("chat.terminator=<|endoftext|>", "data.heldout=0", "train.steps=1")
    assert {int(e.answer_tokens[-1]) for e in learnt(run)} == {0}
    assert {int(e.answer_tokens[-1]) for e in learnt(bench.base)} == {2}
    assert read(run, "model/generation_config.json")["eos_token_id"] == [0]
    assert read(bench.base, "model/generation_config.json")["eos_token_id"] == [2, 0]
    words = bench.run("chat.terminator=STOP", "data.heldout=0", "train.steps=1")
    assert read(words, "model/generation_config.json")["stop_strings"] == ["STOP"]


@knob("chat.template_args")
def _(bench: Bench) -> None:
    file = bench.folder / "switch.jinja"
    file.write_text("{% if brief is defined and brief %}<|im_start|>system\nbrief<|im_end|>\n{% endif %}" + tiny.CHATML)
    off, on = (
        bench.run(f"template={file}", f"chat.template_args={{brief: {word}}}", *ONE_STEP) for word in ("false", "true")
    )
    (more,) = {len(b.prompt_tokens) - len(a.prompt_tokens) for a, b in zip(learnt(off), learnt(on), strict=True)}
    assert more > 0
    assert (on / "model" / "chat_template.jinja").read_text() == file.read_text()


@knob("targets.turns")
def _(bench: Bench) -> None:
    talk = [message for word in ("red", "green") for message in tiny.row(f"say {word} 0", word)["messages"]]
    file = tiny.write_rows(bench.folder / "two.jsonl", [{"messages": talk}])
    every, last, everything = (
        learnt(bench.run(f"data.train=[{file}]", f"targets.turns={turns}", *ONE_STEP))
        for turns in ("all", "last", "everything")
    )
    assert [(e.turn, e.weights.tolist()) for e in every] == [(i, [1.0] * len(e.weights)) for i, e in enumerate(every)]
    assert [(e.turn, e.answer_tokens.tolist()) for e in last] == [(1, every[1].answer_tokens.tolist())]
    whole = len(every[1].prompt_tokens) + len(every[1].answer_tokens)
    assert sum(int((e.weights > 0).sum()) for e in everything) == whole - 1  # each token once, but for the very first
    assert sum(int((e.weights > 0).sum()) for e in every) < whole - 1


@knob("targets.loss_per")
def _(bench: Bench) -> None:
    rows = [tiny.row("say", "red"), tiny.row("say", "a longer answer than that"), tiny.row("say more", "lime teal")]
    rows[1]["weight"] = 3.0
    rows[2]["messages"][1]["weight"] = 0.5
    file = tiny.write_rows(bench.folder / "per.jsonl", rows)
    token, example = (
        bench.run(f"data.train=[{file}]", f"targets.loss_per={per}", *ONE_STEP) for per in ("token", "example")
    )
    lengths = [len(e.answer_tokens) for e in learnt(token)]
    assert len(set(lengths)) == 3
    factors = [1.0, 3.0, 0.5]  # of row and message
    assert weights_of(token) == [[factor] * n for factor, n in zip(factors, lengths, strict=True)]
    assert weights_of(example) == [
        [pytest.approx(factor / n, rel=1e-6)] * n for factor, n in zip(factors, lengths, strict=True)
    ]
    assert tiny.metrics_of(token)[0]["loss"] != tiny.metrics_of(example)[0]["loss"]


@knob("targets.answer")
def _(bench: Bench) -> None:
    of_kind(bench, "answer", "targets.answer")


@knob("targets.reasoning")
def _(bench: Bench) -> None:
    of_kind(bench, "reasoning", "targets.reasoning")


@knob("targets.tool_call")
def _(bench: Bench) -> None:
    of_kind(bench, "tool_call", "targets.tool_call")


@knob("targets.terminator")
def _(bench: Bench) -> None:
    of_kind(bench, "terminator", "targets.terminator")


@knob("pack.tokens")
def _(bench: Bench) -> None:
    lengths = [
        len(e.prompt_tokens) + len(e.answer_tokens) - 1 for e in instil.examples([str(bench.data)], str(bench.model))
    ]
    run = bench.run("pack.tokens=20", "data.drop_most=1")
    rows = read(run, "summary.json")["rows"]
    assert rows["dropped_by_rule"] == {"too_long": sum(n > 20 for n in lengths)}
    assert 0 < rows["dropped_rows"] < 40
    assert read(bench.base, "summary.json")["rows"]["dropped_rows"] == 0


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@knob("train.lr")
def _(bench: Bench) -> None:
    run = bench.run("train.lr=1e-3")
    assert max(rates(run)) == 1e-3
    assert max(rates(bench.base)) == 1e-2
    assert not same_weights(run, bench.base)


@knob("train.epochs")
def _(bench: Bench) -> None:
    records = tiny.metrics_of(bench.run("train.epochs=3"))
    assert len(tiny.metrics_of(bench.base)) == 2 * STEPS_PER_EPOCH
    assert len(records) == 3 * STEPS_PER_EPOCH
    assert [r["epoch"] for r in records] == [i // STEPS_PER_EPOCH for i in range(3 * STEPS_PER_EPOCH)]


@knob("train.steps")
def _(bench: Bench) -> None:
    assert len(tiny.metrics_of(bench.run("train.steps=3"))) == 3
    assert len(tiny.metrics_of(bench.run("train.steps=1000"))) == 2 * STEPS_PER_EPOCH


@knob("train.batch_tokens")
def _(bench: Bench) -> None:
    for batch in (20, 70):
        run = bench.run(f"train.batch_tokens={batch}")
        records = tiny.metrics_of(run)
        epoch = sum(r["target_tokens"] for r in records) / 2
        assert len(records) == 2 * round(epoch / batch)
        assert epoch / (len(records) / 2) == pytest.approx(batch, rel=0.2)  # on average


@knob("train.batch_examples")
def _(bench: Bench) -> None:
    records = tiny.metrics_of(bench.run("train.batch_examples=19"))
    assert len(records) == 2 * 2
    assert sum(r["examples"] for r in records) == 2 * 38


@knob("train.schedule")
def _(bench: Bench) -> None:
    constant, linear, cosine = (rates(bench.run(f"train.schedule={s}", "train.warmup=0")) for s in
                                ("constant", "linear", "cosine"))  # fmt: skip
    assert constant == [1e-2] * 10
    steps = [a - b for a, b in itertools.pairwise(linear)]
    assert steps == pytest.approx([1e-3] * 9)  # from 1e-2 to a tenth in nine even steps
    assert cosine == pytest.approx([1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * i / 9))) for i in range(10)])


@knob("train.warmup")
def _(bench: Bench) -> None:
    rising = rates(bench.run("train.warmup=0.5"))
    assert rising[:5] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2])
    assert rates(bench.base)[0] == 1e-2


@knob("train.weight_decay")
def _(bench: Bench) -> None:
    free, held = bench.run("data.heldout=0"), bench.run("data.heldout=0", "train.weight_decay=1")
    unseen = 255  # the token of a byte that no row has: nothing but the decay moves its embedding
    before = tensors(bench.folder, "m/model.safetensors")["model.embed_tokens.weight"][unseen]
    kept = 1.0
    for rate in rates(held):
        kept *= 1 - rate
    after = tensors(held)["model.embed_tokens.weight"][unseen]
    assert after.tolist() == pytest.approx((kept * before).tolist(), rel=1e-5)
    assert tensors(free)["model.embed_tokens.weight"][unseen].tolist() == before.tolist()


@knob("train.clip_norm")
def _(bench: Bench) -> None:
    off, wide, tight = (bench.run(f"train.clip_norm={c}") for c in (0, 1e9, 0.1))
    assert same_weights(off, wide)
    assert not same_weights(off, tight)
    first = [tiny.metrics_of(run)[0]["grad_norm"] for run in (off, tight)]
    assert first[0] == first[1] > 0.1  # the norm in the record is the gradient's own


@knob("train.precision")
def _(bench: Bench) -> None:
    run = bench.run("train.precision=bf16")
    assert {str(t.dtype) for t in tensors(run).values()} == {"torch.bfloat16"}
    assert {str(t.dtype) for t in tensors(bench.base).values()} == {"torch.float32"}
    losses = [[r["loss"] for r in tiny.metrics_of(r)] for r in (run, bench.base)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@knob("train.compile")
def _(bench: Bench) -> None:
    compiled: list[bool] = []
    real = compiling.compile_layers

    def watch(net: Any, cache: Path) -> None:
        real(net, cache)
        compiled.append(all(layer._compiled_call_impl is not None for layer in decoder_layers(net)))

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of what torch does
        patch.setattr(compiling, "compile_layers", watch)
        run = bench.run("train.compile=true", "train.steps=2")
    losses = [[r["loss"] for r in tiny.metrics_of(r)] for r in (run, bench.run("train.compile=false", "train.steps=2"))]
    assert compiled == [True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@knob("train.spikes")
def _(bench: Bench) -> None:
    class Leap(Spikes):
        def __init__(self, recent: Sequence[float]):
            super().__init__(recent)
            self.limit = 0.0 if len(recent) == 4 else float("inf")  # the fifth step leaps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["instil.train.loop"], "Spikes", Leap)
        warned, skipped = bench.run("train.spikes=warn"), bench.run("train.spikes=skip")
    assert same_weights(warned, bench.base)
    assert not same_weights(skipped, bench.base)
    assert [r["step"] for r in tiny.metrics_of(skipped) if r.get("skipped")] == [5]
    assert read(warned, "summary.json")["spikes"] == {"steps": 1, "left_out": 0}
    assert read(skipped, "summary.json")["spikes"] == {"steps": 1, "left_out": 1}


@knob("train.seed")
def _(bench: Bench) -> None:
    run = bench.run("train.seed=1")
    assert [r["loss"] for r in tiny.metrics_of(run)] != [r["loss"] for r in tiny.metrics_of(bench.base)]
    a, b = (tensors(bench.run("adapter.rank=2", "train.steps=1", f"train.seed={s}"), "adapter/adapter_model.safetensors")
            for s in (0, 1))  # fmt: skip
    name = next(name for name in a if "lora_A" in name)
    assert not (a[name] == b[name]).any()  # new weights are of the seed too


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@knob("adapter.rank")
def _(bench: Bench) -> None:
    for rank in (2, 4):
        shapes = {t.shape[0] for n, t in tensors(bench.run(f"adapter.rank={rank}"), "adapter/adapter_model.safetensors")
                  .items() if "lora_A" in n}  # fmt: skip
        assert shapes == {rank}
    assert not (bench.base / "adapter").exists()


@knob("adapter.alpha")
def _(bench: Bench) -> None:
    plain, strong = bench.run("adapter.rank=2"), bench.run("adapter.rank=2", "adapter.alpha=16")
    assert read(plain, "adapter/adapter_config.json")["lora_alpha"] == 4
    assert read(strong, "adapter/adapter_config.json")["lora_alpha"] == 16
    name = "model.layers.0.self_attn.q_proj.weight"
    adapter = tensors(strong, "adapter/adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
    change = tensors(strong)[name] - tensors(bench.folder, "m/model.safetensors")[name]
    assert change.tolist() == [pytest.approx(row, abs=1e-5) for row in (16 / 2 * (b @ a)).tolist()]


@knob("adapter.targets")
def _(bench: Bench) -> None:
    run = bench.run("adapter.rank=2", "adapter.targets=[q_proj, up_proj]")
    names = tensors(run, "adapter/adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"q_proj", "up_proj"}
    every = tensors(bench.run("adapter.rank=2"), "adapter/adapter_model.safetensors")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in every} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


# ── measuring and saving ─────────────────────────────────────────────────────────────────────────────────────────────


@knob("evaluate.every_steps")
def _(bench: Bench) -> None:
    run = bench.run("evaluate.every_steps=4")
    assert list(read(run, "summary.json")["heldout_losses"]) == ["0", "4", "8", "10"]
    assert [r["step"] for r in tiny.metrics_of(run) if "heldout_loss" in r] == [4, 8, 10]
    assert same_weights(run, bench.base)


@knob("evaluate.examples")
def _(bench: Bench) -> None:
    one, both, more = (bench.run(f"evaluate.examples={n}") for n in (1, 2, 3))
    losses = [read(run, "summary.json")["loss_before"] for run in (one, both, more)]
    assert losses[0] != losses[1]
    assert losses[1] == losses[2]  # two rows are held out
    assert same_weights(one, both)


@knob("checkpoint.every_steps")
def _(bench: Bench) -> None:
    run = bench.run("checkpoint.every_steps=3", "checkpoint.keep=9")
    assert checkpoints(run) == ["step-000003", "step-000006", "step-000009", "step-000010"]
    assert checkpoints(bench.base) == ["step-000010"]
    assert same_weights(run, bench.base)


@knob("checkpoint.every_s")
def _(bench: Bench) -> None:
    run = bench.run("checkpoint.every_s=1e-9", "checkpoint.keep=99")
    assert checkpoints(run) == [f"step-{step:06d}" for step in range(1, 11)]


@knob("checkpoint.keep")
def _(bench: Bench) -> None:
    for keep in (1, 2):
        run = bench.run("checkpoint.every_steps=3", f"checkpoint.keep={keep}")
        assert checkpoints(run) == ["step-000009", "step-000010"][-keep:]


# ── where and on what ────────────────────────────────────────────────────────────────────────────────────────────────


@knob("run.dir")
def _(bench: Bench) -> None:
    run = bench.run(f"run.dir={bench.folder / 'elsewhere'}")
    assert run.parent == bench.folder / "elsewhere"
    assert (run / "summary.json").is_file()


@knob("run.name")
def _(bench: Bench) -> None:
    assert bench.run("run.name=mine") == bench.folder / "runs" / "mine"


@knob("run.device")
def _(bench: Bench) -> None:
    run = bench.run("run.device=cpu", "run.name=on-cpu")
    assert read(run, "manifest.json")["numerics"]["device"] == "cpu"
    with pytest.raises(MachineError, match="cuda:99"):
        bench.run("run.device=cuda:99", "run.name=nowhere")


@knob("run.threads")
def _(bench: Bench) -> None:
    import torch

    for threads in (1, 2):
        run = bench.run(f"run.threads={threads}", f"run.name=threads-{threads}", "train.steps=1")
        assert torch.get_num_threads() == threads
        assert read(run, "manifest.json")["numerics"]["threads"] == threads
