"""A run that is stopped and resumed is the run that was never stopped, to the bit; it stops cleanly and says why."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instil.errors import DivergedError, Stopped
from instil.model.adapters import add_lora
from instil.pack.loader import Loader
from instil.pack.plan import plan_steps
from instil.pack.prefixes import Prefixes
from instil.train import checkpoint
from instil.train.loop import LoopPlan, Progress, Told, train
from instil.train.optim import MasterAdamW
from instil.train.schedule import learning_rate
from instil.types import Example

FP32, BF16 = torch.float32, torch.bfloat16
STEPS = 6


@dataclass
class Run:
    """Everything a process holds of a run."""

    net: Any
    optimizer: MasterAdamW
    loader: Loader
    plan: LoopPlan
    progress: Progress
    records: list[dict[str, Any]]

    def go(self, log: Callable[[dict[str, Any]], None] | None = None, **options: Any) -> Progress:
        def both(record: dict[str, Any]) -> None:
            self.records.append(record)
            if log:
                log(record)

        given = {"measure": None, "facts": {}} | options
        return train(self.net, self.optimizer, self.loader, self.plan, self.progress, tell=Told(both), **given)


@pytest.fixture
def begin(tiny: Any, some_examples: Any, tmp_path: Path) -> Callable[..., Run]:
    """Make all objects of a run afresh; batches are of three packs or so, over two epochs."""

    def make(dtype: torch.dtype = FP32, rank: int = 0, **changes: Any) -> Run:
        net = tiny("llama-tied")
        if rank:
            add_lora(net.to(dtype), SimpleNamespace(rank=rank, alpha=None, targets=[]), "base", 0)
        examples: list[Example] = some_examples(24, weighted=True)
        prefixes = Prefixes.of(examples)
        plan = LoopPlan(
            steps=STEPS, peak_lr=0.01, schedule="cosine", warmup=0.2, clip_norm=1.0, measure_every_steps=STEPS,
            save_every_steps=0, save_every_s=1e9, keep=2, checkpoints=tmp_path / "checkpoints",
        )  # fmt: skip
        loader = Loader(examples, prefixes, plan_steps(prefixes, 8, 30), seed=4)
        optimizer = MasterAdamW(net, dtype=dtype, weight_decay=0.1)
        return Run(net, optimizer, loader, replace(plan, **changes), Progress(), [])

    return make


def resume(run: Run) -> Run:
    """As run.py does it: the newest checkpoint into fresh objects."""
    found = checkpoint.load_latest(run.plan.checkpoints)
    assert found is not None
    state = found.state
    run.optimizer.load_masters(state.weights)
    run.optimizer.load_state(state.optimizer)
    checkpoint.restore_rng(state.rng)
    run.progress = Progress(state.step, **state.counters)
    return run


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def check_same(a: Run, b: Run) -> None:
    """Weights, masters and optimizer state are equal to the bit, and so are all metrics but the time taken."""
    for (name, mine), (_, theirs) in zip(a.net.named_parameters(), b.net.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert all(torch.equal(m, b.optimizer.masters[n]) for n, m in a.optimizer.masters.items())
    mine, theirs = a.optimizer.state(), b.optimizer.state()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in mine.items())
    assert timeless(a.records) == timeless(b.records)
    assert replace(a.progress, seconds=0.0) == replace(b.progress, seconds=0.0)


def interrupted(begin: Any, *kind: Any, stop_at: int = 3) -> Run:
    """A run stopped after `stop_at` steps and resumed in fresh objects; the records of both parts."""
    apart = begin().plan.checkpoints.with_name("interrupted")
    first = begin(*kind, checkpoints=apart)
    with pytest.raises(Stopped):
        first.go(lambda record: record["step"] == stop_at and os.kill(os.getpid(), signal.SIGTERM))
    torch.manual_seed(99)  # another process has other random numbers
    second = resume(begin(*kind, checkpoints=apart))
    second.records = first.records
    second.go()
    return second


@pytest.mark.parametrize("rank", [0, 3], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_stopped_run_goes_on_as_if_it_never_stopped(dtype: torch.dtype, rank: int, begin: Any) -> None:
    """Six steps, or three, a stop, and three in fresh objects: weights, optimizer and metrics equal to the bit."""
    straight = begin(dtype, rank)
    straight.go()
    assert any(len(straight.loader.batch(k).packs) > 1 for k in range(STEPS))
    assert {record["epoch"] for record in straight.records} == {0, 1}
    check_same(straight, interrupted(begin, dtype, rank))


@pytest.mark.parametrize("stop_at", [1, 5, 6])
def test_it_goes_on_from_any_step(stop_at: int, begin: Any) -> None:
    """From the first, across an epoch, and from the last, where nothing is left to do."""
    straight = begin(BF16)
    straight.go()
    check_same(straight, interrupted(begin, BF16, stop_at=stop_at))


@pytest.mark.slow  # on a busy machine two threads wait for each other at every tiny matrix
def test_two_threads_give_the_same_run_twice(begin: Any) -> None:
    """Sums split over threads are split the same way each time."""
    torch.set_num_threads(2)
    straight = begin(BF16)
    straight.go()
    check_same(straight, interrupted(begin, BF16))


def forget_the_optimizer(run: Run) -> None:
    run.optimizer.adamw.state.clear()


def forget_the_step(run: Run) -> None:
    run.progress.step -= 1


def round_the_masters(run: Run) -> None:
    run.optimizer.load_masters({n: m.bfloat16().float() for n, m in run.optimizer.masters.items()})


def another_order(run: Run) -> None:
    run.loader.seed += 1


@pytest.mark.parametrize("fault", [forget_the_optimizer, forget_the_step, round_the_masters, another_order])
def test_an_incomplete_resume_is_caught(fault: Callable[[Run], None], begin: Any) -> None:
    """The same comparison fails for moments lost, a step done twice, masters saved in bf16, another order of the data."""
    straight = begin(BF16)
    straight.go()
    apart = straight.plan.checkpoints.with_name("interrupted")
    first = begin(BF16, checkpoints=apart)
    with pytest.raises(Stopped):
        first.go(lambda record: record["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM))
    second = resume(begin(BF16, checkpoints=apart))
    second.records = first.records
    fault(second)
    second.go()
    with pytest.raises(AssertionError):
        check_same(straight, second)


# --- what is logged


def test_every_step_leaves_one_record(begin: Any) -> None:
    """In order, with the rate of the schedule and the counts of the batch; the totals are their sums."""
    run = begin()
    progress = run.go()
    assert [record["step"] for record in run.records] == list(range(1, STEPS + 1))
    for k, record in enumerate(run.records):
        batch = run.loader.batch(k)
        assert record["lr"] == learning_rate(k, peak=0.01, steps=STEPS, warmup=0.2, schedule="cosine")
        assert (record["target_tokens"], record["computed_tokens"]) == (batch.target_tokens, batch.computed_tokens)
        assert record["examples"] == sum(len(pack.examples) for pack in batch.packs)
        assert record["epoch"] == batch.epoch
    assert progress.step == STEPS
    assert progress.target_tokens == sum(record["target_tokens"] for record in run.records)
    assert progress.computed_tokens == sum(record["computed_tokens"] for record in run.records)
    assert progress.seconds == pytest.approx(sum(record["seconds"] for record in run.records))


def test_held_out_loss_is_measured_before_during_and_after(begin: Any) -> None:
    """Before the first step, every two, after the last; each time in evaluation mode, and once only."""
    run = begin(measure_every_steps=2)
    modes: list[bool] = []

    def measure() -> float:
        modes.append(run.net.training)
        return 10.0 - len(modes)

    progress = run.go(measure=measure)
    assert progress.heldout == {"0": 9.0, "2": 8.0, "4": 7.0, "6": 6.0}
    assert modes == [False] * 4
    assert run.net.training
    assert [record.get("heldout_loss") for record in run.records] == [None, 8.0, None, 7.0, None, 6.0]


def test_a_resumed_run_does_not_measure_again(begin: Any) -> None:
    """What was measured is in the checkpoint."""
    first = begin(measure_every_steps=3)
    with pytest.raises(Stopped):
        first.go(lambda r: r["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM), measure=lambda: 5.0)
    second = resume(begin(measure_every_steps=3))
    assert second.progress.heldout == {"0": 5.0, "3": 5.0}
    assert second.go(measure=lambda: 4.0).heldout == {"0": 5.0, "3": 5.0, "6": 4.0}


# --- when it saves


def saved_steps(run: Run) -> list[int]:
    return sorted(int(f.name[5:]) for f in run.plan.checkpoints.glob("step-*"))


def test_it_saves_every_so_many_steps(begin: Any) -> None:
    """After 2 and 4 of 6, and after the last, so that an export that fails loses nothing; two are kept."""
    run = begin(save_every_steps=2)
    run.go(facts={"data": "a1"})
    assert saved_steps(run) == [4, 6]
    found = checkpoint.load_latest(run.plan.checkpoints)
    assert found is not None
    assert found.manifest["data"] == "a1"


def test_it_saves_by_the_clock_where_no_steps_are_given(begin: Any) -> None:
    """An interval of 0 seconds is over after every step."""
    run = begin(save_every_s=0.0, keep=9)
    run.go()
    assert saved_steps(run) == [1, 2, 3, 4, 5, 6]


def test_saving_changes_nothing(begin: Any) -> None:
    """A run that saves after every step is the run that never saves."""
    quiet, saving = begin(BF16), begin(BF16, save_every_steps=1)
    quiet.go()
    saving.go()
    check_same(quiet, saving)


# --- how it stops


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_after_a_verified_save(number: signal.Signals, code: int, begin: Any) -> None:
    """The step is finished and logged, the checkpoint verifies, the line says how to go on."""
    run = begin()
    with pytest.raises(Stopped) as caught:
        run.go(lambda record: record["step"] == 2 and os.kill(os.getpid(), number))
    assert caught.value.exit_code == code
    (line,) = caught.value.lines()
    assert line == f"step 2: stopped by {number.name}, saved; run the same command again to go on"
    assert saved_steps(run) == [2]
    assert checkpoint.verify(run.plan.checkpoints / "step-000002") is None
    assert len(run.records) == 2


def test_a_second_interrupt_leaves_at_once(begin: Any) -> None:
    """Twice within two seconds: no save, and the checkpoint before is still good."""
    run = begin(save_every_steps=1)

    def twice(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.go(twice)
    assert saved_steps(run) == [1]
    assert checkpoint.verify(run.plan.checkpoints / "step-000001") is None


def test_signals_belong_to_the_caller_again_afterwards(begin: Any) -> None:
    """Also when the run was stopped."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = begin()
    with pytest.raises(Stopped):
        run.go(lambda record: os.kill(os.getpid(), signal.SIGTERM))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_poisoned_weight_ends_the_run_before_it_spreads(begin: Any) -> None:
    """Exit code 6: the step, the rows in it, and no weight changed."""
    run = begin()
    with torch.no_grad():
        run.net.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    before = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    with pytest.raises(DivergedError) as caught:
        run.go()
    assert caught.value.exit_code == 6
    first, rows = caught.value.lines()
    assert first.startswith("step 1: loss ")
    assert "the update was not applied" in first
    named = {run.loader.examples[i].origin for pack in run.loader.batch(0).packs for i in pack.examples}
    assert len(named) > 3
    assert all(origin in rows for origin in named)
    assert all(torch.equal(p, before[n]) for n, p in run.net.named_parameters())
    assert run.records == []
    assert run.progress == Progress()


def test_a_checkpoint_from_before_the_divergence_is_finite(begin: Any) -> None:
    """A rate that explodes leaves the last good checkpoint, not a poisoned one."""
    run = begin(peak_lr=1e30, save_every_steps=1, clip_norm=0.0, warmup=0.0)
    with pytest.raises(DivergedError):
        run.go()
    found = checkpoint.load_latest(run.plan.checkpoints)
    assert found is not None
    assert found.state.step >= 1
    assert all(bool(torch.isfinite(t).all()) for t in found.state.weights.values())
