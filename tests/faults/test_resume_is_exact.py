"""Stopped and gone on anywhere, whatever is trained and however it is packed, a run is the one that was never stopped."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import stories
import tiny as small
from instil import run as story
from instil.errors import Stopped
from instil.folder import keep_metrics_through
from instil.model.adapters import add_lora
from instil.pack import bundle, loader, plan, tree
from instil.pack.loader import Ahead, Loader
from instil.pack.plan import plan_steps
from instil.pack.prefixes import Prefixes
from instil.train import checkpoint, loop
from instil.train.loop import LoopPlan, Progress, Told, train
from instil.train.optim import MasterAdamW
from instil.types import Example

STEPS, EPOCH = 6, 3  # of the small runs here: two epochs of three steps
TRUNK = 24  # tokens of a system prompt that is computed before its branches
Order = list[tuple[int, int, list[tuple[int, ...]]]]


# ── what is packed ───────────────────────────────────────────────────────────────────────────────────────────────────


def tokens(rng: np.random.Generator, n: int) -> list[int]:
    return [int(t) for t in rng.integers(40, 97, n)]


def apart(make: Callable[..., Example]) -> list[Example]:
    """Twenty-four examples that begin differently: nothing is shared."""
    rng = np.random.default_rng(1)
    return [
        make([i + 3, *tokens(rng, int(rng.integers(3, 9)))], tokens(rng, int(rng.integers(2, 7))), origin=f"x:{i}")
        for i in range(24)
    ]


def talks(make: Callable[..., Example]) -> list[Example]:
    """Five conversations of three turns, each beginning with the turns before it; three answers to each of three prompts."""
    rng = np.random.default_rng(2)
    found = []
    for row in range(5):
        so_far = [row + 3]
        for turn in range(3):
            so_far = [*so_far, *tokens(rng, 4)]
            answer = tokens(rng, 3)
            found.append(make(so_far, answer, origin=f"x:{row}", turn=turn))
            so_far = [*so_far, *answer]
    for prompt in range(3):
        asked = [prompt + 20, *tokens(rng, 6)]
        found += [make(asked, tokens(rng, 3 + i), origin=f"y:{3 * prompt + i}") for i in range(3)]
    return found


def trunks(make: Callable[..., Example], several: bool) -> list[Example]:
    """Twenty-four questions after one long system prompt, or after one of two: a pack is its trunk, then its branches."""
    rng = np.random.default_rng(3)
    system = [[3, *tokens(rng, TRUNK)], [4, *tokens(rng, TRUNK)]]
    return [
        make([*system[i % 2 if several else 0], 5 + i, *tokens(rng, 5)], tokens(rng, 4), origin=f"x:{i}")
        for i in range(24)
    ]


def examples_of(kind: str, several: bool, make: Callable[..., Example]) -> tuple[list[Example], int]:
    """Examples of a kind, and the capacity with which a step has one pack, or several."""
    if kind == "apart":
        return apart(make), 45 if several else 400
    if kind == "talks":
        return talks(make), 40 if several else 400
    return trunks(make, several), 60


# ── a run in this process ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Run:
    """Everything that a process holds of a run, and what it did: the records, and the examples of each pack of each step."""

    net: Any
    optimizer: MasterAdamW
    loader: Loader
    plan: LoopPlan
    progress: Progress = field(default_factory=Progress)
    records: list[dict[str, Any]] = field(default_factory=list)
    order: Order = field(default_factory=list)
    rng: bytes = b""

    def go(self, stop_at: int = 0) -> Run:
        """Train to the end, or until a SIGTERM after a step."""
        real = loop.train_step

        def watched(net: Any, optimizer: Any, batch: Any, **options: Any) -> Any:
            self.order.append((batch.step, batch.epoch, [pack.examples for pack in batch.packs]))
            return real(net, optimizer, batch, **options)

        def log(record: dict[str, Any]) -> None:
            self.records.append({key: value for key, value in record.items() if key != "seconds"})
            if record["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "train_step", watched)
            train(
                self.net, self.optimizer, self.loader, self.plan, self.progress, measure=None, tell=Told(log), facts={}
            )
        self.rng = torch.get_rng_state().numpy().tobytes()
        return self


Begin = Callable[[], Run]


def resumed(begin: Begin, stop_at: int, forget: Callable[[Run], None] = lambda run: None) -> Run:
    """Stopped after a step, then gone on with in new objects, in a process with other random numbers."""
    first = begin()
    shutil.rmtree(first.plan.checkpoints, ignore_errors=True)  # of another run in this test
    with pytest.raises(Stopped):
        first.go(stop_at)
    torch.manual_seed(99)
    run = begin()
    found = checkpoint.load_latest(run.plan.checkpoints)
    assert found is not None
    assert found.state.step == stop_at
    run.optimizer.load_masters(found.state.weights)
    run.optimizer.load_state(found.state.optimizer)
    torch.manual_seed(98)
    checkpoint.restore_rng(found.state.rng)
    run.progress = Progress(found.state.step, **found.state.counters)
    run.records, run.order = first.records, first.order
    forget(run)
    return run.go()


def differing(a: Run, b: Run) -> list[str]:
    """What of two runs is not the same to the bit."""
    same = {
        "model": stories.same_tensors(dict(a.net.named_parameters()), dict(b.net.named_parameters())),
        "masters": stories.same_tensors(a.optimizer.masters, b.optimizer.masters),
        "moments": stories.same_tensors(a.optimizer.state(), b.optimizer.state()),
        "rng": a.rng == b.rng and bool(a.rng),
        "order": a.order == b.order,
        "records": a.records == b.records,
        "progress": replace(a.progress, seconds=0.0) == replace(b.progress, seconds=0.0),
    }
    return [name for name, equal in same.items() if not equal]


@pytest.fixture
def beginner(tiny: Any, make_example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Begin]:
    """Choose a run; what it returns makes all of its objects afresh each time. Trunks are worth a pass from 8 tokens on."""
    for module in (bundle, plan, tree):
        monkeypatch.setattr(module, "LEAST_TRUNK", 8)
    monkeypatch.setattr(tree, "LEAST_GROUP", 8)

    def choose(
        kind: str = "apart", several: bool = True, dtype: torch.dtype = torch.float32, rank: int = 0, **net: Any
    ) -> Begin:
        examples, capacity = examples_of(kind, several, make_example)
        prefixes = Prefixes.of(examples)
        steps = plan_steps(prefixes, 8, capacity, seed=4)
        at = LoopPlan(
            steps=STEPS, peak_lr=0.01, schedule="cosine", warmup=0.2, clip_norm=1.0, measure_every_steps=STEPS,
            save_every_steps=0, save_every_s=1e9, keep=9, checkpoints=tmp_path / "checkpoints",
        )  # fmt: skip

        def begin() -> Run:
            model = tiny(net.get("model", "llama-tied"), **{k: v for k, v in net.items() if k != "model"})
            if rank:
                add_lora(model.to(dtype), SimpleNamespace(rank=rank, alpha=None, targets=[]), "base", 0)
            optimizer = MasterAdamW(model, dtype=dtype, weight_decay=0.1)
            return Run(model, optimizer, Loader(examples, prefixes, steps, seed=4), at)

        return begin

    return choose


def shape_of(run: Run) -> tuple[set[int], bool, bool]:
    """Of the packs of a run: how many a step has, whether examples share tokens, and whether packs are cut."""
    batches = [run.loader.batch(k) for k in range(STEPS)]
    packs = [pack for batch in batches for pack in batch.packs]
    alone = sum(run.loader.examples[i].length_tokens - 1 for pack in packs for i in pack.examples)
    return {len(b.packs) for b in batches}, alone > sum(len(p.tokens) for p in packs), any(p.cuts for p in packs)


FAST = ("full-fp32-talks-several", "full-bf16-apart-one", "lora-bf16-trunks-several")
MATRIX = [
    (f"{'lora' if rank else 'full'}-{name}-{kind}-{'several' if several else 'one'}", rank, dtype, kind, several)
    for rank in (0, 3)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    for kind in ("apart", "talks", "trunks")
    for several in (False, True)
]


@pytest.mark.parametrize(
    ("rank", "dtype", "kind", "several"),
    [pytest.param(*how, id=label, marks=() if label in FAST else pytest.mark.slow) for label, *how in MATRIX],
)
def test_a_resumed_run_is_the_straight_one(
    rank: int, dtype: torch.dtype, kind: str, several: bool, beginner: Callable[..., Begin], tmp_path: Path
) -> None:
    """In the middle of an epoch and between two: model, masters, moments, random state, order and records to the bit."""
    begin = beginner(kind, several, dtype, rank)
    straight = begin().go()
    packs, shared, cut = shape_of(straight)
    assert (packs == {1}) != several
    assert max(packs) > 1 or not several
    assert (shared, cut) == (kind != "apart", kind == "trunks")
    assert [epoch for _, epoch, _ in straight.order] == [0] * EPOCH + [1] * EPOCH
    for stop_at in (EPOCH - 1, EPOCH):
        assert differing(straight, resumed(begin, stop_at)) == [], f"stopped after step {stop_at}"


def test_noise_in_the_model_goes_on_where_it_was(beginner: Callable[..., Begin]) -> None:
    """A model with dropout draws the very numbers after a resume that it would have drawn."""
    begin = beginner(model="gpt2", resid_pdrop=0.2, embd_pdrop=0.2)

    def same_start() -> Run:
        run = begin()
        torch.manual_seed(5)
        return run

    straight = same_start().go()
    calm = beginner(model="gpt2")().go()
    assert "records" in differing(straight, calm)  # the noise is there
    assert differing(straight, resumed(same_start, 2)) == []
    lost = resumed(same_start, 2, lambda run: torch.manual_seed(97) and None)
    assert {"model", "masters", "rng", "records"} <= set(differing(straight, lost))


def another_order(run: Run) -> None:
    run.loader.seed += 1


def no_moments(run: Run) -> None:
    run.optimizer.adamw.state.clear()


def masters_in_bf16(run: Run) -> None:
    run.optimizer.load_masters({n: m.bfloat16().float() for n, m in run.optimizer.masters.items()})


def no_recent(run: Run) -> None:
    run.progress.recent.clear()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [(another_order, "order"), (no_moments, "moments"), (masters_in_bf16, "masters"), (no_recent, "progress")],
)
def test_what_is_forgotten_is_seen(fault: Callable[[Run], None], seen: str, beginner: Callable[..., Begin]) -> None:
    """Planted faults, in a run of prefix trees in bfloat16: each shows in the comparison."""
    begin = beginner("talks", True, torch.bfloat16)
    assert seen in differing(begin().go(), resumed(begin, 2, fault))


@pytest.mark.parametrize("how", [(), ("adapter.rank=4", "train.precision=bf16")], ids=["full-fp32", "lora-bf16"])
@pytest.mark.parametrize("stop_at", [4, 5], ids=["in-an-epoch", "between-epochs"])
def test_the_command_line_resumes_conversations_exactly(stop_at: int, how: tuple[str, ...], place: Path) -> None:
    """Rows of several turns and several answers to one prompt, by the same command twice: result and state to the bit."""
    small.write_rows(place / "a.jsonl", conversations())
    whole = stories.finished(place, *how, name="whole")
    assert {record["epoch"] for record in small.metrics_of(whole)} == {0, 1}
    per_epoch = sum(record["epoch"] == 0 for record in small.metrics_of(whole))
    stop_at = per_epoch if stop_at == 5 else per_epoch - 1
    run = stories.stopped(place, stop_at, *how)
    said = stories.train(place, *how)
    assert said.code == 0
    assert f"resumed after step {stop_at}" in said.err
    assert stories.differing(run, whole) == []


def conversations() -> list[dict[str, Any]]:
    """Ten talks of three turns, and four questions with three answers each."""
    talks = []
    for i in range(10):
        turns = (small.row(f"say {small.WORDS[(i + t) % 16]} {i}", small.WORDS[(3 * i + t) % 16]) for t in range(3))
        talks.append({"messages": [message for turn in turns for message in turn["messages"]]})
    return talks + [small.row(f"give {i}", small.WORDS[(5 * i + k) % 16]) for i in range(4) for k in range(3)]


# ── the position is one integer ──────────────────────────────────────────────────────────────────────────────────────


class Counted(Sequence[Example]):
    """Examples that count how often one is read."""

    def __init__(self, examples: Sequence[Example]):
        self.examples, self.read = examples, 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: Any) -> Any:
        self.read += 1
        return self.examples[i]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a pack is built and an epoch planned by loaders."""
    count = {"build_pack": 0, "epoch_packs": 0}

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(loader, name)

        def call(*given: Any, **more: Any) -> Any:
            count[name] += 1
            return real(*given, **more)

        return call

    for name in count:
        monkeypatch.setattr(loader, name, counting(name))
    return count


def test_the_first_batch_after_a_resume_costs_the_same_anywhere(
    make_example: Callable[..., Example], calls: dict[str, int]
) -> None:
    """Six thousand rows: at the first step, in the middle, and after nine hundred epochs, one epoch is planned and the
    examples of one step are read."""
    examples = Counted([make_example([3, 4, 5 + i % 90], [6, 7]) for i in range(6000)])
    prefixes = Prefixes.none(np.full(6000, 4, np.int64))
    steps = plan_steps(prefixes, 8, 64)
    assert steps.steps_per_epoch == 750
    for step in (0, 1, 374, 749, 750, 5000, 900 * 750 + 400):
        examples.read, before = 0, dict(calls)
        with Ahead(Loader(examples, prefixes, steps, seed=1), step + 1) as batches:
            batch = batches.batch(step)
        assert batch.step == step
        assert examples.read == sum(len(pack.examples) for pack in batch.packs) <= 16, step
        assert calls["epoch_packs"] - before["epoch_packs"] == 1, step
        assert calls["build_pack"] - before["build_pack"] == len(batch.packs), step


def test_a_resume_reads_no_batch_that_is_done(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 3 steps and after 37 of 40 the run draws the batches that are left, each once; up to its first step it builds
    as many packs in either case."""
    how = ("train.epochs=8",)
    built: dict[int, int] = {}
    for done in (3, 37):
        stories.stopped(place, done, *how, name=f"x{done}")
        drawn: list[int] = []
        packs = [0]
        with pytest.MonkeyPatch.context() as patch:
            batch, step = Loader.batch, loop.train_step

            def draw(
                self: Loader, k: int, batch: Any = batch, drawn: list[int] = drawn, packs: list[int] = packs
            ) -> Any:
                drawn.append(k)
                made = batch(self, k)
                packs[0] += len(made.packs)
                return made

            def first(*given: Any, step: Any = step, done: int = done, packs: list[int] = packs, **more: Any) -> Any:
                built.setdefault(done, packs[0])
                return step(*given, **more)

            patch.setattr(Loader, "batch", draw)
            patch.setattr(loop, "train_step", first)
            assert stories.train(place, *how, name=f"x{done}").code == 0
        assert drawn == list(range(done, 40))
    assert all(1 <= count <= 2 * 2 for count in built.values()), built  # the step's, and the next one's, which is ahead


# ── the history ──────────────────────────────────────────────────────────────────────────────────────────────────────


def line(step: int, loss: float = 1.0) -> bytes:
    return b'{"step":%d,"loss":%g,"seconds":1,"computed_tokens":9}\n' % (step, loss)


@pytest.mark.parametrize(
    ("written", "kept", "gone"),
    [
        ([line(1), line(2), line(3), line(4)], [line(1), line(2), line(3)], 0),  # later ones are made again
        ([line(1), line(2), line(2, 7), line(3)], [line(1), line(2, 7), line(3)], 0),  # twice there: the later one
        ([line(1), line(2), line(3), b'{"step":4,"lo'], [line(1), line(2), line(3)], 0),  # a kill tore the last one
        ([line(1), b'{"step":2,"l\n', line(3)], [line(1), line(3)], 1),  # torn in the middle
        ([line(1), line(3)], [line(1), line(3)], 1),
        ([line(3), line(1), line(2)], [line(1), line(2), line(3)], 0),  # in order again
        ([line(1), b"\xff\x00\n", b"[]\n", b'{"loss":1}\n', line(2)], [line(1), line(2)], 1),
        ([], [], 3),
    ],
)
def test_the_history_keeps_each_step_once(written: list[bytes], kept: list[bytes], gone: int, tmp_path: Path) -> None:
    """Through step 3: later, doubled and torn lines go; what is missing is counted and said."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b"".join(written))
    said = keep_metrics_through(file, 3)
    assert file.read_bytes() == b"".join(kept)
    expected = f"{file}: {gone} of the 3 steps done have no readable line; the history has gaps"
    assert said == ([expected] if gone else [])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_history_stops_no_run(place: Path) -> None:
    """Lines lost, doubled, torn, and beyond the checkpoint: it is said once, the run goes on exactly, no step is twice."""
    whole = stories.finished(place, name="whole")
    run = stories.stopped(place, 6)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    beyond = b'{"step":7,"loss":1.0}\n'
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:2], lines[3], lines[3], *lines[4:], beyond, b'{"st']))
    said = stories.train(place)
    assert said.code == 0
    (warned,) = [text for text in said.err if "have no readable line" in text]
    assert warned.startswith(f"warning: {run / 'metrics.jsonl'}: 1 of the 6 steps done have no readable line")
    expected = [record for record in small.without_times(small.metrics_of(whole)) if record["step"] != 3]
    assert small.without_times(small.metrics_of(run)) == expected
    assert stories.differing(run, whole) == ["metrics"]


def test_a_resume_that_is_not_exact_is_seen_from_outside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault of the comparison by files: the random state of another process."""
    whole = stories.finished(place, name="whole")
    stories.stopped(place, 6)
    real = story.put_back

    def noisy(*given: Any) -> Progress:
        progress = real(*given)
        torch.manual_seed(96)
        return progress

    monkeypatch.setattr(story, "put_back", noisy)
    assert stories.train(place).code == 0
    assert stories.differing(place / "runs" / "x", whole) == ["rng"]
