"""What one side of the demo's data may say: the shape of its vocabulary, and what both sides have in common.

A phrase is a template: {the} is a determiner, the other slots are the values of a record. It has no capital at its
start and no full stop at its end; the generator adds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Phrases = tuple[str, ...]

# The shop's own few words, which both sides use: how it addresses people, and the sizes of what it sells.
TITLES: Phrases = ("Mr", "Ms", "Mrs", "Dr")
SIZES: Phrases = ("small", "medium", "large")

DETERMINERS: Phrases = ("the", "my", "our", "this")
MONTHS = "January February March April May June July August September October November December".split()
ISSUES: Phrases = ("broken", "late", "wrong", "refund", "question")


@dataclass(frozen=True)
class Words:
    """What one side may say. `names` are (first, last); `cues` are the sentences that show an issue, by issue."""

    names: tuple[tuple[str, str], ...]
    products: Phrases
    greetings: Phrases
    intros: Phrases  # carry {name} at the start of a message
    sign_offs: Phrases  # carry {name} at its end
    closings: Phrases
    cues: Mapping[str, Phrases]
    orders: Phrases
    dates: Phrases
    amounts: Phrases
    reviews: Mapping[str, Phrases]  # by sentiment
    asks: Mapping[str, Phrases]  # the instruction of each small task, by task


def lines(text: str) -> Phrases:
    """One phrase a line."""
    return tuple(line.strip() for line in text.strip().splitlines())


def pairs(left: str, right: str) -> tuple[tuple[str, str], ...]:
    """Every pair of a word on the left and a word on the right."""
    return tuple((a, b) for a in left.split() for b in right.split())


def products(adjectives: str, nouns: str) -> Phrases:
    return tuple(f"{adjective} {noun}" for adjective, noun in pairs(adjectives, nouns))
