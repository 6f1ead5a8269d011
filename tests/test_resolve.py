"""What was left open is chosen, what was said stays; and a run that goes on keeps its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instil.config import HARMLESS, Config, dump_config, flat, keys, load_config
from instil.errors import UsageError
from instil.folder import RunFolder
from instil.pack.store import ExampleStore, write_examples
from instil.resolve import recorded, resolve, total_steps
from instil.types import Example

FITS = 512  # tokens of a pack that fits the machine


def config_of(**given: Any) -> Config:
    return load_config(None, (), {"model": "m", "data.train": ["a.jsonl"], **given})


@pytest.fixture
def store(tmp_path: Path) -> ExampleStore:
    """A hundred examples of 10 computed tokens: 6 of prompt, 5 of answer of which 4 count."""
    weights = np.array([0, 1, 1, 1, 1], np.float32)
    tokens = np.arange(6, dtype=np.int32)
    examples = [Example(tokens, tokens[:5], weights, f"a.jsonl:{i}", 0) for i in range(100)]
    write_examples(tmp_path / "train.arrow", examples)
    return ExampleStore(tmp_path / "train.arrow")


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_open_is_chosen(store: ExampleStore) -> None:
    """After resolving, only what has no value by nature is null: the cap on steps, the other way to give a batch.

    And what is tried on the model when there is one: train.compile."""
    full, _ = resolve(config_of(), store, FITS, "x")
    open_still = {key for key, value in flat(full.model_dump()).items() if value is None}
    assert open_still == {
        "template", "chat.terminator", "train.steps", "train.batch_tokens", "train.compile", "adapter.alpha",
        "run.threads",
    }  # fmt: skip
    assert (full.train.lr, full.train.epochs, full.train.batch_examples) == (2e-5, 2, 8)
    assert (full.pack.tokens, full.run.name) == (FITS, "x")


def test_an_adapter_has_its_own_defaults(store: ExampleStore) -> None:
    """LoRA: ten times the rate, and alpha twice the rank."""
    full, _ = resolve(config_of(**{"adapter.rank": 16}), store, FITS, "x")
    assert (full.train.lr, full.adapter.alpha) == (2e-4, 32)


def test_what_was_said_stays(store: ExampleStore) -> None:
    """No explicit value is changed, whatever the data."""
    said = {
        "train.lr": 3e-3, "train.epochs": 7, "train.batch_examples": 3, "pack.tokens": 20, "adapter.rank": 2,
        "adapter.alpha": 5.0, "evaluate.every_steps": 11, "train.steps": 9, "run.threads": 1,
    }  # fmt: skip
    full, plan = resolve(config_of(**said), store, FITS, "x")
    found = flat(full.model_dump())
    assert {key: found[key] for key in said} == said
    assert plan.capacity_tokens <= 20


def test_a_batch_in_tokens_becomes_steps(store: ExampleStore) -> None:
    """100 examples with 4 target tokens each, 40 target tokens a step: ten steps; 25 examples a step: four."""
    full, plan = resolve(config_of(**{"train.batch_tokens": 40}), store, FITS, "x")
    assert plan.steps_per_epoch == 10
    assert full.train.batch_examples is None
    _, plan = resolve(config_of(**{"train.batch_examples": 25}), store, FITS, "x")
    assert plan.steps_per_epoch == 4


def test_a_pack_holds_at_least_the_longest_example(store: ExampleStore) -> None:
    """When even the longest example does not fit the estimate, it is tried all the same."""
    full, _ = resolve(config_of(), store, 4, "x")
    assert full.pack.tokens == 10


def test_the_run_is_measured_four_times(store: ExampleStore) -> None:
    """Open evaluate.every_steps is a quarter of the run, also of a run that is capped or very short."""
    for given, every in (
        ({"train.batch_examples": 5}, 10), ({"train.batch_examples": 5, "train.steps": 12}, 3), ({"train.steps": 1}, 1)
    ):  # fmt: skip
        full, plan = resolve(config_of(**given), store, FITS, "x")
        assert full.evaluate.every_steps == every
        assert total_steps(full, plan) == (given.get("train.steps") or 40)


def test_resolving_twice_changes_nothing(store: ExampleStore) -> None:
    """config.yaml, resolved again on a machine that fits other packs, is itself."""
    once, plan = resolve(config_of(), store, FITS, "x")
    assert resolve(once, store, 7 * FITS, "y" if once.run.name is None else once.run.name) == (once, plan)


# ── going on ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_run_is_as_it_was_given(tmp_path: Path) -> None:
    """Without a record there is nothing to compare."""
    config = config_of(**{"train.lr": 1.0})
    assert recorded(config, RunFolder(tmp_path)) is config


def test_open_values_are_those_of_the_record(tmp_path: Path, store: ExampleStore) -> None:
    """What was chosen when the run began is not chosen again."""
    config = config_of(**{"train.epochs": 3})
    full, _ = resolve(config, store, FITS, "x")
    (tmp_path / "config.yaml").write_text(dump_config(full))
    assert recorded(config, RunFolder(tmp_path)) == full


OTHER = {
    "model": "other", "template": "t.jinja", "data.train": ["b.jsonl"], "data.heldout": 0.5, "data.heldout_most": 3,
    "data.mapping": {"prompt": "q", "completion": "a"}, "data.too_long": "error", "data.drop_most": 0.5,
    "data.strict": True, "data.leak": "drop", "chat.control_text": "reject", "chat.terminator": "</s>",
    "chat.template_args": {"enable_thinking": True}, "targets.turns": "last", "targets.loss_per": "example",
    "targets.answer": 0.5, "targets.reasoning": 0.5, "targets.tool_call": 0.5, "targets.terminator": 0.5,
    "pack.tokens": 99, "train.lr": 1.0, "train.epochs": 9, "train.steps": 9, "train.batch_examples": 9,
    "train.schedule": "linear", "train.warmup": 0.5, "train.weight_decay": 0.5, "train.clip_norm": 0.5,
    "train.precision": "fp32", "train.compile": True,
    "train.seed": 5, "train.spikes": "skip", "adapter.rank": 9, "adapter.alpha": 9.0, "adapter.targets": ["q_proj"],
    "evaluate.every_steps": 9, "evaluate.examples": 9, "checkpoint.every_steps": 9, "checkpoint.every_s": 9.0,
    "checkpoint.keep": 9, "run.dir": "there", "run.name": "y", "run.device": "cpu", "run.threads": 9,
}  # fmt: skip


BY_CONTENT = ("model", "template", "data.train")  # what they hold counts, not where it is (tests/faults)


@pytest.mark.parametrize("key", [key for key in keys() if key not in ("train.batch_tokens", *BY_CONTENT)])
def test_every_key_that_shapes_the_result_is_fixed(key: str, tmp_path: Path, store: ExampleStore) -> None:
    """Changed when a run goes on, each key is refused by name with both values, or is one of the harmless ones."""
    begun = {"adapter.rank": 2} if key in ("adapter.alpha", "adapter.targets") else {}  # they mean nothing without
    full, _ = resolve(config_of(**begun), store, FITS, "x")
    (tmp_path / "config.yaml").write_text(dump_config(full))
    config = load_config(None, (), {"model": "m", "data.train": ["a.jsonl"], **begun} | {key: OTHER[key]})
    if key in HARMLESS:
        assert flat(recorded(config, RunFolder(tmp_path)).model_dump())[key] == OTHER[key]
        return
    with pytest.raises(UsageError) as refused:
        recorded(config, RunFolder(tmp_path))
    (line,) = refused.value.lines()
    assert line.startswith(f"{key}: ")
    assert f"has {flat(full.model_dump())[key]!r}, now {OTHER[key]!r};" in line


def test_all_changes_are_named_at_once(tmp_path: Path, store: ExampleStore) -> None:
    """Two changed keys, two lines."""
    full, _ = resolve(config_of(), store, FITS, "x")
    (tmp_path / "config.yaml").write_text(dump_config(full))
    with pytest.raises(UsageError) as refused:
        recorded(config_of(**{"train.lr": 1.0, "train.seed": 2}), RunFolder(tmp_path))
    assert [line.split(":")[0] for line in refused.value.lines()] == ["train.lr", "train.seed"]
