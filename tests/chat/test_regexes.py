"""A regex that takes for ever is found before any row is tokenised; the well-known ones cost nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tokenizers
from chat_samples import CONTROL, train_tokenizer
from tokenizers import Regex, models, normalizers, pre_tokenizers

from instil.chat import regexes
from instil.chat.regexes import WELL_KNOWN, fault, vet
from instil.chat.tokenizer import load_tokenizer
from instil.errors import ModelError

HOSTILE = {
    "exponential": (r"(a+)+$|\s", "fails on"),
    "polynomial": (r"x+x+y|.", "x"),
    "quadratic": (r"\s+$|\S+", "grows faster than the text"),
}


def with_regex(regex: str) -> tokenizers.Tokenizer:
    backend = train_tokenizer(CONTROL)
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_regex_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    "Exponential, cubic and quadratic regexes are refused within seconds, at loading, with the regex in the line."
    regex, what = HOSTILE[kind]
    with_regex(regex).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError) as caught:
        load_tokenizer(tmp_path)
    (line,) = caught.value.lines()
    assert line.startswith(f"{tmp_path / 'tokenizer.json'}: the regex {regex}")
    assert what in line
    assert caught.value.exit_code == 4


def test_a_child_that_is_killed_names_the_regex(monkeypatch: pytest.MonkeyPatch) -> None:
    "A regex that ends the process itself is a fault of the regex, not of ours."
    monkeypatch.setattr(regexes, "_in_child", lambda unknown, place: (-9, b"try\ntry\n"))
    backend = with_regex("ab+")
    backend.normalizer = normalizers.Replace(Regex("cd+"), "")
    with pytest.raises(ModelError, match=r"the regex cd\+ ended the process in which it was tried \(SIGKILL\)"):
        vet(backend, "tokenizer.json")


@pytest.mark.parametrize("regex", sorted(WELL_KNOWN))
def test_the_well_known_regexes_pass_the_trial(regex: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Nothing is on the list that would fail; a harmless regex that is not on it passes too."
    monkeypatch.setattr(
        regexes, "TEXT_LIMIT_S", 2.0
    )  # tried here, in a process that has done much else, not in a child
    assert fault(regex) == ""
    assert fault(r"\w+|[^\w\s]+|\s") == ""


def test_well_known_regexes_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    "The usual tokenizers are vetted in no time."
    monkeypatch.setattr(regexes, "_in_child", lambda unknown, place: pytest.fail("a child was started"))
    for regex in WELL_KNOWN:
        vet(with_regex(regex), "tokenizer.json")
    backend = train_tokenizer(CONTROL)
    start = time.perf_counter()
    vet(backend, "tokenizer.json")
    assert time.perf_counter() - start < 0.1


def test_a_regex_is_found_wherever_it_is() -> None:
    "In normalisers and decoders, and inside sequences of them."
    backend = tokenizers.Tokenizer(models.BPE())
    assert list(regexes.regexes(backend)) == []
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex("a+"), "b")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("b+"), "removed")
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace(Regex("c+"), "d")])
    assert list(regexes.regexes(backend)) == ["a+", "b+", "c+"]


def test_a_text_on_which_the_engine_gives_up_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Should a regex pass the trial and fail on a row, the error is a ModelError with the row's text, not a panic."
    monkeypatch.setattr("instil.chat.tokenizer.vet", lambda backend, place: None)
    with_regex(r"(?:k+k?)+q|\s|.").save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    texts = ["fine", "é" + "k" * 60, "fine too"]
    for encode in (tokenizer.encode_batch, tokenizer.encode_arrays, tokenizer.encode_offsets):
        with pytest.raises(ModelError, match="fails on a text of 61 characters that begins 'ékkk"):
            encode(texts)
    with pytest.raises(ModelError, match="fails on a text of 61 characters"):
        tokenizer.encode(texts[1])
    assert len(tokenizer.encode_batch(["fine"])) == 1
