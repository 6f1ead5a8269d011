"""Tokens as people see them: an example as coloured text, its targets highlighted, every token's boundary visible."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rich.console import Console
from rich.text import Text

from instil.report.escape import segments, visible
from instil.types import Example

EMPTY, EMPTY_ASCII = "∅", "(empty)"  # a token that decodes to nothing, such as a part of a character


@dataclass(frozen=True, slots=True)
class Look:
    """How tokens are shown. A style pair is for even and odd tokens, so that neighbours differ.

    context: read, not learnt. target: learnt. terminator: the target that ends the answer. control: a control token in
    the context (a control token that is a target keeps the target's style and is underlined).
    brackets: what stands around a run of targets where colours cannot tell; "" where they can.
    """

    context: tuple[str, str] = ("dim", "dim underline")
    target: tuple[str, str] = ("black on pale_green1", "black on dark_sea_green3")
    terminator: tuple[str, str] = ("bold white on dark_red", "bold white on dark_red")
    control: tuple[str, str] = ("bold dark_cyan", "bold dark_cyan")
    escape: str = "not dim bold italic magenta"
    newline: str = "⏎"
    tab: str = "⇥"
    brackets: tuple[str, str] = ("", "")
    ascii_only: bool = False


COLOUR = Look()
PLAIN = Look(
    context=("dim", "dim underline"),
    target=("bold", "bold underline"),
    terminator=("bold reverse", "bold reverse"),
    control=("dim italic", "dim italic"),
    brackets=("⟦", "⟧"),
)


def look_for(console: Console) -> Look:
    """What a console can show: colours or (NO_COLOR, a pipe) attributes and brackets; ASCII unless it speaks UTF-8."""
    look = PLAIN if console.no_color or console.color_system is None else COLOUR
    if not console.encoding.lower().replace("_", "-").startswith(("utf-8", "utf8")):
        brackets = (">>>", "<<<") if look.brackets[0] else look.brackets
        look = replace(look, newline="\\n", tab="\\t", brackets=brackets, ascii_only=True)
    return look


def token_view(
    example: Example, pieces: Sequence[str], *, control_tokens: Collection[int] = (), look: Look = COLOUR
) -> Text:
    """The example's tokens as one text: prompt, then answer, with one span of its kind's style for each token.

    pieces: the decoded text of each token of prompt then answer. control_tokens: ids of control tokens. A token is a
    target where its weight is > 0; the terminator is the answer's last. Nothing in `pieces` reaches the terminal as
    anything but text: newlines are shown as ⏎ and kept, control and format characters are written out.
    Raises ValueError when there are not as many pieces as tokens.
    """
    tokens = [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]
    if len(pieces) != len(tokens):
        raise ValueError(f"{len(pieces)} pieces for {len(tokens)} tokens")
    text = Text(overflow="fold")
    numbered = zip(range(len(tokens)), tokens, pieces, _kinds(example), strict=True)
    for learnt, run in groupby(numbered, key=lambda token: token[3] in ("target", "terminator")):
        text.append(look.brackets[0] if learnt else "")
        for at, token_id, piece, kind in run:
            shown = "control" if kind == "context" and token_id in control_tokens else kind
            start = len(text)
            escapes = _append(text, piece, look)
            text.stylize(getattr(look, shown)[at % 2], start)
            if kind == "target" and token_id in control_tokens:
                text.stylize("underline", start)
            for first, last in escapes:
                text.stylize(look.escape, first, last)
        text.append(look.brackets[1] if learnt else "")
    return text


def legend(look: Look = COLOUR) -> Text:
    """What the styles mean, in one line."""
    meanings = {
        "context": "context, not learnt",
        "control": "control token",
        "target": "target",
        "terminator": "ends the answer, learnt",
    }
    text = Text(overflow="fold")
    for kind, meaning in meanings.items():
        learnt = kind in ("target", "terminator")
        text.append("  " if text else "").append(look.brackets[0] if learnt else "")
        text.append(f" {meaning} ", getattr(look, kind)[0]).append(look.brackets[1] if learnt else "")
    return text


def print_example(
    console: Console, example: Example, pieces: Sequence[str], *, control_tokens: Collection[int] = ()
) -> None:
    """One example with its heading, as the console can show it."""
    look = look_for(console)
    origin = visible(example.origin, ascii_only=look.ascii_only)
    targets = int((example.weights > 0).sum())
    heading = f"{origin}, turn {example.turn}: {len(example.prompt_tokens):,} prompt tokens, {targets:,} targets"
    console.print(Text(heading, "bold", overflow="fold"))
    console.print(token_view(example, pieces, control_tokens=control_tokens, look=look))


def _kinds(example: Example) -> Iterator[str]:
    """context, target or terminator for each token of prompt then answer."""
    yield from ("context" for _ in example.prompt_tokens)
    last = len(example.weights) - 1
    for at, weight in enumerate(example.weights.tolist()):
        yield "context" if not weight > 0 else "terminator" if at == last else "target"


def _append(text: Text, piece: str, look: Look) -> list[tuple[int, int]]:
    """Append a token's text made safe; returns where it holds escapes."""
    escapes = []

    def add(shown: str, escaped: bool) -> None:
        if escaped:
            escapes.append((len(text), len(text) + len(shown)))
        text.append(shown)

    if not piece:
        add(EMPTY_ASCII if look.ascii_only else EMPTY, True)
    for line_at, line in enumerate(piece.split("\n")):
        if line_at:
            text.append(f"{look.newline}\n")
        for cell_at, cell in enumerate(line.split("\t")):
            if cell_at:
                text.append(f"{look.tab}\t")
            for shown, escaped in segments(cell, ascii_only=look.ascii_only):
                add(shown, escaped)
    return escapes
