"""tokens: exactly the targets are highlighted, every boundary shows, and no text from data drives the terminal."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from instil.report.tokens import COLOUR, PLAIN, legend, look_for, print_example, token_view
from instil.types import Example

PROMPT = ["<|user|>", "Hi", "\n", "<|bot|>"]
ANSWER = ["Hel", "lo", " x", "<|end|>"]


def example(prompt: int, weights: list[float], origin: str = "d.jsonl:7") -> Example:
    tokens = np.arange(prompt + len(weights), dtype=np.int32)
    return Example(tokens[:prompt], tokens[prompt:], np.array(weights, np.float32), origin, 0)


def styled(text, *styles: str) -> list[str]:
    """The stretches of text that carry one of the styles, in order."""
    return [text.plain[span.start : span.end] for span in text.spans if span.style in styles]


def console(encoding: str = "utf-8", **options) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    return Console(file=io.TextIOWrapper(raw, encoding, write_through=True), width=80, **options), raw


def test_exactly_the_targets_are_marked():
    "A token of the answer with weight is a target, the last one ends the answer, all else is context."
    text = token_view(example(4, [1, 0, 0.5, 1]), PROMPT + ANSWER, control_tokens={0, 3, 7})
    assert text.plain == "<|user|>Hi⏎\n<|bot|>Hello x<|end|>"
    assert styled(text, *COLOUR.target) == ["Hel", " x"]
    assert styled(text, *COLOUR.terminator) == ["<|end|>"]
    assert styled(text, *COLOUR.control) == ["<|user|>", "<|bot|>"]
    assert styled(text, *COLOUR.context) == ["Hi", "⏎\n", "lo"]


def test_the_four_kinds_look_different_in_both_looks():
    "No two kinds share a style."
    for look in (COLOUR, PLAIN):
        kinds = [set(look.context), set(look.target), set(look.terminator), set(look.control)]
        assert sum(map(len, kinds)) == len(set.union(*kinds))


def test_neighbouring_tokens_differ():
    "Boundaries show: each token has one span, and its style is not its neighbour's."
    text = token_view(example(3, [1, 1, 1, 1]), list("abcdefg"))
    spans = [(span.start, span.end, span.style) for span in text.spans]
    assert [span[:2] for span in spans] == [(i, i + 1) for i in range(7)]
    assert all(left[2] != right[2] for left, right in pairwise(spans))


def test_a_control_token_within_the_targets_is_underlined():
    "It stays a target, and shows that it is a control token."
    text = token_view(example(1, [1, 1, 1]), ["p", "<|think|>", "b", "<|end|>"], control_tokens={1, 3})
    assert styled(text, *COLOUR.target) == ["<|think|>", "b"]
    assert styled(text, "underline") == ["<|think|>"]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("\x1b[31m", "\\x1b[31m"), ("\x1b]0;title\x07", "\\x1b]0;title\\x07"), ("a\rb", "a\\rb"), ("\x08", "\\x08"),
        ("\x9b1m", "\\x9b1m"), ("\u202eevil\u202c", "\\u202eevil\\u202c"), ("\u2066", "\\u2066"), ("\u200b", "\\u200b"),
        ("\ufeff", "\\ufeff"), ("\U000e0041", "\\U000e0041"), ("\ud800", "\\ud800"), ("\u2028", "\\u2028"),
        ("\x00", "\\x00"), ("\x7f", "\\x7f"), ("", "∅"), ("\n\n", "⏎\n⏎\n"), ("\t", "⇥\t"), ("[bold]é 漢😀", "[bold]é 漢😀"),
    ],
)  # fmt: skip
def test_what_would_drive_the_terminal_is_written_out(piece, shown):
    "Escapes, control, bidi and invisible characters show as in a Python literal; other text is as it is."
    text = token_view(example(1, [1, 1]), [piece, piece, "e"])
    assert text.plain == shown + shown + "e"
    assert styled(text, *COLOUR.target) == [shown]


def test_escapes_look_unlike_the_same_text():
    "A written-out ESC has the escape style, the five characters typed in the data do not."
    text = token_view(example(1, [1, 1]), ["\x1b[0m", "\\x1b[0m", "e"])
    assert styled(text, COLOUR.escape) == ["\\x1b"]


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "no_color": True}, {"force_terminal": True}])
def test_only_rich_writes_escapes(options):
    "Whatever the console, the only control sequences in the output are colours and attributes."
    out, raw = console(**options)
    hostile = "\x1b[2J\x1b]0;t\x07\x9b\r\x08\u202e"
    print_example(out, example(1, [1, 1], origin=f"{hostile}.jsonl:1"), [hostile, hostile, "e"])
    written = raw.getvalue().decode()
    rest = re.sub(r"\x1b\[[0-9;]*m", "", written)
    assert rest.replace("\n", "").isprintable()
    assert "\\x1b[2J" in rest


def test_no_color_is_honoured(monkeypatch):
    "With NO_COLOR there are attributes and brackets, no colours."
    monkeypatch.setenv("NO_COLOR", "1")
    out, raw = console(force_terminal=True, color_system="truecolor")
    print_example(out, example(4, [1, 1, 1, 1]), PROMPT + ANSWER)
    written = raw.getvalue().decode()
    assert "⟦" in written
    assert "\x1b[1" in written
    codes = {code for codes in re.findall(r"\x1b\[([0-9;]*)m", written) for code in codes.split(";")}
    assert codes <= {"0", "1", "2", "3", "4", "7"}  # reset, bold, dim, italic, underline, reverse


def test_a_pipe_shows_the_targets_in_brackets():
    "Without a terminal the targets are still told from the context; runs, not tokens, are bracketed."
    out, raw = console()
    print_example(out, example(4, [1, 0, 1, 1]), PROMPT + ANSWER)
    heading, *lines = raw.getvalue().decode().splitlines()
    assert heading == "d.jsonl:7, turn 0: 4 prompt tokens, 3 targets"
    assert lines == ["<|user|>Hi⏎", "<|bot|>⟦Hel⟧lo⟦ x<|end|>⟧"]


def test_ascii_where_the_console_is_not_utf8():
    "Nothing that the encoding lacks is written."
    out, raw = console("ascii")
    out.print(legend(look_for(out)))
    print_example(out, example(1, [1, 1, 1]), ["é\n", "漢\t", "", "e"])
    written = raw.getvalue().decode("ascii")
    assert "\\xe9\\n\n" in written
    assert ">>>\\u6f22\\t" in written
    assert "(empty)e<<<" in written


def test_the_legend_shows_each_style():
    "Every kind is in the legend, in the style it has in the text."
    text = legend()
    for kind, word in (("context", "context"), ("target", "target"), ("terminator", "ends"), ("control", "control")):
        (found,) = styled(text, getattr(COLOUR, kind)[0])
        assert word in found


def test_pieces_must_match_the_tokens():
    "A caller that decoded something else is told."
    with pytest.raises(ValueError, match="3 pieces for 4 tokens"):
        token_view(example(2, [1, 1]), ["a", "b", "c"])
