"""A model measured on rows: known answers score as they must, and batching does not change what is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import instil
import tiny
from instil.config import load_config
from instil.errors import DataError, MachineError, ModelError, UsageError
from instil.types import Example

ANSWERS = {"say red 0": "blue", "say green 1": "gold", "give 2": '{"a": 1, "b": "x"}', "say black 3": "rose"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, and `run`, which has learnt ANSWERS by heart; `four.jsonl` holds them."""
    folder = tmp_path_factory.mktemp("measure")
    tiny.write_model(folder / "m")
    file = tiny.write_rows(folder / "four.jsonl", [tiny.row(q, a) for q, a in ANSWERS.items()])
    least = {"model": str(folder / "m"), "data.train": [str(file)], "run.dir": str(folder), "data.heldout": 0.0}
    how = ("train.lr=1e-2", "train.schedule=constant", "train.epochs=100", "train.batch_examples=4", "run.name=run")
    instil.train(load_config(None, [*tiny.FAST, *how], least))
    return folder


def loaded(folder: Path) -> Any:
    """A model in float32, with our attention."""
    import torch

    from instil.model.load import load_model

    return load_model(folder, dtype=torch.float32, device=torch.device("cpu"))


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_learnt_answers_are_exactly_right(place: Path) -> None:
    """Four answers by heart: all exactly right, by text and by JSON, and the loss is near zero."""
    found = instil.evaluate(str(place / "run"), str(place / "four.jsonl"))
    assert [a.answer for a in found.answers] == [a.expected for a in found.answers] == list(ANSWERS.values())
    assert all(a.exact for a in found.answers)
    assert found.tasks["rows"].exact_share == 1
    assert (found.tasks["rows"].json_rows, found.tasks["rows"].valid_rows) == (1, 1)
    assert found.loss < 0.1
    assert found.accuracy == 1


def test_wrong_answers_are_counted_by_task(place: Path, tmp_path: Path) -> None:
    """Rows with another expected answer are wrong, each in its own task, and `all` is the sum."""
    rows = [tiny.row(q, a, task="kept") for q, a in list(ANSWERS.items())[:2]]
    rows += [tiny.row("give 2", '{"a": 1, "b": "y"}', task="changed"), tiny.row("say black 3", "red", task="changed")]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    found = instil.evaluate(str(place / "run"), str(file))
    assert {task: (s.exact_rows, s.rows) for task, s in found.tasks.items()} == {
        "kept": (2, 2), "changed": (0, 2), "all": (2, 4)
    }  # fmt: skip
    assert found.tasks["changed"].values == 0.5  # one of two values right
    assert found.as_dict()["tasks"]["all"]["exact_share"] == 0.5
    assert json.dumps(found.as_dict())


def textbook(model: Path, examples: Sequence[Example]) -> tuple[float, int]:
    """The loss by transformers' own logits of each row, one by one, in bfloat16; and the number of targets."""
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    total, count = 0.0, 0
    for example in examples:
        tokens = torch.tensor([[*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]])
        with torch.no_grad():
            log_p = net(tokens).logits[0].float().log_softmax(-1)
        p = len(example.prompt_tokens)
        for j, target in enumerate(example.answer_tokens.tolist()):
            total -= float(log_p[p - 1 + j, target])
            count += 1
    return total / count, count


def test_the_loss_is_the_textbook_s(place: Path) -> None:
    """Nats per answer token: transformers' own logits of each row, one by one, in the same bfloat16."""
    loss, count = textbook(place / "m", instil.examples([str(place / "four.jsonl")], str(place / "m")))
    found = instil.evaluate(str(place / "m"), str(place / "four.jsonl"))
    assert found.target_tokens == count
    assert found.loss == pytest.approx(loss, rel=5e-3)


def test_rows_and_base_choose_what_is_measured(place: Path) -> None:
    """rows: the first so many; base: the model that the run began from, which knows nothing of it."""
    told: list[tuple[int, int]] = []
    found = instil.evaluate(str(place / "run"), str(place / "four.jsonl"), rows=2, progress=lambda *n: told.append(n))
    assert (found.examples, len(found.answers)) == (2, 2)
    assert told[-1] == (2, 2)
    base = instil.evaluate(str(place / "run"), str(place / "four.jsonl"), base=True)
    assert base.tasks["rows"].exact_rows == 0
    assert base.loss == instil.evaluate(str(place / "m"), str(place / "four.jsonl")).loss


def test_the_last_answer_of_a_row_is_generated_and_all_are_measured(place: Path, tmp_path: Path) -> None:
    """Two answers in a row: two examples in the loss, one generated answer."""
    messages = [m for q, a in list(ANSWERS.items())[:2] for m in tiny.row(q, a)["messages"]]
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    found = instil.evaluate(str(place / "run"), str(file))
    assert found.examples == 2
    assert [a.expected for a in found.answers] == ["gold"]


def test_without_rows_there_is_nothing_to_measure(place: Path) -> None:
    """A run that held nothing out, and a model, ask for --data."""
    for name in ("run", "m"):
        with pytest.raises(UsageError, match="--data"):
            instil.evaluate(str(place / name))


def test_rows_that_teach_nothing_cannot_be_measured(place: Path, tmp_path: Path) -> None:
    """Answers of weight 0 are context: a file of nothing else is named, instead of a division by zero."""
    row = tiny.row("say", "red")
    row["messages"][1]["weight"] = 0
    file = tiny.write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(DataError, match=r"a\.jsonl: no row has an answer with a weight above 0"):
        instil.evaluate(str(place / "m"), str(file))


# ── what the base is asked, and what is refused ──────────────────────────────────────────────────────────────────────

OTHER = tiny.CHATML.replace("role }}", "role }} says").replace("assistant", "assistant says")
OTHER = OTHER.replace("<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module", params=[None, tiny.CHATML], ids=["no template", "another template"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `run` that held out two rows and was trained with OTHER.jinja, from a model `m` with another template or none."""
    folder = tmp_path_factory.mktemp("other")
    tiny.write_model(folder / "m", template=request.param)
    (folder / "OTHER.jinja").write_text(OTHER, encoding="utf-8")
    for name, rows in (("a", tiny.some_rows(8)), ("h", tiny.some_rows(10)[8:])):
        tiny.write_rows(folder / f"{name}.jsonl", rows)
    said = tiny.command(
        "train", "--model", folder / "m", "--data", folder / "a.jsonl", "--template", folder / "OTHER.jinja",
        f"data.heldout={folder / 'h.jsonl'}", f"run.dir={folder}", "run.name=run", "train.steps=1", *tiny.FAST,
    )  # fmt: skip
    assert said.code == 0, said.err
    return folder


def test_the_base_is_asked_what_the_run_is_asked(other: Path) -> None:
    """The base's weights after the run's prompts, up to the run's end of an answer: its loss is the textbook's on them."""
    from instil.measure import open_model

    run, model = str(other / "run"), str(other / "m")
    tuned, base = open_model(run), open_model(run, base=True)
    assert tuned.stop_ids == base.stop_ids == (0,)  # <|endoftext|>
    served = instil.examples([str(other / "h.jsonl")], model, str(other / "OTHER.jinja"))
    for data in (None, str(other / "h.jsonl")):
        found = instil.evaluate(run, data, base=True)
        assert [a.expected for a in found.answers] == [tiny.WORDS[(7 * i + 3) % 16] for i in (8, 9)]
        assert found.loss == pytest.approx(textbook(other / "m", served)[0], rel=5e-3)


def test_tuned_and_base_talk_side_by_side(other: Path) -> None:
    """What `instil train` names at its end goes through, whatever template the base has or has not."""
    said = tiny.command("chat", other / "run", "--base", "--max-tokens", 3, text="say red\n\n")
    assert said.code == 0, said.err
    assert "[base] " in said.out
    assert "[tuned] " in said.out
    said = tiny.command("evaluate", other / "run", "--base", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out).keys() == {"base", "tuned"}


def test_the_run_s_own_examples_are_measured(other: Path) -> None:
    """Newer examples beside those that the run trained on are not taken for them; where its own are gone, it is said."""
    import shutil

    from instil.pack.store import publish_examples

    run, away = other / "run", other / "away"
    (own,) = [folder for folder in (run / "packs").iterdir() if folder.is_dir()]
    before = instil.evaluate(str(run))
    strangers = instil.examples([str(other / "a.jsonl")], str(other / "m"), str(other / "OTHER.jinja"))
    stranger = run / "packs" / "0123456789abcdef"
    publish_examples(stranger, {"train": strangers, "heldout": strangers}, {})
    found = instil.evaluate(str(run))
    assert (found.examples, found.loss) == (2, before.loss)
    own.rename(away)
    with pytest.raises(MachineError, match="the prepared examples are gone; put them back from a copy, or start over"):
        instil.evaluate(str(run))
    away.rename(own)
    shutil.rmtree(stranger)


def test_rows_too_long_for_the_model_s_positions_are_refused(tmp_path: Path) -> None:
    """Rotary frequencies that change with the longest document of a pack: not measured, instead of measured wrongly."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny.write_model(tmp_path / "m", rope_parameters=rope, max_position_embeddings=60)
    short, long = tiny.row("say", "red"), tiny.row(" ".join(tiny.WORDS * 2), "red")
    instil.evaluate(str(model), str(tiny.write_rows(tmp_path / "s.jsonl", [short])))
    with pytest.raises(ModelError, match=r"changed? at 60 tokens, and an example has \d+; leave such rows out"):
        instil.evaluate(str(model), str(tiny.write_rows(tmp_path / "l.jsonl", [short, long])))


def test_rows_longer_than_a_window_that_attention_is_not_told_are_refused(tmp_path: Path) -> None:
    """Phi-3.5-MoE does not hand its window on: rows within it are measured, longer ones are refused."""
    import torch
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2, sliding_window=30, eos_token_id=0,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny.write_model(tmp_path / "m", weights=False)
    PhimoeForCausalLM(config).save_pretrained(model)
    short, long = tiny.row("say", "red"), tiny.row(" ".join(tiny.WORDS), "red")
    instil.evaluate(str(model), str(tiny.write_rows(tmp_path / "s.jsonl", [short])))
    with pytest.raises(
        ModelError, match=r"does not tell its attention of its window of 30 tokens; leave such rows out"
    ):
        instil.evaluate(str(model), str(tiny.write_rows(tmp_path / "l.jsonl", [short, long])))


# ── generation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def prompts() -> list[Any]:
    """Prompts of 3 to 20 random tokens."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 300, n).astype(np.int32) for n in (3, 20, 7, 7, 12, 1)]


def test_a_batch_says_what_each_would_say_alone(place: Path, prompts: list[Any]) -> None:
    """Padded on the left or not, in any batch: the same tokens (float32)."""
    from instil.evaluate.generate import Sampling, generate

    net = loaded(place / "m")
    alone = [generate(net, [p], stop_ids=[2], sampling=Sampling(12))[0] for p in prompts]
    for size in (6, 4, 1):
        assert generate(net, prompts, stop_ids=[2], sampling=Sampling(12), batch_examples=size) == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_one_by_one_is_the_textbook_s_greedy_loop(place: Path, prompts: list[Any]) -> None:
    """The likeliest token, appended, again: without cache, padding or batch, by transformers' own attention."""
    import torch
    from transformers import AutoModelForCausalLM

    from instil.evaluate.generate import Sampling, generate

    net = AutoModelForCausalLM.from_pretrained(place / "m", attn_implementation="eager").eval()
    expected = []
    for prompt in prompts:
        tokens = prompt.tolist()
        for _ in range(8):
            with torch.no_grad():
                tokens.append(int(net(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == 2:
                break
        expected.append(tokens[len(prompt) :])
    assert generate(loaded(place / "m"), prompts, stop_ids=[2], sampling=Sampling(8)) == expected


def test_what_pads_a_batch_does_not_matter(place: Path, prompts: list[Any]) -> None:
    """The first stop token pads: another one in its place, even one that stands in the prompts, changes nothing."""
    from instil.evaluate.generate import Sampling, generate

    net = loaded(place / "m")
    unused = [t for t in range(3, 300) if t not in {u for p in prompts for u in p.tolist()}]
    made = generate(net, prompts, stop_ids=[2], sampling=Sampling(6))
    said = {t for answer in made for t in answer}
    pads = [next(t for t in unused if t not in said), next(int(t) for t in prompts[1] if int(t) not in said)]
    for pad in pads:
        assert generate(net, prompts, stop_ids=[pad, 2], sampling=Sampling(6)) == made


def test_an_answer_ends_with_its_first_stop_token(place: Path) -> None:
    """The memorised answer, its terminator, nothing after it; shorter where max_tokens says so; streamed alike."""
    from instil.evaluate.generate import Sampling, generate, stream

    net = loaded(place / "run" / "model")
    example = instil.examples([str(place / "four.jsonl")], str(place / "m"))[0]
    expected = example.answer_tokens.tolist()
    assert generate(net, [example.prompt_tokens], stop_ids=[2, 0], sampling=Sampling(50)) == [expected]
    assert generate(net, [example.prompt_tokens], stop_ids=[2, 0], sampling=Sampling(1)) == [expected[:1]]
    seen: list[int] = []
    told = stream(net, example.prompt_tokens, stop_ids=[2, 0], sampling=Sampling(50), emit=seen.append)
    assert told == seen == expected


def test_a_temperature_makes_answers_vary(place: Path, prompts: list[Any]) -> None:
    """Temperature 0 says the same again; a temperature does not, and a tiny one is as good as none."""
    import torch

    from instil.evaluate.generate import Sampling, generate

    net = loaded(place / "m")
    greedy = generate(net, prompts, stop_ids=[2], sampling=Sampling(8))
    assert generate(net, prompts, stop_ids=[2], sampling=Sampling(8)) == greedy
    torch.manual_seed(1)
    assert generate(net, prompts, stop_ids=[2], sampling=Sampling(8, temperature=2.0)) != greedy
    assert generate(net, prompts, stop_ids=[2], sampling=Sampling(8, temperature=1e-4)) == greedy


def test_the_longest_answer_does_not_depend_on_the_temperature(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Twice the longest expected answer, sampled or not; what --max-tokens says; 256 where nothing is expected."""
    from instil import measure
    from instil.evaluate.generate import Sampling, generate

    made: list[int | None] = []

    def spy(net: Any, prompts: Any, *, sampling: Sampling, **options: Any) -> list[list[int]]:
        made.append(sampling.max_tokens)
        return [[] for _ in prompts]

    monkeypatch.setattr(measure, "generate", spy)
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("say", " ".join(tiny.WORDS))])
    (example,) = instil.examples([str(file)], str(place / "m"))
    for more in ([], ["--temperature", "0.5"], ["--max-tokens", "7", "--temperature", "0.5"]):
        assert tiny.command("evaluate", place / "m", "--data", file, *more).code == 0
    assert made == [2 * len(example.answer_tokens)] * 2 + [7]
    (answer,) = generate(loaded(place / "m"), [example.prompt_tokens], stop_ids=[], sampling=Sampling())
    assert len(answer) == 256
