"""Memory that does not suffice: packs are halved and the batch stays what it was, or one line says what to make smaller."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import forked, words

import tiny
from instil.errors import MachineError
from instil.pack.loader import Loader
from instil.pack.plan import plan_steps
from instil.pack.prefixes import Prefixes
from instil.train import room
from instil.train.optim import MasterAdamW
from instil.train.room import Room, out_of_memory
from instil.train.step import step
from instil.types import Batch, Example, Pack

REFUSALS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."),
    lambda: MemoryError(),
]


class Allocator:
    """Refuses packs of more than so many tokens, after the forward pass when `late`; writes down what it was given."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int, how: Callable[[], BaseException] = REFUSALS[0]):
        self.most, self.how, self.late = most, how, False
        self.tried: list[int] = []
        self.learnt: list[Pack] = []
        self._real = room.learn
        patch.setattr(room, "learn", self)

    def __call__(self, net: Any, pack: Pack, weight_sum: float) -> Any:
        self.tried.append(len(pack.tokens))
        if len(pack.tokens) > self.most:
            if self.late:
                self._real(net, pack, weight_sum)  # gradients of the failed try must not remain
            raise self.how()
        self.learnt.append(pack)
        return self._real(net, pack, weight_sum)


@pytest.fixture
def examples(some_examples: Any) -> list[Example]:
    found: list[Example] = some_examples(24, weighted=True)
    return found


def batch_of(examples: list[Example], number: int = 0) -> Batch:
    prefixes = Prefixes.of(examples)
    return Loader(examples, prefixes, plan_steps(prefixes, 12, 120), seed=4).batch(number)


def gradients(net: Any, optimizer: MasterAdamW, batch: Batch, place: Room) -> tuple[float, dict[str, torch.Tensor]]:
    losses = place.learn(net, optimizer, batch)
    loss = float(torch.stack(losses).sum(0)[0]) / batch.weight_sum
    return loss, {name: master.grad.clone() for name, master in optimizer.masters.items() if master.grad is not None}


@pytest.mark.parametrize("how", REFUSALS, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("most", [80, 45, 25])
def test_halved_packs_are_the_same_step(
    most: int, late: bool, how: Callable[[], BaseException], tiny: Any, examples: list[Example], assert_same: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Loss and every gradient of a retried step are those of the unsplit one within 1e-6; the batch is the same."""
    net, batch = tiny("llama"), batch_of(examples)
    assert max(len(pack.tokens) for pack in batch.packs) > 80
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    expected = gradients(net, optimizer, batch, Room(examples))
    said: list[str] = []
    allocator = Allocator(monkeypatch, most, how)
    allocator.late = late
    found = gradients(net, optimizer, batch, Room(examples, say=said.append))
    assert_same(found, expected, tolerance=1e-6)
    last = max(i for i, tokens in enumerate(allocator.tried) if tokens > most)
    kept = allocator.learnt[-len(allocator.tried[last + 1 :]) :]
    assert max(len(pack.tokens) for pack in kept) <= most
    assert sorted(i for pack in kept for i in pack.examples) == sorted(i for pack in batch.packs for i in pack.examples)
    assert sum(len(pack.target) for pack in kept) == sum(len(pack.target) for pack in batch.packs)
    assert sum(float(pack.weight.sum()) for pack in kept) == pytest.approx(batch.weight_sum, rel=1e-12)
    assert said
    assert all("does not fit into memory" in line and "the batch stays the same" in line for line in said)


def test_a_lost_half_would_be_seen(
    tiny: Any, examples: list[Example], assert_same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: a split that leaves the last example out is not within 1e-6."""
    net, batch = tiny("llama"), batch_of(examples)
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    expected = gradients(net, optimizer, batch, Room(examples))
    Allocator(monkeypatch, 45)
    real = room.build_pack
    monkeypatch.setattr(room, "build_pack", lambda some, at, limit: real(some[:-1] or some, at[:-1] or at, limit))
    found = gradients(net, optimizer, batch, Room(examples))
    with pytest.raises(AssertionError):
        assert_same(found, expected, tolerance=1e-6)


def test_what_does_not_fit_is_remembered(tiny: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once for a size; later steps try no larger pack again."""
    net, said = tiny("llama"), []
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    allocator, place = Allocator(monkeypatch, 45), Room(examples, say=said.append)
    step(net, optimizer, batch_of(examples), lr=1e-3, clip_norm=1.0, room=place)
    lines = len(said)
    assert lines >= 1
    assert len(set(said)) == lines
    tried = len(allocator.tried)
    step(net, optimizer, batch_of(examples, 1), lr=1e-3, clip_norm=1.0, room=place)
    assert len(said) == lines
    assert max(allocator.tried[tried:]) <= 45


def test_an_example_that_does_not_fit_ends_the_step(
    tiny: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to halve: exit 5 with what to make smaller, no weight and no moment changed."""
    net = tiny("llama")
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    Allocator(monkeypatch, 3)
    with pytest.raises(
        MachineError, match=r"step 1: a pack of .* does not fit .*; use a smaller pack\.tokens"
    ) as caught:
        step(net, optimizer, batch_of(examples), lr=1e-3, clip_norm=1.0, room=Room(examples))
    assert caught.value.exit_code == 5
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert optimizer.state() == {}


def test_other_errors_are_not_of_memory(tiny: Any, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is not retried with smaller packs."""
    net = tiny("llama")
    allocator = Allocator(monkeypatch, 45, lambda: RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="multiplied"):
        step(net, MasterAdamW(net, dtype=torch.float32, weight_decay=0.0), batch_of(examples), lr=0.0, clip_norm=0.0,
             room=Room(examples))  # fmt: skip
    assert not out_of_memory(allocator.how())


@pytest.mark.parametrize("most", [90, 60])
def test_a_run_of_halved_packs(
    most: int, source: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step learns as many target tokens and examples as where memory suffices, and the losses are the same."""
    Allocator(monkeypatch, most)
    said = tiny.command(*words(source, tmp_path / "x", "train.epochs=1", "train.schedule=constant", "train.lr=1e-4"))
    monkeypatch.undo()
    assert said.code == 0, said.err
    straight = words(source, tmp_path / "y", "train.epochs=1", "train.schedule=constant", "train.lr=1e-4")
    assert tiny.command(*straight).code == 0
    ours, theirs = tiny.metrics_of(tmp_path / "x"), tiny.metrics_of(tmp_path / "y")
    for name in ("step", "target_tokens", "examples", "epoch", "lr"):
        assert [record[name] for record in ours] == [record[name] for record in theirs]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-5)
    assert [line for line in said.err if "halved, the batch stays the same" in line]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of the address space as Linux has them")
def test_an_address_space_that_is_too_small(source: Path, tmp_path: Path) -> None:
    """RLIMIT_AS: exit 5, the last line says what to make smaller, no traceback, and nothing of the run is left."""

    def limited() -> None:
        import resource

        from instil import run as story

        real = story.load_model

        def load(*arguments: Any, **more: Any) -> Any:
            net = real(*arguments, **more)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
            torch.empty(64 << 20)  # what a larger model would want
            return net

        story.load_model = load

    child = forked(words(source, tmp_path / "runs" / "x"), tmp_path / "said", before=limited)
    assert child.wait() == 5, child.lines()
    assert child.lines()[-1] == (
        "memory: not enough for this (0.268 GB more were asked for); use a smaller pack.tokens or model, or "
        "adapter.rank; `instil plan` says what a run needs"
    )
    assert "Traceback" not in "\n".join(child.lines())
    assert not (tmp_path / "runs").exists()
