"""The configuration: YAML 1.2, strict, all errors at once with their places, written out and read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.config import Config, SourceConfig, dump_config, flat, keys, load_config, nearest_key
from instil.errors import UsageError

LEAST = {"model": "m", "data.train": ["a.jsonl"]}


def loaded(text: str, folder: Path, *overrides: str) -> Config:
    """A file with model and data, and `text` below."""
    file = folder / "c.yaml"
    file.write_text("model: m\ndata: {train: a.jsonl}\n" + text, encoding="utf-8")
    return load_config(file, overrides)


def refusal(file: Path | None, *overrides: str, given: dict[str, Any] | None = None) -> list[str]:
    """The lines with which a configuration is refused."""
    with pytest.raises(UsageError) as refused:
        load_config(file, overrides, given)
    return refused.value.lines()


# ── YAML 1.2 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "0.00001", "1.0e-05", "+1e-5"])
def test_numbers_with_exponents_are_numbers(number: str, tmp_path: Path) -> None:
    """YAML 1.1 would read 1e-5 as text."""
    assert loaded(f"train: {{lr: {number}}}\n", tmp_path).train.lr == 0.00001
    assert load_config(None, [f"train.lr={number}"], LEAST).train.lr == 0.00001


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "y", "N"])
def test_words_are_words(word: str, tmp_path: Path) -> None:
    """YAML 1.1 would read `no` as false; here a run may be called no."""
    assert loaded(f"run: {{name: {word}}}\n", tmp_path).run.name == word
    assert load_config(None, [f"run.name={word}"], LEAST).run.name == word


@pytest.mark.parametrize("text", ["12:30:45", "0o14", "2024-01-02"])
def test_times_and_dates_that_are_text_stay_text(text: str, tmp_path: Path) -> None:
    """YAML 1.1 would read 12:30:45 as the number 45045; quotes keep what YAML 1.2 has a meaning for."""
    assert loaded(f"run: {{dir: '{text}'}}\n", tmp_path).run.dir == text
    assert loaded("run:\n  dir: 12:30:45\n", tmp_path).run.dir == "12:30:45"


def test_a_duplicate_key_is_an_error_with_its_line(tmp_path: Path) -> None:
    """Of two values for one key, neither is silently dropped."""
    file = tmp_path / "c.yaml"
    file.write_text("model: a\ndata:\n  train: x\nmodel: b\n")
    (line,) = refusal(file)
    assert line.startswith(f"{file}:4:1: ")
    assert "duplicate key" in line


@pytest.mark.parametrize(
    ("text", "place"),
    [("model: [a\n", ":2:1: "), ("train:\n\tlr: 1\n", ":2:1: "), ("a: b: c\n", ":1:"), ("a: 1\n---\nb: 2\n", ":")],
)
def test_broken_yaml_has_its_place(text: str, place: str, tmp_path: Path) -> None:
    """One line, with the line and column where reading stopped."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    (line,) = refusal(file)
    assert line.startswith(f"{file}{place}")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n", "model\n", "7\n"])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    """An empty file, a list, a word."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert refusal(file) == [f"{file}: is not a mapping of keys; write for instance `model: demo`"]


def test_no_python_comes_out_of_yaml(tmp_path: Path) -> None:
    """A tag that would make an object in other readers runs nothing here."""
    file = tmp_path / "c.yaml"
    marker = tmp_path / "ran"
    file.write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\ndata: {{train: a}}\n")
    refusal(file)
    assert not marker.exists()


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Latin-1 is not guessed at."""
    file = tmp_path / "c.yaml"
    file.write_bytes("model: é\n".encode("latin-1"))
    assert refusal(file) == [f"{file}: is not UTF-8 text; save it as UTF-8"]


# ── errors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_errors_come_at_once_with_their_places(tmp_path: Path) -> None:
    """Unknown keys, wrong types and values out of range of a file and of overrides, each at its own place."""
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\ndata: {train: a.jsonl}\ntrain:\n  lr: fast\n  # a comment\n  epochs: 0\nadaptor:\n  rank: 4\n"
    )
    lines = refusal(file, "train.seed=-1", "pack.tokns=5")
    assert [line.split(": ")[0] for line in sorted(lines)] == sorted(
        [f"{file}:4", f"{file}:6", f"{file}:8", "train.seed=-1", "pack.tokns=5"]
    )
    assert next(line for line in lines if "adaptor" in line).endswith("unknown key; did you mean adapter.rank?")


def test_a_share_that_is_none_is_told_what_a_share_is() -> None:
    """data.heldout takes a path or a share; of a number that is no share, the range is said, not that it is no path."""
    (line,) = refusal(None, "data.heldout=100", given=LEAST)
    assert line.startswith("data.heldout=100: 100: should be less than 1; data.heldout: file, or share")


def test_the_last_word_counts(tmp_path: Path) -> None:
    """Overrides win over the file, options of the command line over both."""
    config = loaded("train: {lr: 1, epochs: 1, seed: 1}\n", tmp_path, "train.lr=2", "train.epochs=2")
    assert (config.train.lr, config.train.epochs, config.train.seed) == (2, 2, 1)
    given = load_config(tmp_path / "c.yaml", ["train.lr=2"], {"train.lr": 3.0})
    assert given.train.lr == 3


def test_a_value_is_not_a_section() -> None:
    """`model.name=x` after `model=m`: a value has no parts."""
    (line,) = refusal(None, "model=m", "model.name=x")
    assert line.startswith("model.name=x: model is a value, not a section")


@pytest.mark.parametrize(
    "bad",
    ["train.lr=.inf", "train.lr=true", "train.epochs=1e9", "data.heldout=1", "data.heldout=-0.1", "run.threads=0",
     "adapter.rank=-1", "train.epochs=true", "train.lr='1'", "run.dir=1", "checkpoint.keep=0",
     "data.train=[]", "train.precision=fp16", "train.batch_tokens=0",
     "data.strict=yes", "data.too_long=cut", "data.drop_most=1.5", "data.leak=warn", "data.mapping=3",
     "chat.control_text=allow", "chat.terminator=''", "chat.template_args=[1]", "targets.terminator=0",
     "targets.answer=-1", "targets.loss_per=batch", "targets=lst", "targets=3",
     "data.train=[{path: a, repeat: 0}]", "data.train=[{path: a, weight: -1}]", "data.train=[{path: ''}]",
     "run.name=" + "x" * 65, "run.name=.x", "run.name='a b'", "model=''", "evaluate.every_steps=0"],
)  # fmt: skip
def test_values_out_of_range_are_refused(bad: str) -> None:
    """Each with the override as its place; true is no number, and a number no text."""
    (line,) = refusal(None, "model=m", "data.train=a.jsonl", bad)
    assert line.startswith(f"{bad}: "), line


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("learnig_rate", "train.lr"), ("train.learning_rate", "train.lr"), ("lr", "train.lr"), ("train.Ir", "train.lr"),
        ("train.epoch", "train.epochs"), ("epochs", "train.epochs"), ("num_train_epochs", "train.epochs"),
        ("max_steps", "train.steps"), ("per_device_train_batch_size", "train.batch_examples"),
        ("train.batch_size", "train.batch_examples"), ("lora_r", "adapter.rank"), ("lora_alpha", "adapter.alpha"),
        ("lora.rank", "adapter.rank"), ("max_length", "pack.tokens"), ("sequence_len", "pack.tokens"),
        ("model_name_or_path", "model"), ("base_model", "model"), ("datasets", "data.train"),
        ("data.trian", "data.train"), ("data.held_out", "data.heldout"), ("output_dir", "run.dir"),
        ("max_grad_norm", "train.clip_norm"), ("lr_scheduler_type", "train.schedule"),
        ("warmup_ratio", "train.warmup"), ("save_steps", "checkpoint.every_steps"),
        ("eval_steps", "evaluate.every_steps"), ("seed", "train.seed"), ("template", "template"),
        ("train_on_inputs", "targets.turns"), ("chat_template", "template"),
        ("chat_template_kwargs", "chat.template_args"), ("target.turn", "targets.turns"),
        ("train.wieght_decay", "train.weight_decay"), ("run.device_name", "run.device"),
    ],
)  # fmt: skip
def test_the_nearest_key_is_the_one_that_was_meant(written: str, meant: str) -> None:
    """Misspellings, and the names that other trainers use."""
    assert nearest_key(written, list(keys())) == meant


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_null_means_chosen_and_may_be_said() -> None:
    """What is null in the defaults may also be set to null."""
    open_keys = [
        key for key, value in flat(Config(model="m", data={"train": ["a"]}).model_dump()).items() if value is None
    ]
    assert {"train.lr", "train.epochs", "pack.tokens", "run.name"} <= set(open_keys)
    config = load_config(None, [f"{key}=null" for key in open_keys], LEAST)
    assert config == load_config(None, (), LEAST)


def test_one_path_is_a_list_of_one(tmp_path: Path) -> None:
    """data.train takes a path or a list of paths."""
    assert loaded("", tmp_path).data.train == ["a.jsonl"]
    assert load_config(None, ["data.train=[a.jsonl, b.jsonl]"], {"model": "m"}).data.train == ["a.jsonl", "b.jsonl"]


def test_a_source_may_be_more_than_a_path(tmp_path: Path) -> None:
    """A path and {path, ...} mix; one source alone needs no list; what is not said has its default."""
    config = load_config(
        None, ["data.train=[a, {path: b, repeat: 2, mapping: {text: t, split_at: x}}]"], {"model": "m"}
    )
    plain, other = config.data.train
    assert (plain, other) == ("a", SourceConfig(path="b", repeat=2, mapping={"text": "t", "split_at": "x"}))
    assert load_config(None, ["data.train={path: b, weight: 0.5}"], {"model": "m"}).data.train == [
        SourceConfig(path="b", weight=0.5)
    ]
    assert loaded("", tmp_path, "data.train=[{path: b}]").data.train == [SourceConfig(path="b")]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{path: a, reapet: 2}", "'reapet' is no key of a source; did you mean repeat?"),
        ("{repeat: 2}", "a source lacks 'path'; write for instance {path: FILE, repeat: 2}"),
        ("{path: a, mapping: x}", "'x': should be a valid dictionary; data.train: files, folders"),
        ("7", "7: should be a valid dictionary; data.train: files, folders"),
    ],
)
def test_a_wrong_source_is_named(source: str, says: str) -> None:
    """In our words: the override, what is wrong with it, what a source may hold."""
    (line,) = refusal(None, "model=m", f"data.train=[b, {source}]")
    assert line.startswith(f"data.train=[b, {source}]: {says}")


def test_targets_may_be_one_word(tmp_path: Path) -> None:
    """`targets=last` is targets.turns=last, wherever it stands, and leaves the other targets as they were said."""
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: {train: a.jsonl}\ntargets: last\n")
    said = [
        load_config(None, ["targets=last", "targets.answer=2"], LEAST),
        load_config(None, ["targets.answer=2", "targets=last"], LEAST),
        load_config(None, ["targets.answer=2"], LEAST | {"targets": "last"}),
        load_config(file, ["targets.answer=2"]),
        load_config(None, (), LEAST | {"targets.turns": "last", "targets.answer": 2}),
    ]
    assert [each.targets for each in said] == [said[-1].targets] * 5
    assert (said[0].targets.turns, said[0].targets.answer) == ("last", 2)
    file.write_text("model: m\ndata: {train: a.jsonl}\ntargets: lst\n")
    (line,) = refusal(file)
    assert line.startswith(f"{file}:3: targets: 'lst': should be 'all', 'last' or 'everything'")


def test_a_mapping_is_one_value() -> None:
    """data.mapping and chat.template_args hold the user's own names: any key is fine, and one may be set alone."""
    words = ["data.mapping={prompt: q}", "data.mapping.completion=a", "chat.template_args.enable_thinking=false"]
    config = load_config(None, words, LEAST)
    assert config.data.mapping == {"prompt": "q", "completion": "a"}
    assert config.chat.template_args == {"enable_thinking": False}
    assert flat(config.model_dump())["data.mapping"] == {"prompt": "q", "completion": "a"}


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | st.floats(-1e6, 1e6) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
SOURCES = st.fixed_dictionaries(
    {"path": WORDS},
    optional={
        "mapping": st.dictionaries(WORDS, WORDS, max_size=3),
        "repeat": st.floats(1e-6, 1000),
        "weight": st.none() | st.floats(1e-6, 1e6),
    },
)
CONFIGS = st.fixed_dictionaries(
    {"model": WORDS, "data.train": st.lists(WORDS | SOURCES, min_size=1, max_size=3)},
    optional={
        "template": WORDS,
        "data.heldout": st.one_of(WORDS, st.floats(0, 0.99)),
        "data.mapping": st.dictionaries(WORDS, JSON, max_size=3),
        "chat.template_args": st.dictionaries(WORDS, JSON, max_size=3),
        "chat.terminator": st.none() | WORDS,
        "targets": st.sampled_from(["all", "last", "everything"]),
        "train.lr": st.floats(1e-12, 10),
        "train.seed": st.integers(0, 2**63 - 1),
        "train.epochs": st.none() | st.integers(1, 1000),
        "train.schedule": st.sampled_from(["constant", "linear", "cosine"]),
        "adapter.targets": st.lists(WORDS, max_size=3),
        "checkpoint.every_s": st.floats(1e-9, 1e12),
        "run.dir": WORDS,
    },
).map(lambda values: values | {"adapter.rank": 4} if values.get("adapter.targets") else values)


@settings(deadline=None, max_examples=60)
@given(values=CONFIGS)
def test_a_configuration_written_out_reads_back_the_same(values: dict[str, Any], tmp_path_factory: Any) -> None:
    """dump_config, then load_config: equal for any text and any number, bit for bit."""
    config = load_config(None, (), values)
    file = tmp_path_factory.mktemp("c") / "c.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize(
    "text", ["no", "null", "1e-5", "0.5", "true", "~", "12:30", " a ", "a: b", "#x", "- y", "'", "é", "\xa0", "a..."]
)
def test_text_that_looks_like_something_else_stays_text(text: str, tmp_path: Path) -> None:
    """A folder called `null` and a file called `0.5` survive the way through config.yaml."""
    config = load_config(None, (), LEAST | {"run.dir": text, "template": text, "data.heldout": text})
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8")
    again = load_config(tmp_path / "c.yaml")
    assert (again.run.dir, again.template, again.data.heldout) == (text, text, text)


def test_every_key_is_written_out_with_its_description() -> None:
    """config.yaml explains itself: each key once, in order, each with a comment."""
    text = dump_config(load_config(None, (), LEAST))
    found, section = [], ""
    for line in text.splitlines():
        name = line.split(":")[0]
        if line.endswith(":"):
            section = f"{name}."
            continue
        assert "  # " in line
        found.append(f"{section}{name.strip()}" if name.startswith(" ") else name)
    assert found == list(keys())
