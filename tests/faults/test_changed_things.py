"""What may change while a run is stopped, and what may not: every setting, the data, the model; each with the way out."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stories
import tiny
from instil.config import HARMLESS, UNFORKABLE, keys, load_config

DOCS = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
LORA = "adapter.rank=4"  # the other keys of an adapter mean nothing without one
DONE = 4  # steps of ten that are done when something changes

# Another valid value for every key. {place}: the folder of the test.
OTHER: dict[str, str] = {
    "model": "{place}/other", "template": "{place}/t.jinja", "data.train": "[{{path: {place}/a.jsonl, repeat: 2}}]",
    "data.heldout": "0.5", "data.heldout_most": "3", "data.mapping": "{{prompt: q, completion: a}}",
    "data.too_long": "error", "data.drop_most": "0.5", "data.strict": "true", "data.leak": "drop",
    "chat.control_text": "reject", "chat.terminator": "<|endoftext|>",
    "chat.template_args": "{{enable_thinking: true}}", "targets.turns": "last", "targets.loss_per": "example",
    "targets.answer": "0.5", "targets.reasoning": "0.5", "targets.tool_call": "0.5", "targets.terminator": "0.5",
    "pack.tokens": "99", "train.lr": "0.5", "train.epochs": "9", "train.steps": "9", "train.batch_tokens": "30",
    "train.batch_examples": "9", "train.schedule": "linear", "train.warmup": "0.5", "train.weight_decay": "0.5",
    "train.clip_norm": "0.5", "train.precision": "bf16", "train.compile": "true", "train.spikes": "skip",
    "train.seed": "5", "adapter.rank": "9", "adapter.alpha": "9.0", "adapter.targets": "[q_proj]",
    "evaluate.every_steps": "3", "evaluate.examples": "1", "checkpoint.every_steps": "3", "checkpoint.every_s": "0.001",
    "checkpoint.keep": "9", "run.dir": "{place}/there", "run.name": "y", "run.device": "cpu", "run.threads": "2",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a finished run `whole`, and a run `x` that was stopped after DONE steps; no test changes it."""
    place = tmp_path_factory.mktemp("changed")
    tiny.write_model(place / "m")
    tiny.write_model(place / "other", hidden_size=64)
    (place / "t.jinja").write_text("<|endoftext|>" + tiny.CHATML)
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(40))
    stories.finished(place, "data.heldout=0.1", name="whole")
    stories.stopped(place, DONE, "data.heldout=0.1")
    stories.stopped(place, DONE, "data.heldout=0.1", LORA, name="lora")
    return place


def go_on(base: Path, *settings: str, name: str = "x") -> tiny.Said:
    """The same command with some settings otherwise."""
    return stories.train(base, "data.heldout=0.1", *settings, name=name)


# ── every setting ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_key_has_another_value() -> None:
    """A new key needs an entry: it is walked by the tests below."""
    assert list(OTHER) == list(keys())


@pytest.mark.parametrize("key", [key for key in keys() if key not in HARMLESS])
def test_a_setting_that_shapes_the_run_is_refused(key: str, base: Path) -> None:
    """Exit 2 with the key, what the run has and what is given now, and both ways out; nothing has changed."""
    name = "lora" if key.startswith("adapter.") else "x"
    run = base / "runs" / name
    before = stories.contents(run, "log.txt")
    value = OTHER[key].format(place=base)
    more = [LORA] if name == "lora" else ["train.batch_examples=null"] if key == "train.batch_tokens" else []
    said = go_on(base, *more, f"{key}={value}", name=name)
    assert said.code == 2, said.err
    (line,) = [text for text in said.err if text.startswith(f"{key}: ")]
    recorded, now = (flat(load_config(run / "config.yaml", words))[key] for words in ([], [*more, f"{key}={value}"]))
    assert recorded != now
    assert line.startswith(f"{key}: the run in {run} has {recorded!r}, now {now!r}; ")
    assert "start over with --fresh" in line
    way = (
        f"`instil fork {run} NAME " if key not in UNFORKABLE else "begin another run with run.name=NAME (`instil fork` "
    )
    assert way in line
    assert stories.contents(run, "log.txt") == before


def flat(config: Any) -> dict[str, Any]:
    """A configuration's values by dotted key."""
    found = {}
    for key in keys():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        found[key] = [x if isinstance(x, str) else x.model_dump() for x in value] if key == "data.train" else value
    return found


@pytest.mark.parametrize("key", HARMLESS)
def test_a_harmless_setting_is_accepted(key: str, base: Path, tmp_path: Path) -> None:
    """Each may change in the middle; the final weights are those of the run in which nothing changed, to the bit."""
    value = OTHER[key].format(place=tmp_path)
    place, name = tmp_path / "here", "x"
    if key == "run.dir":
        place = Path(value)
    if key == "run.name":
        name = value
    shutil.copytree(base / "runs" / "x", place / name)
    said = go_on(base, f"run.dir={place}", f"run.name={name}", f"{key}={value}")
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err
    told = [line for line in said.err if "not the same to the bit" in line]
    assert [line for line in told if "threads 1 -> 2" in line] == (told if key == "run.threads" else [])
    if key == "run.threads":
        assert len(told) == 1
        return
    if key == "run.device" and _has_gpu():
        assert any("device cuda:0 -> cpu" in line for line in told)
        return
    mine, its = (folder / "model" / "model.safetensors" for folder in (place / name, base / "runs" / "whole"))
    assert tiny.same(mine, its)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_the_page_of_settings_names_the_harmless_ones() -> None:
    """docs/configuration.md lists exactly the keys that a resumed run may have otherwise."""
    (sentence,) = re.findall(r"When an unfinished run is resumed,(.*?)may have other values", DOCS, re.DOTALL)
    assert tuple(re.findall(r"`([a-z_.]+)`", sentence)) == HARMLESS


def test_the_fork_that_is_proposed_works(base: Path, tmp_path: Path) -> None:
    """The command of the message, with a name put in, as a shell would read it: exit 0, and the settings are the new ones."""
    place = tmp_path
    shutil.copytree(base / "runs" / "x", place / "x")
    said = go_on(
        base, f"run.dir={place}", "train.lr=0.5", "train.schedule=linear", "data.mapping={prompt: q, completion: a b}"
    )
    assert said.code == 2
    (command,) = re.findall(r"`instil (fork [^`]*)`", said.err[-1])
    forked = tiny.command(*shlex.split(command.replace("NAME", "z")))
    assert forked.code == 0, forked.err
    config = load_config(place / "z" / "config.yaml")
    assert (config.train.lr, config.train.schedule) == (0.5, "linear")
    assert config.data.mapping == {"prompt": "q", "completion": "a b"}


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def half(place: Path) -> Path:
    """A place with a run `x` that was stopped after DONE steps."""
    stories.stopped(place, DONE)
    return place


Rows = list[dict[str, Any]]


def edited(rows: Rows) -> Rows:
    return [*rows[:4], tiny.row("say what", "else"), *rows[5:]]


def appended(rows: Rows) -> Rows:
    return [*rows, tiny.row("one", "more"), tiny.row("two", "more")]


def reordered(rows: Rows) -> Rows:
    return [*rows[:8], rows[20], *rows[9:20], rows[8], *rows[21:]]


def last_gone(rows: Rows) -> Rows:
    return rows[:-2]


def middle_gone(rows: Rows) -> Rows:
    return [*rows[:6], *rows[7:]]


def weighed(rows: Rows) -> Rows:
    return [*rows[:11], rows[11] | {"weight": 0.5}, *rows[12:]]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (edited, "{file}:5 is the first row that differs"), (appended, "{file}:41 is new, 2 rows more"),
        (reordered, "{file}:9 is the first row that differs"), (last_gone, "{file}:39 is gone, as is all behind it"),
        (middle_gone, "{file}:7 is the first row that differs"),
        (weighed, "{file}:12 is the first row that differs"),
    ],
)  # fmt: skip
def test_changed_data_is_refused_with_the_first_row(change: Callable[[Rows], Rows], where: str, half: Path) -> None:
    """Exit 3, the file and the first row that is not what it was; with the old rows back, the run goes on."""
    file, run = half / "a.jsonl", half / "runs" / "x"
    old = file.read_bytes()
    before = stories.contents(run, "log.txt")
    tiny.write_rows(file, change(tiny.some_rows(40)))
    said = stories.train(half)
    assert said.code == 3, said.err
    (line,) = [text for text in said.err if text.startswith(f"{file}: has changed since the run in {run} began: ")]
    assert f"began: {where.format(file=file)}; put it back, start over with --fresh, or `instil fork " in line
    assert stories.contents(run, "log.txt") == before
    file.write_bytes(old)
    assert stories.train(half).code == 0


def test_rows_that_are_only_spelt_otherwise_are_told_so(half: Path) -> None:
    """Blanks between the values: other bytes, the same rows; exit 3 all the same, and it says which it is."""
    rows = tiny.some_rows(40)
    (half / "a.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    said = stories.train(half)
    assert said.code == 3
    assert "its rows are the same, only their spelling differs; put it back" in said.err[-1]


def test_data_that_became_unreadable_is_told_so(half: Path) -> None:
    """A file cut in the middle of a row: exit 3 with the row, as for a new run."""
    file = half / "a.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    said = stories.train(half)
    assert said.code == 3
    assert any(f"{file}:40" in line for line in said.err), said.err


def test_a_renamed_file_is_the_same_data(half: Path) -> None:
    """The configuration names the new path, the content is the old one: the run goes on, to the same bits."""
    whole = stories.finished(half, name="whole")
    (half / "a.jsonl").rename(half / "b.jsonl")
    said = stories.train(half, f"data.train=[{half / 'b.jsonl'}]")
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err
    assert stories.differing(half / "runs" / "x", whole) == []


def test_another_file_with_other_rows_is_another_setting(half: Path) -> None:
    """Exit 2 naming data.train, both files, and both ways out."""
    tiny.write_rows(half / "b.jsonl", edited(tiny.some_rows(40)))
    before = stories.contents(half / "runs" / "x", "log.txt")
    said = stories.train(half, f"data.train=[{half / 'b.jsonl'}]")
    assert said.code == 2, said.err
    assert said.err[-1].startswith("data.train: the run in ")
    assert all(
        text in said.err[-1] for text in (str(half / "a.jsonl"), str(half / "b.jsonl"), "--fresh", "instil fork")
    )
    assert stories.contents(half / "runs" / "x", "log.txt") == before


def test_files_that_come_and_go_in_a_folder_are_seen(place: Path) -> None:
    """The data is a glob: a new file, then one that is gone, each exit 3 by its name; as it was, the run goes on."""
    folder = place / "rows"
    folder.mkdir()
    rows = tiny.some_rows(60)
    for i in range(2):
        tiny.write_rows(folder / f"{i}.jsonl", rows[20 * i : 20 * i + 20])
    data = f"data.train=[{folder}/*.jsonl]"
    run = stories.stopped(place, DONE, data)
    tiny.write_rows(folder / "2.jsonl", rows[40:])
    said = stories.train(place, data)
    assert said.code == 3, said.err
    assert said.err[-1].startswith(f"{folder / '2.jsonl'}: is new since the run in {run} began; put it back")
    (folder / "2.jsonl").unlink()
    (folder / "1.jsonl").rename(place / "kept")
    said = stories.train(place, data)
    assert said.code == 3
    assert said.err[-1].startswith(f"{folder / '1.jsonl'}: is gone since the run in {run} began; put it back")
    (place / "kept").rename(folder / "1.jsonl")
    assert stories.train(place, data).code == 0


def test_changed_heldout_rows_are_refused(place: Path) -> None:
    """The file that is measured on is data as well: exit 3 with its first row that differs."""
    file = tiny.write_rows(place / "h.jsonl", [tiny.row(f"what {i}", "else") for i in range(4)])
    stories.stopped(place, DONE, f"data.heldout={file}")
    tiny.write_rows(file, [tiny.row(f"what {i}", "else" if i != 2 else "more") for i in range(4)])
    said = stories.train(place, f"data.heldout={file}")
    assert said.code == 3, said.err
    assert f"{file}:3 is the first row that differs" in said.err[-1]


# ── tokenizer, template, weights ─────────────────────────────────────────────────────────────────────────────────────


def other_weight(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = place / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"][7, 7] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def other_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "m" / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_weight, "model"), (other_text("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'), "model"),
        (other_text("chat_template.jinja", "\n", " \n"), "template"),
        (other_text("tokenizer.json", '"add_prefix_space": false', '"add_prefix_space": true'), "tokenizer"),
        (other_text("tokenizer_config.json", "256", "255"), "tokenizer"),
    ],
)  # fmt: skip
def test_a_changed_model_is_refused_by_its_part(change: Callable[[Path], None], what: str, half: Path) -> None:
    """One weight by a thousandth, one number, one blank: exit 4 naming which part it is, both hashes, the ways out."""
    run = half / "runs" / "x"
    before = stories.contents(run, "log.txt")
    change(half)
    said = stories.train(half)
    assert said.code == 4, said.err
    assert said.err[-1].startswith(f"{run}: the {what} has changed since the run began (")
    assert re.search(r"[0-9a-f]{12}\.\.\. -> [0-9a-f]{12}\.\.\.\)", said.err[-1])
    assert "--fresh" in said.err[-1]
    assert "instil fork" in said.err[-1]
    assert stories.contents(run, "log.txt") == before


def test_a_changed_template_file_is_refused(place: Path) -> None:
    """A file in place of the model's own template is compared by what it holds."""
    file = place / "t.jinja"
    file.write_text(tiny.CHATML)
    stories.stopped(place, DONE, f"template={file}")
    file.write_text("<|endoftext|>" + tiny.CHATML)
    said = stories.train(place, f"template={file}")
    assert said.code == 4
    assert "the template has changed since the run began" in said.err[-1]
    file.write_text(tiny.CHATML)
    assert stories.train(place, f"template={file}").code == 0
