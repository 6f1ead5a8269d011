"""Configurations and command lines that are wrong: exit 2, file:line: key, the value and what to do, nothing written."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from instil.config import Config, load_config
from instil.errors import UsageError
from instil.yamltext import MOST_BYTES, MOST_DEPTH, MOST_NODES

Refused = Callable[..., list[str]]
LEAST = "model: m\ndata: {train: a.jsonl}\n"
GIVEN = {"model": "m", "data.train": ["a.jsonl"]}


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Run `instil train` on a configuration file with this content and these words: its lines, and nothing is written."""
    (tmp_path / "a.jsonl").write_text("")

    def train(content: str | bytes = LEAST, *words: object, code: int = 2) -> list[str]:
        file = tmp_path / "c.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        before = tiny.tree(tmp_path)
        began = time.process_time()
        said = tiny.command("train", file, f"run.dir={tmp_path / 'runs'}", *words)
        assert time.process_time() - began < 2
        assert (said.code, said.out) == (code, ""), said
        assert tiny.tree(tmp_path) == before
        assert not any("Traceback" in line for line in said.err)
        return [line.replace(f"{file}", "c.yaml") for line in said.err]

    return train


def loaded(text: str | bytes, folder: Path, *overrides: str) -> Config:
    file = folder / "c.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(file, overrides)


# ── 65, 68: keys and values ──────────────────────────────────────────────────────────────────────────────────────────


def test_every_wrong_key_and_value_is_said_at_once_with_its_range(refused: Refused) -> None:
    """Six mistakes, six lines: each with file and line, the key, the value, and what it may be."""
    lines = refused(
        LEAST
        + "train:\n  lr: -1\n  batch_examples: 0\n  epochs: 1e9\n  warmup: 1\n  learnig_rate: 3\nadapter:\n  rank: x\n"
    )
    assert lines[:5] == [
        "c.yaml:4: train.lr: -1: should be greater than 0; train.lr: peak learning rate; null = 2e-5 full, 2e-4 LoRA "
        "(above 0 to 10)",
        "c.yaml:6: train.epochs: 1000000000.0: should be a valid integer; train.epochs: passes over the data; null = 1 "
        "above 10k examples, else 2 (from 1 to 1000)",
        "c.yaml:5: train.batch_examples: 0: should be greater than or equal to 1; train.batch_examples: examples a step, "
        "on average; null = 8 to 128 by data size (from 1)",
        "c.yaml:7: train.warmup: 1: should be less than 1; train.warmup: share of the steps in which the rate rises (from "
        "0 below 1)",
        "c.yaml:8: train.learnig_rate: unknown key; did you mean train.lr?",
    ]
    assert lines[5].startswith("c.yaml:10: adapter.rank: 'x': should be a valid integer; adapter.rank: LoRA rank")
    assert len(lines) == 6


@pytest.mark.parametrize("value", ["1000000000", "1001", "0", "-3"])
def test_epochs_out_of_range_are_refused(value: str, refused: Refused) -> None:
    """A whole number that is too large or too small, with the range."""
    (line,) = refused(LEAST, f"train.epochs={value}")
    assert line.startswith(f"train.epochs={value}: {value}: should be ")
    assert line.endswith("(from 1 to 1000)")


def test_a_value_of_a_megabyte_makes_no_line_of_a_megabyte(refused: Refused) -> None:
    """What is shown of a wrong value is cut."""
    (line,) = refused(LEAST + f"train:\n  lr: {'x' * 900_000}\n")
    assert len(line) < 500
    (line,) = refused(LEAST, f"train.lr={'x' * 90_000}")
    assert len(line) < 700


# ── 66: YAML 1.2 ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", ["no", "on", "12:30:45", "2024-01-02", "2024-01-02T03:04:05Z", "1_000", "NO"])
def test_what_only_older_yaml_has_a_meaning_for_is_text(text: str, tmp_path: Path) -> None:
    """`no` is no false, 12:30:45 no number, and a date no date: in a file, in an override, and inside of a value."""
    if text != "1_000":
        assert loaded(LEAST + f"run:\n  dir: {text}\n", tmp_path).run.dir == text
        assert load_config(None, [f"run.dir={text}"], GIVEN).run.dir == text
        args = load_config(None, [f"chat.template_args={{day: {text}, list: [{text}]}}"], GIVEN).chat.template_args
        assert args == {"day": text, "list": [text]}
    else:
        with pytest.raises(UsageError, match=r"run\.dir"):
            load_config(None, ["run.dir=7"], GIVEN)


def test_a_small_rate_is_a_number(tmp_path: Path) -> None:
    """PyYAML would give the text '1e-5'."""
    assert loaded(LEAST + "train: {lr: 1e-5}\n", tmp_path).train.lr == 0.00001


@pytest.mark.parametrize("key", ["train.seed", "train.lr"])
def test_a_number_of_thousands_of_digits_is_refused(key: str, refused: Refused) -> None:
    """Python reads no such number; it is said in one line."""
    (line,) = refused(LEAST, f"{key}={'1' * 5000}")
    assert line.startswith(f"{key}=111")
    assert "a number that is too long to be one" in line
    section, name = key.split(".")
    (line,) = refused(LEAST + f"{section}:\n  {name}: {'1' * 5000}\n")
    assert line == "c.yaml: a number that is too long to be one; mend the YAML"


# ── 67: what is not plain YAML ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        (LEAST + "model: b\n", "c.yaml:3:1", 'found duplicate key "model"'),
        (LEAST + "train: {lr: 1, lr: 2}\n", "c.yaml:3:16", 'found duplicate key "lr"'),
        (LEAST + "train:\n\tlr: 1\n", "c.yaml:4:1", "found character '\\t' that cannot start any token"),
        (LEAST + "---\nmodel: b\n", "c.yaml:3:1", "a second document begins here; keep one document"),
        ("%YAML 1.1\n---\n" + LEAST, "c.yaml:2:1", "a YAML directive; leave it out"),
        (LEAST + "run:\n  dir: !!str 7\n", "c.yaml:4:8", "the tag 'tag:yaml.org,2002:str' is not read"),
        (LEAST + "run: {dir: !secret x}\n", "c.yaml:3:12", "the tag '!secret' is not read: values are plain"),
        (LEAST + "train: !!map {lr: 1}\n", "c.yaml:3:8", "the tag 'tag:yaml.org,2002:map' is not read"),
        (LEAST + "a: !!python/object:os.system {}\n", "c.yaml:3:4", "python/object:os.system' is not read"),
        (LEAST + "a: !!binary aGk=\n", "c.yaml:3:4", "binary' is not read"),
        (LEAST + "a: &a {b: *a}\n", "c.yaml:3:11", "*a stands for nothing before it, or for itself"),
        (LEAST + "a: *b\n", "c.yaml:3:4", "*b stands for nothing before it"),
        (LEAST + "run: {dir: 'a\0b'}\n", "c.yaml:3:14", "a NUL character; save it as plain text"),
        (LEAST + "run: {dir: 'a\x07b'}\n", "c.yaml", "special characters are not allowed"),
        (LEAST + "train: [1, 2\n", "c.yaml:4:1", "expected ',' or ']'"),
        ("- model\n", "c.yaml", "is not a mapping of keys"),
    ],
)
def test_yaml_that_is_not_plain_is_refused_with_line_and_column(
    text: str, place: str, what: str, refused: Refused
) -> None:
    """Of two values none is dropped, of tags none is read, of documents there is one; the place is where it stands."""
    (line,) = refused(text)
    assert line.startswith(f"{place}: ")
    assert what in line


def test_no_program_comes_out_of_a_tag(refused: Refused, tmp_path: Path) -> None:
    """In a file and in an override; the marker that the program would leave is absent."""
    marker = tmp_path / "ran"
    program = f"!!python/object/apply:os.system ['touch {marker}']"
    (line,) = refused(LEAST + f"template: {program}\n")
    assert line.startswith("c.yaml:3:11: the tag ")
    (line,) = refused(LEAST, f"template={program}")
    assert line.startswith("template=!!python/object")
    assert "is not read" in line
    assert not marker.exists()


def laughs(levels: int, width: int = 9) -> str:
    """The billion laughs: each level a list of aliases of the one before."""
    lines = ["a0: &a0 [" + ", ".join(["lol"] * width) + "]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * width) + "]" for n in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("levels", [5, 10, 300])
def test_an_anchors_bomb_is_refused_at_once_and_takes_no_memory(levels: int, refused: Refused) -> None:
    """9^10 texts from a file of 500 bytes: counted, not made (9^300 as well)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = refused(LEAST + laughs(levels))
    assert f"more than {MOST_NODES:,} values up to here, with aliases (*name) written out; " in line
    assert line.startswith("c.yaml:7:" if levels == 5 else "c.yaml:")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000 or sys.platform == "darwin"


def test_a_few_aliases_are_fine_and_the_limit_is_where_it_is_said(tmp_path: Path) -> None:
    """An anchor used twice is a convenience; a list of as many values as the limit has one too many with the rest."""
    text = "model: m\ndata: {train: &files [a.jsonl, b.jsonl], heldout: c.jsonl}\nadapter: {rank: 2, targets: *files}\n"
    assert loaded(text, tmp_path).adapter.targets == ["a.jsonl", "b.jsonl"]
    # 1 mapping, `model`, `m`, `data`, 1 mapping, `train`, 1 list: seven values beside the list's own
    files = [f"f{n}" for n in range(MOST_NODES - 7)]
    assert len(loaded(f"model: m\ndata: {{train: [{', '.join(files)}]}}\n", tmp_path).data.train) == MOST_NODES - 7
    with pytest.raises(UsageError, match="more than 10,000 values"):
        loaded(f"model: m\ndata: {{train: [{', '.join([*files, 'one'])}]}}\n", tmp_path)


@pytest.mark.parametrize("depth", [MOST_DEPTH, 1000, 100_000])
def test_nesting_without_end_is_refused(depth: int, refused: Refused) -> None:
    """Lists in lists: no recursion breaks, in a file and in an override."""
    (line,) = refused(LEAST + f"chat:\n  template_args: {{a: {'[' * depth}{']' * depth}}}\n")
    assert line.startswith("c.yaml:4:")
    assert f"more than {MOST_DEPTH} levels" in line
    (line,) = refused(LEAST, f"chat.template_args={{a: {'[' * depth}{']' * depth}}}")
    assert f"more than {MOST_DEPTH} levels" in line


def test_a_file_of_ten_megabytes_is_refused_by_its_size(refused: Refused) -> None:
    """A data file given as the configuration, say: nothing of it is parsed."""
    (line,) = refused(LEAST + "# x\n" * 2_500_000)
    assert line.startswith(f"c.yaml: has 10,000,032 bytes, and a configuration has at most {MOST_BYTES:,}; ")


@pytest.mark.skipif(not Path("/dev/zero").exists() or not hasattr(os, "mkfifo"), reason="devices and pipes of Unix")
def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    """A device, a pipe without a writer, a folder: refused before they are opened."""
    os.mkfifo(tmp_path / "pipe.yaml")
    for path in (Path("/dev/zero"), tmp_path / "pipe.yaml", tmp_path):
        said = tiny.command("train", path)
        assert (said.code, len(said.err)) == (2, 1)
        assert said.err[0].startswith(f"{path}: cannot be read (")


def test_encodings(refused: Refused, tmp_path: Path) -> None:
    """A byte order mark and CRLF are fine; Latin-1 and UTF-16 are not UTF-8, and are not guessed at."""
    text = LEAST + "run:\n  dir: é\ntrain:\n  lr: 1e-5\n"
    for content in (b"\xef\xbb\xbf" + text.encode(), text.replace("\n", "\r\n").encode()):
        config = loaded(content, tmp_path)
        assert (config.model, config.run.dir, config.train.lr) == ("m", "é", 1e-5)
    (line,) = refused(text.replace("lr: 1e-5", "lr: -1").replace("\n", "\r\n"))
    assert line.startswith("c.yaml:6: train.lr: -1: ")
    for encoding in ("latin-1", "utf-16"):
        assert refused(text.encode(encoding)) == ["c.yaml: is not UTF-8 text; save it as UTF-8"]


# ── 69: contradictions ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "place", "keys"),
    [
        (
            "train:\n  batch_tokens: 8\n  batch_examples: 8\n",
            "c.yaml:4",
            ("train.batch_tokens", "train.batch_examples"),
        ),
        ("adapter:\n  alpha: 8\n", "c.yaml:4: adapter.alpha", ("adapter.alpha", "adapter.rank")),
        (
            "adapter:\n  rank: 0\n  targets: [q_proj]\n",
            "c.yaml:5: adapter.targets",
            ("adapter.targets", "adapter.rank"),
        ),
    ],
)
def test_keys_that_exclude_each_other_are_both_named(
    text: str, place: str, keys: tuple[str, str], refused: Refused
) -> None:
    """One of the two would be passed over in silence."""
    (line,) = refused(LEAST + text)
    assert line.startswith(f"{place}: ")
    assert all(key in line for key in keys)
    assert "; " in line


def test_a_limit_on_a_share_says_nothing_of_a_file(refused: Refused) -> None:
    """data.heldout_most with a held-out file would measure on more rows than were asked for."""
    (line,) = refused(LEAST, "data.heldout=b.jsonl", "data.heldout_most=5")
    assert line == (
        "data.heldout_most=5: data.heldout_most is 5, and data.heldout is a file, of which all rows are taken; leave it "
        "out, or shorten the file"
    )


def test_all_contradictions_come_at_once(refused: Refused) -> None:
    """Three pairs, three lines."""
    words = ("adapter.alpha=2", "adapter.targets=[q]", "train.batch_tokens=1", "train.batch_examples=1")
    assert len(refused(LEAST, *words)) == 3


@pytest.mark.parametrize(
    ("sources", "what"),
    [
        ("[{path: A, weight: 1}, B]", "has no weight, and other sources have one; give all sources a weight, or none"),
        ("[{path: A, weight: 1, repeat: 2}, {path: B, weight: 1}]", "has a weight and a repeat of 2"),
    ],
)
def test_weights_on_some_sources_only_are_refused(sources: str, what: str, place: Path) -> None:
    """Before a row is read; the source is named."""
    for name in ("A", "B"):
        tiny.write_rows(place / name, tiny.some_rows(4))
        sources = sources.replace(name, str(place / name))
    before = tiny.tree(place)
    words = ("train", "--model", place / "m", f"data.train={sources}", f"run.dir={place / 'runs'}", "run.name=x")
    said = tiny.command(*words)
    assert (said.code, len(said.err)) == (2, 1)
    assert said.err[0].startswith("data.train[")
    assert what in said.err[0]
    assert tiny.tree(place) == before


@pytest.mark.parametrize(
    "settings",
    [
        ("checkpoint.every_s=60", "checkpoint.every_steps=5"),  # docs: the clock counts where every_steps is 0
        ("train.epochs=2", "train.steps=5"),  # a cap
        ("data.heldout=0", "data.heldout_most=5"), ("data.heldout=0", "evaluate.every_steps=5"),
        ("train.schedule=constant", "train.warmup=0.1"), ("data.strict=true", "data.drop_most=0.5"),
        ("adapter.rank=0",), ("adapter.rank=4", "adapter.alpha=8", "adapter.targets=[q]"),
        ("train.batch_tokens=8", "train.batch_examples=null"),
    ],
)  # fmt: skip
def test_what_has_a_rule_is_no_contradiction(settings: tuple[str, ...]) -> None:
    """Pairs of keys of which the descriptions say how they go together."""
    config = load_config(None, settings, GIVEN)
    assert config.model == "m"


# ── 70: the environment ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_environment_configures_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There are no variables that override keys: a run means the same in every shell."""
    before = loaded(LEAST, tmp_path)
    names = ["MODEL", "TRAIN_LR", "TRAIN__LR", "train.lr", "LR", "RUN_DIR", "CONFIG", "SEED"]
    for name in names:
        monkeypatch.setenv(f"INSTIL_{name}", "7")
        monkeypatch.setenv(name, "7")
    assert loaded(LEAST, tmp_path) == before
    said = tiny.command("train")
    assert said.code == 2
    assert [line.split(":")[0] for line in said.err] == ["model", "data"]


# ── 72, 73: the command line ─────────────────────────────────────────────────────────────────────────────────────────


def words_of(said: tiny.Said) -> str:
    """stderr as one line of words, without the frame that is drawn around an error."""
    drawn = {ord(char): " " for char in set("".join(said.err)) if 0x2500 <= ord(char) < 0x2580}
    return " ".join(" ".join(said.err).translate(drawn).split())


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("trian",), "'train'"),
        (("chekc", "a.jsonl"), "'check'"),
        (("train", "--modle", "x"), "--model"),
        (("check", "a.jsonl", "--tempalte", "x"), "--template"),
        (("train", "--model"), "--model"),
        (("train", "--model", "a", "--model", "b"), "--model is given 2 times; give it once"),
        (("check", "a.jsonl", "--model", "a", "--json", "--json"), "--json is given 2 times; give it once"),
        (("train", "--fresh", "--no-fresh", "--model", "a"), "--fresh is given 2 times; give it once"),
    ],
)
def test_a_wrong_command_line_names_the_nearest_word(words: tuple[str, ...], what: str) -> None:
    """Unknown verbs and options, values that are missing, and options that are given twice: exit 2."""
    said = tiny.command(*words)
    assert (said.code, said.out) == (2, "")
    assert what in words_of(said)
    assert "Traceback" not in words_of(said)


def test_data_may_be_given_again(place: Path) -> None:
    """--data is a list: twice is two files."""
    tiny.write_rows(place / "b.jsonl", tiny.some_rows(60)[40:])
    said = tiny.command("train", "--model", place / "m", "--data", place / "a.jsonl", "--data", place / "b.jsonl",
                        *tiny.FAST, "train.steps=1", "data.heldout=0", f"run.dir={place / 'runs'}", "run.name=x")  # fmt: skip
    assert said.code == 0, said.err
    assert any("60 rows used" in line for line in said.err)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train.lr.x=1",), "train.lr.x=1: {'x': 1}: should be a valid number; train.lr: "),
        (("train.lr=1", "train.lr.x=1"), "train.lr.x=1: lr is a value, not a section; see docs/configuration.md"),
        (("model.name=x",), "model.name=x: model is a value, not a section; "),
        (("train.lr=[1, 2",), "train.lr=[1, 2: expected ',' or ']'"),
        (("train.lr={a: 1, a: 2}",), "train.lr={a: 1, a: 2}: "),
        (("train.lr=*x",), "train.lr=*x: *x stands for nothing before it"),
        (("train.lr=1\n---\n2",), "train.lr=1 --- 2: a second document begins here"),
        (("train.lr=",), ""),
        (("train.lr='1'",), "train.lr='1': '1': should be a valid number"),
        (("train.lr=a: b: c",), "train.lr=a: b: c: "),
    ],
)
def test_a_value_that_is_no_value_is_refused(words: tuple[str, ...], line: str, refused: Refused) -> None:
    """A part of a scalar, broken YAML, aliases of nothing: the line begins with the override. Nothing means null."""
    if line == "":
        assert load_config(None, words, GIVEN).train.lr is None
        return
    (found,) = refused(LEAST, *words)
    assert found.startswith(line), found


def test_a_refusal_is_lines_in_a_process_of_its_own(tmp_path: Path) -> None:
    """As a user sees it: no traceback, exit code 2, nothing on stdout."""
    (tmp_path / "c.yaml").write_text(LEAST + laughs(10))
    code = "import sys; from instil.cli.main import main; sys.argv[0] = 'instil'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(tmp_path / "c.yaml")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
