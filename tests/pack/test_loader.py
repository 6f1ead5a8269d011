"""A run's position is one number: any step can be asked for, in any order, and is always the same batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from instil.pack.bins import shuffled
from instil.pack.loader import Loader
from instil.pack.plan import plan_steps
from instil.pack.prefixes import Prefixes
from instil.pack.store import ExampleStore, write_examples
from instil.types import Batch, Example


def loader(examples: Any, seed: int = 3, batch: float = 5) -> Loader:
    prefixes = Prefixes.of(examples)
    return Loader(examples, prefixes, plan_steps(prefixes, batch, 30), seed)


def content(batch: Batch) -> tuple[Any, ...]:
    """Everything in a batch, comparable."""
    fields = ("tokens", "positions", "reach", "at", "target", "weight", "owner")
    packs = tuple((*(getattr(p, f).tolist() for f in fields), p.examples) for p in batch.packs)
    return batch.step, batch.epoch, batch.weight_sum, packs


def test_any_order_of_steps_gives_the_batches_of_going_through(some_examples: Any) -> None:
    """Forwards, backwards across epochs, or a single step of a fresh loader."""
    examples = some_examples(40, weighted=True)
    steps = 3 * loader(examples).plan.steps_per_epoch
    forward, other = loader(examples), loader(examples)
    through = [content(forward.batch(k)) for k in range(steps)]
    for k in shuffled(steps, (0, 0)).tolist():
        assert content(other.batch(k)) == through[k]
    assert content(loader(examples).batch(steps - 1)) == through[-1]


def test_steps_count_through_the_epochs(some_examples: Any) -> None:
    """Step k is in epoch k // steps_per_epoch, and each epoch holds every example once."""
    run = loader(some_examples(40))
    n = run.plan.steps_per_epoch
    for epoch in range(3):
        batches = [run.batch(epoch * n + k) for k in range(n)]
        assert {b.epoch for b in batches} == {epoch}
        assert sorted(i for b in batches for p in b.packs for i in p.examples) == list(range(40))


def test_the_divisor_of_a_step_is_the_sum_of_its_answers_weights(some_examples: Any) -> None:
    """weight_sum is that of the examples in the batch, known before the first backward."""
    examples: list[Example] = some_examples(40, weighted=True)
    run = loader(examples)
    for k in range(run.plan.steps_per_epoch):
        batch = run.batch(k)
        inside = [examples[i] for p in batch.packs for i in p.examples]
        assert batch.weight_sum == pytest.approx(sum(float(w) for e in inside for w in e.weights), abs=1e-9)


def test_packs_hold_the_examples_they_name(some_examples: Any) -> None:
    """`examples` and `owner` are indices into the run's examples."""
    examples: list[Example] = some_examples(40)
    run = loader(examples)
    for pack in run.batch(1).packs:
        for i in pack.examples:
            assert pack.target[pack.owner == i].tolist() == examples[i].answer_tokens.tolist()


def test_another_seed_gives_another_order(some_examples: Any) -> None:
    """The seed reaches the batches."""
    examples = some_examples(40)
    assert content(loader(examples, seed=1).batch(0)) != content(loader(examples, seed=2).batch(0))


def test_a_store_on_disk_gives_the_batches_of_a_list_in_memory(tmp_path: Path, some_examples: Any) -> None:
    """Where the examples lie makes no difference."""
    examples = some_examples(40, weighted=True)
    write_examples(tmp_path / "train.arrow", examples)
    stored = ExampleStore(tmp_path / "train.arrow")
    memory, disk = loader(examples), Loader(stored, Prefixes.of(stored), loader(examples).plan, 3)
    for k in range(2 * memory.plan.steps_per_epoch):
        assert content(memory.batch(k)) == content(disk.batch(k))
