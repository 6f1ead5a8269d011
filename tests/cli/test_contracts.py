"""What is promised to scripts: JSON alone on stdout with the agreed keys, and a run folder that others can use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny

QUESTIONS = {"say red 0": "blue", "say green 1": "gold", "say blue 2": "lime", "say black 3": "rose"}
LEARN = (*tiny.FAST, "data.heldout=0", "train.lr=1e-2", "train.schedule=constant", "train.epochs=60",
         "train.batch_examples=4")  # fmt: skip
ROWS = {"rows", "used_rows", "dropped_rows", "train_rows", "heldout_rows", "examples", "prompt_tokens",
        "answer_tokens", "cut_tokens", "dropped_tokens", "dropped_by_rule"}  # fmt: skip
CERTIFICATE = {"examples", "checked", "by_edit", "by_rendering", "as_given", "by_library", "prompt_tokens",
               "answer_tokens", "target_tokens", "target_kinds", "weight_sum", "terminator", "terminators",
               "lossy_texts", "template_sha256", "tokenizer_sha256", "data_sha256", "uses_date", "notes"}  # fmt: skip


def train(model: Path, data: Path, folder: Path, *words: object) -> dict[str, Any]:
    """A run at `folder`; returns the one JSON document on stdout."""
    where = (f"run.dir={folder.parent}", f"run.name={folder.name}")
    said = tiny.command("train", "--model", model, "--data", data, "--json", *words, *where)
    assert said.code == 0, said.err
    return json.loads(said.out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, runs: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run with held-out rows, and what --json printed."""
    out = train(model, data, runs / "plain", *tiny.FAST, "data.heldout=0.1", "train.lr=1e-2", "train.epochs=3")
    return runs / "plain", out


@pytest.fixture(scope="module")
def memorised(model: Path, runs: Path) -> tuple[Path, Any]:
    """A run that has learnt four answers by heart, and the logits of its model as they were when training ended."""
    import torch

    from instil import run as story
    from instil.model.attention import attention

    data = tiny.write_rows(runs / "four.jsonl", [tiny.row(q, a) for q, a in QUESTIONS.items()])
    export, logits = story.export_model, []

    def spy(net: Any, *args: Any, **named: Any) -> None:
        with torch.no_grad(), attention(net, "eager"):
            logits.append(net(input_ids=torch.arange(3, 40)[None], use_cache=False).logits[0])
        export(net, *args, **named)

    story.export_model = spy
    try:
        train(model, data, runs / "memorised", *LEARN)
    finally:
        story.export_model = export
    return runs / "memorised", logits[0]


# ── --json ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_json_is_one_document(model: Path, data: Path) -> None:
    """`check --json` prints the contract's document, and the sums are those of the rows."""
    said = tiny.command("check", data, "--model", model, "--json")
    found = json.loads(said.out)
    assert said.code == 0
    assert said.err == []
    assert found.keys() == {"ok", "rows", "examples", "problems", "tokens", "certificate"}
    assert found["tokens"].keys() == {"prompt", "answer", "cut", "dropped"}
    assert (found["ok"], found["rows"], found["examples"], found["problems"]) == (True, 40, 40, [])
    certificate = found["certificate"]
    assert certificate.keys() >= CERTIFICATE | {"account", "recognised", "dropped_rows"}
    ending = {"text": "<|im_end|>", "id": 2, "ids": [2], "source": "the template writes it at the end of the turn"}
    assert (certificate["terminator"], certificate["terminators"]) == (ending, [ending])
    assert (certificate["examples"], certificate["checked"], certificate["by_edit"]) == (40, 40, 40)
    assert certificate["target_tokens"] == found["tokens"]["answer"] == sum(certificate["target_kinds"].values())
    assert certificate["target_kinds"]["terminator"] == 40
    examples = [json.loads(line) for line in tiny.command("inspect", data, "--model", model, "--json").out.splitlines()]
    assert found["tokens"]["prompt"] == sum(len(e["prompt_tokens"]) for e in examples)
    assert found["tokens"]["answer"] == sum(len(e["answer_tokens"]) for e in examples)


def test_check_json_holds_the_problems_and_stdout_nothing_else(model: Path, tmp_path: Path) -> None:
    """Not ok: the same document with each problem's origin, rule and detail; people's lines go to stderr; exit 3."""
    rows = tiny.some_rows(3)
    rows[1]["messages"][1]["role"] = "bot"
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    said = tiny.command("check", file, "--model", model, "--json")
    found = json.loads(said.out)
    assert said.code == 3
    assert found["ok"] is False
    assert [p.keys() for p in found["problems"]] == [{"origin", "rule", "detail"}]
    assert found["problems"][0]["origin"].startswith(f"{file}:2")
    assert found["problems"][0]["rule"] == "role"
    assert "did you mean 'assistant'?" in found["problems"][0]["detail"]
    assert len(said.err) == 1


def test_inspect_json_gives_the_tokens_of_the_model_s_own_template(model: Path, tmp_path: Path) -> None:
    """JSON lines, one an example, whose prompt is what transformers' apply_chat_template makes of the messages before."""
    from transformers import AutoTokenizer

    turns = [
        ("system", "be short"),
        ("user", "say ä red"),
        ("assistant", "gold"),
        ("user", "more"),
        ("assistant", "no"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    file = tiny.write_rows(tmp_path / "a.jsonl", [{"messages": messages}])
    said = tiny.command("inspect", file, "--model", model, "--json")
    found = [json.loads(line) for line in said.out.splitlines()]
    assert said.code == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    for example, at in zip(found, (2, 4), strict=True):
        assert example.keys() == {
            "origin", "turn", "prompt_tokens", "answer_tokens", "weights", "prompt_text", "answer_text"
        }  # fmt: skip
        expected = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, return_dict=True)
        assert example["prompt_tokens"] == expected["input_ids"]
        assert example["prompt_text"] == tokenizer.apply_chat_template(
            messages[:at], add_generation_prompt=True, tokenize=False
        )
        assert example["answer_text"] == f"{messages[at]['content']}<|im_end|>"
        assert example["answer_tokens"] == tokenizer(example["answer_text"], add_special_tokens=False)["input_ids"]
        assert example["weights"] == [1.0] * len(example["answer_tokens"])
    assert [e["turn"] for e in found] == [0, 1]
    assert {e["origin"] for e in found} == {f"{file}:1"}


def test_inspect_shows_the_rows_that_were_asked_for(model: Path, data: Path) -> None:
    """--rows A:B counts from 0; without --json three rows are shown."""
    said = tiny.command("inspect", data, "--model", model, "--json", "--rows", "5:7")
    assert [json.loads(line)["origin"] for line in said.out.splitlines()] == [f"{data}:6", f"{data}:7"]
    shown = tiny.command("inspect", data, "--model", model).out
    assert [f"{data}:{i}," in shown.replace("\n", "") for i in (1, 2, 3, 4)] == [True, True, True, False]


def test_train_json_is_the_summary(plain: tuple[Path, dict[str, Any]]) -> None:
    """`train --json` prints summary.json with the run's folder, and nothing else on stdout."""
    run, out = plain
    assert out == {"run": str(run), **json.loads((run / "summary.json").read_text())}
    assert out.keys() >= {
        "steps", "epochs", "loss_before", "loss_after", "target_tokens", "computed_tokens", "target_tokens_per_s",
        "computed_tokens_per_s", "train_seconds", "seconds", "peak_memory_bytes", "rows",
    }  # fmt: skip
    assert out["rows"].keys() == ROWS
    assert out["loss_after"] < out["loss_before"]


def test_evaluate_json_is_one_document(plain: tuple[Path, dict[str, Any]]) -> None:
    """`evaluate --json` prints the loss and the scores; with --base both, and the tuned one is better."""
    run, summary = plain
    said = tiny.command("evaluate", run, "--json", "--max-tokens", 4)
    found = json.loads(said.out)
    assert said.code == 0
    keys = {"model", "examples", "target_tokens", "loss", "accuracy", "tasks", "answers", "seconds"}
    assert found.keys() == keys
    assert found["examples"] == 4  # a tenth of forty rows
    assert found["loss"] == pytest.approx(summary["loss_after"], rel=0.02)  # measured in bf16
    assert found["tasks"]["rows"].keys() >= {"rows", "exact_rows", "exact_share"}
    assert [a.keys() for a in found["answers"]] == [{"origin", "task", "expected", "answer", "exact"}] * 4
    both = json.loads(tiny.command("evaluate", run, "--json", "--max-tokens", 4, "--base").out)
    assert both.keys() == {"base", "tuned"}
    assert both["base"].keys() == keys
    assert both["tuned"]["loss"] < both["base"]["loss"]
    assert both["base"]["loss"] == pytest.approx(summary["loss_before"], rel=0.02)


def test_people_get_a_table_and_the_next_command(plain: tuple[Path, dict[str, Any]], model: Path, data: Path) -> None:
    """Without --json the result is for people, and the end of a run says what to do next."""
    run, _ = plain
    said = tiny.command("evaluate", run, "--max-tokens", 4, "--base")
    assert "answer loss" in said.out
    assert "exactly right, of 4" in said.out
    again = tiny.command("train", run / "config.yaml")
    assert again.code == 0
    assert again.out == f"{run}\n"
    assert again.err[0] == f"{run} is finished already; --fresh starts it over"
    assert again.err[-1].startswith("next: instil chat ")


def test_no_row_drives_the_terminal(model: Path, tmp_path: Path) -> None:
    """Escape sequences and bidi overrides of a row are written out, and a terminal that is none gets no colours."""
    evil = "\x1b]8;;http://x\x07\x1b[31mred\u202e\u200b"
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row(evil, "red"), *tiny.some_rows(120)])
    shown = tiny.command("inspect", file, "--model", model)
    broken = tiny.write_rows(tmp_path / "b.jsonl", [{"messages": [{"role": evil, "content": "x"}]}])
    refused = tiny.command("check", broken, "--model", model)
    assert (shown.code, refused.code) == (0, 3)
    checked = tiny.command("check", file, "--model", model)
    assert checked.code == 0
    assert "note: " in checked.out  # that one row holds them
    for text in (shown.out, checked.out, refused.out, *refused.err):
        assert not {"\x1b", "\x07", "\u202e", "\u200b"} & set(text)
    assert r"\u202e" in shown.out


def test_version_and_help() -> None:
    """`--version` is one line; `--help` names every verb; both exit 0."""
    import instil

    assert tiny.command("--version").out == f"instil {instil.__version__}\n"
    said = tiny.command("--help")
    assert said.code == 0
    assert all(verb in said.out for verb in ("train", "evaluate", "chat", "inspect", "check"))
    for verb in ("train", "evaluate", "chat", "inspect", "check"):
        assert tiny.command(verb, "--help").code == 0


# ── the run folder ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_run_folder_holds_what_the_design_says(plain: tuple[Path, dict[str, Any]]) -> None:
    """Each file of the design, its own lock, its log, and nothing half-written."""
    run, _ = plain
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "manifest.json", "ledger.jsonl", "packs", "metrics.jsonl", "model", "summary.json",
        "report.html", "run.lock", "log.txt", "checkpoints",
    }  # fmt: skip
    assert not [path for path in tiny.tree(run) if "tmp" in path or "partial" in path or "trash" in path]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.keys() >= {
        "model", "tokenizer_sha256", "template_sha256", "data_sha256", "versions", "machine", "numerics"
    }  # fmt: skip


def test_the_data_s_digest_is_sha256_of_the_file(plain: tuple[Path, dict[str, Any]], data: Path) -> None:
    """The manifest's digests are what `sha256sum` prints."""
    import hashlib

    manifest = json.loads((plain[0] / "manifest.json").read_text())
    assert manifest["data_sha256"] == {str(data): hashlib.sha256(data.read_bytes()).hexdigest()}
    assert manifest["template_sha256"] == hashlib.sha256(tiny.CHATML.encode()).hexdigest()


def test_every_step_has_a_line_of_metrics(plain: tuple[Path, dict[str, Any]]) -> None:
    """The agreed keys, steps without gap, and sums equal to the summary's."""
    run, summary = plain
    records = tiny.metrics_of(run)
    assert [r["step"] for r in records] == list(range(1, summary["steps"] + 1))
    for record in records:
        assert record.keys() >= {
            "step", "loss", "lr", "grad_norm", "target_tokens", "computed_tokens", "seconds"
        }  # fmt: skip
    assert sum(r["target_tokens"] for r in records) == summary["target_tokens"]
    assert sum(r["computed_tokens"] for r in records) == summary["computed_tokens"]
    assert records[-1]["heldout_loss"] == summary["loss_after"]


def test_one_epoch_learns_every_answer_token_once(plain: tuple[Path, dict[str, Any]], model: Path, data: Path) -> None:
    """target_tokens of an epoch = the answer tokens of the training rows, counted from `inspect` by origin."""
    run, summary = plain
    ledger = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    trained = {entry["origin"] for entry in ledger if entry["side"] == "train"}
    assert len(trained) == 36
    examples = [json.loads(line) for line in tiny.command("inspect", data, "--model", model, "--json").out.splitlines()]
    expected = sum(len(e["answer_tokens"]) for e in examples if e["origin"] in trained)
    assert summary["target_tokens"] == 3 * expected


def test_the_summary_is_written_when_the_model_is_there(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever sees summary.json may use the model: all but the page, which is made from the folder, is there before."""
    from instil import run as story

    seen: list[set[str]] = []
    write = story.write_json

    def spy(path: Path, value: Any) -> None:
        if path.name == "summary.json":
            seen.append({child.name for child in path.parent.iterdir()})
        write(path, value)

    monkeypatch.setattr(story, "write_json", spy)
    train(model, data, tmp_path / "x", *tiny.FAST, "train.steps=1")
    assert len(seen) == 1
    assert seen[0] >= {"config.yaml", "manifest.json", "ledger.jsonl", "packs", "metrics.jsonl", "model"}
    assert "summary.json" not in seen[0]


def test_a_run_s_configuration_makes_the_same_run_again(plain: tuple[Path, dict[str, Any]], data: Path) -> None:
    """config.yaml under another name: the same metrics and a bit-identical model."""
    run, _ = plain
    said = tiny.command("train", run / "config.yaml", "run.name=again")
    assert said.code == 0
    again = run.with_name("again")
    assert tiny.same(again / "model" / "model.safetensors", run / "model" / "model.safetensors")
    assert tiny.without_times(tiny.metrics_of(again)) == tiny.without_times(tiny.metrics_of(run))
    mine, other = ((folder / "config.yaml").read_text().splitlines() for folder in (again, run))
    assert [(a.split("#")[0].strip(), b.split("#")[0].strip()) for a, b in zip(mine, other, strict=True) if a != b] == [
        ("name: again", "name: plain")
    ]


# ── model/ ───────────────────────────────────────────────────────────────────────────────────────────────────────────

FRESH = """
import sys, json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, question = sys.argv[1:]
net = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                    return_dict=True, return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = net(input_ids=torch.arange(3, 40)[None]).logits[0]
    made = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)[0]
print(json.dumps({"logits": logits.tolist(), "prompt": tokenizer.decode(ids[0]), "eos": net.generation_config.eos_token_id,
                  "answer": tokenizer.decode(made[ids.shape[1]:]), "instil": "instil" in sys.modules}))
"""


def test_the_model_loads_in_a_fresh_process(memorised: tuple[Path, Any]) -> None:
    """With transformers alone: the logits of the trained model, its template, and an answer that stops where taught."""
    import torch

    run, logits = memorised
    question, answer = next(iter(QUESTIONS.items()))
    words = [sys.executable, "-W", "error", "-c", FRESH, str(run / "model"), question]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["instil"] is False
    assert torch.allclose(torch.tensor(found["logits"]), logits, rtol=1e-5, atol=1e-5)
    assert found["prompt"] == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert 2 in found["eos"]
    assert found["answer"] == f"{answer}<|im_end|>"


def test_generation_stops_where_training_taught_it_to(memorised: tuple[Path, Any]) -> None:
    """The terminator comes first among the eos ids of generation_config.json; the model's own stays."""
    config = json.loads((memorised[0] / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2, 0]


def test_the_template_given_is_the_template_kept(model: Path, data: Path, tmp_path: Path) -> None:
    """model/ has the template that was trained with, and the tokenizer's files byte by byte."""
    template = tmp_path / "t.jinja"
    template.write_text(tiny.CHATML.replace("assistant\n", "assistant:\n").replace("{{ message.role }}\n",
                        "{{ message.role }}{{ ':' if message.role == 'assistant' }}\n"))  # fmt: skip
    train(model, data, tmp_path / "x", *tiny.FAST, "train.steps=1", "--template", template)
    kept = tmp_path / "x" / "model"
    assert tiny.same(kept / "chat_template.jinja", template)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert tiny.same(kept / name, model / name)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_an_adapter_is_peft_s_and_equals_the_merged_model(model: Path, data: Path, tmp_path: Path) -> None:
    """LoRA: adapter/ loads through peft on the base that its config names, and gives the logits of model/."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    train(model, data, tmp_path / "x", *tiny.FAST, "adapter.rank=4", "train.lr=1e-2", "train.steps=8")
    adapter = tmp_path / "x" / "adapter"
    assert {f.name for f in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == (str(model), 4, 8)
    probe = torch.arange(3, 40)[None]
    with torch.no_grad():
        through_peft = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()(probe).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "model").eval()(probe).logits
        base = AutoModelForCausalLM.from_pretrained(model).eval()(probe).logits
    assert torch.allclose(through_peft, merged, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 0.1  # the detector would see an adapter that does nothing


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chat_answers_as_taught(memorised: tuple[Path, Any]) -> None:
    """A message in, the memorised answer out, without its control token; /new forgets; an empty line ends."""
    first, second = list(QUESTIONS.items())[:2]
    said = tiny.command("chat", memorised[0], text=f"{first[0]}\n/new\n{second[0]}\n\nnever read\n")
    assert said.code == 0
    assert said.out.splitlines() == [first[1], second[1]]


def test_chat_shows_the_base_beside_the_tuned(memorised: tuple[Path, Any]) -> None:
    """--base: the same message to both, each answer marked."""
    question, answer = next(iter(QUESTIONS.items()))
    said = tiny.command("chat", memorised[0], "--base", "--max-tokens", 6, text=f"{question}\n")
    assert said.code == 0
    assert "[base] " in said.out
    assert said.out.splitlines()[-1] == f"[tuned] {answer}"
    assert f"[base] {answer}" not in said.out


ENDS_IN_WORDS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n###\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_an_end_of_several_tokens_ends_answers_too(tmp_path: Path) -> None:
    """Where the template ends a turn with words, the model learns them, and no one sees them: chat, scores, stop strings."""
    model = tiny.write_model(tmp_path / "m", template=ENDS_IN_WORDS)
    data = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row(q, a) for q, a in QUESTIONS.items()])
    train(model, data, tmp_path / "x", *LEARN)
    config = json.loads((tmp_path / "x" / "model" / "generation_config.json").read_text())
    assert (config["stop_strings"], config["eos_token_id"]) == (["\n###"], [0])
    (first, one), (second, two) = list(QUESTIONS.items())[:2]
    said = tiny.command("chat", tmp_path / "x", text=f"{first}\n/new\n{second}\n")
    assert said.out.splitlines() == [one, two]
    found = json.loads(tiny.command("evaluate", tmp_path / "x", "--data", data, "--json").out)
    assert [(a["expected"], a["answer"], a["exact"]) for a in found["answers"]] == [
        (a, a, True) for a in QUESTIONS.values()
    ]
