"""A process that dies at any call of a save, a prune or a publication leaves the old or the new, never between; power too."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import crashes
import pytest
from crashes import ACTS, DIED, NEW, NEW_LEDGER, OLD, OLD_LEDGER, PLANTS, SAVES, same_state, state
from forks import Forks

from instil import files
from instil.data import ledger
from instil.errors import MachineError
from instil.pack import store
from instil.train import checkpoint
from instil.train.checkpoint import load_latest, steps_newest_first, verify

Record = Callable[[str, object], None]
MOST_POINTS = 400
AFTER = {"first save": 1, "third save, which prunes": 3, "save over a damaged one": 5, "prune": 5}  # the newest then


# --- what must hold at every point


def problems_of(act: str, root: Path, *, done: bool, powerless: bool = False, exchange: bool = True) -> list[str]:
    """What is wrong with the files that a process left which died in an act. done: it had come to its end; powerless: the
    power went, so that a name that was being removed may be there again, and its folder in part."""
    if act in SAVES:
        return list(checkpoint_problems(act, root, done, powerless))
    found = list(published_problems(act, root, done, exchange))
    for folder in (root, root / "packs"):
        if folder.is_dir():
            files.sweep(folder)
    left = [path.name for path in root.rglob(".*")]
    return (
        found + [f"{left} stays after a sweep" for _ in left[:1]] + list(published_problems(act, root, done, exchange))
    )


def checkpoint_problems(act: str, root: Path, done: bool, powerless: bool) -> Iterator[str]:
    """Of checkpoints: which verify, which one is loaded, and whether the next save cleans up."""
    folder, new = root / "checkpoints", AFTER[act]
    damaged_before = {5} if act == "save over a damaged one" else set()
    before = set(SAVES[act]) - damaged_before
    there = {checkpoint.step_of(path): verify(path) for path in steps_newest_first(folder)}
    good = {step for step, problem in there.items() if problem is None}
    if not good <= before | {new}:
        yield f"{good} verify, of which some were never saved"
    if len(good) < min(len(before), 2):
        yield f"{len(before)} verified before, and {good} now"
    half = set(there) - good - damaged_before
    if half and not powerless:
        yield f"{half} are there in part"
    if done and new not in good:
        yield f"{new} was saved, and is not there"
    try:
        found = load_latest(folder)
    except MachineError as error:
        yield f"nothing loads: {error}"
        return
    if (found is None) != (not before and not good):
        yield f"{before} verified before, and nothing is found"
    if found is not None and not (found.state.step == max(good) and same_state(found.state, state(max(good)))):
        yield f"step {found.state.step} is loaded, not {max(good)}"
    if found is not None and before and found.state.step < max(before):
        yield f"step {found.state.step} is loaded, and {max(before)} verified before"
    checkpoint.save(folder, state(9), {}, keep=2)
    left = [path.name for path in folder.iterdir() if not path.name.startswith("step-")]
    if left:
        yield f"{left} stay after the next save"
    again = load_latest(folder)
    if again is None or again.state.step != 9:
        yield "the next save cannot be loaded"


def published_problems(act: str, root: Path, done: bool, exchange: bool) -> Iterator[str]:
    """Of a folder or a file: the old or the new (or none, where there was none)."""
    if act.startswith("publish examples"):
        folder = root / "packs" / "key"
        wrong = store.damage(folder) if folder.is_dir() else "absent"
        old = wrong == "absent" if act == "publish examples" else (folder / "train.arrow").exists() and bool(wrong)
        old = old or (wrong == "absent" and not exchange)
        if wrong and (done or not old):
            yield f"examples: {wrong}"
        if wrong is None and len(store.open_store(folder)[0]["train"]) != len(crashes.examples()):
            yield "the examples are not those that were published"
    elif act.startswith("publish"):
        found = {path.name: path.read_bytes() for path in (root / "model").glob("*")}
        old = OLD if act == "publish over an older one" else {}
        if found != NEW and (done or not (found == old or (not exchange and not found))):
            yield f"model/ holds {sorted(found)}, neither the old nor the new"
    elif act == "write_atomically":
        content = (root / "file").read_bytes()
        if content != b"new" * 40 and (done or content != b"old"):
            yield f"the file holds {content!r}"
    else:
        entries = ledger.read_ledger(root / "ledger.jsonl")
        if entries != NEW_LEDGER and (done or entries != OLD_LEDGER):
            yield f"the ledger has {len(entries)} entries"


# --- killed


def died_everywhere(
    act: str, forks: Forks, place: Path, *, exchange: bool = True, plant: str = ""
) -> tuple[int, list[str]]:
    """Do an act in forked processes, the n-th of which ends at point n, until one comes to the end of it (with a planted
    fault: until it is found)."""
    crashes.prepare(act, place / "before")
    found: list[str] = []
    for point in range(1, MOST_POINTS):
        root = place / "x"
        shutil.copytree(place / "before", root)
        child = forks.call("crashes:dies", act, str(root), point, exchange, plant, log=place / "log")
        code = child.wait().code
        assert code in (0, DIED), child.said()
        try:
            wrong = problems_of(act, root, done=code == 0, exchange=exchange)
        except Exception as error:  # of planted faults
            wrong = [f"{type(error).__name__}: {error}"]
        found += [f"{act}, point {point}: {problem}" for problem in wrong]
        shutil.rmtree(root)
        if code == 0 or (plant and found):
            return point - 1, found
    raise AssertionError("it does not come to an end")


CANNOT = "the system cannot exchange names"
OVER = [act for act in ACTS if "over" in act]
ALSO = [
    pytest.param(act, False, id=f"{act}, {CANNOT}", marks=[pytest.mark.slow] if act != OVER[0] else []) for act in OVER
]


@pytest.mark.parametrize(("act", "exchange"), [*(pytest.param(act, True, id=act) for act in ACTS), *ALSO])
def test_a_process_that_dies_at_any_point_leaves_the_old_or_the_new(
    act: str, exchange: bool, cold_forks: Forks, tmp_path: Path, record_property: Record
) -> None:
    """Before each call that changes files and in the middle of each write; what is left over, the next save removes."""
    points, found = died_everywhere(act, cold_forks, tmp_path, exchange=exchange)
    record_property("points", points)
    assert found == []
    assert points >= 5


PLANTED = [
    ("first save", "written in place"),
    ("third save, which prunes", "pruned before the save"),
    ("third save, which prunes", "removed without a rename"),
    ("publish over an older one", "written in place"),
    ("publish examples", "written in place"),
    ("write_atomically", "plain writes"),
    ("write_ledger", "plain writes"),
]


@pytest.mark.parametrize(("act", "plant"), PLANTED)
def test_a_planted_fault_is_found_by_dying(act: str, plant: str, cold_forks: Forks, tmp_path: Path) -> None:
    """Files written where they are read, checkpoints removed too soon or piece by piece: some point shows it."""
    assert died_everywhere(act, cold_forks, tmp_path, plant=plant)[1]


# --- without power

DATA, NAMES = ("zeroed", "cut", "gone"), ("kept", "undone", "some")
EVERY = [(*each, seed) for each in itertools.product(DATA, NAMES) for seed in range(3 if each[1] == "some" else 1)]
RECORD = {"step": 1, "seconds": 1.0, "computed_tokens": 9}
FEW = [("zeroed", "undone", 0), ("cut", "some", 1)]


def powerless_everywhere(act: str, place: Path, losses: list[tuple[str, str, int]]) -> tuple[int, list[str]]:
    """Do an act once, look at the files at each point as a disk may have them after a power cut there."""
    root = place / "x"
    crashes.prepare(act, root)
    found: list[str] = []
    shots = crashes.snapshots(lambda: ACTS[act](root), root, place / "shots")
    for number, shot in enumerate(shots):
        for data, names, seed in losses:
            after = shot.after_power_loss(place / "after", data, names, seed + 100 * number)
            try:
                wrong = problems_of(act, after, done=shot.what == "end", powerless=True)
            except Exception as error:  # of planted faults
                wrong = [f"{type(error).__name__}: {error}"]
            found += [f"{act}, before {shot.what} ({number}), {data}, names {names}: {each}" for each in wrong]
    return len(shots), found


@contextmanager
def planted(plant: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A planted fault, taken out again."""
    with monkeypatch.context() as patch:
        for place in (checkpoint, files, store, ledger):
            for name in ("sync", "publish", "discard", "write_atomically"):
                if hasattr(place, name):
                    patch.setattr(place, name, getattr(place, name))  # so that it is put back
        PLANTS[plant]()
        yield


@pytest.mark.parametrize("losses", [FEW, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["few", "every"])
@pytest.mark.parametrize("act", ACTS)
def test_a_power_cut_at_any_point_leaves_the_old_or_the_new(
    act: str, losses: list[tuple[str, str, int]], tmp_path: Path, record_property: Record
) -> None:
    """What was not flushed is zeroed, cut or gone, and names are what they were: a checkpoint that verified still does,
    and what has been saved stays saved."""
    points, found = powerless_everywhere(act, tmp_path, losses)
    record_property("points", points)
    record_property("power cuts", points * len(losses))
    assert found == []
    assert points >= 5


FLUSHES = ["files are not flushed", "the manifest is not flushed", "folders are not flushed"]
UNFLUSHED = [*itertools.product(["first save", "third save, which prunes"], FLUSHES), ("publish", FLUSHES[0])]


@pytest.mark.parametrize(("act", "plant"), UNFLUSHED)
def test_a_missing_flush_is_found(act: str, plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a save that does not wait for its files, its manifest, or the names of its folders."""
    with planted(plant, monkeypatch):
        found = powerless_everywhere(act, tmp_path, FEW[:1])[1]
    assert found


def test_every_way_in_which_power_is_lost_changes_something(tmp_path: Path) -> None:
    """Each kind of loss leaves other files than a mere kill at some point: none of them is idle."""
    root = tmp_path / "x"
    crashes.prepare("third save, which prunes", root)
    shots = crashes.snapshots(lambda: ACTS["third save, which prunes"](root), root, tmp_path / "shots")
    idle = []
    for data, names in itertools.product(DATA, NAMES):
        changed = 0
        for shot in shots[::3]:
            after = shot.after_power_loss(tmp_path / "after", data, names)
            changed += contents(after) != contents(shot.path)
        idle += [(data, names)] if changed < 2 else []
    assert idle == []


def test_the_history_is_on_the_disk_before_the_checkpoint_that_follows_from_it(tmp_path: Path) -> None:
    """Whatever a power cut leaves: where a checkpoint of step 1 verifies, metrics.jsonl has the line of step 1."""
    from instil.folder import RunFolder, append_metrics, read_metrics
    from instil.resume import flush_metrics

    def act(flush: Callable[[RunFolder], None]) -> None:
        run = RunFolder(tmp_path / "x")
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.rmtree(tmp_path / "shots", ignore_errors=True)
        run.path.mkdir()

        def step() -> None:
            append_metrics(run.metrics, RECORD)
            flush(run)
            checkpoint.save(run.checkpoints, state(1), {}, keep=2)

        shots.extend(crashes.snapshots(step, run.path, tmp_path / "shots"))

    def gaps() -> int:
        found = 0
        for shot in shots:
            for data, names, seed in FEW:
                after = RunFolder(shot.after_power_loss(tmp_path / "after", data, names, seed))
                saved = after.checkpoints.is_dir() and load_latest_or_none(after.checkpoints)
                found += bool(saved) and read_metrics(after.metrics) != [RECORD]
        return found

    shots: list[crashes.Snapshot] = []
    act(flush_metrics)
    assert gaps() == 0
    shots.clear()
    act(lambda run: None)  # planted: nothing waits for the history
    assert gaps() > 0


def load_latest_or_none(folder: Path) -> checkpoint.Found | None:
    """The newest checkpoint that verifies, or None where there are only damaged ones."""
    try:
        return load_latest(folder)
    except MachineError:
        return None


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
