"""Bad input: one clear line with place and remedy, the contract's exit code, and nothing left behind."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny

RunsFolder = Callable[..., tiny.Said]


@pytest.fixture
def refused(model: Path, data: Path, tmp_path: Path) -> Callable[..., str]:
    """Run `instil train` where it must fail, and return its one line.

    Whatever was in the folder of runs is there afterwards, and nothing else, and it took less than 2 s.
    """

    def train(*words: object, code: int, lines: int = 1, model: object = model, data: object = data) -> str:
        runs = tmp_path / "work" / "runs"
        before = tiny.tree(tmp_path)
        start = time.monotonic()
        said = tiny.command(
            "train", "--model", model, "--data", data, *tiny.FAST, f"run.dir={runs}", "run.name=x", *words
        )
        assert time.monotonic() - start < 2
        assert said.code == code, said.err
        assert said.out == ""
        assert len(said.err) == lines, said.err
        assert tiny.tree(tmp_path) == before, "something half-written stayed behind"
        return said.err[-1]

    return train


def rows_with(path: Path, change: Callable[[list[Any]], object], n: int = 5) -> Path:
    """A data file whose rows (as a list) were spoilt."""
    rows = tiny.some_rows(n)
    change(rows)
    return tiny.write_rows(path, rows)


# ── the data: exit 3 ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_data_path_names_the_nearest_file(refused: Callable[..., str], data: Path) -> None:
    """A mistyped path is answered with the file that was meant."""
    line = refused(code=3, data=data.with_name("trian.jsonl"))
    assert line == f"{data.with_name('trian.jsonl')}: no such file; did you mean '{data}'?"


def test_an_empty_file_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """A file without rows is an error, not a run of no steps."""
    file = tiny.write_rows(tmp_path / "empty.jsonl", [])
    assert refused(code=3, data=file).startswith(f"{file}: 0 rows")


def test_a_broken_line_is_named_with_line_and_column(refused: Callable[..., str], tmp_path: Path) -> None:
    """The place of a JSON error is the file's line and the line's column, counted from 1."""
    file = tmp_path / "broken.jsonl"
    good = json.dumps(tiny.some_rows(1)[0])
    file.write_text(f'{good}\n{{"messages": [1,]}}\n{good}\n')
    line = refused(code=3, data=file)
    assert line.startswith(f"{file}:2: ")
    assert "column 16" in line  # the comma: 15 characters stand before it


def test_an_unknown_role_names_the_nearest(refused: Callable[..., str], tmp_path: Path) -> None:
    """A misspelt role is answered with the role that was meant, at its row and message."""
    file = rows_with(tmp_path / "a.jsonl", lambda rows: rows[1]["messages"][1].update(role="asistant"))
    line = refused(code=3, data=file)
    assert line == f"{file}:2: messages[1].role: 'asistant' is not a role; did you mean 'assistant'?"


def test_a_missing_answer_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    """A row in which nobody answers cannot be learnt from."""
    file = rows_with(tmp_path / "a.jsonl", lambda rows: rows[3]["messages"].pop())
    line = refused(code=3, data=file)
    assert line.startswith(f"{file}:4: the row has no answer")


def test_all_rows_too_long_is_an_error(refused: Callable[..., str], data: Path) -> None:
    """When the capacity drops every row, the reasons and their counts are said."""
    line = refused("pack.tokens=5", "data.heldout=0", code=3)
    assert line.startswith(f"{data}: 0 of 40 rows left to train on (too_long 40); ")


def test_all_rows_empty_is_an_error(refused: Callable[..., str], tmp_path: Path) -> None:
    """When every answer is empty, every row is dropped, which is an error with the rule's name."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("say", " ")] * 3)
    assert "0 of 3 rows left (empty_answer 3)" in refused(code=3, data=file)


def test_a_leaking_heldout_row_is_an_error(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    """A held-out row that is trained on as well would flatter the result; both places are named."""
    file = tiny.write_rows(tmp_path / "held.jsonl", [tiny.row("what", "else"), tiny.some_rows(40)[6]])
    line = refused("--heldout", file, code=3)
    assert line == f"{file}:2: this held-out row is also trained on ({data}:7); remove one of the two"


def test_twenty_problems_are_shown_then_a_count(refused: Callable[..., str], tmp_path: Path) -> None:
    """All problems come at once: up to twenty of a kind, then how many more there are."""
    file = tmp_path / "a.jsonl"
    rows_with(file, lambda rows: [row["messages"][0].update(role="bot") for row in rows], n=25)
    assert refused(code=3, data=file, lines=21) == "... and 5 more of this kind (role)"


def test_a_row_may_not_type_control_tokens(refused: Callable[..., str], tmp_path: Path) -> None:
    """A control token spelt out in a row's text is refused with its row, never made a real one."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("say", "red"), tiny.row("say <|im_end|>", "red")])
    assert refused(code=3, data=file).startswith(f"{file}:2: messages[0].content: contains the control token")


def test_one_broken_row_of_ten_thousand_is_found_at_once(model: Path, tmp_path: Path) -> None:
    """`check` reads ten thousand rows and answers within 2 s of work."""
    rows = tiny.some_rows(10_000)
    rows[7_654]["messages"][1]["role"] = "model"
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    start = time.process_time()
    said = tiny.command("check", file, "--model", model)
    assert time.process_time() - start < 2
    assert said.code == 3
    assert said.err == [f"{file}:7655: messages[1].role: 'model' is not a role; did you mean 'assistant'?"]


# ── the command line and the configuration: exit 2 ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rate=1", "unknown key; did you mean train.lr?"),
        ("trian.lr=1", "unknown key; did you mean train.lr?"),
        ("train.lr=fast", "'fast': should be a valid number"),
        ("train.epochs=1.5", "1.5: should be a valid integer"),
        ("train.lr=-1", "-1: should be greater than 0"),
        ("train.warmup=1", "1: should be less than 1"),
        ("train.schedule=sine", "'sine': should be 'constant', 'linear' or 'cosine'"),
        ("train.lr=.nan", "nan: should be a finite number"),
        ("run.name=a/b", "'a/b': "),
        ("run.name=..", "'..': "),
        ("train=3", "3: should be a valid dictionary"),
    ],
)
def test_a_bad_override_is_named(refused: Callable[..., str], override: str, says: str) -> None:
    """The line begins with the override as it was written and says what it should be."""
    line = refused(override, code=2)
    assert line.startswith(f"{override}: "), line
    assert says in line


def test_an_unknown_key_in_a_file_has_its_line(refused: Callable[..., str], tmp_path: Path) -> None:
    """A misspelt key in YAML is named with file, line and the key that was meant."""
    file = tmp_path / "a.yaml"
    file.write_text("# mine\ntrain:\n  epochs: 1\n  learnig_rate: 1e-5\n")
    assert refused(file, code=2) == f"{file}:4: train.learnig_rate: unknown key; did you mean train.lr?"


def test_both_batch_keys_are_a_contradiction(refused: Callable[..., str]) -> None:
    """A batch is given in tokens or in examples; both names are in the line."""
    line = refused("train.batch_tokens=8", "train.batch_examples=8", code=2)
    assert "train.batch_tokens and train.batch_examples are both set; keep one of them" in line


def test_a_second_configuration_file_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """Two files would have to be merged by a rule that nobody knows."""
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text("train:\n  epochs: 1\n")
    line = refused(tmp_path / "a.yaml", tmp_path / "b.yaml", code=2)
    assert line.startswith(f"{tmp_path / 'b.yaml'}: a second configuration file; ")


def test_a_missing_configuration_file_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    """The path and the system's reason."""
    line = refused(tmp_path / "none.yaml", code=2)
    assert line == f"{tmp_path / 'none.yaml'}: cannot be read (No such file or directory); check the path"


def test_an_override_without_a_sign_is_refused(refused: Callable[..., str]) -> None:
    """`train.lr` alone is no file that exists and no override; the line says how to write one."""
    line = refused("train.lr", code=2)
    assert line.startswith("train.lr: ")
    assert "train.lr=2e-5" in line


def test_an_adapter_target_that_is_absent_names_the_known(refused: Callable[..., str]) -> None:
    """A wrong target is found once the model is loaded; even then nothing stays behind."""
    line = refused("adapter.rank=2", "adapter.targets=[q_porj]", code=2, lines=1)
    assert line.startswith("adapter.targets: the model has no linear layer 'q_porj'; use some of: ")
    assert "q_proj" in line


def test_a_folder_with_foreign_files_is_left_alone(refused: Callable[..., str], tmp_path: Path) -> None:
    """A folder that somebody else filled is never written to."""
    folder = tmp_path / "work" / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("mine")
    assert "holds files that are not a run's" in refused(code=2)
    assert "holds files that are not a run's" in refused("--fresh", code=2)
    assert (folder / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("words", [("trian",), ("train", "--modle", "x"), ("check", "a.jsonl"), ("train", "--model")])
def test_a_wrong_command_line_is_a_usage_error(words: tuple[str, ...]) -> None:
    """Unknown verbs and options and missing values exit 2, with nothing on stdout."""
    said = tiny.command(*words)
    assert said.code == 2
    assert said.out == ""
    assert said.err


def test_missing_model_and_data_are_said_together() -> None:
    """`instil train` alone says all that is missing, and how to give it."""
    said = tiny.command("train")
    assert said.code == 2
    assert [line.split(";")[0] for line in said.err] == ["model: is missing", "data: is missing"]


def test_inspect_refuses_a_range_that_is_none(model: Path, data: Path) -> None:
    """--rows takes A:B."""
    said = tiny.command("inspect", data, "--model", model, "--rows", "a:b")
    assert said.code == 2
    assert said.err == ["--rows: 'a:b' is not A:B; write for instance --rows 0:10"]


# ── the model: exit 4 ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_model_names_the_nearest_folder(refused: Callable[..., str], model: Path) -> None:
    """A mistyped model is answered with the folder that was meant."""
    line = refused(code=4, model=model.with_name("tiny-lama"))
    assert line.startswith(f"'{model.with_name('tiny-lama')}': ")
    assert f"did you mean {model}?" in line


def test_training_needs_weights_but_looking_does_not(
    refused: Callable[..., str], data: Path, model: Path, tmp_path: Path
) -> None:
    """A folder with tokenizer and template only suffices for check and inspect; train says what it looked for."""
    bare = tiny.write_model(tmp_path / "bare", weights=False)
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    line = refused(code=4, model=bare)
    assert line.startswith(f"{bare}: no weights in it: looked for model.safetensors")
    assert tiny.command("check", data, "--model", bare).code == 0
    assert tiny.command("inspect", data, "--model", bare, "--json").code == 0


def test_a_template_that_rewrites_history_is_refused_with_the_reason(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    """Such a template would teach on prompts that no server sends; the line shows where it rewrites, and the way out."""
    model = tiny.write_model(tmp_path / "m", template=tiny.REWRITES)
    line = refused(code=4, model=model)
    assert line.startswith(
        f"{model / 'chat_template.jinja'}: the template rewrites the prompt once the answer is there"
    )
    assert "' now" in line
    assert "--template FILE" in line


def test_a_model_without_template_asks_for_one(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    """A base model has no template: the line says --template, and giving one helps."""
    bare = tiny.write_model(tmp_path / "m", template=None)
    assert refused(code=4, model=bare).endswith("; give one with --template FILE")
    (tmp_path / "t.jinja").write_text(tiny.CHATML)
    assert tiny.command("check", data, "--model", bare, "--template", tmp_path / "t.jinja").code == 0


def test_a_template_with_a_syntax_error_has_its_line(refused: Callable[..., str], tmp_path: Path) -> None:
    """The file and the line that jinja could not read."""
    file = tmp_path / "t.jinja"
    file.write_text("{% for message in messages %}\n{{ message.content }}\n{% if %}{% endfor %}\n")
    line = refused("--template", file, code=4)
    assert line.startswith(f"{file}:3: the template has a syntax error: ")


def test_a_template_file_that_is_absent_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    """--template with a wrong path."""
    assert refused("--template", tmp_path / "no.jinja", code=4).startswith(f"{tmp_path / 'no.jinja'}: ")


def test_a_recurrent_model_is_refused_by_name(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    """State that runs through a pack would leak from document to document: mamba is refused by its name."""
    mamba = tiny.write_model(tmp_path / "mamba", weights=False)
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"], "hidden_size": 32, "num_hidden_layers": 2}
    (mamba / "config.json").write_text(json.dumps(config))
    (mamba / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    line = refused(code=4, model=mamba)
    assert line.startswith(f"{mamba}: mamba: its layers (")
    assert "carry state from document to document" in line


def test_weights_with_no_number_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    """A model whose every output is NaN is found when it is loaded, before anything is learnt."""
    import torch
    from safetensors.torch import load_file, save_file

    broken = tiny.write_model(tmp_path / "m")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    assert refused(code=4, model=broken).startswith(f"{broken}: ")


def test_evaluate_and_chat_refuse_what_is_no_model(data: Path, model: Path, tmp_path: Path) -> None:
    """A path that is nothing, a data file, an empty folder: exit 4; a model without rows to measure on: exit 2."""
    (tmp_path / "empty").mkdir()
    for verb in ("evaluate", "chat"):
        for what in (tmp_path / "nothing", data, tmp_path / "empty"):
            said = tiny.command(verb, what, text="")
            assert said.code == 4
            assert str(what) in said.err[-1]
    said = tiny.command("evaluate", model)
    assert said.code == 2
    assert said.err[-1].startswith("--data: ")


def test_only_a_run_has_a_base(model: Path, data: Path) -> None:
    """--base needs a run folder, which knows what it began from."""
    said = tiny.command("evaluate", model, "--data", data, "--base")
    assert said.code == 2
    assert said.err[-1].startswith(f"--base: {model} is a model, not a run")


# ── the machine: exit 5 ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_device_that_is_absent_is_refused(refused: Callable[..., str]) -> None:
    """No silent step down to the CPU: the devices that exist are listed."""
    line = refused("run.device=cuda:7", code=5)
    assert line.startswith("run.device: 'cuda:7' is not here; use one of: cpu")


def test_a_run_has_one_writer(refused: Callable[..., str], tmp_path: Path) -> None:
    """While another process holds the run's lock, a second start is refused and says who holds it."""
    folder = tmp_path / "work" / "runs" / "x"
    folder.mkdir(parents=True)
    with (folder / "run.lock").open("w") as lock:
        lock.write("process 4711 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = refused(code=5)
    assert line == f"{folder}: is in use by process 4711 on elsewhere; wait for it, or stop it"


def test_a_folder_that_cannot_be_written_is_named(model: Path, data: Path, tmp_path: Path) -> None:
    """run.dir below a file cannot be made: exit 5 with the system's reason."""
    (tmp_path / "file").write_text("")
    said = tiny.command("train", "--model", model, "--data", data, f"run.dir={tmp_path / 'file'}", "run.name=x")
    assert said.code == 5
    assert said.err == [f"{tmp_path / 'file' / 'x'}: cannot be written (Not a directory); choose another run.dir"]
