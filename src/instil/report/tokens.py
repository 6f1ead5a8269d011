"""Tokens as people see them: an example as coloured text, its targets highlighted, every token's boundary visible."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from rich.console import Console
from rich.text import Text

from instil.report.decoding import parts
from instil.report.escape import visible
from instil.report.kinds import WORDS, answer_kinds, token_account
from instil.types import KINDS, Example

Pair = tuple[str, str]  # styles of even and odd tokens, so that neighbours differ

BRIGHT: Mapping[str, Pair] = {
    "answer": ("black on pale_green1", "black on dark_sea_green3"),
    "reasoning": ("black on light_sky_blue1", "black on sky_blue2"),
    "tool_call": ("black on khaki1", "black on khaki3"),
    "terminator": ("bold white on dark_red", "bold white on dark_red"),
    "prompt": ("black on plum1", "black on plum2"),
}
FAINT: Mapping[str, Pair] = {
    "answer": ("pale_green1 on grey23", "pale_green1 on grey35"),
    "reasoning": ("light_sky_blue1 on grey23", "light_sky_blue1 on grey35"),
    "tool_call": ("khaki1 on grey23", "khaki1 on grey35"),
    "terminator": ("bold light_coral on grey23", "bold light_coral on grey23"),
    "prompt": ("plum1 on grey23", "plum1 on grey35"),
}
BOLD: Mapping[str, Pair] = {**dict.fromkeys(KINDS, ("bold", "bold underline")), "terminator": ("bold reverse",) * 2}


@dataclass(frozen=True, slots=True)
class Look:
    """How tokens are shown.

    context: read, not learnt. target: learnt, by kind; faint: the same, for weights below 1. control: a control token
    in the context (a control token that is a target keeps the target's style and is underlined).
    note: a weight, a kind or a cut, which no token says. brackets: what stands around a run of targets where colours
    cannot tell, with the run's kind and weight in it; "" where they can.
    """

    context: Pair = ("dim", "dim underline")
    target: Mapping[str, Pair] = field(default_factory=lambda: BRIGHT)
    faint: Mapping[str, Pair] = field(default_factory=lambda: FAINT)
    control: Pair = ("bold dark_cyan", "bold dark_cyan")
    escape: str = "not dim bold italic magenta"
    byte: str = "dim italic"  # of a character that a later token completes
    note: str = "bold italic orange3"
    newline: str = "⏎"
    tab: str = "⇥"
    empty: str = "∅"  # a token that decodes to nothing
    times: str = "×"
    brackets: Pair = ("", "")
    ascii_only: bool = False


COLOUR = Look()
PLAIN = Look(target=BOLD, faint=BOLD, control=("dim italic", "dim italic"), note="italic", brackets=("⟦", "⟧"))


def look_for(console: Console) -> Look:
    """What a console can show: colours or (NO_COLOR, a pipe) attributes and brackets; ASCII unless it speaks UTF-8."""
    look = PLAIN if console.no_color or console.color_system is None else COLOUR
    if console.encoding.lower().replace("_", "-").startswith(("utf-8", "utf8")):
        return look
    brackets = (">>>", "<<<") if look.brackets[0] else look.brackets
    return replace(look, newline="\\n", tab="\\t", empty="(empty)", times="x", brackets=brackets, ascii_only=True)


def token_view(
    example: Example, pieces: Sequence[str], *, control_tokens: Collection[int] = (), look: Look = COLOUR
) -> Text:
    """The example's tokens as one text: prompt, then answer, with one span of its kind's style for each token.

    pieces: what each token of prompt then answer adds to the text. control_tokens: ids of control tokens. A token is a
    target where its weight is > 0. Nothing in `pieces` reaches the terminal as anything but text: newlines are shown
    as ⏎ and kept, control and format characters are written out. A weight other than 1 stands before its run.
    Raises ValueError when there are not as many pieces as tokens.
    """
    tokens = list(_tokens(example, pieces, look))
    text = Text(overflow="fold")
    if example.cut_tokens:
        text.append(f"[... {_counted(example.cut_tokens, 'token')} of old turns cut]", look.note).append("\n")
    for (learnt, _, note), run in groupby(tokens, key=lambda token: token.run):
        text.append(look.brackets[0] if learnt else "")
        text.append(note, look.note)
        for token in run:
            _append(text, token, token.token_id in control_tokens, look)
        text.append(look.brackets[1] if learnt else "")
    return text


def legend(look: Look = COLOUR, kinds: Collection[str] = KINDS) -> Text:
    """What the styles mean, in one line; kinds: those of the targets that are shown."""
    text = Text(overflow="fold").append(" context, not learnt ", look.context[0])
    text.append("  ").append(" control token ", look.control[0])
    for kind in (kind for kind in KINDS if kind in kinds):
        text.append("  ").append(look.brackets[0]).append(_label(kind, look), look.note)
        text.append(f" {WORDS[kind]} ", look.target[kind][0]).append(look.brackets[1])
    return text.append("  ").append(f"{look.times}0.5", look.note).append(" weight, if not 1")


def print_example(
    console: Console, example: Example, pieces: Sequence[str], *, control_tokens: Collection[int] = ()
) -> None:
    """One example with its heading, as the console can show it."""
    look = look_for(console)
    heading = f"{visible(example.origin, ascii_only=look.ascii_only)}, turn {example.turn}: {counts(example)}"
    console.print(Text(heading, "bold", overflow="fold"))
    console.print(token_view(example, pieces, control_tokens=control_tokens, look=look))


def counts(example: Example) -> str:
    """How many tokens an example has of what; the kinds of its targets where there is more than a plain answer."""
    account = token_account([example])
    text = f"{_counted(account.prompt, 'prompt token')}, {_counted(account.target_tokens, 'target')}"
    found = {kind: n for kind, n in account.targets.items() if n}
    return f"{text} ({_listed(found)})" if set(found) - {"answer", "terminator"} else text


@dataclass(frozen=True, slots=True)
class _Token:
    """A token to show. run: (learnt, weight, note before it), equal for tokens that are shown as one run."""

    at: int
    token_id: int
    piece: str
    kind: str
    weight: float
    run: tuple[bool, float, str]


def _tokens(example: Example, pieces: Sequence[str], look: Look) -> Iterator[_Token]:
    """Prompt, then answer. kind: "context", or what kind of target it is."""
    prompt, answer = example.prompt_tokens.tolist(), example.answer_tokens.tolist()
    if len(pieces) != len(prompt) + len(answer):
        raise ValueError(f"{len(pieces)} pieces for {len(prompt) + len(answer)} tokens")
    for at, token_id in enumerate(prompt):
        yield _Token(at, token_id, pieces[at], "context", 0.0, (False, -1.0, ""))
    answers = zip(answer, answer_kinds(example).tolist(), example.weights.tolist(), strict=True)
    for at, (token_id, kind, weight) in enumerate(answers, start=len(prompt)):
        name = KINDS[kind] if weight > 0 else "context"
        yield _Token(at, token_id, pieces[at], name, weight, (weight > 0, weight, _note(name, weight, look)))


def _note(kind: str, weight: float, look: Look) -> str:
    """What is written before a run of targets: its weight, and where colours cannot tell, its kind."""
    mark = "" if weight == 1 else f"{look.times}{weight:.3g}"
    if not look.brackets[0]:
        return mark
    return "" if kind == "context" else _label(kind, look, mark)


def _label(kind: str, look: Look, mark: str = "") -> str:
    """The note within brackets, `reasoning ×0.5|`; "" where there is nothing to say."""
    name = "" if kind in ("answer", "terminator") else WORDS[kind]
    said = " ".join(each for each in (name, mark) if each)
    return f"{said}|" if said and look.brackets[0] else ""


def _append(text: Text, token: _Token, control: bool, look: Look) -> None:
    """Append a token's text made safe, with its style."""
    learnt = token.kind != "context"
    styles = look.control if control else look.context
    if learnt:
        styles = (look.faint if token.weight < 1 else look.target)[token.kind]
    drawn = {"newline": f"{look.newline}\n", "tab": f"{look.tab}\t", "empty": look.empty}
    marks = {"escape": look.escape, "byte": look.byte, "empty": look.byte}
    start, marked = len(text), []
    for kind, shown in parts(token.piece, ascii_only=look.ascii_only):
        began = len(text)
        text.append(drawn.get(kind, shown))
        if kind in marks:
            marked.append((marks[kind], began, len(text)))
    text.stylize(styles[token.at % 2], start)
    if learnt and control and token.kind != "terminator":
        text.stylize("underline", start)
    for style, first, last in marked:
        text.stylize(style, first, last)


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _listed(targets: Mapping[str, int]) -> str:
    """`8 reasoning, 3 answer, 1 end`."""
    return ", ".join(f"{n:,} {'end' if kind == 'terminator' else WORDS[kind]}" for kind, n in targets.items())
