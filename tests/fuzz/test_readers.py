"""Readers of what others write: whatever the bytes are, they are read or refused in words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from readers import READERS

CORPUS = Path(__file__).parent / "corpus"


def kept(name: str) -> list[bytes]:
    """The inputs that fuzzing by hand found worth keeping."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]


def changed(seeds: list[bytes], rng: random.Random) -> bytes:
    """A seed with bytes flipped, cut out, doubled, or joined to another."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 12)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randrange(1, 30)]
        else:
            other = rng.choice(seeds)
            data[at:at] = other[: rng.randrange(1, 40)]
    return bytes(data)


@pytest.mark.parametrize("name", READERS)
def test_the_corpus_is_read_or_refused(name: str) -> None:
    """Everything that was kept, also what once was a fault."""
    seeds = kept(name)
    assert len(seeds) >= 5
    for data in seeds:
        READERS[name](data)


@pytest.mark.parametrize("name", READERS)
def test_changed_inputs_are_read_or_refused(name: str) -> None:
    """300 of them."""
    rng, seeds = random.Random(name), kept(name)
    for _ in range(300):
        READERS[name](changed(seeds, rng))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_changed_inputs_are_read_or_refused(name: str) -> None:
    """Ten thousand, others in every run."""
    seed = random.SystemRandom().randrange(2**32)
    rng, seeds = random.Random(seed), kept(name)
    for number in range(10_000):
        data = changed(seeds, rng)
        try:
            READERS[name](data)
        except Exception as error:
            raise AssertionError(f"seed {seed}, input {number}: {data!r}") from error


def test_a_reader_that_raises_something_else_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a KeyError is no answer to a user's file."""
    import readers

    def broken(_paths: object) -> None:
        raise KeyError("messages")

    monkeypatch.setattr(readers, "load_conversations", broken)
    with pytest.raises(KeyError):
        READERS["jsonl"](b"{}")
