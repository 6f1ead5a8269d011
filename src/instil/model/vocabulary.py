"""A model folder with other tokenizer files in, one with tokenizer.json and links to the rest out, by transformers."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from instil.errors import ModelError

CONVERTER_VERSION = "1"  # part of the cache key: raise it whenever the written files change
WRITTEN = ("tokenizer.json", "tokenizer_config.json")
GENERIC = {"TokenizersBackend", "PreTrainedTokenizerFast", "PythonBackend"}  # classes that know no model's rules

_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_BPE = ("vocab.json", "merges.txt")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_TIKTOKEN_MODELS = ("llama", "mllama")  # whose splitting transformers knows; the file itself does not hold it
_HASHED_BYTES = 64_000_000  # files up to this size count into the key by their bytes, others by size and time


def convertible(names: Sequence[str]) -> str | None:
    """The file, among those of a folder without tokenizer.json, that its tokenizer can be made from."""
    found = next((name for name in _SENTENCEPIECE if name in names), None)
    if found is None and all(name in names for name in _BPE):
        return _BPE[0]
    return found or next((name for name in names if name.endswith(".tiktoken")), None)


def key(folder: Path) -> str:
    """sha256 of everything that decides what `convert` writes: place, file names, tokenizer and configuration."""
    from importlib.metadata import version

    total = hashlib.sha256(f"{CONVERTER_VERSION} {version('transformers')} {folder.resolve()}\n".encode())
    for entry in sorted(folder.iterdir()):
        total.update(f"{entry.name}\0".encode("utf-8", "surrogateescape"))
        if not entry.is_file() or entry.suffix in (".safetensors", ".bin", ".gguf"):
            continue
        status = entry.stat()
        if status.st_size <= _HASHED_BYTES:
            total.update(hashlib.sha256(entry.read_bytes()).digest())
        else:
            total.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return total.hexdigest()


def convert(folder: Path, out: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of `folder`'s tokenizer into `out`, and link its other files there.

    Raises ModelError where a package is missing, or where the tokenizer cannot be told for certain from its files.
    `out` may then be half-written.
    """
    names = [entry.name for entry in folder.iterdir()]
    file = folder / (convertible(names) or "tokenizer.model")
    _check_packages(file)
    _check_certain(folder, file)
    tokenizer = _load(folder, file)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"))
    config = _read(folder / "tokenizer_config.json")
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    config = {**special, **{name: value for name, value in config.items() if name != "auto_map"}}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for name in names:
        if name not in WRITTEN:
            (out / name).symlink_to(folder.absolute() / name)


def _check_packages(file: Path) -> None:
    """Refuse, with the line that helps, where a package that reads this file is missing."""
    wanted = ["tiktoken"] if _is_tiktoken(file) else ["sentencepiece", "google.protobuf"]
    missing = [] if file.name in _BPE else [name for name in wanted if not _installed(name)]
    if missing:
        kind = "a tiktoken" if "tiktoken" in wanted else "a sentencepiece"
        packages = " ".join("protobuf" if name.startswith("google") else name for name in missing)
        _refuse(file, f"to read {kind} vocabulary, packages are missing: {packages}", f"pip install {packages}")


def _check_certain(folder: Path, file: Path) -> None:
    """Refuse a tiktoken file whose way of splitting text is not known."""
    model_type = str(_read(folder / "config.json").get("model_type", ""))
    if _is_tiktoken(file) and model_type not in _TIKTOKEN_MODELS:
        what = (
            f"a tiktoken vocabulary does not say how to split text, and for model_type {model_type!r} it is not known"
        )
        _refuse(file, what, "give the model's tokenizer.json")


def _load(folder: Path, file: Path) -> Any:
    """transformers' own tokenizer of the folder, from local files and without code of the model's."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the conversion met
        _refuse(
            file, f"transformers cannot read this tokenizer ({_one_line(error)})", "give the model's tokenizer.json"
        )
    if not hasattr(tokenizer, "backend_tokenizer"):
        _refuse(file, f"{type(tokenizer).__name__} has no fast tokenizer", "give the model's tokenizer.json")
    if file.name in _BPE and type(tokenizer).__name__ in GENERIC:
        what = (
            "neither config.json nor tokenizer_config.json names the kind of tokenizer, so its splitting is not known"
        )
        _refuse(file, what, "give the model's tokenizer.json")
    return tokenizer


def _is_tiktoken(file: Path) -> bool:
    """Whether the file holds lines of base64 and rank, whatever its name."""
    with file.open("rb") as stream:
        return _TIKTOKEN_LINE.match(stream.read(4096)) is not None


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError.at(file, f"not JSON ({_one_line(error)})", "fetch it again", "tokenizer") from error
    return found if isinstance(found, dict) else {}


def _refuse(place: os.PathLike[str], what: str, remedy: str) -> NoReturn:
    raise ModelError.at(os.fspath(place), what, remedy, "tokenizer")


def _one_line(value: object) -> str:
    """Text from outside, fit for one line of an error."""
    text = " ".join(str(value).encode("ascii", "backslashreplace").decode().split())
    return text if len(text) <= 160 else text[:157] + "..."
