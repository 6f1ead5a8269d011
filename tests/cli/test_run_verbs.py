"""The verbs on a run, fork, verify and replay: what they print, their exit codes, and JSON alone on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stories
import tiny
from instil.train import loop


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a finished run `x`, and a run `bad` whose second step diverged; no test changes them."""
    place = tmp_path_factory.mktemp("verbs")
    tiny.write_model(place / "m")
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(40))
    stories.finished(place)
    real = loop.train_step

    def poisoned(net: Any, optimizer: Any, batch: Any, **options: Any) -> Any:
        if batch.step == 1:
            with torch.no_grad():
                net.model.norm.weight[3] = float("nan")
        return real(net, optimizer, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", poisoned)
        assert stories.train(place, name="bad").code == 6
    return place


# ── fork ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fork_prints_the_new_folder_and_how_to_go_on(made: Path) -> None:
    """The folder alone on stdout; the command that it tells goes on from there and finishes."""
    run = made / "runs" / "x"
    said = tiny.command("fork", run, "longer", "train.epochs=3")
    assert said.code == 0
    assert said.out == f"{run.with_name('longer')}\n"
    assert said.err == [f"next: instil train {run.with_name('longer')} goes on after step 10"]
    trained = tiny.command("train", run.with_name("longer"))
    assert trained.code == 0
    assert "resumed after step 10" in trained.err
    assert len(tiny.metrics_of(run.with_name("longer"))) == 15


def test_fork_as_json(made: Path) -> None:
    """One document: the folder and the step."""
    run = made / "runs" / "x"
    said = tiny.command("fork", run, "json", "train.epochs=3", "--json")
    assert said.code == 0
    assert stories.strict_json(said.out) == {"run": str(run.with_name("json")), "step": 10}


@pytest.mark.parametrize(
    "words",
    [("{run}",), ("{run}", "x"), ("{run}", "y", "adapter.rank=4"), ("{run}", "y", "model=demo"),
     ("{run}", "y", "train.lr=-1"), ("{run}", "y", "nothing=1"), ("{run}", "y/z"), ("{place}", "y"), ("nowhere", "y"),
     ("{bad}", "y")],
)  # fmt: skip
def test_fork_refuses_with_exit_2(words: tuple[str, ...], made: Path) -> None:
    """A name missing or taken, other tensors, bad values, no run, no checkpoint: one line on stderr, no traceback, no trace."""
    before = tiny.tree(made)
    names = {"run": made / "runs" / "x", "place": made, "bad": made / "runs" / "bad"}
    said = tiny.command("fork", *(word.format(**names) for word in words))
    assert said.code == 2, said.err
    assert said.out == ""
    assert said.err
    assert not any("Traceback" in line for line in said.err)
    assert tiny.tree(made) == before


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_verify_says_what_holds(made: Path) -> None:
    """A line for each check on stderr, the verdict on stdout, exit 0."""
    said = tiny.command("verify", made / "runs" / "x", "--steps", 0)
    assert (said.code, said.out) == (0, "all of it holds\n")
    assert len(said.err) == 7
    assert all(line.startswith("ok: ") for line in said.err)


def test_verify_ends_with_exit_5_where_something_does_not_hold(made: Path) -> None:
    """A flipped bit in the result: the check that failed is marked, and so is the verdict; as JSON too."""
    run = stories.again(made / "runs" / "x", "flipped")
    file = run / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = tiny.command("verify", run, "--steps", 0)
    assert (said.code, said.out) == (5, "NOT all of it holds\n")
    (wrong,) = [line for line in said.err if not line.startswith("ok: ")]
    assert wrong == "WRONG: result: model/model.safetensors is not what was written"
    said = tiny.command("verify", run, "--steps", 0, "--json")
    assert said.code == 5
    found = stories.strict_json(said.out)
    assert found["ok"] is False
    assert [check["what"] for check in found["checks"] if not check["ok"]] == ["result"]


def test_verify_as_json(made: Path) -> None:
    """{"ok": bool, "checks": [{"what", "ok", "detail"}]}, alone on stdout."""
    said = tiny.command("verify", made / "runs" / "x", "--steps", "0", "--json")
    assert said.code == 0
    found = stories.strict_json(said.out)
    assert found.keys() == {"ok", "checks"}
    assert found["ok"] is True
    assert len(found["checks"]) == 7
    for check in found["checks"]:
        assert {key: type(value) for key, value in check.items()} == {"what": str, "ok": bool, "detail": str}


@pytest.mark.slow  # three processes that import torch
def test_verify_with_its_trial(made: Path) -> None:
    """The default: real runs of a few steps, one of them killed and resumed; nothing stays behind."""
    before = tiny.tree(made)
    said = tiny.command("verify", made / "runs" / "x", "--json")
    assert said.code == 0, said.err
    last = stories.strict_json(said.out)["checks"][-1]
    assert (last["what"], last["ok"]) == ("4 steps + kill + resume", True)
    assert tiny.tree(made) == before


@pytest.mark.parametrize("words", [(), ("nowhere",), ("{place}",), ("{run}", "--steps", "-1"), ("{run}", "more")])
def test_verify_refuses_with_exit_2(words: tuple[str, ...], made: Path) -> None:
    """No run, or words that mean nothing."""
    said = tiny.command("verify", *(word.format(run=made / "runs" / "x", place=made) for word in words))
    assert said.code == 2
    assert said.out == ""
    assert said.err


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_replay_tells_people(made: Path) -> None:
    """That it diverges again, what said so, the weights, the first module, and the rows with their logits."""
    run = made / "runs" / "bad"
    before = stories.contents(run)
    said = tiny.command("replay", run)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert lines[0] == "step 2 diverges again"
    assert lines[1].startswith("step 2: loss nan, gradient norm nan, rate ")
    assert "weights that are not finite: model.norm.weight" in lines
    assert "the first output that is not finite is that of model.norm" in lines
    rows = lines[lines.index("rows of the step, the worst first:") + 1 :]
    assert len(rows) >= 6
    assert all(row.startswith(f"  {made / 'a.jsonl'}:") for row in rows)
    assert all(row.endswith("(loss nan, largest logit nan)") for row in rows)
    assert stories.contents(run) == before


def test_replay_as_json(made: Path) -> None:
    """One document, and a valid one: numbers that are none are text."""
    said = tiny.command("replay", made / "runs" / "bad", "--json")
    assert said.code == 0
    found = stories.strict_json(said.out)
    assert found.keys() == {"step", "diverged", "problems", "weights", "first_module", "gradients", "rows"}
    assert found["rows"][0]["loss"] == "nan"
    with pytest.raises(ValueError, match="NaN is not JSON"):
        stories.strict_json('{"loss": NaN}')


@pytest.mark.parametrize("words", [(), ("nowhere",), ("{place}",), ("{run}",)])
def test_replay_refuses_with_exit_2(words: tuple[str, ...], made: Path) -> None:
    """No run, or one that went well."""
    said = tiny.command("replay", *(word.format(run=made / "runs" / "x", place=made) for word in words))
    assert said.code == 2
    assert said.out == ""
    assert said.err
