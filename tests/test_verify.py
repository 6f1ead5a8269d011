"""Verify looks at every hash of a run and tries a kill and a resume; what is planted in either is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import stories
import tiny
from instil import run as story
from instil import verify as module
from instil.errors import MachineError, UsageError
from instil.folder import RunFolder, locked, read_metrics
from instil.verify import Verified, resumes, verify

CHECKS = ["base model", "tokenizer", "template", "data", "prepared examples"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a finished run `x` with two checkpoints, and a stopped one `half`; no test changes it."""
    place = tmp_path_factory.mktemp("made")
    tiny.write_model(place / "m")
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(40))
    stories.finished(place, "checkpoint.every_steps=5")
    stories.stopped(place, 4, name="half")
    stories.finished(place, "adapter.rank=4", name="lora")
    return place


def failed(found: Verified) -> list[str]:
    return [check.what for check in found.checks if not check.ok]


def test_all_hashes_of_a_run_hold(made: Path) -> None:
    """What it learns from and with, its examples, both checkpoints, its result; and nothing of it changes."""
    run = made / "runs" / "x"
    before = stories.contents(run)
    said: list[str] = []
    found = verify(str(run), steps=0, say=said.append)
    assert found.ok
    assert [check.what for check in found.checks] == [*CHECKS, "step-000010", "step-000005", "result"]
    assert said == [f"ok: {check.what}: {check.detail}" for check in found.checks]
    assert stories.contents(run) == before
    assert found.as_dict() == {
        "ok": True, "checks": [{"what": c.what, "ok": c.ok, "detail": c.detail} for c in found.checks]
    }  # fmt: skip


def test_a_run_that_is_not_finished_has_no_result(made: Path) -> None:
    """Its one checkpoint is looked at, and no model is missed."""
    found = verify(str(made / "runs" / "half"), steps=0)
    assert found.ok
    assert [check.what for check in found.checks] == [*CHECKS, "step-000004"]


def test_an_adapter_is_part_of_the_result(made: Path) -> None:
    """Every file of adapter/ and of model/."""
    found = verify(str(made / "runs" / "lora"), steps=0)
    assert found.ok
    files = sum(len(list((made / "runs" / "lora" / folder).iterdir())) for folder in ("model", "adapter"))
    assert found.checks[-1].detail == f"{files} files as written"


def flipped(path: Path, at: float = 0.5) -> None:
    """One bit of a file."""
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


def files_of(run: Path, folder: str) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in (run / folder).rglob("*") if path.is_file())


def test_a_flipped_bit_anywhere_is_found(made: Path, tmp_path: Path) -> None:
    """First, middle and last byte of every file of both checkpoints, the prepared examples and the result: that check
    fails, and no other."""
    run = stories.again(made / "runs" / "x", "flips")
    flips = 0
    for folder in ("checkpoints", "packs", "model"):
        for name in files_of(run, folder):
            whole = (run / name).read_bytes()
            what = {"packs": "prepared examples", "model": "result"}.get(folder, name.split("/")[1])
            for at in (0.0, 0.5, 1.0):
                flipped(run / name, at)
                assert failed(verify(str(run), steps=0)) == [what], f"{name} at {at}"
                (run / name).write_bytes(whole)
                flips += 1
    assert flips >= 3 * (2 * 5 + 6 + 4)
    assert verify(str(run), steps=0).ok
    shutil.rmtree(run)


def gone(path: Path) -> None:
    path.unlink()


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def another_file(path: Path) -> None:
    path.with_name("odd").write_bytes(b"x")


@pytest.mark.parametrize("fault", [gone, shorter, longer, another_file])
@pytest.mark.parametrize(
    ("name", "what"),
    [("checkpoints/step-000010/weights.safetensors", "step-000010"), ("model/model.safetensors", "result"),
     ("packs/*/train.arrow", "prepared examples")],
)  # fmt: skip
def test_other_damage_is_found(fault: Callable[[Path], None], name: str, what: str, made: Path) -> None:
    """A file that is gone, a byte shorter or longer, or one that nobody wrote."""
    run = stories.again(made / "runs" / "x", "damaged")
    (path,) = run.glob(name)
    fault(path)
    assert failed(verify(str(run), steps=0)) == [what]
    shutil.rmtree(run)


@pytest.mark.parametrize(
    ("file", "what"),
    [("m/model.safetensors", "base model"), ("m/tokenizer_config.json", "tokenizer"),
     ("m/chat_template.jinja", "template"), ("a.jsonl", "data")],
)  # fmt: skip
def test_what_the_run_began_with_is_compared(file: str, what: str, place: Path) -> None:
    """Another weight, tokenizer, template or row than when it began: that check fails, and no other."""
    run = stories.finished(place)
    assert verify(str(run), steps=0).ok
    path = place / file
    if path.suffix == ".safetensors":
        flipped(path, 1.0)
    else:
        path.write_text(path.read_text().replace("say", "tell").replace("256", "255").replace("user", "human") + " ")
    if file == "a.jsonl":
        tiny.write_rows(path, [tiny.row("say what", "else"), *tiny.some_rows(40)[1:]])
    assert failed(verify(str(run), steps=0)) == [what]
    path.unlink()
    found = verify(str(run), steps=0)
    assert not found.ok


@pytest.mark.parametrize("content", ["", "{}", '{"loss_before": 1.0', "[]"])
def test_a_summary_that_cannot_be_read_is_found(content: str, made: Path) -> None:
    """The result is not known to be what was written: that check fails, and no other."""
    run = stories.again(made / "runs" / "x", "summary")
    (run / "summary.json").write_text(content)
    found = verify(str(run), steps=0)
    assert failed(found) == ["result"]
    assert found.checks[-1].detail == "summary.json cannot be read"
    shutil.rmtree(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """Exit 2, not a report that all of nothing holds."""
    for name in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="is not the folder of a run that has begun"):
            verify(str(tmp_path / name), steps=0)


# ── the kill and the resume ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial runs in this process: killed as by SIGKILL, after its second step, without a save of its own."""

    class Killed(BaseException):
        pass

    def die() -> None:
        raise Killed

    def to_the_end(words: Sequence[str]) -> None:
        assert tiny.command(*words).code == 0

    def killed(words: Sequence[str], folder: Path, steps: int, wait: float) -> tuple[int, bool]:
        with stories.after_step(2, die), pytest.raises((Killed, AssertionError)):
            tiny.command(*words)
        return len(read_metrics(folder / "metrics.jsonl")), True

    monkeypatch.setattr(module, "_to_the_end", to_the_end)
    monkeypatch.setattr(module, "_killed", killed)


def test_a_run_that_resumes_exactly_passes(made: Path, in_process: None) -> None:
    """Four steps, killed after the second and resumed, of a full and an adapter run: equal, and nothing stays behind."""
    before = tiny.tree(made)
    for name in ("x", "lora"):
        check = resumes(RunFolder(made / "runs" / name), 4)
        assert check.ok, check.detail
        assert check.what == "4 steps + kill + resume"
        assert check.detail == "killed after step 2 of 4; weights, optimizer, metrics equal to the bit"
    assert tiny.tree(made) == before


def test_what_a_dead_trial_left_is_removed(made: Path, in_process: None) -> None:
    """A verify that was killed leaves a folder with runs in it: the next one of that run begins without them."""
    before = tiny.tree(made)
    left = stories.again(made / "runs" / "x", "left")
    (made / "runs" / ".verify-x").mkdir()
    left.rename(made / "runs" / ".verify-x" / "straight")
    assert resumes(RunFolder(made / "runs" / "x"), 4).ok
    assert tiny.tree(made) == before


def test_two_verifies_of_a_run_are_kept_apart(made: Path) -> None:
    """The second one says who is there, and touches nothing of it."""
    before = tiny.tree(made)
    with locked(made / "runs" / ".verify-x"):
        (made / "runs" / ".verify-x" / "straight").mkdir()
        with pytest.raises(MachineError, match="is in use by process"):
            resumes(RunFolder(made / "runs" / "x"), 4)
        assert (made / "runs" / ".verify-x" / "straight").is_dir()
    shutil.rmtree(made / "runs" / ".verify-x")
    assert tiny.tree(made) == before


def test_the_trial_is_beside_the_run(made: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run is named from within: nothing is made in its folder."""
    places: list[str] = []
    real = module._to_the_end

    def noted(words: Sequence[str]) -> None:
        places.extend(word for word in words if word.startswith("run.dir="))
        real(words)

    monkeypatch.setattr(module, "_to_the_end", noted)
    monkeypatch.chdir(made / "runs" / "x")
    assert resumes(RunFolder(Path(".")), 4).ok
    assert set(places) == {f"run.dir={made / 'runs' / '.verify-x'}"}


def no_moments(progress: Any, run: Any, optimizer: Any) -> None:
    optimizer.adamw.state.clear()


def masters_in_bf16(progress: Any, run: Any, optimizer: Any) -> None:
    optimizer.load_masters({name: m.bfloat16().float() for name, m in optimizer.masters.items()})


def other_noise(progress: Any, run: Any, optimizer: Any) -> None:
    torch.manual_seed(12345)


def lost_line(progress: Any, run: Any, optimizer: Any) -> None:
    run.metrics.write_bytes(b"".join(run.metrics.read_bytes().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("fault", "seen"),
    [(no_moments, "optimizer.safetensors"), (masters_in_bf16, "weights.safetensors"), (other_noise, "rng.safetensors"),
     (lost_line, "metrics.jsonl")],
)  # fmt: skip
def test_a_resume_that_is_not_exact_is_found(
    fault: Callable[..., Any], seen: str, made: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted faults: moments lost, masters rounded, another random state, a line of the history lost."""
    real = story.put_back

    def put_back(*given: Any) -> Any:
        progress = real(*given)
        if progress.step:
            fault(progress, *given[:2])
        return progress

    monkeypatch.setattr(story, "put_back", put_back)
    check = resumes(RunFolder(made / "runs" / "x"), 4)
    assert not check.ok
    assert check.detail.startswith("killed after step 2: ")
    assert seen in check.detail
    assert check.detail.endswith(" differ")


def test_a_trial_that_cannot_run_says_why(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's data is gone: MachineError with the last line that the trial said."""
    run = stories.again(made / "runs" / "x", "nodata")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(made / "a.jsonl"), str(made / "none.jsonl")))
    monkeypatch.setattr(module, "CHILD", "import sys; print('no such file', file=sys.stderr); sys.exit(3)")
    with pytest.raises(MachineError, match="a run of it ended with exit 3: no such file; see why first"):
        resumes(RunFolder(run), 2)
    shutil.rmtree(run)


SLOWLY = """
import time
from instil import run as story
append = story.append_metrics
def slowly(path, record):
    append(path, record)
    time.sleep(0.7)
story.append_metrics = slowly
"""
FORGETS = """
put_back = story.put_back
def forgets(*given):
    progress = put_back(*given)
    given[1].adamw.state.clear()
    return progress
story.put_back = forgets
"""


@pytest.mark.slow  # three processes that import torch
@pytest.mark.parametrize("forgets", [False, True], ids=["exact", "without-moments"])
def test_a_real_kill_and_resume(forgets: bool, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes with steps slow enough to be killed between: an exact resume passes, one without moments does not."""
    before = tiny.tree(made)
    monkeypatch.setattr(module, "CHILD", SLOWLY + (FORGETS if forgets else "") + module.CHILD)
    check = resumes(RunFolder(made / "runs" / "x"), 4)
    assert check.ok != forgets, check.detail
    done = check.detail.split()[3].rstrip(":")
    assert 1 <= int(done) < 4, check.detail
    assert ("optimizer.safetensors" in check.detail) == forgets
    assert tiny.tree(made) == before


def test_a_trial_that_was_through_too_soon_proves_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of three kills came in time: that is no proof, and said to be none."""
    monkeypatch.setattr(module, "_to_the_end", lambda words: None)
    tries: list[float] = []

    def late(words: Sequence[str], folder: Path, steps: int, wait: float) -> tuple[int, bool]:
        tries.append(wait)
        return steps, False

    monkeypatch.setattr(module, "_killed", late)
    check = resumes(RunFolder(made / "runs" / "x"), 4)
    assert not check.ok
    assert "before it could be killed" in check.detail
    assert tries == sorted(tries, reverse=True)
    assert len(tries) == 3
