"""dataset: the page says of every token what it is for, and nothing in a row is anything but text."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from instil.errors import MachineError, Problem
from instil.report.dataset import About, first_examples, shares, write_dataset
from instil.report.kinds import Account
from instil.types import KINDS, Example

PAYLOADS = (
    "<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "<svg/onload=alert(1)>", "</title></style>",
    "javascript:alert(1)", '<a href="javascript:alert(1)">x</a>', '" onmouseover="alert(1)', "' onfocus='alert(1)",
    "\x1b[2J\x1b]8;;http://x\x07", "\u202eevil\u2066", "\u200b\ufeff", "\x00\r\x9b", "{{ 7 * 7 }}{% raw %}", "-->]]>",
    "&lt;b&gt;&#60;i", "\ud800", "\udce2\udc82",
)  # fmt: skip


class Page(HTMLParser):
    """A page as a browser's parser sees it: elements, attributes, the text within, tokens with their class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.tokens: list[tuple[str, str, str]] = []  # class of the run, tooltip, text
        self.path: list[tuple[str, str]] = []
        self.visible = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.elements[tag] += 1
        self.attributes += [(tag, name, value) for name, value in named.items()]
        if tag in ("meta", "rect", "line", "path", "link", "img", "input", "br"):
            return
        if tag in ("i", "b") and "title" in named:
            self.tokens.append((self.path[-1][1], named["title"], ""))
        self.path.append((tag, named.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        if tag == "rect":
            return
        assert self.path.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.path]
        if "style" not in tags:
            self.visible += data
        if {"i", "b"} & set(tags) and self.tokens and "article" in tags:
            kind, title, text = self.tokens[-1]
            self.tokens[-1] = (kind, title, text + data)


def example(
    prompt: int, kinds: list[str], weights: list[float] | None = None, origin: str = "d.jsonl:7", cut: int = 0
) -> Example:
    """Tokens are numbered from 0."""
    tokens = np.arange(prompt + len(kinds), dtype=np.int32)
    indices = np.array([KINDS.index(kind) for kind in kinds], np.int8)
    weight = np.array(weights or [1] * len(kinds), np.float32)
    return Example(tokens[:prompt], tokens[prompt:], weight, origin, 0, "", indices, cut)


PLAIN = example(1, ["answer", "terminator"])


def about(**changes: object) -> About:
    return About(**{  # type: ignore[arg-type]
        "model": "org/model", "template": "chat_template.jinja", "template_sha256": "ab" * 32,
        "tokenizer_sha256": "cd" * 32, "files": ("d.jsonl: 9 rows",), "rows": 9, "all_rows": 9, **changes,
    })  # fmt: skip


def written(
    folder: Path, examples: list[Example], pieces: list[str] | None = None, *, facts: About | None = None, **options
) -> Page:
    """The page of examples that all have the same pieces, or a, b, c, ..."""
    file = folder / "page.html"

    def pieces_of(one: Example) -> list[str]:
        return pieces or [chr(97 + i % 26) for i in range(len(one.prompt_tokens) + len(one.answer_tokens))]

    write_dataset(file, examples, pieces_of, facts or about(), **options)
    return Page(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_from_data_is_markup(tmp_path, payload):
    "Whatever stands in a token, a file's name, a label or a problem: the page has the elements that it has without."
    hostile = Example(**{
        **{name: getattr(PLAIN, name) for name in PLAIN.__slots__},
        "origin": f"{payload}.jsonl:1", "task": payload, "prompt_tokens": np.zeros(500, np.int32),
    })  # fmt: skip
    harmless = Example(**{**{name: getattr(hostile, name) for name in PLAIN.__slots__}, "origin": "a:1", "task": "b"})

    def page(text: str, one: Example) -> Page:
        facts = about(model=text, template=text, files=(text,), problems=(Problem(text, text, text),))
        return written(tmp_path, [one], [text] * 502, facts=facts, control_tokens={0})

    found, same = page(payload, hostile), page("harmless", harmless)
    without_marks = {tag: n for tag, n in found.elements.items() if tag != "u"}
    assert without_marks == {tag: n for tag, n in same.elements.items() if tag != "u"}
    assert not {"script", "img", "iframe", "object", "embed", "form", "link", "base"} & set(found.elements)
    assert Counter(name for _, name, _ in found.attributes) == Counter(name for _, name, _ in same.attributes)
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert {value for _, name, value in found.attributes if name in ("href", "src", "action")} == {"#e1"}
    assert payload not in found.html or payload in ("javascript:alert(1)", "{{ 7 * 7 }}{% raw %}")
    kinds = {unicodedata.category(char) for char in found.html if char != "\n"}
    assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.mark.parametrize("payload", ["<b>&amp;</b>", "javascript:alert(1)", '"quoted"', "plain é 漢 😀"])
def test_text_is_shown_as_it_is(tmp_path, payload):
    "What can be shown is shown to the letter, in the token and in its tooltip."
    page = written(tmp_path, [PLAIN], [payload, "b", "c"])
    assert page.tokens[0] == ("c", f"0 · context · '{payload}'", payload)


@pytest.mark.parametrize(
    ("piece", "shown", "title"),
    [
        ("\x1b[m", "\\x1b[m", "\\x1b[m"), ("\u202e", "\\u202e", "\\u202e"), ("a\nb", "a⏎\nb", "a\\nb"),
        ("\t", "⇥\t", "\\t"), ("", "∅", ""), ("\udce2", "<0xE2>", "<0xE2>"), ("\x00", "\\x00", "\\x00"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_written_out(tmp_path, piece, shown, title):
    "Newlines and tabs stay, with a mark; the rest is an escape."
    page = written(tmp_path, [PLAIN], [piece, "b", "c"])
    assert page.tokens[0] == ("c", f"0 · context · '{title}'", shown)


def test_every_token_says_what_it_is(tmp_path):
    "Its class is its kind's; its tooltip has id, kind, weight and text."
    kinds = ["prompt", "reasoning", "tool_call", "answer", "answer", "terminator"]
    page = written(tmp_path, [example(1, kinds, [1, 0.5, 2, 0, 1, 1])])
    assert page.tokens == [
        ("c", "0 · context · 'a'", "a"), ("p", "1 · learnt prompt ×1 · 'b'", "b"),
        ("r", "2 · reasoning ×0.5 · 'c'", "c"), ("t", "3 · tool call ×2 · 'd'", "d"), ("z", "4 · answer ×0 · 'e'", "e"),
        ("a", "5 · answer ×1 · 'f'", "f"), ("e", "6 · ends the answer ×1 · 'g'", "g"),
    ]  # fmt: skip
    assert page.elements["em"] == 4  # ×0.5, ×2 and ×0 before their runs, and one in the legend


def test_neighbours_differ(tmp_path):
    "Even tokens are <i>, odd ones <b>, also across the end of a run: every boundary shows."
    page = written(tmp_path, [example(3, ["reasoning", "answer", "terminator"])])
    assert re.findall(r"<([ib])(?: class=\"k\")? title", page.html) == list("ibibib")


def test_control_tokens_are_outlined(tmp_path):
    "In the context and in the targets."
    page = written(tmp_path, [example(2, ["answer", "terminator"])], control_tokens={0, 3})
    assert re.findall(r'<[ib] class="k" title="(\d)', page.html) == ["0", "3"]


def test_the_bar_is_the_account():
    "Stretches follow each other, are as wide as their tokens, and leave out what there is none of."
    account = Account(50, {"answer": 20, "terminator": 5}, unlearnt=0, cut=15, dropped=10)
    found = [(share.label, share.tokens, share.x, share.width) for share in shares(account)]
    assert found == [
        ("prompt, read", 50, 0, 50), ("answer", 20, 50, 20), ("ends the answer", 5, 70, 5), ("cut", 15, 75, 15),
        ("dropped", 10, 90, 10),
    ]  # fmt: skip
    assert shares(Account(0, {})) == []


def test_the_page_counts(tmp_path):
    "Examples, tokens by kind, cut and dropped tokens, the files and digests, and refused rows."
    facts = about(dropped_tokens=1234, rows=3, all_rows=9, problems=(Problem("d.jsonl:2", "is odd", "mend it"),))
    page = written(tmp_path, [example(5, ["answer", "answer", "terminator"], cut=312)], facts=facts)
    text = re.sub(r"\s+", " ", page.visible)
    for said in ("3 of 9", "prompt, read 5", "answer 2", "ends the answer 1", "cut 312", "dropped 1,234", "ab" * 32,
                 "cd" * 32, "d.jsonl: 9 rows", "d.jsonl:2: is odd; mend it", "312 tokens of old turns cut"):  # fmt: skip
        assert said in text


def test_a_long_prompt_is_folded_to_its_end(tmp_path):
    "All tokens are there; what is folded away ends with a line, and at least the last 60 tokens are in view."
    pieces = ["\n" if i == 600 else "x" for i in range(703)]
    page = written(tmp_path, [example(700, ["answer", "answer", "terminator"])], pieces)
    folded, shown = page.html.split("</summary>")[-1].split("</details>")
    assert (folded.count(" title="), shown.count(" title=")) == (601, 102)
    assert page.elements["details"] == 2  # the digests' too
    assert written(tmp_path, [example(300, ["terminator"])]).elements["details"] == 1


def test_a_page_is_limited_and_says_so(tmp_path):
    "The first 200 examples, unless all are asked for; the account is that of all."
    page = written(tmp_path, [PLAIN] * 250)
    assert page.elements["article"] == 200
    assert "The first 200 of 250 examples" in page.visible
    assert "prompt, read 250" in page.visible
    whole = written(tmp_path, [PLAIN] * 250, limited=False)
    assert whole.elements["article"] == 250
    assert "The first" not in whole.visible


def test_long_examples_are_limited_by_their_tokens():
    "A page of 200 thousand tokens is what a browser can show; one example is always shown."
    long = example(60_000, ["terminator"])
    assert len(first_examples([long] * 10)) == 3
    assert len(first_examples([example(300_000, ["terminator"])] * 2)) == 1
    assert len(first_examples([])) == 0


def test_a_hundred_examples_of_500_tokens_are_a_small_page(tmp_path):
    "Below 6 MB, with every token's tooltip."
    kinds = ["reasoning"] * 100 + ["answer"] * 99 + ["terminator"]
    page = written(tmp_path, [example(300, kinds)] * 100, [" a word"] * 500)
    assert page.elements["article"] == 100
    assert len(page.tokens) == 50_000
    assert (tmp_path / "page.html").stat().st_size < 6e6


def test_the_page_forbids_scripts_and_fetches_nothing(tmp_path):
    "A policy that allows styles of the page's own and nothing else; light and dark; equal input, equal bytes."
    page = written(tmp_path, [PLAIN])
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme: dark" in page.html
    assert "@media print" in page.html
    assert not re.search(r"url\(|@import|https?:", page.html)
    assert written(tmp_path, [PLAIN]).html == page.html


def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    "A write that fails leaves the older page and no draft."
    written(tmp_path, [PLAIN])
    before = (tmp_path / "page.html").read_bytes()

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(MachineError, match="No space left"):
        written(tmp_path, [PLAIN] * 2)
    assert (tmp_path / "page.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_of_nothing(tmp_path):
    "No example is a page too."
    assert written(tmp_path, []).elements["article"] == 0


def test_pieces_must_match_the_tokens(tmp_path):
    "A caller that decoded something else is told."
    with pytest.raises(ValueError, match="zip"):
        written(tmp_path, [PLAIN], ["a", "b"])
