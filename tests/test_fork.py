"""A fork goes on from another run's state under other settings, as if by hand, and leaves that run alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stories
import tiny
from instil.config import load_config
from instil.errors import UsageError
from instil.folder import RunFolder, read_manifest
from instil.fork import fork
from instil.model.adapters import add_lora
from instil.model.load import load_model
from instil.pack.store import open_store
from instil.plan import loader_of
from instil.train.optim import MasterAdamW
from instil.train.step import step as train_step

DONE = 4


def go_on(folder: Path) -> tuple[Path, list[str]]:
    """Train a folder to its end."""
    said = tiny.command("train", folder)
    assert said.code == 0, said.err
    return folder, said.err


def by_hand(source: Path, forked: Path, rate: Callable[[int, int], float]) -> dict[str, torch.Tensor]:
    """The masters after continuing from the newest state of `source` with the data and settings of `forked`: a plain loop
    over the batches, with the rate of each step from `rate(step, steps)`."""
    config, state = load_config(forked / "config.yaml"), stories.newest(source)
    folder = RunFolder(forked)
    store = open_store(folder.packs / read_manifest(folder)["packs"])[0]["train"]
    batches = loader_of(config, store)
    steps = min((config.train.epochs or 1) * batches.plan.steps_per_epoch, config.train.steps or 10**9)
    torch.set_num_threads(1)
    net = load_model(Path(config.model), dtype=torch.float32, device=torch.device("cpu"))
    if config.adapter.rank:
        add_lora(net, config.adapter, config.model, config.train.seed)
    optimizer = MasterAdamW(net, dtype=torch.float32, weight_decay=config.train.weight_decay)
    optimizer.load_masters(state.weights)
    optimizer.load_state(state.optimizer)
    net.train()
    for k in range(state.step, steps):
        train_step(net, optimizer, batches.batch(k), lr=rate(k, steps), clip_norm=config.train.clip_norm)
    return {name: master.detach() for name, master in optimizer.masters.items()}


def cosine(peak: float) -> Callable[[int, int], float]:
    """The default schedule, as its formula: 3% warm-up, then half a cosine from the peak to a tenth of it."""

    def rate(k: int, steps: int) -> float:
        warm = math.ceil(0.03 * steps)
        if k < warm:
            return peak * (k + 1) / warm
        t = (k - warm) / (steps - 1 - warm)
        return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2)

    return rate


SETTINGS: list[tuple[str, list[str], Callable[[int, int], float], int]] = [
    ("nothing", [], cosine(1e-2), 10),
    ("rate", ["train.lr=3e-3"], cosine(3e-3), 10),
    ("epochs", ["train.epochs=3"], cosine(1e-2), 15),
    ("schedule", ["train.schedule=constant", "train.warmup=0", "train.clip_norm=0.01"], lambda k, steps: 1e-2, 10),
    ("batch", ["train.batch_examples=4"], cosine(1e-2), 20),
]
FAST = ("full-rate", "lora-epochs")


@pytest.mark.parametrize(
    ("settings", "rate", "steps", "lora"),
    [
        pytest.param(*how, more, id=f"{kind}-{label}", marks=() if f"{kind}-{label}" in FAST else pytest.mark.slow)
        for label, *how in SETTINGS
        for kind, more in (("full", ()), ("lora", ("adapter.rank=4",)))
    ],
)
def test_a_fork_is_going_on_by_hand(
    settings: list[str], rate: Callable[[int, int], float], steps: int, lora: tuple[str, ...], place: Path
) -> None:
    """From the newest state with the new settings, to the bit; the history is that of the run, then its own."""
    run = stories.stopped(place, DONE, *lora)
    before = stories.contents(run)
    folder, done = fork(str(run), "y", settings)
    assert (folder, done) == (run.with_name("y"), DONE)
    forked, said = go_on(folder)
    assert f"resumed after step {DONE}" in said
    assert stories.same_tensors(stories.newest(forked).weights, by_hand(run, forked, rate))
    records = tiny.metrics_of(forked)
    assert records[:DONE] == tiny.metrics_of(run)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert [record["lr"] for record in records[DONE:]] == pytest.approx([rate(k, steps) for k in range(DONE, steps)])
    assert stories.contents(run) == before


def test_another_rate_than_the_fork_s_is_caught(place: Path) -> None:
    """The planted fault of the comparison: by hand with the old rate."""
    run = stories.stopped(place, DONE)
    forked, _ = go_on(fork(str(run), "y", ["train.lr=3e-3"])[0])
    assert not stories.same_tensors(stories.newest(forked).weights, by_hand(run, forked, cosine(1e-2)))


def test_a_fork_without_changes_is_the_run(place: Path) -> None:
    """Nothing otherwise: the fork and the run end with the same bits."""
    run = stories.stopped(place, DONE)
    forked, _ = go_on(fork(str(run), "y")[0])
    assert stories.train(place).code == 0
    assert stories.differing(forked, run) == []


def test_a_fork_may_have_other_data(place: Path) -> None:
    """Other rows from here on: each of its later batches is of them, the state is the run's."""
    run = stories.stopped(place, DONE)
    other = tiny.write_rows(place / "b.jsonl", [tiny.row(f"give {i}", tiny.WORDS[i % 16]) for i in range(40)])
    forked, _ = go_on(fork(str(run), "y", [f"data.train={other}"])[0])
    assert str(other) in (forked / "ledger.jsonl").read_text()
    assert str(place / "a.jsonl") not in (forked / "ledger.jsonl").read_text()
    assert stories.same_tensors(stories.newest(forked).weights, by_hand(run, forked, cosine(1e-2)))
    assert stories.train(place).code == 0
    assert set(stories.differing(forked, run)) >= {"weights", "model", "metrics"}


def test_a_finished_run_is_trained_for_longer(place: Path) -> None:
    """From the last checkpoint of a finished run, for an epoch more."""
    run = stories.finished(place)
    before = stories.contents(run)
    forked, said = go_on(fork(str(run), "y", ["train.epochs=3"])[0])
    assert "resumed after step 10" in said
    assert len(tiny.metrics_of(forked)) == 15
    assert stories.contents(run) == before


def test_the_newest_checkpoint_that_verifies_is_taken(place: Path) -> None:
    """A flipped byte in the newest: the one before it, and the history through that one."""
    run = stories.stopped(place, 5, "checkpoint.every_steps=2")
    file = run / "checkpoints" / "step-000005" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    folder, done = fork(str(run), "y")
    assert done == 4
    assert [record["step"] for record in tiny.metrics_of(folder)] == [1, 2, 3, 4]


def test_a_fork_says_where_it_is_from(place: Path) -> None:
    """Its checkpoint's manifest names the run, its id, and the step; its own id is another one."""
    run = stories.stopped(place, DONE)
    itself = json.loads((run / "manifest.json").read_text())["run"]
    folder, _ = fork(str(run), "y")
    manifest = json.loads((folder / "checkpoints" / f"step-{DONE:06d}" / "manifest.json").read_text())
    assert manifest["forked_from"] == {"run": itself, "path": str(run), "step": DONE}
    go_on(folder)
    assert json.loads((folder / "manifest.json").read_text())["run"]["id"] != itself["id"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["adapter.rank=2"], "adapter.rank=2: "), (["adapter.rank=2", "adapter.targets=[q_proj]"], "adapter.rank=2: "),
        (["model=other"], "model=other: "), (["train.lr=-1"], "train.lr=-1: "), (["train.lr=fast"], "train.lr=fast: "),
        (["learnig_rate=1"], "learnig_rate=1: unknown key; did you mean train.lr?"), (["train.lr"], "train.lr: is not "),
        (["train.batch_tokens=9"], "train.batch_tokens=9: "),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: list[str], said: str, place: Path) -> None:
    """Other tensors than the checkpoint's, values out of range, unknown keys: exit 2, and no folder is left."""
    run = stories.stopped(place, DONE)
    before = tiny.tree(place)
    with pytest.raises(UsageError) as refused:
        fork(str(run), "y", settings)
    assert refused.value.exit_code == 2
    assert refused.value.lines()[0].startswith(said), refused.value.lines()
    assert tiny.tree(place) == before


@pytest.mark.parametrize("name", ["x", "taken", "../y", "", "a/b", "-y"])
def test_a_name_that_is_taken_or_none_is_refused(name: str, place: Path) -> None:
    """The run's own, that of another folder, and what is no name at all: exit 2, and nothing has changed."""
    run = stories.stopped(place, DONE)
    run.with_name("taken").mkdir()
    before = tiny.tree(place)
    with pytest.raises(UsageError):
        fork(str(run), name)
    assert tiny.tree(place) == before


def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(place: Path) -> None:
    """Killed before its first save: exit 2, and what to do."""
    run = stories.stopped(place, DONE)
    for folder in (run / "checkpoints").iterdir():
        folder.rename(place / folder.name)
    before = tiny.tree(place)
    with pytest.raises(UsageError, match="has no checkpoint yet; let it train for a while"):
        fork(str(run), "y")
    with pytest.raises(UsageError, match="is not the folder of a run that has begun"):
        fork(str(place / "nowhere"), "y")
    assert tiny.tree(place) == before


def test_the_run_is_found_however_it_is_written(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From inside its folder, with a slash behind it, by a link, moved: the fork is beside the run, never in it."""
    run = stories.stopped(place, DONE)
    moved = Path(run.rename(place / "runs" / "moved"))
    (place / "link").symlink_to(moved)
    monkeypatch.chdir(moved)
    forks = [fork(".", "a"), fork(f"{moved}/", "b"), fork("../moved", "c"), fork(str(place / "link"), "d")]
    assert [step for _, step in forks] == [DONE] * 4
    assert sorted(path.name for path in (place / "runs").iterdir()) == ["a", "b", "c", "d", "moved"]


def test_a_fork_that_fails_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while the history is copied: no half a run, and the source is as it was."""
    from instil import fork as module

    run = stories.stopped(place, DONE)
    before = stories.contents(place)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        fork(str(run), "y")
    assert not run.with_name("y").exists()
    assert stories.contents(place) == before


@pytest.mark.parametrize(
    ("settings", "gives"), [(["train.epochs=1"], 5), (["train.steps=3"], 3), (["train.batch_examples=20"], 4), ([], 10)]
)
def test_a_fork_with_nothing_to_learn_is_refused(settings: list[str], gives: int, place: Path) -> None:
    """Settings under which the run would end where it already is, or before: exit 2 with both numbers, and no folder."""
    run = stories.finished(place)
    before = tiny.tree(place)
    with pytest.raises(UsageError, match=f"10 steps are done, and these settings give {gives}: ") as refused:
        fork(str(run), "y", settings)
    assert refused.value.lines()[0].endswith("; raise train.epochs or train.steps in the fork's settings")
    assert tiny.tree(place) == before
    assert fork(str(run), "y", [*settings, "train.epochs=9", "train.steps=100"])[1] == 10


def test_a_fork_that_is_not_trained_yet_can_be_forked(place: Path) -> None:
    """It has no manifest, and goes on as a fork of the run does."""
    run = stories.stopped(place, DONE)
    first, _ = fork(str(run), "y", ["train.lr=3e-3"])
    second, done = fork(str(first), "z")
    assert done == DONE
    assert load_config(second / "config.yaml").train.lr == 3e-3
    assert stories.differing(go_on(second)[0], go_on(first)[0]) == []


def test_what_is_left_of_a_fork_is_no_run(place: Path) -> None:
    """Its lock alone: `train` on the folder is refused, and an ordinary run of that name begins at the beginning."""
    stories.stopped(place, DONE)
    left = place / "runs" / "y"
    left.mkdir()
    (left / "run.lock").touch()
    assert tiny.command("train", left).code == 2
    said = stories.train(place, name="y")
    assert said.code == 0
    assert not [line for line in said.err if line.startswith("resumed")]


def test_a_fork_into_the_home_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ in run.dir is the home folder, here too."""
    run = stories.stopped(place, DONE)
    monkeypatch.setenv("HOME", str(place / "home"))
    assert fork(str(run), "y", ["run.dir=~/forks"])[0] == place / "home" / "forks" / "y"
