"""decoding: pieces joined are the decoded text, for every kind of decoder, and the work grows with the tokens' number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from instil.report.decoding import joined, parts, pieces

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=40)


def byte_level() -> Tokenizer:
    """GPT-2's kind: a token for each byte, and for three words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["th", "Ġth", "Ã©"]  # "Ã©" is how the two bytes of é are spelt
    vocabulary = {name: i for i, name in enumerate([*alphabet, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("Ġ", "th"), ("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Llama 2's kind: ▁ for spaces, one put in front and dropped again, bytes for what the vocabulary lacks."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeth", "▁th", "th"]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [("t", "h"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


KINDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def pieces_of(tokenizer: Tokenizer, text: str) -> tuple[list[str], list[int]]:
    """The pieces of a text, and its tokens."""
    ids = tokenizer.encode(text).ids
    return pieces(ids, tokenizer.decode, tokenizer.id_to_token), ids


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_the_pieces_joined_are_the_text(kind, text):
    "Nothing is lost and nothing is doubled, whatever the characters and wherever they are torn."
    found, ids = pieces_of(KINDS[kind], text)
    assert len(found) == len(ids)
    assert joined(found) == KINDS[kind].decode(ids) == text


@given(text=TEXTS)
def test_without_names_the_last_token_has_the_character(text):
    "A decoder alone suffices for the text."
    ids = KINDS["byte_level"].encode(text).ids
    assert "".join(pieces(ids, KINDS["byte_level"].decode)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_torn_character_is_added_by_its_last_token(kind):
    "漢 is E6 BC A2: two marks of bytes, then the character."
    found, _ = pieces_of(KINDS[kind], "d漢e")
    assert found[-4:] == ["\udce6", "\udcbc", "漢", "e"]
    assert [part for piece in found[-4:-2] for part in parts(piece)] == [("byte", "<0xE6>"), ("byte", "<0xBC>")]


def test_a_token_may_end_one_character_and_begin_another():
    "Its piece is what it completes, and a mark for what it begins."
    names = {0: b"\xe6\xbc", 1: b"\xa2\xe6", 2: b"\xbc\xa2!"}
    alphabet = {0xE6: "æ", 0xBC: "¼", 0xA2: "¢", 0x21: "!"}  # GPT-2's alphabet: these bytes are their Latin-1 selves
    found = pieces(
        [0, 1, 2],
        lambda ids: b"".join(names[i] for i in ids).decode("utf-8", "replace"),
        lambda i: "".join(alphabet[byte] for byte in names[i]),
    )
    assert found == ["\udce6\udcbc", "漢\udce6", "漢!"]


def test_spaces_belong_to_the_token_that_has_them():
    "The space that the decoder drops at the start of the text is kept in front of later words."
    found, _ = pieces_of(KINDS["byte_fallback"], "th th th")
    assert found == ["th", " th", " th"]


def test_broken_bytes_are_marked():
    "Tokens that make no character, as in a pair tokenised elsewhere, show their bytes."
    tokenizer = KINDS["byte_level"]
    ids = [tokenizer.token_to_id(name) for name in ("æ", "a", "¢")]  # the bytes E6 61 A2
    assert pieces(ids, tokenizer.decode, tokenizer.id_to_token) == ["\udce6", "a", "\udca2"]


def test_a_text_of_replacement_characters_keeps_its_pieces():
    "U+FFFD in the data is a character like any other, however many there are."
    found, _ = pieces_of(KINDS["byte_level"], "\ufffd" * 40 + "a")
    assert joined(found) == "\ufffd" * 40 + "a"


def test_the_work_is_linear():
    "No token is decoded more than a few times, however long the text: twice as much text, twice as much work."
    tokenizer = KINDS["byte_level"]

    def decoded(text: str) -> int:
        seen = []
        pieces(tokenizer.encode(text).ids, lambda ids: seen.append(len(ids)) or tokenizer.decode(ids))
        return sum(seen)

    assert decoded("漢e" * 200) <= 2.1 * decoded("漢e" * 100)
