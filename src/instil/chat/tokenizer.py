"""The model's tokenizer, read from its folder: text in, token ids out, and which tokens are control tokens."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from instil.chat.plain import PlainEncoder
from instil.chat.regexes import vet
from instil.chat.spelling import Spelling
from instil.chat.words import Encoder, by_library
from instil.errors import ModelError
from instil.types import Int32

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")  # what a tokenizer is read from
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OTHER_FORMATS = ("tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "tiktoken.model")


@dataclass(frozen=True, slots=True, eq=False)
class Tokenizer:
    """Text to token ids and back, exactly as the model's server does it once the template has been rendered.

    control_tokens: text -> id of the added tokens flagged special. control_pattern finds them in text, longest first.
    special: bos_token, eos_token, ... as the template's variables. vocab_size: highest id + 1.
    digest: sha256 over the files the tokenizer was read from. fast, plain and spelling are the parts behind
    `encode_arrays`, `encode_marked` and `token_bytes`; they remember what they worked out.
    """

    backend: tokenizers.Tokenizer
    control_tokens: Mapping[str, int]
    control_pattern: re.Pattern[str]
    special: Mapping[str, str]
    vocab_size: int
    digest: str
    fast: Encoder = field(init=False)
    plain: PlainEncoder = field(init=False)
    spelling: Spelling = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fast", Encoder(self.backend))
        object.__setattr__(self, "plain", PlainEncoder(self.backend))
        object.__setattr__(self, "spelling", Spelling(self.backend))

    @property
    def notes(self) -> list[str]:
        """What the user should know about how texts were encoded; empty when all is well."""
        return self.fast.notes

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Nothing is added: a BOS is there only if the template wrote it."""
        return by_library(self.backend.encode_batch_fast, [text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts at once."""
        return [ids.tolist() for ids in self.fast.encode(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[Int32]:
        """`encode` of many texts at once, as new arrays. Words and segments met before are not tokenised again."""
        return self.fast.encode(texts)

    def encode_prefixes(self, text: str, cuts: Sequence[int]) -> list[Int32]:
        """The ids of text[:cut] for each cut: the prompts of one conversation, whose common part is tokenised once."""
        return self.fast.prefixes(text, cuts)

    def encode_marked(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """The ids of a text in which data may have typed control tokens, which then are plain text.

        pieces: the text in order; True where data wrote it, False where the template did, whose control tokens stay
        control tokens. Where data typed none, these are the ids of `encode`. Raises ValueError with the reason where
        typed text would become a control token all the same: such a row must be refused.
        """
        return self.plain.encode(pieces)

    def encode_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """For each text its ids, and for each id the characters [start, stop) of the text that it stands for."""
        return [(found.ids, found.offsets) for found in by_library(self.backend.encode_batch, texts)]

    def decode(self, ids: Sequence[int], keep_control: bool = True) -> str:
        """The text of `ids`, with the control tokens written out or left out."""
        return self.backend.decode([int(token_id) for token_id in ids], skip_special_tokens=not keep_control)

    def token_bytes(self, ids: Sequence[int] | Int32) -> bytes | None:
        """The exact bytes that `ids` stand for, control tokens written out, looked up token by token.

        A check of `encode` by another way than `decode`. None where the tokenizer's decoder does not work token by
        token, or an id has no token.
        """
        return self.spelling.bytes_of(ids)

    def token_ends(self, ids: Int32) -> NDArray[np.int64] | None:
        """How many bytes the first 1, 2, ... of `ids` spell together; None where that cannot be told token by token."""
        return self.spelling.ends_of(ids)

    def lossless(self, text: str) -> bool:
        """Whether the tokens of `text` spell it to the byte. False where the vocabulary lacks one of its bytes or
        characters, where the tokenizer normalises it to another text, and where `token_bytes` cannot tell."""
        return self.token_bytes(self.encode(text)) == text.encode()

    def bos_id(self) -> int | None:
        """The id of the token that begins a text, where the tokenizer names one."""
        return self.backend.token_to_id(self.special["bos_token"]) if "bos_token" in self.special else None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json and the special tokens beside it.

    Raises ModelError when they are missing, broken, unknown to the library, or hold a regex that takes too long.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        others = [name for name in OTHER_FORMATS if (folder / name).is_file()]
        found = f"found only {', '.join(others)}" if others else "nothing that holds a tokenizer is there"
        what = f"no tokenizer: looked for tokenizer.json in {folder}, {found}"
        raise ModelError.at(path, what, "save the model with its fast tokenizer (tokenizer.json)", "no-tokenizer")
    backend = _read_backend(path)
    vet(backend, str(path))
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


def eos_ids(folder: Path, tokenizer: Tokenizer) -> dict[str, list[tuple[str | None, int | None]]]:
    """What each file of the folder says ends a text: `file` -> (token, id) of each, for the files that say anything.

    tokenizer_config.json names a token; config.json (its text_config too) and generation_config.json give ids. The
    token is None for an id outside the vocabulary, the id None for a text that is no token. Which of them counts is
    for the caller to decide.
    """
    found: dict[str, list[tuple[str | None, int | None]]] = {}
    named = tokenizer.special.get("eos_token")
    if named is not None:
        found["tokenizer_config.json"] = [(named, tokenizer.backend.token_to_id(named))]
    for name in ("config.json", "generation_config.json"):
        config = _read_json(folder / name)
        nested = config.get("text_config")
        given = config.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
        ids = given if isinstance(given, list) else [] if given is None else [given]
        wrong = [value for value in ids if isinstance(value, bool) or not isinstance(value, int)]
        if wrong:
            what = f"eos_token_id: {wrong[0]!r} is not a token's number"
            raise ModelError.at(folder / name, what, "give whole numbers", "eos")
        if ids:
            found[name] = [(tokenizer.backend.id_to_token(n) if 0 <= n < 2**32 else None, n) for n in ids]
    return found


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer in a file. The error says whether the file is broken or only unknown to the library."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception for whatever it cannot read
        what, remedy = f"not a tokenizer: {error}", "download the file again"
        try:
            whole = isinstance(json.loads(path.read_bytes()), dict)
        except (ValueError, RecursionError, OSError):
            whole = False
        if whole:
            what = f"tokenizers {tokenizers.__version__} does not know what is in it ({error})"
            remedy = "pip install --upgrade tokenizers, or take the tokenizer.json of the original model"
        raise ModelError.at(path, what, remedy, "broken-tokenizer") from error


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
