"""The bytes of tokens, looked up one by one, are what the library decodes, and show a byte that got lost."""

from __future__ import annotations

import gzip
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from chat_samples import CONTROL, SHARED, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from instil.chat.spelling import Spelling
from instil.chat.tokenizer import load_tokenizer

BYTE_LEVEL = train_tokenizer(CONTROL)
SPELLING = Spelling(BYTE_LEVEL)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁a", "▁▁", "ab", "▁ab", "é"]


def pieces(decoder: decoders.Decoder, scheme: str | None = None) -> tokenizers.Tokenizer:
    """A tokenizer of pieces with byte fallback; scheme None = the space comes from a normaliser, as in Llama 2."""
    vocab = {piece: n for n, piece in enumerate(["<unk>", "<s>", *BYTES, *LETTERS])}
    merges = [("▁", "a"), ("▁", "▁"), ("a", "b"), ("▁", "ab")]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    backend = tokenizers.Tokenizer(model)
    if scheme is None:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoder
    backend.add_special_tokens(["<unk>", "<s>"])
    return backend


REPLACE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "llama2": lambda: pieces(decoders.Sequence([*REPLACE, decoders.Strip(" ", 1, 0)])),
    "gemma": lambda: pieces(decoders.Sequence(REPLACE), "never"),
    "metaspace first": lambda: pieces(decoders.Metaspace(prepend_scheme="first"), "first"),
    "metaspace never": lambda: pieces(decoders.Metaspace(prepend_scheme="never"), "never"),
}


@settings(deadline=None)
@given(text=st.text() | st.lists(st.sampled_from([*CONTROL, " ", "\n", "Hello", "é", "🙂"])).map("".join))
def test_byte_level_tokens_spell_the_text(text: str) -> None:
    "Whatever the text, its tokens' bytes are its UTF-8, control tokens included."
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    assert SPELLING.bytes_of(ids) == text.encode()


@pytest.mark.parametrize("name", DECODERS)
def test_pieces_spell_what_the_library_decodes(name: str) -> None:
    "For decoders of sentencepiece-like tokenizers the bytes are those of the decoded text."
    backend = DECODERS[name]()
    spelling = Spelling(backend)
    for text in ("ab a  ab<s> b", " ab", "  ", "é日本🙂 a", "<s>ab", "", "a.b,", "<s><s> a"):
        ids = backend.encode(text, add_special_tokens=False).ids
        if "metaspace" in name and not text.isascii():  # this decoder writes byte tokens out as they are
            continue
        assert spelling.bytes_of(ids) == backend.decode(ids, skip_special_tokens=False).encode(), text


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.BPEDecoder(), decoders.CTC()])
def test_a_decoder_that_looks_at_neighbours_has_no_table(decoder: decoders.Decoder | None) -> None:
    "Where a token's text depends on the tokens around it, the answer is None and not a guess."
    backend = train_tokenizer(CONTROL)
    if decoder is None:
        backend = tokenizers.Tokenizer(backend.model)
    else:
        backend.decoder = decoder
    assert Spelling(backend).bytes_of([1, 2]) is None


def test_ids_without_a_token_have_no_bytes() -> None:
    "Negative ids, ids past the end and holes in the vocabulary are no tokens."
    assert SPELLING.bytes_of([]) == b""
    assert SPELLING.bytes_of([-1]) is None
    assert SPELLING.bytes_of([3, 10**6]) is None
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 2}, []))
    backend.decoder = decoders.ByteLevel()
    assert Spelling(backend).bytes_of([0, 2]) == b"ab"
    assert Spelling(backend).bytes_of([0, 1]) is None


def test_a_wrong_token_is_noticed() -> None:
    "Planted fault: one id exchanged, left out or doubled changes the bytes."
    ids = BYTE_LEVEL.encode("Hello world, the answer").ids
    other = BYTE_LEVEL.token_to_id("z")
    for wrong in ([*ids[:2], other, *ids[3:]], ids[1:], [ids[0], *ids]):
        assert SPELLING.bytes_of(wrong) != b"Hello world, the answer"


def test_a_vocabulary_without_a_byte_loses_it_and_this_shows(make_folder: Callable[..., Path]) -> None:
    "Without a token for byte 4 the library drops it without a word; `lossless` tells."
    folder = make_folder()
    file = folder / "tokenizer.json"
    whole = load_tokenizer(folder)
    assert whole.lossless("a\x04b")
    file.write_text(file.read_text().replace('"\\u0104"', '"<gone>"').replace('"Ą"', '"<gone>"'))
    lossy = load_tokenizer(folder)
    assert lossy.token_bytes(lossy.encode("a\x04b")) == b"ab"
    assert not lossy.lossless("a\x04b")
    assert lossy.lossless("ab é")


def test_smollm2_lacks_21_bytes() -> None:
    "The demo model's vocabulary has no token for 21 byte values; texts with those of them that texts can hold show it."
    folders = sorted((Path.home() / ".cache" / "instil" / "models").glob("SmolLM2*"))
    if not folders:
        pytest.skip("the demo model is not in the cache")
    tokenizer = load_tokenizer(folders[0])
    alone = {text for text in tokenizer.backend.get_vocab() if len(text) == 1}
    lost = [chr(byte) for byte in range(128) if not tokenizer.lossless(f"a{chr(byte)}b")]
    assert [ord(char) for char in lost] == [4, 6, 19, 20, 22, 29]
    assert len(set(pre_tokenizers.ByteLevel.alphabet()) - alone) == 21
    assert tokenizer.lossless("<|im_start|>user\nnaïve café 東京 🙂\t\r\n<|im_end|>")


def test_gpt2_spells_every_text() -> None:
    "GPT-2's vocabulary has all bytes, so nothing is ever lost, and a million tokens are checked at once."
    file = SHARED / "tokenizers" / "gpt2.tokenizer.json.gz"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    backend = tokenizers.Tokenizer.from_str(gzip.decompress(file.read_bytes()).decode())
    spelling = Spelling(backend)
    draw = random.Random(0)
    text = "".join(chr(draw.choice([draw.randrange(128), draw.randrange(0xD800)])) for _ in range(20_000))
    ids = backend.encode(text).ids
    assert spelling.bytes_of(ids) == text.encode() == backend.decode(ids, skip_special_tokens=False).encode()
    million = np.resize(np.array(ids, np.int32), 1_000_000)
    start = time.perf_counter()
    assert spelling.bytes_of(million).startswith(text.encode())
    assert time.perf_counter() - start < 1  # measured 0.03 s; the bound leaves room for a busy machine
