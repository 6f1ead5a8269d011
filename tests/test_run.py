"""The story of a run: it learns, resumes exactly, refuses what changed, and stops where numbers end."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import instil
import tiny
from instil import run as story
from instil.config import load_config
from instil.errors import DataError, DivergedError, InstilError, ModelError, Stopped, UsageError

Configure = Callable[..., Any]


@pytest.fixture
def configure(place: Path) -> Configure:
    """A configuration for `place`, with further overrides."""

    def make(*overrides: str, **given: Any) -> Any:
        least = {"model": str(place / "m"), "data.train": [str(place / "a.jsonl")], "run.dir": str(place / "runs")}
        words = [*tiny.FAST, "train.lr=1e-2", "train.batch_examples=8", "run.name=x", *overrides]
        return load_config(None, words, least | given)

    return make


def train(config: Any, **more: Any) -> tuple[Path, list[str]]:
    """A run, and what it said."""
    lines: list[str] = []
    return instil.train(config, listener=instil.Listener(lines.append), **more), lines


def stopped_at(step: int, config: Any) -> Path:
    """A run that SIGTERM stopped after a step."""

    def stop(record: dict[str, Any], steps: int) -> None:
        if record["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as stopped:
        instil.train(config, listener=instil.Listener(on_step=stop))
    assert stopped.value.exit_code == 143
    return Path(config.run.dir) / config.run.name


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [(), ("adapter.rank=8",), ("train.precision=bf16",), ("train.batch_tokens=30",)])
def test_a_run_learns_what_it_is_shown(how: tuple[str, ...], place: Path, configure: Configure) -> None:
    """Eight answers by heart: the loss of the last steps is below a tenth of the first, in every mode."""
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(8))
    batch = {"train.batch_examples": None} if "train.batch_tokens=30" in how else {}
    run, _ = train(configure("data.heldout=0", "train.epochs=80", "train.schedule=constant", *how, **batch))
    losses = [record["loss"] for record in tiny.metrics_of(run)]
    assert min(losses[-8:]) < 0.1 * losses[0]
    assert max(losses[-8:]) < 0.3 * losses[0]


def test_equal_runs_are_bit_identical(configure: Configure) -> None:
    """Same configuration, other name: the same bytes."""
    first, _ = train(configure("train.epochs=2"))
    second, _ = train(configure("train.epochs=2", "run.name=y"))
    assert weights(first) == weights(second)


def test_the_api_stays_a_function_whatever_was_imported() -> None:
    """`instil.train` and `instil.evaluate` are also folders; importing from those must not hide the functions."""
    import importlib

    for module in ("instil.train.loop", "instil.evaluate.generate", "instil.train", "instil.evaluate"):
        importlib.import_module(module)
        assert instil.train is story.train
        assert callable(instil.evaluate)
        assert not isinstance(instil.evaluate, type(instil))


# ── resuming ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_finished_run_says_so_and_is_left_alone(configure: Configure) -> None:
    """The same command again trains nothing and touches nothing but its lock."""
    run, _ = train(configure())
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*") if path.name != "run.lock"}
    again, said = train(configure())
    assert again == run
    assert said == [f"{run} is finished already; --fresh starts it over"]
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in run.rglob("*") if path.name != "run.lock"}
    assert after == before


def test_fresh_moves_the_old_run_aside(configure: Configure) -> None:
    """--fresh starts over under the name; the older run stays whole beside it, also when a setting changed."""
    run, _ = train(configure())
    old = weights(run)
    again, said = train(configure("train.lr=1e-3"), fresh=True)
    (aside,) = (folder for folder in run.parent.iterdir() if folder != run)
    assert again == run
    assert aside.name.startswith("x.old-")
    assert weights(aside) == old
    assert (aside / "report.html").is_file()
    assert weights(run) != old
    assert not any("resumed" in line or "finished" in line for line in said)


def test_a_failed_fresh_start_brings_the_old_run_back(place: Path, configure: Configure) -> None:
    """When starting over fails before training, the older run is where it was."""
    run, _ = train(configure())
    before = tiny.tree(run.parent)
    with pytest.raises(DataError):
        instil.train(configure(**{"data.train": [str(place / "none.jsonl")]}), fresh=True)
    assert tiny.tree(run.parent) == before


@pytest.mark.parametrize(
    ("override", "before", "now"),
    [("train.lr=0.5", "0.01", "0.5"), ("train.seed=3", "0", "3"), ("train.epochs=7", "2", "7"),
     ("data.heldout=0", "0.05", "0.0"), ("adapter.rank=2", "0", "2"), ("train.precision=bf16", "'fp32'", "'bf16'")],
)  # fmt: skip
def test_a_changed_setting_is_refused_with_both_values(
    override: str, before: str, now: str, configure: Configure
) -> None:
    """What would change the result cannot change in the middle: exit 2, the key, the old value and the new one."""
    run = stopped_at(2, configure())
    tree = tiny.tree(run)
    with pytest.raises(UsageError) as refused:
        instil.train(configure(override))
    (line,) = refused.value.lines()
    assert line.startswith(f"{override.split('=')[0]}: the run in {run} has {before}, now {now}; ")
    assert "--fresh" in line
    assert tiny.tree(run) == tree


def test_a_harmless_setting_may_change(configure: Configure) -> None:
    """Checkpoints, measurements and threads are free to change when a run goes on; the result is the same."""
    whole, _ = train(configure("run.name=whole"))
    stopped_at(3, configure())
    run, said = train(configure("checkpoint.keep=5", "checkpoint.every_steps=2"))
    assert "resumed after step 3" in said
    assert weights(run) == weights(whole)
    assert len(list((run / "checkpoints").iterdir())) == 5  # 3, 4, 6, 8 and 10


def test_changed_data_is_refused(place: Path, configure: Configure) -> None:
    """Another byte in a data file: exit 3 with the file's name, and the run is untouched."""
    run = stopped_at(2, configure())
    tree = tiny.tree(run)
    with (place / "a.jsonl").open("a") as file:
        file.write(json.dumps(tiny.row("one", "more")) + "\n")
    with pytest.raises(DataError) as refused:
        instil.train(configure())
    assert refused.value.exit_code == 3
    file = place / "a.jsonl"
    assert refused.value.lines()[0].startswith(
        f"{file}: has changed since the run in {run} began: {file}:41 is new, 1 "
    )
    assert tiny.tree(run) == tree


@pytest.mark.parametrize(
    ("file", "what"),
    [("chat_template.jinja", "template"), ("tokenizer_config.json", "tokenizer"), ("config.json", "model"),
     ("model.safetensors", "model")],
)  # fmt: skip
def test_a_changed_model_is_refused(file: str, what: str, place: Path, configure: Configure) -> None:
    """Another template, tokenizer or model in the same place: exit 4, and the run is untouched."""
    run = stopped_at(2, configure())
    path = place / "m" / file
    if file == "model.safetensors":
        from safetensors.torch import load_file, save_file

        save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    else:
        path.write_text(path.read_text() + "\n ")
    with pytest.raises(ModelError) as refused:
        instil.train(configure())
    assert refused.value.exit_code == 4
    assert refused.value.lines()[0].startswith(f"{run}: the {what} has changed since the run began (")


def test_a_run_with_other_packs_is_refused(configure: Configure) -> None:
    """What a version that packed otherwise began would go on with other batches: exit 2, and the run is untouched."""
    run = stopped_at(2, configure())
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["packing"]  # as the first versions left it
    (run / "manifest.json").write_text(json.dumps(manifest))
    tree = tiny.tree(run)
    with pytest.raises(UsageError) as refused:
        instil.train(configure())
    assert refused.value.exit_code == 2
    assert refused.value.lines()[0].startswith(f"{run}: was begun by a version of instil that packs examples otherwise")
    assert tiny.tree(run) == tree


def test_a_resumed_run_keeps_its_rows(place: Path, configure: Configure) -> None:
    """What was too long for the model at the start is so when the run goes on, though the pack was chosen meanwhile.

    And the rows are not prepared a second time.
    """
    tiny.write_model(place / "m", max_position_embeddings=48)
    rows = [*tiny.some_rows(16), tiny.row("say " + "x" * 60, "red")]
    tiny.write_rows(place / "a.jsonl", rows)
    open_pack = {"pack.tokens": None, "data.heldout": 0.0, "data.drop_most": 0.1}
    whole, _ = train(configure("train.epochs=4", "run.name=whole", **open_pack))
    ledger = (whole / "ledger.jsonl").read_text()
    assert '"too_long"' in ledger.splitlines()[-1]
    assert '"dropped"' in ledger.splitlines()[-1]
    stopped_at(3, configure("train.epochs=4", **open_pack))
    run, _ = train(configure("train.epochs=4", **open_pack))
    assert (run / "ledger.jsonl").read_text() == ledger
    assert weights(run) == weights(whole)
    assert len(list((run / "packs").iterdir())) == 1
    copy, _ = train(load_config(whole / "config.yaml", ["run.name=copy"]))
    assert (copy / "ledger.jsonl").read_text() == ledger
    assert weights(copy) == weights(whole)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_cut_off_after_its_model_ends_the_same(
    rank: int, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power lost between model/ and summary.json: not finished, and the same call makes the same model again."""
    how = (f"adapter.rank={rank}", "checkpoint.every_steps=4")
    whole, _ = train(configure(*how, "run.name=whole"))

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(story, "summary", cut)
        with pytest.raises(KeyboardInterrupt):
            train(configure(*how))
    run, said = train(configure(*how))
    assert "resumed after step 10" in said
    assert weights(run) == weights(whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}
    assert tiny.without_times(tiny.metrics_of(run)) == tiny.without_times(tiny.metrics_of(whole))


def test_a_resumed_run_prepares_nothing_again(
    place: Path, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the pack that was chosen is smaller than the model's context, which was the limit at the start."""
    from instil import prepare

    tiny.write_model(place / "m", max_position_embeddings=100_000)
    run = stopped_at(2, configure())
    (before,) = (run / "packs").iterdir()
    monkeypatch.setattr(prepare, "load_conversations", None)
    train(configure())
    assert list((run / "packs").iterdir()) == [before]


# ── where numbers end ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_diverged_run_names_the_rows_and_writes_no_model(place: Path, configure: Configure) -> None:
    """A rate that explodes: exit 6 at the second step, with its row's origin and where the step is kept, and no model/."""
    settings = ("data.heldout=0", "train.batch_examples=1", "train.clip_norm=0", "train.warmup=0")
    with pytest.raises(DivergedError) as diverged:
        instil.train(configure(*settings, "train.lr=10", "train.weight_decay=1"))
    assert diverged.value.exit_code == 6
    first, second, third = diverged.value.lines()
    assert "not finite; the update was not applied" in first
    assert f"its rows, the worst first: {place / 'a.jsonl'}:" in second
    assert third.startswith(f"{place / 'runs' / 'x' / 'incident'}: holds the step that diverged; `instil replay ")
    run = place / "runs" / "x"
    assert not (run / "model").exists()
    assert not (run / "summary.json").exists()
    step = int(first.split(":")[0].removeprefix("step "))
    assert [record["step"] for record in tiny.metrics_of(run)] == list(range(1, step))


def test_a_failing_run_leaves_its_caller_s_signals_alone(place: Path, configure: Configure) -> None:
    """The handlers of SIGINT and SIGTERM are the caller's again, whatever happened."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped_at(1, configure())
    train(configure())
    with pytest.raises(InstilError):
        instil.train(configure("run.device=cuda:7", "run.name=z"))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
