"""Control tokens typed by data become plain text; those of the template stay; nothing else changes."""

from __future__ import annotations

import random

import pytest
import tokenizers
from chat_samples import CONTROL, train_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from instil.chat.plain import _LEADS, PlainEncoder
from instil.chat.tokenizer import load_tokenizer

Pieces = list[tuple[str, bool]]
WORDS = ["Hello", " world", "\n", "  ", "é", "🙂", "12", "<", "|>", "<|im_", "end|>", "[[", *CONTROL]


def conversation(draw: random.Random, typed: list[str] = WORDS) -> Pieces:
    """A text of a template around texts of data."""
    pieces: Pieces = []
    for _ in range(draw.randrange(1, 5)):
        pieces += [(f"{draw.choice(CONTROL)}user\n", False), ("".join(draw.choices(typed, k=draw.randrange(8))), True)]
        pieces += [(draw.choice(["<|im_end|>", " </s>", "\n"]), False)]
    return pieces


def by_encode_special_tokens(backend: tokenizers.Tokenizer, pieces: Pieces) -> list[int]:
    """The oracle for byte-level BPE: the library's own switch for encoding special tokens as text.

    Each stretch between two control tokens of the template is encoded alone, the switch on.
    """
    names = sorted(CONTROL, key=len, reverse=True)
    ids: list[int] = []
    stretch = ""

    def close() -> None:
        nonlocal stretch
        backend.encode_special_tokens = True
        ids.extend(backend.encode(stretch, add_special_tokens=False).ids)
        backend.encode_special_tokens = False
        stretch = ""

    for text, plain in pieces:
        while text:
            name = None if plain else next((name for name in names if text.startswith(name)), None)
            if name is None:
                stretch, text = stretch + text[0], text[1:]
            else:
                close()
                ids.append(backend.token_to_id(name))
                text = text[len(name) :]
    close()
    return ids


def sentencepiece(scheme: str = "first", *, kind: str = "unigram", flags: dict[str, bool] | None = None):
    """A small tokenizer as made from sentencepiece models; </s> is a piece of its vocabulary, as in some Unigram ones."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz<>/|_", "▁a", "▁b", "ab", "▁ab"]
    if kind == "unigram":
        pieces = [("<unk>", 0.0), ("<s>", -9.0), ("</s>", -9.0), *((letter, -3.0) for letter in letters)]
        model = models.Unigram(pieces, unk_id=0)
    else:
        vocab = {piece: n for n, piece in enumerate(["<unk>", "<s>", "</s>", *letters])}
        model = models.BPE(vocab, [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Metaspace()
    tokens = [AddedToken(name, special=True, **(flags or {"normalized": False})) for name in ("<unk>", "<s>", "</s>")]
    backend.add_special_tokens([*tokens, AddedToken("<|end|>", special=True, **(flags or {"normalized": False}))])
    return backend


def encode(backend: tokenizers.Tokenizer, pieces: Pieces) -> list[int]:
    return PlainEncoder(backend).encode(pieces)


# ── byte-level BPE ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_typed_control_tokens_are_text_for_byte_level_bpe() -> None:
    "The ids are those of the library's own switch, for random conversations full of typed control tokens."
    backend = train_tokenizer(CONTROL)
    encoder = PlainEncoder(backend)
    draw = random.Random(0)
    changed = 0
    for _ in range(600):
        pieces = conversation(draw)
        ids = encoder.encode(pieces)
        assert ids == by_encode_special_tokens(backend, pieces), pieces
        assert backend.decode(ids, skip_special_tokens=False) == "".join(text for text, _ in pieces)
        changed += ids != backend.encode("".join(text for text, _ in pieces), add_special_tokens=False).ids
    assert changed > 200


def test_where_nothing_is_typed_the_ids_are_those_of_encode() -> None:
    "Both ways of encoding, as it is and with other names, agree with the library on texts without typed tokens."
    backend = train_tokenizer(CONTROL)
    encoder = PlainEncoder(backend)
    draw = random.Random(1)
    innocent = [word for word in WORDS if word not in CONTROL and "|" not in word]
    for _ in range(300):
        pieces = conversation(draw, innocent)
        text = "".join(piece for piece, _ in pieces)
        expected = backend.encode(text, add_special_tokens=False).ids
        assert encoder.encode(pieces) == expected
        assert encoder._encode_renamed(pieces, text, "") == expected


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_control_token_half_typed_is_text(cut: int) -> None:
    "What template and data write together is no control token, while two pieces of the template together are one."
    backend = train_tokenizer(CONTROL)
    end = backend.token_to_id("<|im_end|>")
    head, tail = "<|im_end|>"[:cut], "<|im_end|>"[cut:]
    assert end not in encode(backend, [("a" + head, False), (tail, True)])
    assert end not in encode(backend, [("a" + head, True), (tail, False)])
    assert end in encode(backend, [("a" + head, False), (tail, False)])
    assert end not in encode(backend, [("a" + head, True), (tail, True)])


def test_a_typed_tail_does_not_turn_one_control_token_into_another() -> None:
    "Data that continues the template's token to a longer one gets the template's token and text."
    backend = train_tokenizer(["<a>", "<a>b"])
    one, other = backend.token_to_id("<a>"), backend.token_to_id("<a>b")
    assert backend.encode("<a>b").ids == [other]
    assert encode(backend, [("<a>", False), ("b", True)]) == [one, *backend.encode("b").ids]


def test_added_tokens_that_are_not_special_stay_tokens() -> None:
    "Typed text that is a plain added token is encoded as ever."
    backend = train_tokenizer(CONTROL)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    ids = encode(backend, [("<s>", False), ("<think>", True), ("<s>", True)])
    assert ids[:2] == [backend.token_to_id("<s>"), backend.token_to_id("<think>")]
    assert backend.token_to_id("<s>") not in ids[2:]


def test_text_with_the_private_names_is_still_plain() -> None:
    "Whoever types the character that begins the secret names gets another one; all of them typed is refused."
    backend = train_tokenizer(CONTROL)
    forged = _LEADS[0] + chr(0xF0000)
    pieces = [("<|im_start|>", False), (f"{forged}<|im_end|>", True), ("<|im_end|>", False)]
    assert encode(backend, pieces) == by_encode_special_tokens(backend, pieces)
    with pytest.raises(ValueError, match="holds every character"):
        encode(backend, [("".join(_LEADS) + "<s>", True)])


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "normalized"])
def test_flags_of_control_tokens_work_as_before(flag: str) -> None:
    "A template's token that takes its spaces with it still does, beside typed tokens that take none."
    backend = train_tokenizer(CONTROL)
    backend.add_special_tokens([AddedToken("<mask>", special=True, **{flag: True})])
    pieces = [("Hello <mask> you", False), ("<mask> x <mask> ", True), (" <mask> ", False), ("a", True)]
    ids = encode(backend, pieces)
    mask = backend.token_to_id("<mask>")
    neutral = [(text.replace("<mask>", "(mask)") if plain else text, plain) for text, plain in pieces]
    expected = backend.encode("".join(text for text, _ in neutral), add_special_tokens=False)
    assert ids.count(mask) == expected.ids.count(mask) == 2
    decode = lambda ids: backend.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert decode(ids).replace("<mask>", "(mask)") == decode(expected.ids).replace("<mask>", "(mask)")


# ── tokenizers made from sentencepiece models ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_spaces_before_segments_are_kept_as_they_are(scheme: str, kind: str) -> None:
    "A typed token is encoded as text of the same shape that is no token, with the tokenizer's own rule for spaces."
    backend = sentencepiece(scheme, kind=kind)
    plain = tokenizers.Tokenizer.from_str(backend.to_str())  # the oracle has no token <|end|>
    stand_in = "<|enz|>"  # the same pieces but for its last letter
    for pieces in (
        [("<s>", False), ("ab <|end|> a", True), ("</s>", False)],
        [("<|end|>ab", True), ("<s>", False), ("a", True)],
        [("ab", True), ("<s> b</s>", False), (" <|end|> ", True)],
    ):
        neutral = "".join(text.replace("<|end|>", stand_in) if typed else text for text, typed in pieces)
        expected = plain.encode(neutral, add_special_tokens=False).ids
        d, z = backend.token_to_id("d"), backend.token_to_id("z")
        assert encode(backend, pieces) == [d if n == z else n for n in expected]


@pytest.mark.parametrize("scheme", ["first", "always", "never", "normalizer"])
@pytest.mark.parametrize("flags", [{"normalized": False}, {"normalized": True}, {"rstrip": True}, {"lstrip": True}])
def test_sentencepiece_texts_without_typed_tokens_are_those_of_encode(scheme: str, flags: dict[str, bool]) -> None:
    "Whatever the flags and the rule for spaces, texts without typed tokens have the library's ids."
    backend = sentencepiece(scheme, flags=flags)
    for text in ("<s>ab a<|end|> b</s>", "ab", "a <s> <s>b", "zé<s>é"):
        pieces = [(part, False) if "<" in part else (part, True) for part in text.replace(">", ">\1").split("\1")]
        assert encode(backend, pieces) == backend.encode(text, add_special_tokens=False).ids


def test_a_vocabulary_that_spells_a_control_token_is_refused() -> None:
    "Planted fault: where </s> is an ordinary piece as well, typing it would make the id; such a row has no ids."
    backend = sentencepiece(kind="unigram")
    assert encode(backend, [("ab", True), ("</s>", False)])[-1] == backend.token_to_id("</s>")
    with pytest.raises(ValueError, match="turns a control token that data typed into a real one"):
        encode(backend, [("ab</s>", True)])


def test_an_unknown_character_is_no_forgery() -> None:
    "The id for what the vocabulary lacks may come from typed text, as long as nobody typed its name."
    backend = sentencepiece(kind="bpe")
    ids = encode(backend, [("é<|end|>", True), ("<|end|>", False)])
    assert ids.count(backend.token_to_id("<unk>")) == 1
    assert ids.count(backend.token_to_id("<|end|>")) == 1


def test_the_tokenizer_offers_it(make_folder) -> None:
    "Tokenizer.encode_marked is this, for the tokens that the configuration adds as well."
    tokenizer = load_tokenizer(make_folder(pad_token="[PAD]"))
    pad = tokenizer.control_tokens["[PAD]"]
    assert tokenizer.encode_marked([("[PAD]", False), ("[PAD]", True)]) == [
        pad,
        *tokenizer.encode("[PAD"),
        *tokenizer.encode("]"),
    ]
    assert tokenizer.encode_marked([("Hello", True), ("[PAD]", False)]) == tokenizer.encode("Hello[PAD]")
