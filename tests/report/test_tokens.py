"""tokens: exactly the targets are highlighted, every boundary shows, and no text from data drives the terminal."""

from __future__ import annotations

import io
import re
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from instil.report.tokens import COLOUR, PLAIN, legend, look_for, print_example, token_view
from instil.types import KINDS, Example

PROMPT = ["<|user|>", "Hi", "\n", "<|bot|>"]
ANSWER = ["Hel", "lo", " x", "<|end|>"]


def example(prompt: int, weights: list[float], origin: str = "d.jsonl:7", kinds: str = "", cut: int = 0) -> Example:
    """kinds: the first letter of each answer token's kind, A for answer; without, the example has none of its own."""
    tokens = np.arange(prompt + len(weights), dtype=np.int32)
    letters = [kind[0] for kind in ("Answer", "reasoning", "call", "end", "prompt")]
    indices = np.array([letters.index(letter) for letter in kinds], np.int8)
    weight = np.array(weights, np.float32)
    return Example(tokens[:prompt], tokens[prompt:], weight, origin, 0, kinds=indices, cut_tokens=cut)


def styled(text, *styles: str) -> list[str]:
    """The stretches of text that carry one of the styles, in order."""
    return [text.plain[span.start : span.end] for span in text.spans if span.style in styles]


def console(encoding: str = "utf-8", **options) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    return Console(file=io.TextIOWrapper(raw, encoding, write_through=True), width=80, **options), raw


def test_exactly_the_targets_are_marked():
    "A token of the answer with weight is a target, the last one ends the answer, all else is context."
    text = token_view(example(4, [1, 1, 0, 1]), PROMPT + ANSWER, control_tokens={0, 3, 7})
    assert text.plain == "<|user|>Hi⏎\n<|bot|>Hello×0 x<|end|>"
    assert styled(text, *COLOUR.target["answer"]) == ["Hel", "lo"]
    assert styled(text, *COLOUR.target["terminator"]) == ["<|end|>"]
    assert styled(text, *COLOUR.control) == ["<|user|>", "<|bot|>"]
    assert styled(text, *COLOUR.context) == ["Hi", "⏎\n", " x"]


def test_each_kind_of_target_has_its_style():
    "An example's own kinds decide, not the place in the answer."
    text = token_view(example(1, [1] * 6, kinds="prcAce"), list("0prctCe"))
    assert {kind: "".join(styled(text, *COLOUR.target[kind])) for kind in KINDS} == {
        "prompt": "p", "reasoning": "r", "tool_call": "cC", "answer": "t", "terminator": "e",
    }  # fmt: skip


def test_a_weight_other_than_1_is_written_before_its_run():
    "×0.5 stands once before the tokens that share it, which are fainter; ×2 is written, and 1 is not."
    text = token_view(example(1, [0.5, 0.5, 2, 1]), list("pabce"))
    assert text.plain == "p×0.5ab×2ce"
    assert styled(text, COLOUR.note) == ["×0.5", "×2"]
    assert styled(text, *COLOUR.faint["answer"]) == ["a", "b"]
    assert styled(text, *COLOUR.target["answer"]) == ["c"]


def test_cut_turns_are_said_first():
    "What left the prompt stands before it, with its number of tokens."
    text = token_view(example(1, [1, 1], cut=1312), list("pab"))
    assert text.plain == "[... 1,312 tokens of old turns cut]\npab"
    assert token_view(example(1, [1, 1], cut=1), list("pab")).plain.startswith("[... 1 token of old turns cut]\n")


def test_no_two_kinds_look_alike():
    "No two kinds share a style in colours; without them the brackets tell the kinds of targets apart."
    kinds = [COLOUR.context, COLOUR.control, *COLOUR.target.values(), *COLOUR.faint.values()]
    assert sum(len(set(pair)) for pair in kinds) == len({style for pair in kinds for style in pair})
    plain = [PLAIN.context, PLAIN.control, PLAIN.target["answer"], PLAIN.target["terminator"]]
    assert sum(len(set(pair)) for pair in plain) == len({style for pair in plain for style in pair})


def test_neighbouring_tokens_differ():
    "Boundaries show: each token has one span, and its style is not its neighbour's."
    text = token_view(example(3, [1, 1, 1, 1]), list("abcdefg"))
    spans = [(span.start, span.end, span.style) for span in text.spans]
    assert [span[:2] for span in spans] == [(i, i + 1) for i in range(7)]
    assert all(left[2] != right[2] for left, right in pairwise(spans))


def test_a_control_token_within_the_targets_is_underlined():
    "It stays a target, and shows that it is a control token."
    text = token_view(example(1, [1, 1, 1]), ["p", "<|think|>", "b", "<|end|>"], control_tokens={1, 3})
    assert styled(text, *COLOUR.target["answer"]) == ["<|think|>", "b"]
    assert styled(text, "underline") == ["<|think|>"]


@pytest.mark.parametrize(
    ("piece", "shown"),
    [
        ("\x1b[31m", "\\x1b[31m"), ("\x1b]0;title\x07", "\\x1b]0;title\\x07"), ("a\rb", "a\\rb"), ("\x08", "\\x08"),
        ("\x9b1m", "\\x9b1m"), ("\u202eevil\u202c", "\\u202eevil\\u202c"), ("\u2066", "\\u2066"), ("\u200b", "\\u200b"),
        ("\ufeff", "\\ufeff"), ("\U000e0041", "\\U000e0041"), ("\ud800", "\\ud800"), ("\u2028", "\\u2028"),
        ("\x00", "\\x00"), ("\x7f", "\\x7f"), ("", "∅"), ("\n\n", "⏎\n⏎\n"), ("\t", "⇥\t"), ("[bold]é 漢😀", "[bold]é 漢😀"),
        ("\udce2\udc82", "<0xE2><0x82>"),
    ],
)  # fmt: skip
def test_what_would_drive_the_terminal_is_written_out(piece, shown):
    "Escapes, control, bidi and invisible characters show as in a Python literal; other text is as it is."
    text = token_view(example(1, [1, 1]), [piece, piece, "e"])
    assert text.plain == shown + shown + "e"
    assert styled(text, *COLOUR.target["answer"]) == [shown]


def test_escapes_look_unlike_the_same_text():
    "A written-out ESC has the escape style, the five characters typed in the data do not."
    text = token_view(example(1, [1, 1]), ["\x1b[0m", "\\x1b[0m", "e"])
    assert styled(text, COLOUR.escape) == ["\\x1b"]


def test_bytes_of_a_torn_character_are_dim():
    "They are told from the same characters typed in the data."
    text = token_view(example(1, [1, 1]), ["\udce2", "<0xE2>", "e"])
    assert text.plain == "<0xE2><0xE2>e"
    assert styled(text, COLOUR.byte) == ["<0xE2>"]


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


def test_a_pipe_says_kind_and_weight_in_the_brackets():
    "Where there are no colours the bracket of a run names its kind, unless it is a plain answer, and its weight."
    out, raw = console()
    print_example(out, example(1, [1, 0.5, 1, 1, 1], kinds="rrcAe"), list("pqrcae"))
    heading, shown = raw.getvalue().decode().replace(" \n", " ").split(")\n")
    assert heading.endswith("1 prompt token, 5 targets (1 answer, 2 reasoning, 1 tool call, 1 end")
    assert shown.strip() == "p⟦reasoning|q⟧⟦reasoning ×0.5|r⟧⟦tool call|c⟧⟦ae⟧"


@pytest.mark.parametrize("width", [1, 8, 20])
def test_a_narrow_terminal_loses_nothing(width):
    "Every character is there, whatever the width."
    raw = io.StringIO()
    out = Console(file=raw, width=width)
    print_example(out, example(4, [1, 1, 1, 1], cut=9), PROMPT + ANSWER)
    assert "<|user|>Hi" in raw.getvalue().replace("\n", "")
    assert raw.getvalue().replace("\n", "").replace(" ", "").endswith("⟦Hellox<|end|>⟧")


def test_a_dumb_terminal_gets_brackets_and_no_escapes(monkeypatch):
    "TERM=dumb is a terminal that knows no colours."
    monkeypatch.setenv("TERM", "dumb")
    out, raw = console(force_terminal=True)
    print_example(out, example(4, [1, 1, 1, 1]), PROMPT + ANSWER)
    assert "⟦Hello x<|end|>⟧" in raw.getvalue().decode()
    assert b"\x1b" not in raw.getvalue()


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
    "Every kind is in the legend, in the style it has in the text; those that are not asked for are left out."
    words = {"answer": "answer", "reasoning": "reasoning", "tool_call": "tool call", "terminator": "ends",
             "prompt": "prompt"}  # fmt: skip
    styles = {word: COLOUR.target[kind][0] for kind, word in words.items()}
    for word, style in {**styles, "context": COLOUR.context[0], "control": COLOUR.control[0]}.items():
        (found,) = styled(legend(), style)
        assert word in found
    assert "reasoning" not in legend(kinds=("answer",)).plain


def test_pieces_must_match_the_tokens():
    "A caller that decoded something else is told."
    with pytest.raises(ValueError, match="3 pieces for 4 tokens"):
        token_view(example(2, [1, 1]), ["a", "b", "c"])


def test_kinds_must_match_the_answer():
    "An example whose kinds are of another answer is a bug that shows."
    with pytest.raises(ValueError, match="2 kinds for 3 answer tokens"):
        token_view(example(1, [1, 1, 1], kinds="Ae"), list("pabc"))
