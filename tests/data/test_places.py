"""locate: files, folders, globs and names on the hub lead to data files, in order, and nothing is passed over."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from instil.data.hub import choose
from instil.data.locate import is_data_file, masked
from instil.data.mixture import load_conversations, source_digests
from instil.data.sources import file_digest
from instil.data.spec import SourceSpec
from instil.errors import DataError, UsageError

GOOD = '{"prompt": "p%d", "completion": "c"}\n'
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hugging Face cache of our own, without a network."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(cache: Path, repo: str, *names: str, revision: str = "main") -> Path:
    """A data set in the cache, laid out as huggingface_hub does it."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(COMMIT)
    for i, name in enumerate(names):
        write(str(folder / "snapshots" / COMMIT / name), i)
    return folder / "snapshots" / COMMIT


def write(name: str, i: int = 0) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(GOOD % i)
    return name


def origins(*sources) -> list[str]:
    return [each.origin for each in load_conversations(sources).conversations]


def refusal(path: str, error=DataError) -> str:
    with pytest.raises(error) as caught:
        load_conversations([path])
    (line,) = caught.value.lines()
    return line


def test_a_folder_is_its_data_files_sorted(here):
    """At any depth; what else is in the folder is listed, also what is hidden."""
    for i, name in enumerate(["d/b.jsonl", "d/a/x.json", "d/a.jsonl.gz.txt", "d/README.md", "d/.cache/x.jsonl"]):
        write(name, i)
    loaded = load_conversations(["d"])
    assert [each.origin for each in loaded.conversations] == ["d/a/x.json:1", "d/b.jsonl:1"]
    assert loaded.notes == ("d: 3 files in the folder not read: .cache/, README.md, a.jsonl.gz.txt",)
    assert source_digests(["d"]) == loaded.digests == {n: file_digest(n) for n in ("d/a/x.json", "d/b.jsonl")}


def test_a_folder_without_data_is_refused(here):
    """Empty, or with other files only."""
    os.mkdir("d")
    assert refusal("d").startswith("d: no data file in the folder, it is empty; give .jsonl")
    write("d/a.txt")
    assert refusal("d").startswith("d: no data file in the folder (only a.txt); ")


def test_links_are_followed_and_circles_are_not(here):
    """The user's own links may leave the folder."""
    write("elsewhere/a.jsonl")
    os.mkdir("d")
    Path("d/link").symlink_to("../elsewhere")
    Path("d/self").symlink_to(".")
    assert origins("d") == ["d/link/a.jsonl:1"]


def test_a_glob_is_its_matches_sorted(here):
    """A pattern without an ending takes data files only, and says what it passed over."""
    for i, name in enumerate(["d/b.jsonl", "d/a.jsonl", "d/x.txt", "e/c.jsonl"]):
        write(name, i)
    assert origins("d/*.jsonl") == ["d/a.jsonl:1", "d/b.jsonl:1"]
    assert origins("**/*.jsonl") == ["d/a.jsonl:1", "d/b.jsonl:1", "e/c.jsonl:1"]
    assert origins("d/*.txt") == ["d/x.txt:1"]
    assert load_conversations(["d/*"]).notes == ("d/*: 1 file in the folder not read: d/x.txt",)
    assert origins("d/[ab].jsonl") == ["d/a.jsonl:1", "d/b.jsonl:1"]
    write("d/[ab].jsonl", 9)
    assert origins("d/[ab].jsonl") == ["d/[ab].jsonl:1"]


def test_a_glob_that_matches_nothing_names_the_nearest(here):
    """What is there that may have been meant."""
    write("data/train.jsonl")
    assert refusal("data/trian*.jsonl") == "data/trian*.jsonl: matches no data file; did you mean 'data/train.jsonl'?"
    assert refusal("no/*.jsonl") == "no/*.jsonl: matches no data file; there is no folder 'no'"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@host.org/a/b.jsonl?token=secret#secret", "https://***@host.org/a/b.jsonl?***"),
        ("http://169.254.169.254/", "http://169.254.169.254"),
        ("file:///etc/passwd", "file:///etc/passwd"),
        ("s3://key:se@cret@bucket/x", "s3://***@bucket/x"),
        ("https://user:secret@host.org", "https://***@host.org"),
        ("https://host.org?token=secret", "https://host.org?***"),
    ],
)
def test_urls_are_refused_with_their_secrets_masked(url, shown):
    """Nothing is fetched, and no message holds a password."""
    line = refusal(url)
    assert (
        line
        == f"{shown}: is a URL, and instil opens none; download it first, look at it, and give the path of the file"
    )
    assert "secret" not in masked(url)


def test_a_data_set_of_the_hub_is_read_from_the_cache(cache):
    """Origins name the data set; the training split is read, the others are named."""
    cached(cache, "org/name", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "README.md")
    for name in ("hub:org/name", "org/name", "hub:org/name@main"):
        loaded = load_conversations([name])
        assert [each.origin for each in loaded.conversations] == ["org/name/data/train-00000-of-00001.jsonl:1"]
        assert loaded.notes == (f"{name}: read the split train; not read: test",)
    for part in ("test", "data/test", "data/test-00000-of-00001.jsonl"):
        assert origins(f"hub:org/name/{part}") == ["org/name/data/test-00000-of-00001.jsonl:1"]
    assert origins(SourceSpec("hub:org/name/test"), "hub:org/name/train")[0].startswith("org/name/data/test")
    assert list(load_conversations(["org/name"]).digests) == ["org/name/data/train-00000-of-00001.jsonl"]


def test_what_the_cache_has_not_got_says_how_to_fetch_it(cache):
    """Offline, the command for another machine is printed; and the nearest thing to a path is not forgotten."""
    line = refusal("org/name")
    assert line.startswith("org/name: no path here, not in the cache ")
    assert "(HF_HUB_OFFLINE is set); where there is a network run `hf download org/name --repo-type dataset" in line
    cached(cache, "org/other", "train.jsonl")
    assert refusal("hub:org/other/tset") == (
        "hub:org/other/tset: has no file, folder or split 'tset'; name one of train, train.jsonl"
    )


def test_what_the_hub_answers_is_said_in_one_line(cache, monkeypatch):
    """No such data set, a gate, a wrong revision, or no network: each with what to do; nothing is fetched for none."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    response = SimpleNamespace(headers={}, status_code=404, request=None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for error, expected in [
        (errors.RepositoryNotFoundError("x", response=response), "the hub has no data set org/none"),
        (errors.GatedRepoError("x", response=response), "asks for an agreement on its page"),
        (errors.RevisionNotFoundError("x", response=response), "org/none has no such revision"),
        (errors.HfHubHTTPError("x\ny", response=response), "the hub refuses (x y"),
        (OSError("no route"), "no path here, not in the cache"),
    ]:

        def refuse(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        assert f"org/none: {expected}" in refusal("org/none")


def test_an_existing_path_wins_over_the_hub(cache):
    """`org/name` that is here is never looked up; nor is a file with the ending of data."""
    cached(cache, "org/name", "train.jsonl")
    write("org/name/local.jsonl")
    assert origins("org/name") == ["org/name/local.jsonl:1"]
    assert "no such file" in refusal("org/nam")
    assert "no such file" in refusal("none/train.jsonl")


@pytest.mark.parametrize(
    "name", ["hub:../../x", "hub:org/../x", "hub:org/name/../../x", "hub:org", "hub:", "hub:org/name@../x"]
)
def test_a_name_that_leaves_its_place_is_a_usage_error(name):
    """Nothing outside the data set can be named."""
    assert "is not the name of a data set on the hub" in refusal(name, UsageError)


def test_a_script_is_refused_and_never_executed(cache):
    """Neither on the hub nor as a file; data files beside one are read, and the script is named."""
    folder = cached(cache, "org/script")
    folder.mkdir(parents=True)
    trap = f"open({str(cache / 'executed')!r}, 'w')"
    (folder / "script.py").write_text(trap)
    assert refusal("hub:org/script").startswith("hub:org/script: is made by a script (script.py), which instil never")
    Path("local.py").write_text(trap)
    assert refusal("local.py").startswith("local.py: is a Python script, not data; ")
    write(str(folder / "train.jsonl"))
    assert load_conversations(["org/script"]).notes == ("org/script: script.py is a script and was not executed",)
    assert not (cache / "executed").exists()


@pytest.mark.parametrize(
    ("names", "part", "expected"),
    [
        (["train.parquet", "validation.parquet"], "", ["train.parquet"]),
        (["data/train-0.parquet", "data/train-1.parquet"], "", ["data/train-0.parquet", "data/train-1.parquet"]),
        (["main/train.parquet", "socratic/train.parquet"], "main", ["main/train.parquet"]),
        (["main/train.parquet", "main/test.parquet"], "main/test", ["main/test.parquet"]),
        (["rows.jsonl", "dataset_infos.json"], "", ["rows.jsonl"]),
        (["pretraining.jsonl", "test.jsonl"], "test", ["test.jsonl"]),
    ],
)
def test_the_files_that_a_part_means(names, part, expected):
    """A file, a folder, a split, or nothing."""
    assert choose(names, part, "hub:o/n")[0] == expected


@pytest.mark.parametrize(
    ("names", "part", "expected"),
    [
        (
            ["main/train.parquet", "socratic/train.parquet"],
            "",
            "has several parts (main, socratic); name one, as in hub:o/n/main",
        ),
        (["test.parquet", "dev.parquet"], "", "has the splits validation, test; name one, as in hub:o/n/validation"),
        (["x.zip", "README.md"], "", "has no data file (only README.md, x.zip)"),
        ([], "", "has no data file (only nothing)"),
        (["a.jsonl", "load.py"], "load.py", "is made by a script (load.py)"),
    ],
)
def test_what_could_mean_several_things_is_refused(names, part, expected):
    """Two configurations are never mixed by guessing."""
    with pytest.raises(DataError) as caught:
        choose(names, part, "hub:o/n")
    assert f"hub:o/n: {expected}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", True), ("a.JSON.gz", True), ("b/a.tsv.zst", True), ("a.parquet", True), ("a.ndjson", True),
        ("a.jsonl.bak", False), (".a.jsonl", False), (".git/a.json", False), ("dataset_infos.json", False), ("a.txt", False),
    ],
)  # fmt: skip
def test_a_data_file_is_known_by_its_ending(name, expected):
    """In a folder only names can be judged."""
    assert is_data_file(name) is expected


def test_sources_number_their_conversations(here):
    """Each conversation knows which of the sources it is from, whatever the number of files."""
    for i, name in enumerate(["d/a.jsonl", "d/b.jsonl", "c.jsonl"]):
        write(name, i)
    assert [each.source for each in load_conversations(["d", SourceSpec("c.jsonl")]).conversations] == [0, 0, 1]


def test_a_file_of_two_sources_is_given_twice(here):
    """Also when a folder brings it a second time."""
    write("d/a.jsonl")
    assert "d/a.jsonl: the file is given twice" in refusal_of("d", "d/a.jsonl")


def refusal_of(*sources: str) -> str:
    with pytest.raises(DataError) as caught:
        load_conversations(sources)
    return str(caught.value)
