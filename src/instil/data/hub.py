"""A data set's name on the hub in, its data files in the local cache out; a data set's script is never executed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from instil.data.locate import is_data_file
from instil.data.notes import some
from instil.errors import DataError, Problem, UsageError

_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w-]+|[A-Za-z0-9][\w.-]*))?(?:/(?P<part>.+))?",
    re.ASCII,
)
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}
_WORD = re.compile(r"[A-Za-z0-9]+")


def hub_files(name: str, given: str) -> tuple[list[tuple[str, str]], list[str]]:
    """[(path in the cache, `org/name/file`)] of `org/name[@revision][/split-or-file]`, and what to tell the user.

    Fetched if the hub can be reached; else what the cache has, HF_HOME and HF_HUB_OFFLINE honoured. Raises UsageError
    for a name that is none, DataError where there is no such data set, or no choice of its files is evident.
    """
    match = _NAME.fullmatch(name)
    if match is None or ".." in name.split("/") or ".." in name.replace("@", "/").split("/") or "//" in name:
        what = "is not the name of a data set on the hub"
        raise UsageError.at(repr(given), what, "write hub:org/name, hub:org/name@revision or hub:org/name/split", "hub")
    repo, revision, part = match["repo"], match["revision"], match["part"] or ""
    names = _listing(repo, revision, given)
    chosen, notes = choose(names, part, given)
    folder = _fetched(repo, revision, chosen, given)
    return [(os.path.join(folder, file), f"{repo}/{file}") for file in chosen], notes


def choose(names: Sequence[str], part: str, given: str) -> tuple[list[str], list[str]]:
    """The files of a data set that `part` (a file, folder or split; "" = its training split) means, and what to say.

    Raises DataError where none is meant, or files of several folders could be.
    """
    data = sorted(name for name in names if is_data_file(name))
    scripts = sorted(name for name in names if name.endswith(".py"))
    if part.endswith(".py") or (not data and scripts):
        what = f"is made by a script ({part or scripts[0]}), which instil never executes"
        remedy = "give one with data files, or its converted form: hub:org/name@refs/convert/parquet"
        raise DataError.at(given, what, remedy, "script")
    if not data:
        what = f"has no data file (only {some(sorted(names), len(names)) or 'nothing'})"
        raise DataError.at(given, what, "give one with .jsonl, .json, .parquet, .csv or .tsv files", "no_files")
    found = [name for name in data if _is_part(name, part)] if part else data
    if not found:
        what = f"has no file, folder or split {part!r}"
        raise DataError.at(given, what, f"name one of {_choices(data)}", "no_files")
    notes = [f"{given}: {scripts[0]} is a script and was not executed"] if scripts else []
    splits = dict.fromkeys(split for name in found if (split := _split(name)))
    if len(splits) > 1 and part not in found:
        if "train" not in splits:
            what = f"has the splits {', '.join(splits)}"
            raise DataError.at(given, what, f"name one, as in {given}/{next(iter(splits))}", "split")
        notes.append(f"{given}: read the split train; not read: {', '.join(s for s in splits if s != 'train')}")
        found = [name for name in found if _split(name) == "train"]
    folders = dict.fromkeys(str(PurePosixPath(name).parent) for name in found)
    if len(folders) > 1 and not part:
        what = f"has several parts ({some(list(folders), len(folders))})"
        raise DataError.at(given, what, f"name one, as in {given}/{next(iter(folders))}", "split")
    return found, notes


def _is_part(name: str, part: str) -> bool:
    """Whether a file is `part`, in the folder `part`, or of the split that it names (perhaps in a folder)."""
    folder, _, last = part.rpartition("/")
    if name == part or name.startswith(f"{part}/"):
        return True
    inside = not folder or name.startswith(f"{folder}/")
    return inside and (_split(name) == last or PurePosixPath(name).name.split(".")[0] == last)


def _split(name: str) -> str | None:
    """The split that a file's name, or else a folder above it, says: `data/train-00000-of-00002.parquet` is train."""
    for step in reversed(PurePosixPath(name).parts):
        words = [word.lower() for word in _WORD.findall(step)]
        for split, synonyms in _SPLITS.items():
            if any(word in synonyms for word in words):
                return split
    return None


def _choices(data: Sequence[str]) -> str:
    splits = list(dict.fromkeys(split for name in data if (split := _split(name))))
    return some([*splits, *data], len(splits) + len(data))


def _listing(repo: str, revision: str | None, given: str) -> list[str]:
    """The names of all files of a data set: from the hub, or from the cache where the hub cannot be reached."""
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:
            return HfApi().list_repo_files(repo, revision=revision, repo_type="dataset")
    except Exception as error:
        if not _unreachable(error):
            raise _refused(error, repo, given) from None
    folder = _snapshot(repo, revision, None, given)
    walked = [(here, name) for here, _, names in os.walk(folder) for name in names]
    return [os.path.relpath(os.path.join(here, name), folder).replace(os.sep, "/") for here, name in walked]


def _fetched(repo: str, revision: str | None, chosen: Sequence[str], given: str) -> str:
    """The folder of the cache that has the chosen files."""
    folder = _snapshot(repo, revision, chosen, given)
    if missing := [name for name in chosen if not os.path.isfile(os.path.join(folder, name))]:
        what = f"{some(missing, len(missing))} could not be fetched, and the cache has no copy"
        raise DataError.at(given, what, f"run `hf download {repo} --repo-type dataset` where there is a network", "hub")
    return folder


def _snapshot(repo: str, revision: str | None, chosen: Sequence[str] | None, given: str) -> str:
    from huggingface_hub import snapshot_download

    patterns = None if chosen is None else [re.sub(r"([*?[])", r"[\1]", name) for name in chosen]
    try:
        # chosen is None: only asked what the cache has
        return str(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=patterns, local_files_only=chosen is None
            )
        )
    except Exception as error:
        raise _refused(error, repo, given) from None


def _unreachable(error: Exception) -> bool:
    """Whether the hub did not answer, as against answering no."""
    from huggingface_hub import errors

    return not isinstance(error, errors.HfHubHTTPError | errors.HFValidationError)


def _refused(error: Exception, repo: str, given: str) -> DataError:
    from huggingface_hub import constants, errors

    fetch = f"hf download {repo} --repo-type dataset --local-dir {repo.split('/')[1]}"
    if isinstance(error, errors.GatedRepoError):
        return DataError(Problem(given, "asks for an agreement on its page", "agree there, then set HF_TOKEN", "hub"))
    if isinstance(error, errors.RepositoryNotFoundError):
        remedy = "check the name; it is no path here either; a private one needs HF_TOKEN"
        return DataError(Problem(given, f"the hub has no data set {repo}", remedy, "hub"))
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(Problem(given, f"{repo} has no such revision", "check what follows the @", "hub"))
    if isinstance(error, errors.LocalEntryNotFoundError) or _unreachable(error):
        offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        what = f"no path here, not in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached{offline}"
        return DataError(Problem(given, what, f"where there is a network run `{fetch}` and give that folder", "hub"))
    reason = " ".join(str(error).split())[:200]
    return DataError(Problem(given, f"the hub refuses ({reason})", "check the name and the revision", "hub"))
