"""A run goes on only as itself: what its checkpoints tell is compared, whatever became of config.yaml and manifest.json."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

import stories
import tiny
from instil.config import load_config
from instil.train import checkpoint

DONE = 4  # steps of ten


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a finished run `whole`, a run `x` that was stopped after DONE steps, `other` of another rate and seed,
    and `lora`; no test changes it."""
    place = tmp_path_factory.mktemp("identity")
    tiny.write_model(place / "m")
    tiny.write_rows(place / "a.jsonl", tiny.some_rows(40))
    stories.finished(place, name="whole")
    stories.stopped(place, DONE)
    stories.stopped(place, DONE, "train.lr=1e-3", "train.seed=9", name="other")
    stories.stopped(place, DONE, "adapter.rank=4", name="lora")
    return place


@pytest.fixture
def half(base: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run."""
    return Path(shutil.copytree(base / "runs" / "x", tmp_path / "x"))


def go_on(base: Path, run: Path, *more: object) -> tiny.Said:
    """The command that began the run, where the run is now."""
    return stories.train(base, f"run.dir={run.parent}", *more, name=run.name)


def as_whole(said: tiny.Said, run: Path, base: Path) -> bool:
    """Whether it resumed and ended as the run that nothing happened to, to the bit."""
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err
    return stories.differing(run, base / "runs" / "whole") == []


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "manifest.json").read_text()))


def rewritten(folder: Path, **changes: Any) -> None:
    """A checkpoint's manifest with other fields (None: without them), its digest right, as a program would write it."""
    manifest = {key: value for key, value in (manifest_of(folder) | changes).items() if value is not None}
    manifest.pop("sha256")
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_bytes(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS))
    assert checkpoint.verify(folder) is None


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_edited_configuration_is_not_what_the_run_began_with(base: Path, half: Path) -> None:
    """Another rate and seed written into config.yaml: exit 2 by both, with both values; put back, the run goes on."""
    file = half / "config.yaml"
    old = file.read_text()
    new = re.sub(r"\blr: 0.01\b", "lr: 1.0e-05", re.sub(r"\bseed: 0\b", "seed: 7", old))
    assert new != old
    file.write_text(new)
    before = stories.contents(half, "log.txt")
    said = tiny.command("train", half)
    assert said.code == 2, said.err
    assert said.err[-2] == f"train.lr: the run in {half} has 0.01, now 1e-05"
    assert said.err[-1].startswith(
        f"train.seed: the run in {half} has 0, now 7; set them back, start over with --fresh"
    )
    assert f"`instil fork {half} NAME train.lr=1e-05 train.seed=7`" in said.err[-1]
    assert stories.contents(half, "log.txt") == before
    file.write_text(old)
    assert as_whole(tiny.command("train", half), half, base)


def test_the_command_that_began_a_run_mends_its_configuration(base: Path, half: Path) -> None:
    """The checkpoints agree with the command: it goes on, and config.yaml is again what the run is."""
    file = half / "config.yaml"
    file.write_text(re.sub(r"\blr: 0.01\b", "lr: 1.0e-05", file.read_text()))
    assert as_whole(go_on(base, half), half, base)
    assert load_config(file).train.lr == 0.01


def test_a_configuration_that_was_cut_is_seen(base: Path, half: Path) -> None:
    """What is behind the cut would be at its defaults, precision among them: exit 2 by name, nothing is trained."""
    file = half / "config.yaml"
    text = file.read_text()
    file.write_text(text[: text.index("train:\n  lr")])  # `data:` has a key train too, of which a list follows
    said = tiny.command("train", half)
    assert said.code == 2, said.err
    assert any(line.startswith(f"train.precision: the run in {half} has 'fp32', now 'bf16'") for line in said.err)


def test_a_lost_configuration_is_that_of_the_checkpoints(base: Path, half: Path) -> None:
    """Gone: another rate is refused, and the command that began the run ends as if nothing had happened."""
    (half / "config.yaml").unlink()
    said = go_on(base, half, "train.lr=1e-3")
    assert said.code == 2, said.err
    assert said.err[-1].startswith(f"train.lr: the run in {half} has 0.01, now 0.001; set it back")
    assert as_whole(go_on(base, half), half, base)


def test_what_was_chosen_survives_a_lost_configuration(base: Path, half: Path) -> None:
    """The pack that the machine held when the run began is not chosen again."""
    chosen = load_config(half / "config.yaml").pack.tokens
    (half / "config.yaml").unlink()
    told = manifest_of(half / "checkpoints" / f"step-{DONE:06d}")["settings"]
    assert told["pack.tokens"] == str(chosen)
    rewritten(half / "checkpoints" / f"step-{DONE:06d}", settings=told | {"pack.tokens": "123"})
    assert go_on(base, half).code == 0
    assert load_config(half / "config.yaml").pack.tokens == 123


@pytest.mark.parametrize(
    ("begun", "line"),
    [
        ("train.steps=8", "train.steps: the run in {run} has 8, now None; set it back"),
        ("template={place}/t.jinja", "template: the run in {run} has '{place}/t.jinja', now None; set it back"),
        ("chat.terminator=<|im_end|>", "chat.terminator: the run in {run} has '<|im_end|>', now None; set it back"),
        ("train.batch_tokens=30", "train.batch_tokens: the run in {run} has 30, now None"),
    ],
)
def test_a_setting_that_is_left_out_is_another_setting(begun: str, line: str, place: Path) -> None:
    """Where null does not mean "chosen for you", a command without the setting is not the command that began the run."""
    (place / "t.jinja").write_text("<|endoftext|>" + tiny.CHATML)
    more = ["train.batch_examples=null"] if begun.startswith("train.batch") else []
    run = stories.stopped(place, 2, *more, begun.format(place=place))
    said = stories.train(place)
    assert said.code == 2, said.err
    assert any(text.startswith(line.format(run=run, place=place)) for text in said.err), said.err
    assert stories.train(place, *more, begun.format(place=place)).code == 0


def test_what_is_chosen_may_be_left_out(base: Path, half: Path) -> None:
    """A rate of null is "chosen for you", and the run has chosen: it keeps what it has."""
    assert as_whole(go_on(base, half, "train.lr=null", "train.epochs=null"), half, base)


def test_another_unit_of_the_batch_is_forked_as_proposed(base: Path, half: Path) -> None:
    """The fork that is proposed for a batch in tokens takes the batch in examples back; without that it names the way."""
    said = go_on(base, half, "train.batch_examples=null", "train.batch_tokens=50")
    assert said.code == 2
    (command,) = re.findall(r"`instil (fork [^`]*)`", said.err[-1])
    forked = tiny.command(*shlex.split(command.replace("NAME", "z")))
    assert forked.code == 0, forked.err
    assert load_config(half.with_name("z") / "config.yaml").train.batch_tokens == 50
    said = tiny.command("fork", half, "y", "train.batch_tokens=50")
    assert said.code == 2
    assert "set the other to null, for instance train.batch_examples=null" in said.err[-1]


# ── data and model ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lost_manifest_hides_no_other_rows(place: Path) -> None:
    """manifest.json is gone, and the file is one row longer: exit 3 with that row; as it was, the run goes on."""
    whole, run = stories.finished(place, name="whole"), stories.stopped(place, DONE)
    file = place / "a.jsonl"
    old = file.read_bytes()
    (run / "manifest.json").unlink()
    tiny.write_rows(file, [*tiny.some_rows(40), tiny.row("one", "more")])
    said = stories.train(place)
    assert said.code == 3, said.err
    assert said.err[-1].startswith(f"{file}: has changed since the run in {run} began: {file}:41 is new, 1 rows more; ")
    file.write_bytes(old)
    assert as_whole(stories.train(place), run, whole.parents[1])


@pytest.mark.parametrize("lost", ["nothing", "manifest.json", "the order in checkpoints"])
def test_files_in_any_order_are_the_run_s_own(lost: str, place: Path) -> None:
    """Three files whose names are in no order: the run goes on, to the bit, with `train RUN` too; where it can be known,
    another order is refused."""
    for name, most in (("c", 20), ("b", 30), ("a", 40)):
        tiny.write_rows(place / f"{name}.jsonl", tiny.some_rows(40)[most - 20 : most])
    files = f"[{place / 'c.jsonl'},{place / 'a.jsonl'}]"
    held = f"data.heldout={place / 'b.jsonl'}"
    allowed = "data.leak=allow"

    def go(name: str, given: str) -> tiny.Said:
        return stories.train(place, f"data.train={given}", held, allowed, name=name)

    assert go("whole", files).code == 0
    with stories.after_step(DONE, lambda: os.kill(os.getpid(), 15)):
        assert go("x", files).code == 143
    run = place / "runs" / "x"
    if lost == "manifest.json":
        (run / lost).unlink()
    if lost.startswith("the order"):
        rewritten(run / "checkpoints" / f"step-{DONE:06d}", data_files=None)
    other = go("x", f"[{place / 'a.jsonl'},{place / 'c.jsonl'}]")
    assert other.code in (2, 3), other.err
    said = tiny.command("train", run)
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err
    assert stories.differing(run, place / "runs" / "whole") == []


@pytest.mark.parametrize("what", ["model", "tokenizer", "template"])
def test_a_lost_manifest_hides_no_other_model(what: str, place: Path) -> None:
    """Without manifest.json too: exit 4 by the part that changed."""
    run = stories.stopped(place, DONE)
    (run / "manifest.json").unlink()
    name = {"model": "config.json", "tokenizer": "tokenizer_config.json", "template": "chat_template.jinja"}[what]
    file = place / "m" / name
    file.write_text(file.read_text() + "\n ")
    said = stories.train(place)
    assert said.code == 4, said.err
    assert said.err[-1].startswith(f"{run}: the {what} has changed since the run began (")


def test_a_lost_manifest_changes_no_date(base: Path, half: Path) -> None:
    """What a template is told as the date is that of the checkpoint, not today's."""
    rewritten(half / "checkpoints" / f"step-{DONE:06d}", date="2020-02-03")
    (half / "manifest.json").unlink()
    assert go_on(base, half).code == 0
    assert manifest_of(half)["date"] == "2020-02-03"


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────


def replaced(half: Path, other: Path) -> Path:
    """The checkpoint of a run in place of those of another."""
    shutil.rmtree(half / "checkpoints")
    return Path(shutil.copytree(other / "checkpoints", half / "checkpoints")) / f"step-{DONE:06d}"


def test_a_checkpoint_of_another_run_is_refused(base: Path, half: Path) -> None:
    """Of the same shapes, made at another rate with another seed: exit 2 by both, and nothing is loaded."""
    replaced(half, base / "runs" / "other")
    said = go_on(base, half)
    assert said.code == 2, said.err
    assert said.err[-2] == f"train.lr: the run in {half} has 0.001, now 0.01"
    assert said.err[-1].startswith(f"train.seed: the run in {half} has 9, now 0; ")
    assert not any("resumed" in line for line in said.err)


def test_an_older_checkpoint_of_another_run_is_refused(base: Path, half: Path) -> None:
    """It would be taken, were the newest damaged."""
    folder = base / "runs" / "other" / "checkpoints" / f"step-{DONE:06d}"
    shutil.copytree(folder, half / "checkpoints" / "step-000002")
    rewritten(half / "checkpoints" / "step-000002", step=2)
    said = go_on(base, half)
    assert said.code == 2, said.err
    assert said.err[-1].startswith(f"train.seed: the run in {half} has 9, now 0; ")


@pytest.mark.parametrize("told", [True, False])
def test_a_checkpoint_of_other_tensors_is_refused(told: bool, base: Path, half: Path) -> None:
    """Of an adapter in a run of all weights: exit 2, by its settings, or, where an older version told none, its tensors."""
    folder = replaced(half, base / "runs" / "lora")
    if not told:
        rewritten(folder, settings=None)
    said = go_on(base, half)
    assert said.code == 2, said.err
    text = "has 4, now 0" if told else f"{folder}: holds other tensors than this run trains (the first is "
    assert text in said.err[-1] or any(text in line for line in said.err)


def test_a_checkpoint_that_tells_no_settings_is_taken(base: Path, half: Path) -> None:
    """As the versions before wrote it: its run is compared by config.yaml, and goes on to the same bits."""
    rewritten(half / "checkpoints" / f"step-{DONE:06d}", settings=None)
    said = go_on(base, half, "train.seed=3")
    assert said.code == 2
    assert said.err[-1].startswith(f"train.seed: the run in {half} has 0, now 3; ")
    assert as_whole(go_on(base, half), half, base)


def test_a_checkpoint_tells_the_settings_of_its_run(base: Path, half: Path) -> None:
    """Each key that must stay, as JSON, and with it the digests of data, model, tokenizer and template."""
    told = manifest_of(half / "checkpoints" / f"step-{DONE:06d}")
    assert (told["settings"]["train.lr"], told["settings"]["train.schedule"]) == ("0.01", '"cosine"')
    assert "run.dir" not in told["settings"]
    run = manifest_of(half)
    for key in ("model", "tokenizer_sha256", "template_sha256", "data_sha256"):
        assert told[key] == run[key]


def test_where_no_checkpoint_is_left_it_is_said(base: Path, half: Path) -> None:
    """All gone, four steps logged: a line says that they are done again, and the end is the same."""
    shutil.rmtree(half / "checkpoints")
    said = go_on(base, half)
    assert said.code == 0, said.err
    lines = [line for line in said.err if line.startswith("no checkpoint is there: ")]
    assert lines == ["no checkpoint is there: the 4 steps that were logged are done again, from the first one"]
    assert stories.differing(half, base / "runs" / "whole") == []


def test_a_run_that_begins_says_nothing_of_checkpoints(place: Path) -> None:
    """There has never been one, and nothing is logged."""
    assert not any("no checkpoint" in line for line in stories.train(place, "train.steps=1").err)


def test_a_fork_with_fewer_steps_than_are_done_is_refused(place: Path) -> None:
    """On data of which ten steps are more than all: exit 2; and a fork made as the line says goes on."""
    run = stories.finished(place)
    few = tiny.write_rows(place / "few.jsonl", tiny.some_rows(16))
    assert tiny.command("fork", run, "y", f"data.train={few}").code == 0
    said = tiny.command("train", run.with_name("y"))
    assert said.code == 2, said.err
    what = "10 steps are done, and these settings give 4; "
    assert said.err[-1] == f"{run.with_name('y')}: {what}fork {run} once more, with more train.epochs or train.steps"
    assert tiny.command("fork", run, "z", f"data.train={few}", "train.epochs=6").code == 0
    assert tiny.command("train", run.with_name("z")).code == 0


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def relative(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with a run `x`, begun by relative paths from there and stopped; the test is elsewhere now."""
    (place / "t.jinja").write_text("<|endoftext|>" + tiny.CHATML)
    (place / "else").mkdir()
    monkeypatch.chdir(place)
    with stories.after_step(DONE, lambda: os.kill(os.getpid(), 15)):
        said = tiny.command(*relative_words())
    assert said.code == 143, said.err
    monkeypatch.chdir(place / "else")
    return place


def relative_words(name: str = "x") -> list[str]:
    what = ("model=m", "data.train=[a.jsonl]", "template=t.jinja")
    return ["train", *what, *stories.RECIPE, "run.dir=runs", f"run.name={name}"]


def test_a_run_begun_by_relative_paths_goes_on_from_elsewhere(relative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml has them in full; the run, verified and resumed from another folder, ends as the undisturbed one."""
    config = load_config(relative / "runs" / "x" / "config.yaml")
    assert (config.model, config.template) == (str(relative / "m"), str(relative / "t.jinja"))
    assert config.data.train == [str(relative / "a.jsonl")]
    assert tiny.command("verify", "../runs/x", "--steps", 0).code == 0
    assert tiny.command("train", "../runs/x").code == 0
    monkeypatch.chdir(relative)
    assert tiny.command(*relative_words("whole")).code == 0
    assert stories.differing(relative / "runs" / "x", relative / "runs" / "whole") == []


def test_the_relative_paths_go_on_as_well(relative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same command from where it was given first."""
    monkeypatch.chdir(relative)
    said = tiny.command(*relative_words())
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err


def test_changed_data_of_relative_paths_is_named_by_its_row(relative: Path) -> None:
    """The ledger calls the file a.jsonl, the command calls it in full: exit 3 with the first row that differs."""
    file = relative / "a.jsonl"
    rows = tiny.some_rows(40)
    tiny.write_rows(file, [*rows[:6], tiny.row("say what", "else"), *rows[7:]])
    said = tiny.command("train", "../runs/x")
    assert said.code == 3, said.err
    assert said.err[-1].startswith(f"{file}: has changed since the run in ../runs/x began: {file}:7 is the first row")


@pytest.mark.parametrize("spelt", ["{place}/moved", "{place}/moved/", "../moved"])
def test_a_moved_model_is_the_same_model(spelt: str, relative: Path) -> None:
    """Renamed, and given by its new place: the run goes on, and its record has the new place."""
    (relative / "m").rename(relative / "moved")
    assert tiny.command("train", "../runs/x").code == 4
    said = tiny.command("train", "../runs/x", f"model={spelt.format(place=relative)}")
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err
    run = relative / "runs" / "x"
    assert load_config(run / "config.yaml").model == str(relative / "moved")
    assert manifest_of(run)["model"]["name"] == str(relative / "moved")


def test_a_moved_template_is_the_same_template(relative: Path) -> None:
    """Also where it is now the model's own: its text counts."""
    (relative / "t.jinja").rename(relative / "m" / "chat_template.jinja")
    said = tiny.command("train", "../runs/x", "template=null")
    assert said.code == 0, said.err
    assert f"resumed after step {DONE}" in said.err


def test_a_fork_may_name_the_moved_model(relative: Path) -> None:
    """The same content at another place is what the checkpoint fits; other content is refused as before."""
    (relative / "m").rename(relative / "moved")
    tiny.write_model(relative / "wide", hidden_size=64)
    said = tiny.command("fork", "../runs/x", "y", f"model={relative / 'wide'}")
    assert said.code == 2
    assert "its checkpoint fits nothing else" in said.err[-1]
    assert tiny.command("fork", "../runs/x", "y", f"model={relative / 'moved'}").code == 0
    assert tiny.command("train", "../runs/y").code == 0


def test_another_model_elsewhere_is_another_setting(relative: Path) -> None:
    """The same shapes, one weight otherwise, in another folder: exit 2 with both places, and no fork is proposed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(relative / "m", relative / "other")
    file = relative / "other" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][7, 7] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    said = tiny.command("train", "../runs/x", f"model={relative / 'other'}")
    assert said.code == 2, said.err
    model = f"has '{relative / 'm'}', now '{relative / 'other'}'; set it back, start over with --fresh"
    assert said.err[-1].startswith(f"model: the run in ../runs/x {model}, or begin another run with run.name=NAME")


# ── what losses are measured on ──────────────────────────────────────────────────────────────────────────────────────


def heldout_losses(run: Path) -> tuple[Any, dict[str, float], set[int]]:
    """loss_before of the summary, its losses by step, and the steps that metrics.jsonl has one for."""
    summary = json.loads((run / "summary.json").read_text())
    logged = {record["step"] for record in tiny.metrics_of(run) if record.get("heldout_loss") is not None}
    return summary["loss_before"], summary["heldout_losses"], logged


@pytest.mark.parametrize(
    ("setting", "same"), [("train.lr=1e-3", True), ("evaluate.examples=2", False), ("data.heldout=0.3", False)]
)
def test_a_fork_has_no_before_on_other_examples(setting: str, same: bool, place: Path) -> None:
    """On the run's held-out examples its losses go on; on others those before the fork are left out, and it is said."""
    run = stories.stopped(place, DONE, "data.heldout=0.2", "evaluate.every_steps=2")
    before = {int(step): loss for step, loss in stories.newest(run).counters["heldout"].items()}
    assert set(before) == {0, 2, 4}
    assert tiny.command("fork", run, "y", setting).code == 0
    said = tiny.command("train", run.with_name("y"))
    assert said.code == 0, said.err
    first, losses, logged = heldout_losses(run.with_name("y"))
    told = "the held-out losses so far were measured on other examples: they are left out"
    assert (told in said.err) is not same
    if same:
        assert {step: losses[str(step)] for step in before} == before
        assert first == before[0]
        assert {2, 4} < logged
    else:
        assert first is None
        assert min(map(int, losses)) > DONE
        assert min(logged) > DONE


# ── random numbers ───────────────────────────────────────────────────────────────────────────────────────────────────

DROPOUT = """
import sys
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel
import torch
torch.manual_seed(0)
fields = dict(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
GPT2LMHeadModel(GPT2Config(**fields, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.3)).save_pretrained(sys.argv[1])
"""


def test_dropout_is_drawn_from_the_seed_in_every_process(tmp_path: Path) -> None:
    """Two processes begin the same run of a model with dropout: equal weights."""
    tiny.write_model(tmp_path / "m", weights=False)
    subprocess.run([sys.executable, "-c", DROPOUT, tmp_path / "m"], check=True, capture_output=True)
    tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(8))
    child = "from instil.cli.main import main; main()"

    def weights(name: str) -> bytes:
        words = stories.words(tmp_path, "train.steps=2", name=name)
        done = subprocess.run([sys.executable, "-c", child, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "runs" / name / "model" / "model.safetensors").read_bytes()

    assert weights("x") == weights("y")
