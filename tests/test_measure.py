"""A model measured on rows: known answers score as they must, and batching does not change what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import instil
import tiny
from instil.config import load_config
from instil.errors import DataError, UsageError

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


def test_the_loss_is_the_textbook_s(place: Path) -> None:
    """Nats per answer token: transformers' own logits of each row, one by one, in the same bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(place / "m", dtype=torch.bfloat16).eval()
    total, count = 0.0, 0
    for example in instil.examples([str(place / "four.jsonl")], str(place / "m")):
        tokens = torch.tensor([[*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]])
        with torch.no_grad():
            log_p = net(tokens).logits[0].float().log_softmax(-1)
        p = len(example.prompt_tokens)
        for j, target in enumerate(example.answer_tokens.tolist()):
            total -= float(log_p[p - 1 + j, target])
            count += 1
    found = instil.evaluate(str(place / "m"), str(place / "four.jsonl"))
    assert found.target_tokens == count
    assert found.loss == pytest.approx(total / count, rel=5e-3)


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
