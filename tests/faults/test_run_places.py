"""Where a run is: moved, copied, linked, unwritable, in a place that is for something else, or no run at all."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import shutil
import signal
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import STEPS, assert_same_run, forked, words

import tiny
from instil.config import load_config
from instil.errors import UsageError
from instil.train import checkpoint

# ── moved, copied, linked ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def stopped(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after step 9 of 40."""
    from instil import run as story

    real = story.append_metrics

    def spy(path: Path, record: dict[str, Any]) -> None:
        real(path, record)
        if record["step"] == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(story, "append_metrics", spy)
        assert tiny.command(*words(source, tmp_path / "runs" / "x", "checkpoint.every_steps=5")).code == 143
    return tmp_path / "runs" / "x"


def itself(run: Path) -> dict[str, Any]:
    """Who a run says it is."""
    found: dict[str, Any] = json.loads((run / "manifest.json").read_text())["run"]
    return found


def test_a_moved_run_goes_on_and_is_itself(stopped: Path, whole: Path, tmp_path: Path) -> None:
    """`instil train NEW_PLACE` resumes with the same bits, under the id that it had; nothing is made in the old place."""
    before = itself(stopped)
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "y"
    stopped.rename(moved)
    said = tiny.command("train", moved)
    assert said.code == 0, said.err
    assert "resumed after step 9" in said.err
    assert_same_run(moved, whole)
    assert itself(moved) == before
    assert not stopped.exists()


def test_a_copied_run_goes_on_as_another(stopped: Path, whole: Path, tmp_path: Path) -> None:
    """cp -r: the copy gets an id of its own and says whose copy it is; both go on to the same bits, and keep their ids."""
    before, copy = itself(stopped), tmp_path / "copy"
    shutil.copytree(stopped, copy)
    for _ in range(2):
        assert tiny.command("train", copy).code == 0
        found = itself(copy)
        assert found["id"] != before["id"]
        assert found["copied_from"] == before["id"]
    assert itself(stopped) == before
    assert not (stopped / "summary.json").exists()
    assert tiny.command("train", stopped).code == 0
    assert itself(stopped) == before
    assert_same_run(copy, whole)
    assert_same_run(stopped, whole)


@pytest.mark.parametrize("how", ["link", "link/", "link/config.yaml", "link/../runs/x", "."])
def test_a_linked_run_is_the_run(
    how: str, stopped: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a symbolic link of another name and place, or from within: the run goes on where it is, and no other is begun."""
    before = itself(stopped)
    (tmp_path / "link").symlink_to(stopped, target_is_directory=True)
    monkeypatch.chdir(stopped if how == "." else tmp_path)
    given = "runs/x" if how.startswith("link/..") else how
    said = tiny.command("train", given)
    assert said.code == 0, said.err
    assert "resumed after step 9" in said.err
    assert_same_run(stopped, whole)
    assert itself(stopped) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]


# ── unwritable ───────────────────────────────────────────────────────────────────────────────────────────────────────

CAPGET, CAPSET, VERSION_3 = 125, 126, 0x20080522  # x86_64; linux/capability.h
OVERRIDES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


def obey_permissions() -> None:
    """In a child: root gives up the right to write where nobody may; others have none."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = ctypes.create_string_buffer(struct.pack("Ii", VERSION_3, 0)), ctypes.create_string_buffer(24)
    assert libc.syscall(CAPGET, header, data) == 0
    sets = list(struct.unpack("6I", data.raw[:24]))
    sets[0] &= ~OVERRIDES
    data = ctypes.create_string_buffer(struct.pack("6I", *sets))
    assert libc.syscall(CAPSET, header, data) == 0


obeys = pytest.mark.skipif(
    os.name != "posix" or (os.geteuid() == 0 and not (sys.platform == "linux" and os.uname().machine == "x86_64")),
    reason="permissions do not bind root here",
)


@obeys
def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    """Exit 5 in one line before step 1; nothing is made."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs").chmod(0o555)
    child = forked(words(source, tmp_path / "runs" / "x"), tmp_path / "said", before=obey_permissions)
    assert child.wait() == 5
    (line,) = child.lines()
    assert line.startswith(f"{tmp_path / 'runs' / 'x'}: cannot be written (Permission denied); ")
    assert list((tmp_path / "runs").iterdir()) == []


@obeys
@pytest.mark.parametrize("given_back", [True, False])
def test_permission_lost_on_the_way(given_back: bool, source: Path, whole: Path, tmp_path: Path) -> None:
    """As a failed save: a warning, then exit 5 at the second; given back in between, the run ends with the same bits."""
    folder = tmp_path / "x"

    def losing() -> None:
        obey_permissions()
        from instil import run as story

        real = story.append_metrics

        def spy(path: Path, record: dict[str, Any]) -> None:
            real(path, record)
            if record["step"] in (10, 18):
                locked = record["step"] == 10 or not given_back
                (path.parent / "checkpoints").chmod(0o555 if locked else 0o755)

        story.append_metrics = spy

    child = forked(words(source, folder, "checkpoint.every_steps=8"), tmp_path / "said", before=losing)
    code = child.wait()
    (folder / "checkpoints").chmod(0o755)
    (warning,) = [line for line in child.lines() if line.startswith("warning: ") and "not saved" in line]
    assert f"{folder / 'checkpoints' / 'step-000016'}: not saved: Permission denied" in warning
    assert "training goes on, the next save is the last try" in warning
    if given_back:
        assert code == 0, child.lines()
    else:
        assert code == 5, child.lines()
        assert child.lines()[-1].startswith(f"{folder / 'checkpoints' / 'step-000024'}: not saved: Permission denied")
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000008"]
        assert checkpoint.verify(folder / "checkpoints" / "step-000008") is None
        assert "Traceback" not in "\n".join(child.lines())
        assert tiny.command(*words(source, folder)).code == 0
    assert_same_run(folder, whole)


# ── data that changes meanwhile ──────────────────────────────────────────────────────────────────────────────────────


def test_data_changed_during_the_run(place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run learns from its own copy, with the same bits; the next start says exit 3 and where it differs."""
    from instil import run as story

    real, folder = story.append_metrics, tmp_path / "runs" / "x"

    def spy(path: Path, record: dict[str, Any]) -> None:
        real(path, record)
        if record["step"] == 3:
            rows = tiny.some_rows(40)
            rows[16]["messages"][1]["content"] = "other"
            tiny.write_rows(place / "a.jsonl", rows)

    with monkeypatch.context() as patch:
        patch.setattr(story, "append_metrics", spy)
        assert tiny.command(*words(place, folder)).code == 0
    assert_same_run(folder, whole)
    before = {path: path.read_bytes() for path in (folder / "model").iterdir()}
    said = tiny.command(*words(place, folder))
    assert said.code == 3
    assert f"{place / 'a.jsonl'}: has changed since the run" in said.err[-1]
    assert f"{place / 'a.jsonl'}:17 is the first row that differs" in said.err[-1]
    assert {path: path.read_bytes() for path in (folder / "model").iterdir()} == before


# ── names and places ─────────────────────────────────────────────────────────────────────────────────────────────────

BAD_NAMES = [
    "../x", "a/b", "", ".", "..", "CON", "con", "Aux.txt", "nul", "PRN", "COM1", "lpt9.log", "x" * 300, "x\n", "a\nb",
    "\N{PARTY POPPER}", "-x", "--fresh", "a b", "a\\b", "x\0y", "_x", "é",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_is_no_name(name: str, source: Path, tmp_path: Path) -> None:
    """Exit 2 in one line that names run.name, and nothing is made."""
    with pytest.raises(UsageError, match=r"run\.name") as caught:
        load_config(None, (), {"model": "m", "data.train": ["a"], "run.name": name})
    assert caught.value.exit_code == 2
    assert len(caught.value.lines()) == 1
    quoted = json.dumps(name)
    said = tiny.command(*words(source, tmp_path / "x")[:-1], f"run.dir={tmp_path}", f"run.name={quoted}")
    assert said.code == 2
    assert len(said.err) == 1
    assert tiny.tree(tmp_path) == set()


@pytest.mark.parametrize("name", ["x", "x" * 64, "0", "a.b-c_d", "console", "com", "COM10", "nul-1", "auxiliary"])
def test_a_name_that_is_one(name: str) -> None:
    """Letters, digits, dot, hyphen, underscore; names that only begin like a device's are no device's."""
    assert load_config(None, (), {"model": "m", "data.train": ["a"], "run.name": name}).run.name == name


def unchanged(folder: Path) -> dict[str, Any]:
    """All that is below a folder: names, contents, permissions, times."""
    found = {}
    for path in folder.rglob("*"):
        seen = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(seen.st_mode) else None
        found[str(path.relative_to(folder))] = (seen.st_mode, seen.st_mtime_ns, content)
    return found


def test_the_folder_of_the_data_is_no_run(place: Path) -> None:
    """As the run itself, or where a run in it would become data of the next start: exit 2 with what to do."""
    (place / "d").mkdir()
    shutil.move(place / "a.jsonl", place / "d" / "a.jsonl")
    before = unchanged(place)
    for data, folder in ((place / "d" / "a.jsonl", place / "d"), (place / "d", place / "d" / "x"),
                         (place / "d", place / "d" / "deep" / "x")):  # fmt: skip
        given = ["train", "--model", place / "m", "--data", data, *tiny.FAST]
        said = tiny.command(*given, f"run.dir={folder.parent}", f"run.name={folder.name}")
        assert said.code == 2
        (line,) = said.err
        assert line.startswith("run.dir: ")
        assert "choose another run.dir" in line
        assert unchanged(place) == before
    heldout = words(place, place / "d", f"data.heldout={place / 'd' / 'a.jsonl'}")
    heldout[heldout.index("--data") + 1] = str(tiny.write_rows(place / "b.jsonl", tiny.some_rows(8)))
    assert tiny.command(*heldout).code == 2
    beside = words(place, place / "d" / "x", "train.steps=1")
    beside[beside.index("--data") + 1] = str(place / "d" / "a.jsonl")
    assert tiny.command(*beside).code == 0


@pytest.mark.parametrize("which", ["root", "home", "home as a run"])
def test_the_root_and_the_home_folder_hold_no_runs(
    which: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 2 and nothing is made; a folder in the home folder is fine."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    folder = {"root": Path("/instil-test"), "home": home / "x", "home as a run": home}[which]
    said = tiny.command(*words(source, folder))
    assert said.code == 2
    (line,) = said.err
    assert line.startswith("run.dir: ")
    assert line.endswith("choose another run.dir, for instance run.dir=runs")
    assert list(home.iterdir()) == []
    assert not Path("/instil-test").exists()
    assert tiny.command(*words(source, home / "runs" / "x", "train.steps=1")).code == 0


@pytest.mark.parametrize("in_git", [True, False])
def test_a_run_in_a_git_work_tree_ignores_itself(in_git: bool, source: Path, tmp_path: Path) -> None:
    """`.gitignore` with `*`; elsewhere there is none; one that is there already stays."""
    if in_git:
        (tmp_path / ".git").mkdir()
    folder = tmp_path / "deep" / "runs" / "x"
    assert tiny.command(*words(source, folder, "train.steps=1")).code == 0
    assert (folder / ".gitignore").exists() == in_git
    if in_git:
        assert (folder / ".gitignore").read_text() == "*\n"
        (folder / ".gitignore").write_text("mine\n")
        assert tiny.command(*words(source, folder, "train.steps=1")).code == 0
        assert (folder / ".gitignore").read_text() == "mine\n"


def test_git_itself_sees_nothing_of_a_run(source: Path, tmp_path: Path) -> None:
    """The oracle: `git status` in a repository in which a run was trained is clean, and was not without the file."""
    import subprocess

    if shutil.which("git") is None:
        pytest.skip("no git here")
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*given: str) -> str:
        done = subprocess.run(
            ["git", *given], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    git("init", "-q")
    assert tiny.command(*words(source, tmp_path / "runs" / "x", "train.steps=1")).code == 0
    assert git("status", "--porcelain") == ""
    (tmp_path / "runs" / "x" / ".gitignore").unlink()
    assert "runs/" in git("status", "--porcelain")


@pytest.mark.parametrize("name", ["thesis.txt", ".hidden", "sub/file"])
@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_foreign_files_are_not_touched(name: str, more: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    """Exit 2, and every name, byte, permission and time in the folder is as it was."""
    folder = tmp_path / "x"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("years of work")
    before = unchanged(tmp_path)
    said = tiny.command(*words(source, folder, *more))
    assert said.code == 2
    assert said.err == [f"run.dir: {folder} holds files that are not a run's; choose another run.name"]
    assert unchanged(tmp_path) == before


@pytest.mark.parametrize("kind", ["absent", "empty", "foreign", "a file", "half a run"])
@pytest.mark.parametrize("verb", ["train", "evaluate", "explain", "fork", "verify", "replay"])
def test_what_is_no_run_is_refused(verb: str, kind: str, tmp_path: Path) -> None:
    """Exit 2 in one line that names it, and nothing is made or changed."""
    folder = tmp_path / "nothing"
    if kind == "a file":
        folder.write_text("a: 1\n")
    elif kind != "absent":
        folder.mkdir()
        if kind == "foreign":
            (folder / "thesis.txt").write_text("years of work")
        if kind == "half a run":
            (folder / "run.lock").touch()
    before = unchanged(tmp_path)
    more = {"explain": ["a.jsonl:1"], "fork": ["y"]}.get(verb, [])
    said = tiny.command(verb, folder, *more)
    codes = (2, 4) if verb == "evaluate" else (2,)  # evaluate takes models as well: what is neither is no model
    assert said.code in codes, said.err
    assert str(folder) in "\n".join(said.err) or verb == "train"
    assert unchanged(tmp_path) == before


# ── a torn line ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("torn", [b'{"step":10,"lo', b"{", b"\0" * 40, b'\xff\xfe{"step', b"7\n"])
def test_a_torn_last_line_of_the_metrics(torn: bytes, stopped: Path, source: Path, whole: Path) -> None:
    """report and explain leave it out, the report says so; a resume drops it and makes the line again."""
    from instil.report.page import write_report

    metrics = stopped / "metrics.jsonl"
    good = metrics.read_bytes()
    metrics.write_bytes(good + torn)
    page = write_report(stopped).read_text()
    assert "The last line of metrics.jsonl is torn" in page
    said = tiny.command("explain", stopped, f"{source / 'a.jsonl'}:3", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["steps_done"] == 9
    assert metrics.read_bytes() == good + torn
    assert tiny.command("train", stopped).code == 0
    assert metrics.read_bytes().startswith(good)
    assert [record["step"] for record in tiny.metrics_of(stopped)] == list(range(1, STEPS + 1))
    assert_same_run(stopped, whole)


def changed_manifest(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    change(manifest)
    (run / "manifest.json").write_text(json.dumps(manifest))


# ── another machine ──────────────────────────────────────────────────────────────────────────────────────────────────


def older(manifest: dict[str, Any]) -> None:
    manifest["versions"]["torch"] = "1.0.0"
    manifest["versions"]["python"] = "3.10.0"
    manifest["numerics"]["device"] = "cuda:0"


def test_another_machine_is_said_once_and_recorded(
    stopped: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for each version and device that changed, kept in manifest.json; the next resume says nothing of it."""

    from instil import run as story

    changed_manifest(stopped, older)
    real, stop_at = story.append_metrics, [12]

    def spy(path: Path, record: dict[str, Any]) -> None:
        real(path, record)
        if record["step"] in stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(story, "append_metrics", spy)
    said = tiny.command("train", stopped)
    assert said.code == 143
    end = " since the run began: from here on it is not the same to the bit"
    python = ".".join(map(str, sys.version_info[:3]))
    torch = importlib.metadata.version("torch")
    what = [f"torch 1.0.0 -> {torch}", f"python 3.10.0 -> {python}", "device cuda:0 -> cpu"]
    lines = sorted(line for line in said.err if "not the same to the bit" in line)
    assert lines == sorted(f"warning: {each}{end}" for each in what)
    changes = json.loads((stopped / "manifest.json").read_text())["changes"]
    assert [(each["after_step"], sorted(each["what"])) for each in changes] == [(9, sorted(what))]
    stop_at[:] = [15]
    said = tiny.command("train", stopped)
    assert said.code == 143
    assert not [line for line in said.err if "not the same to the bit" in line]
    assert json.loads((stopped / "manifest.json").read_text())["changes"] == changes
    stop_at[:] = []
    said = tiny.command("train", stopped, "run.threads=2")
    assert said.code == 0
    assert [line for line in said.err if "to the bit" in line] == [f"warning: threads 1 -> 2{end}"]
    changes = json.loads((stopped / "manifest.json").read_text())["changes"]
    assert changes[1:] == [{"after_step": 15, "what": ["threads 1 -> 2"]}]


def test_the_same_machine_is_not_worth_a_word(stopped: Path, whole: Path) -> None:
    """The other way round: a resume with nothing changed warns of nothing and records nothing."""
    said = tiny.command("train", stopped)
    assert said.code == 0
    assert "to the bit" not in "\n".join(said.err)
    assert json.loads((stopped / "manifest.json").read_text())["changes"] == []
    assert_same_run(stopped, whole)


@pytest.mark.parametrize("device", ["cuda:7", "cuda:99", "tpu", "gpu"])
def test_a_device_that_is_not_here(device: str, source: Path, tmp_path: Path) -> None:
    """Exit 5 with the devices that are; never silently the CPU, and nothing is left."""
    said = tiny.command(*words(source, tmp_path / "x", f"run.device={device}"))
    assert said.code == 5
    (line,) = said.err
    assert line.startswith(f"run.device: '{device}' is not here; use one of: cpu")
    assert tiny.tree(tmp_path) == set()
