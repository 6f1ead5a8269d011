"""The model's tokenizer, read from its folder: text in, token ids out, and which tokens are control tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from instil.errors import ModelError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # what a tokenizer is read from
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "tiktoken.model")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """Text to token ids and back, exactly as the model's server does it once the template has been rendered.

    control_tokens: text -> id of the added tokens flagged special. control_pattern finds them in text, longest first.
    special: bos_token, eos_token, ... as the template's variables. vocab_size: highest id + 1.
    digest: sha256 over the files the tokenizer was read from.
    """

    backend: tokenizers.Tokenizer
    control_tokens: Mapping[str, int]
    control_pattern: re.Pattern[str]
    special: Mapping[str, str]
    vocab_size: int
    digest: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Nothing is added: a BOS is there only if the template wrote it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once, on all cores."""
        return [found.ids for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each text its ids, and for each id the characters [start, stop) of the text that it stands for."""
        return [
            (found.ids, found.offsets) for found in self.backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int], keep_control: bool = True) -> str:
        """The text of `ids`, with the control tokens written out or left out."""
        return self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=not keep_control)

    def bos_id(self) -> int | None:
        """The id of the token that begins a text, where the tokenizer names one."""
        return self.backend.token_to_id(self.special["bos_token"]) if "bos_token" in self.special else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json and the special tokens beside it. Raises ModelError when they are missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in OTHER_FORMATS if (folder / name).is_file()]
        found = f"found only {', '.join(others)}" if others else "nothing that holds a tokenizer is there"
        what = f"no tokenizer: looked for tokenizer.json in {folder}, {found}"
        raise ModelError.at(path, what, "save the model with its fast tokenizer (tokenizer.json)", "no-tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for whatever it cannot read
        raise ModelError.at(path, f"not a tokenizer: {error}", "download the file again", "broken-tokenizer") from error
    backend.no_padding()
    backend.no_truncation()
    special = read_special(folder)
    _add_missing(backend, folder, special)
    added = backend.get_added_tokens_decoder()
    control = {token.content: token_id for token_id, token in sorted(added.items()) if token.special}
    longest_first = sorted(control, key=len, reverse=True)
    return Tokenizer(
        backend=backend,
        control_tokens=control,
        control_pattern=re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),  # (?!) never matches
        special=special,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        digest=_digest(folder),
    )


def read_special(folder: Path) -> dict[str, str]:
    """bos_token, eos_token, ... by name, from tokenizer_config.json and special_tokens_map.json.

    As in transformers, special_tokens_map.json counts only where tokenizer_config.json has no added_tokens_decoder.
    """
    config = _read_json(folder / "tokenizer_config.json")
    named = config if "added_tokens_decoder" in config else config | _read_json(folder / "special_tokens_map.json")
    texts = {key: _token_text(value) for key, value in named.items() if key.endswith("_token")}
    in_order = dict.fromkeys(STANDARD) | texts  # the order in which transformers adds those that are missing
    return {key: text for key, text in in_order.items() if text is not None}


def read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json as a dictionary, empty where there is none."""
    return _read_json(folder / "tokenizer_config.json")


def _add_missing(backend: tokenizers.Tokenizer, folder: Path, special: Mapping[str, str]) -> None:
    """Add the tokens that the configuration names and tokenizer.json lacks, in the order in which transformers does."""
    config = _read_json(folder / "tokenizer_config.json")
    wanted = []
    for _, flags in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0])):
        wanted.append(tokenizers.AddedToken(**{key: value for key, value in flags.items() if key != "__type"}))
    extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
    texts = [*special.values(), *(extra.values() if isinstance(extra, dict) else map(_token_text, extra))]
    wanted += [tokenizers.AddedToken(text, special=True, normalized=False) for text in texts if text]
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in wanted:
        if token.content not in known:
            known.add(token.content)
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _token_text(value: Any) -> str | None:
    """The text of a token that a configuration gives as a string or as the fields of an AddedToken."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where the file is absent."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError.at(path, f"not JSON: {error}", "download the file again", "broken-tokenizer") from error
    if not isinstance(found, dict):
        what = f"expected a JSON object, found {type(found).__name__}"
        raise ModelError.at(path, what, "download the file again", "broken-tokenizer")
    return found


def _digest(folder: Path) -> str:
    """sha256 over name, length and bytes of each file the tokenizer is read from."""
    total = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            total.update(f"{name}\0{len(content)}\0".encode())
            total.update(content)
    return total.hexdigest()
