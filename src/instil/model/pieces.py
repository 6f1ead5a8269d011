"""A sentencepiece vocabulary with scores in, the same tokenisation as a BPE of the tokenizers library out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers

NORMAL, BYTE = 1, 6  # llama.cpp's token types (llama.h, enum llama_token_type) that take part in tokenising text
LONGEST_PIECE = 1024  # characters; sentencepiece's own models keep to 16 as a rule
SPACE = "▁"


class Unfit(ValueError):
    """The vocabulary cannot be this kind of tokenizer; the message says why."""


def pieces_tokenizer(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], *, unknown: str | None, space_prefix: bool
) -> Tokenizer:
    """The tokenizer of a sentencepiece BPE vocabulary, as llama.cpp's `llama` vocabularies have it.

    Two neighbouring pieces are joined when the joint one exists, that with the highest score first; a character
    without a piece becomes its bytes. A space is ▁, and with space_prefix every stretch of text begins with one.
    Nothing else is normalised. Raises Unfit. Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_spm.
    """
    vocab = {piece: n for n, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise Unfit("its vocabulary holds a token twice")
    if len(scores) != len(pieces) or not all(map(math.isfinite, scores)):
        raise Unfit("its scores are not one finite number for each token")
    joinable = {piece: scores[n] for n, piece in enumerate(pieces) if types[n] == NORMAL and piece}
    model = models.BPE(
        vocab=vocab, merges=_merges(joinable, vocab), unk_token=unknown, fuse_unk=True,
        byte_fallback=_has_bytes(pieces, types),
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    marks = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), marks]) if space_prefix else marks
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    return tokenizer


def _merges(scores: dict[str, float], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best third first."""
    found: list[tuple[float, int, tuple[str, str]]] = []
    for piece, score in scores.items():
        if len(piece) > LONGEST_PIECE:
            raise Unfit(f"token {ids[piece]} has {len(piece)} characters, more than {LONGEST_PIECE}")
        halves = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        found += [(-score, ids[piece], pair) for pair in halves if pair[0] in scores and pair[1] in scores]
    found.sort(key=lambda merge: (merge[0], merge[1], ids[merge[2][0]], ids[merge[2][1]]))
    return [pair for _, _, pair in found]


def _has_bytes(pieces: Sequence[str], types: Sequence[int]) -> bool:
    """Whether there is a token for each byte; some of them only would lose text."""
    found = {piece.upper() for piece, kind in zip(pieces, types, strict=True) if kind == BYTE}
    wanted = {f"<0X{byte:02X}>" for byte in range(256)}
    if found and found != wanted:
        raise Unfit("its byte tokens are not the 256 from <0x00> to <0xFF>")
    return bool(found)
