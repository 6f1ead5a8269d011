"""A tokenizer's pre-tokenizer in, one regex of Python that splits ASCII text into the same words out."""

from __future__ import annotations

import itertools
import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

# The regex inside the library's ByteLevel pre-tokenizer (tokenizers, src/pre_tokenizers/byte_level.rs), from GPT-2.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

ASCII = frozenset(map(chr, range(128)))
SPACE = frozenset("\t\n\v\f\r ")  # what \s means, there and here
DIGITS = frozenset(string.digits)
_ESCAPES = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_CLASSES = {"s": SPACE, "d": DIGITS, "w": frozenset(string.ascii_letters + string.digits + "_")}
_NO_ASCII = {"Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar"}  # scripts without ASCII
_LITERAL_CASELESS = re.compile(r"\(\?i:([A-Za-z'|\[\]]*)\)")
_QUANTIFIER = re.compile(r"(?:[*+?]\+?|\{\d+(?:,\d*)?\})(?![*+?{])")
_RUN = re.compile(r"(?P<unit>\[[^\[\]]*\]|\\p\{\w+\}|\\d)(?P<many>\+|\{1,(?P<most>[1-3])\}|)")


class Unknown(ValueError):
    """The pattern holds something whose meaning here is not certain."""


def word_regex(pre_tokenizer: Mapping[str, Any] | None) -> re.Pattern[str] | None:
    """The regex whose matches are the words that the byte-level `pre_tokenizer` (as JSON) makes of ASCII text.

    It stands for all steps together. None where a step is not known, or there is no byte-level step at the end. Where
    its matches leave out a part of a text, the text is one that the regex does not split.
    """
    steps = _steps(pre_tokenizer)
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    try:
        *runs, main = [*map(_step_pattern, steps[:-1]), *([GPT2] if steps[-1].get("use_regex", True) else [])]
        return _composed(runs, main)
    except (Unknown, ValueError, re.error):
        return None


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer.get("type") == "Sequence":
        return [step for part in pre_tokenizer.get("pretokenizers", []) for step in _steps(part)]
    return [pre_tokenizer]


def _step_pattern(step: Mapping[str, Any]) -> str:
    """The regex of a step that makes a word of each match."""
    if step.get("type") == "Digits" and step.get("individual_digits"):
        return r"\p{N}"
    if step.get("type") != "Split" or "Regex" not in step.get("pattern", {}):
        raise Unknown(step.get("type"))
    # A text that the regex covers has no gaps, and then removing what lies between matches changes nothing.
    if (step.get("behavior"), bool(step.get("invert"))) not in (("Isolated", False), ("Removed", True)):
        raise Unknown(step.get("behavior"))
    return step["pattern"]["Regex"]


def _composed(runs: list[str], main: str) -> re.Pattern[str]:
    """One regex for splitting by each of `runs` first and what lies between them by `main`.

    A run is a class of characters, repeated at most three times. Its characters end every other word, as the end of a
    text does: so they are taken out of all other classes, also of those in lookaheads.
    """
    whole = re.compile(translate(main), re.ASCII)
    taken: frozenset[str] = frozenset()
    branches = []
    for run in runs:
        found = _RUN.fullmatch(run)
        if found is None:
            raise Unknown(run)
        members = _members(found["unit"]) - taken
        if not members:  # no ASCII character is in it, so it never matches here
            continue
        most = int(found["most"] or 1)
        if found["many"] == "+" or not all(_is_one_word(whole, members, n) for n in range(1, most + 1)):
            raise Unknown(run)
        branches.append(f"{_class(members)}{{1,{most}}}")
        taken |= members
    return re.compile("|".join([*branches, translate(main, taken)]), re.ASCII)


def _is_one_word(main: re.Pattern[str], members: frozenset[str], length: int) -> bool:
    """Whether `main`, which later splits each run as well, leaves runs of this length whole."""
    texts = map("".join, itertools.product(sorted(members), repeat=length))
    return len(members) ** length <= 1000 and all(main.findall(text) in ([text], []) for text in texts)


def translate(pattern: str, without: frozenset[str] = frozenset()) -> str:
    """The Oniguruma regex `pattern` for Python's re on ASCII text in which no character is in `without`.

    Every class is evaluated to the ASCII characters in it, so that neither engine's reading of \\s or \\p matters.
    Raises Unknown for whatever may mean something else to Python.
    """
    out, at = [], 0
    while at < len(pattern):
        piece, at = _next(pattern, at, without)
        out.append(piece)
    translated = "".join(out)
    if re.compile(translated, re.ASCII).match(""):
        raise Unknown("matches nothing at all")
    return translated


def _next(pattern: str, at: int, without: frozenset[str]) -> tuple[str, int]:
    """The translation of the element that begins at `at`, and where the next begins."""
    caseless = _LITERAL_CASELESS.match(pattern, at)
    if caseless:
        if without & set(string.ascii_letters + "'"):
            raise Unknown(caseless.group())
        return caseless.group(), caseless.end()
    if pattern.startswith(("(?:", "(?!", "(?="), at):
        return pattern[at : at + 3], at + 3
    if pattern[at] == "(" and not pattern.startswith("(?", at):
        return "(?:", at + 1
    if pattern[at] in ")|":
        return pattern[at], at + 1
    quantifier = _QUANTIFIER.match(pattern, at)
    if quantifier:
        return quantifier.group(), quantifier.end()
    if pattern[at] in "^$.(*+?{":
        raise Unknown(pattern[at:])
    members, end = _set(pattern, at) if pattern[at] == "[" else _atom(pattern, at)
    return _class(members - without), end


def _members(unit: str) -> frozenset[str]:
    members, end = _set(unit, 0) if unit.startswith("[") else _atom(unit, 0)
    if end != len(unit):
        raise Unknown(unit)
    return members


def _set(pattern: str, at: int) -> tuple[frozenset[str], int]:
    """The ASCII members of the class [...] that begins at `at`, and where it ends."""
    start = at + 2 if pattern.startswith("[^", at) else at + 1
    members: set[str] = set()
    at = start
    while not pattern.startswith("]", at):
        if at >= len(pattern) or pattern[at] == "[" or pattern.startswith("&&", at):
            raise Unknown(pattern)
        low = pattern[at]
        found, at = _atom(pattern, at)
        if pattern.startswith("-", at) and not pattern.startswith("-]", at):
            high = pattern[at + 1]
            if "\\" in (low, high) or high == "[" or low > high:
                raise Unknown(pattern)
            found, at = frozenset(c for c in ASCII if low <= c <= high), at + 2
        members |= found
    if at == start:
        raise Unknown(pattern)
    return (ASCII - members if pattern[start - 1] == "^" else frozenset(members)), at + 1


def _atom(pattern: str, at: int) -> tuple[frozenset[str], int]:
    """The ASCII characters that a literal, an escape or a property stands for, and where it ends."""
    if pattern[at] != "\\":
        return frozenset(pattern[at]) & ASCII, at + 1
    letter = pattern[at + 1 : at + 2]
    if letter in _ESCAPES:
        return frozenset(_ESCAPES[letter]), at + 2
    if letter.lower() in _CLASSES:
        members = _CLASSES[letter.lower()]
        return (members if letter.islower() else ASCII - members), at + 2
    named = re.compile(r"\\([pP])\{(\w+)\}").match(pattern, at)
    if named:
        members = _property(named[2])
        return (members if named[1] == "p" else ASCII - members), named.end()
    if letter in string.punctuation and letter:
        return frozenset(letter), at + 2
    raise Unknown(pattern[at:])


def _property(name: str) -> frozenset[str]:
    """The ASCII characters of a general category (L, Lu, N, ...) or of a script that has none."""
    if name in _NO_ASCII:
        return frozenset()
    known: Callable[[str], bool] = {1: lambda c: c[0] == name, 2: lambda c: c == name}.get(len(name), lambda c: False)
    if name[:1] not in "LMNPS" or len(name) > 2 or (len(name) == 2 and name[1] not in "ultmondlcepsifk"):
        raise Unknown(name)
    return frozenset(c for c in ASCII if known(unicodedata.category(c)))


def _class(members: frozenset[str]) -> str:
    """A regex for one character of `members`."""
    if not members:
        return "(?!)"
    chars = "".join(map(re.escape, sorted(members)))
    return chars if len(members) == 1 else f"[{chars}]"
