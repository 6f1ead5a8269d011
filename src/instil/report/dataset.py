"""The page of examples: every token coloured by what it is for, self-contained, without scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import accumulate, groupby
from pathlib import Path
from statistics import median
from typing import NamedTuple

from markupsafe import Markup

from instil.errors import Problem, problem_lines
from instil.report.decoding import parts
from instil.report.escape import visible
from instil.report.kinds import WORDS, Account, answer_kinds, token_account
from instil.report.page import page_environment, write_page
from instil.report.tokens import counts
from instil.types import KINDS, Example

MOST_EXAMPLES = 200  # of a page that nobody gave a size
MOST_TOKENS = 200_000  # the same, about 12 MB: what a browser scrolls through without effort
LONG_PROMPT = 400  # tokens; of a longer prompt all but the last TAIL are folded away
TAIL = 60  # or somewhat more, to the start of a line
PALEST = 35  # percent of its colour that a target keeps, however small its weight
PREVIEW = 110  # characters of the folded part that are seen

CLASSES = dict(zip(KINDS, "artep", strict=True))  # short, as the page is mostly these; c: context, z: weight 0
SHARES = (
    ("c", "prompt, read"), *((CLASSES[kind], WORDS[kind]) for kind in KINDS),
    ("z", "weight 0, not learnt"), ("x", "cut"), ("d", "dropped"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class About:
    """What the page says about its examples. model, template: as given or found; *_sha256: their digests.

    files: a sentence for each; rows: that the examples are of, of all_rows; dropped_tokens: of the examples that are
    not used; problems: of the rows that gave no example.
    """

    model: str
    template: str
    template_sha256: str
    tokenizer_sha256: str
    files: tuple[str, ...]
    rows: int
    all_rows: int
    dropped_tokens: int = 0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """A stretch of the account's bar: x and width in percent of it."""

    kind: str
    label: str
    tokens: int
    x: float
    width: float


@dataclass(frozen=True, slots=True)
class Card:
    """An example as the template draws it. folded: the first `folded_tokens` of a long prompt, closed at first."""

    number: int
    origin: str
    turn: int
    task: str
    counts: str
    cut_tokens: int
    folded_tokens: int
    preview: str
    folded: Markup
    tokens: Markup


class _Token(NamedTuple):
    """A token to show, and the class and weight of its run."""

    at: int
    token_id: int
    piece: str
    kind: str
    weight: float


def write_dataset(
    file: Path,
    examples: Sequence[Example],
    pieces: Callable[[Example], Sequence[str]],
    about: About,
    *,
    control_tokens: Collection[int] = (),
    limited: bool = True,
) -> int:
    """Write the page of `examples`; returns how many of them it shows: all, or if `limited` the first of them.

    pieces: what each token of an example (prompt, then answer) adds to the text; called for the examples shown.
    Raises MachineError where the file cannot be written; an older one is then untouched.
    """
    shown = first_examples(examples) if limited else examples
    account = token_account(examples, dropped_tokens=about.dropped_tokens)
    page = page_environment().from_string(files("instil.report").joinpath("dataset.html").read_text(encoding="utf-8"))
    text = page.render(
        about=about,
        facts=_facts(about, examples, account),
        account=account,
        shares=shares(account),
        legend=_legend(account, any(len(set(each.weights.tolist()) - {1.0}) for each in shown)),
        cards=(_card(n, each, pieces(each), control_tokens) for n, each in enumerate(shown, start=1)),
        shown=len(shown),
        examples=len(examples),
        problems=problem_lines(about.problems),
    )
    write_page(file, text.encode())
    return len(shown)


def first_examples(examples: Sequence[Example]) -> Sequence[Example]:
    """As many of the first as a page can show with ease: MOST_EXAMPLES, and one or MOST_TOKENS at most."""
    sums = accumulate(each.length_tokens + 1 for each in examples[:MOST_EXAMPLES])
    return examples[: max(1, sum(total <= MOST_TOKENS for total in sums))]


def shares(account: Account) -> list[Share]:
    """The stretches of the account's bar, in SHARES' order, without those of no token."""
    tokens = (account.prompt, *(account.targets.get(kind, 0) for kind in KINDS), account.unlearnt, account.cut,
              account.dropped)  # fmt: skip
    found, x = [], 0.0
    for (kind, label), n in zip(SHARES, tokens, strict=True):
        width = 100 * n / account.tokens if n else 0.0
        if n:
            found.append(Share(kind, label, n, round(x, 3), round(width, 3)))
        x += width
    return found


def _facts(about: About, examples: Sequence[Example], account: Account) -> list[tuple[str, str]]:
    """The numbers at the top of the page."""
    lengths = [each.length_tokens + 1 for each in examples]
    return [
        ("rows", f"{about.rows:,}" if about.rows == about.all_rows else f"{about.rows:,} of {about.all_rows:,}"),
        ("examples", f"{len(examples):,}"),
        ("prompt tokens", f"{account.prompt:,}"),
        ("target tokens", f"{account.target_tokens:,}"),
        ("median length", f"{median(lengths or [0]):,.0f}"),
        ("longest example", f"{max(lengths, default=0):,}"),
    ]


def _legend(account: Account, weighted: bool) -> list[tuple[str, str]]:
    """(class, words) of what the page may show, and of nothing else."""
    kinds = [(CLASSES[kind], WORDS[kind]) for kind in KINDS if account.targets.get(kind)]
    weights = [("z", "weight 0, not learnt")] if account.unlearnt else []
    return [("c", "context"), ("k", "control token"), *kinds, *weights, *([("w", "×0.5")] if weighted else [])]


def _card(number: int, example: Example, pieces: Sequence[str], control_tokens: Collection[int]) -> Card:
    """One example. The end of a long prompt stays in view, as it is what the answer answers."""
    tokens = list(_tokens(example, pieces))
    folded = _folded_tokens(pieces[: len(example.prompt_tokens)])
    return Card(
        number=number,
        origin=example.origin,
        turn=example.turn,
        task=example.task,
        counts=counts(example),
        cut_tokens=example.cut_tokens,
        folded_tokens=folded,
        preview=visible(" ".join("".join(pieces[:folded])[: 2 * PREVIEW].split())[:PREVIEW]),
        folded=_markup(tokens[:folded], control_tokens),
        tokens=_markup(tokens[folded:], control_tokens),
    )


def _folded_tokens(prompt: Sequence[str]) -> int:
    """How many tokens of a prompt are folded away: up to the last line that leaves TAIL of them, if it is near."""
    if len(prompt) <= LONG_PROMPT:
        return 0
    last = len(prompt) - TAIL
    return next((at for at in range(last, last - 2 * TAIL, -1) if prompt[at - 1].endswith("\n")), last)


def _tokens(example: Example, pieces: Sequence[str]) -> Iterator[_Token]:
    """Prompt, then answer. Raises ValueError when there are not as many pieces as tokens."""
    prompt, answer = example.prompt_tokens.tolist(), example.answer_tokens.tolist()
    kinds = [*(["context"] * len(prompt)), *(KINDS[kind] for kind in answer_kinds(example).tolist())]
    weights = [*([-1.0] * len(prompt)), *example.weights.tolist()]
    return map(
        _Token, range(len(kinds)), *zip(*zip([*prompt, *answer], pieces, kinds, weights, strict=True), strict=True)
    )


def _markup(tokens: Iterable[_Token], control_tokens: Collection[int]) -> Markup:
    """Tokens as spans, one for each run of equal kind and weight. In it even tokens are <i>, odd ones <b>."""
    html = []
    for weight, same_weight in groupby(tokens, key=lambda token: token.weight):
        if weight >= 0 and weight != 1:
            html.append(f"<em>×{weight:.3g}</em>")
        for kind, run in groupby(same_weight, key=lambda token: token.kind):
            html.append(_opening(kind, weight))
            html += [_token(token, control_tokens) for token in run]
            html.append("</span>")
    return Markup("".join(html))


def _opening(kind: str, weight: float) -> str:
    """The span around a run; the smaller the weight, the paler its colour."""
    if kind == "context" or not weight > 0:
        return f'<span class="{"c" if kind == "context" else "z"}">'
    pale = f' style="--w:{max(PALEST, round(100 * weight))}%"' if weight < 1 else ""
    return f'<span class="{CLASSES[kind]}"{pale}>'


def _token(token: _Token, control_tokens: Collection[int]) -> str:
    """One token: its text made safe, and in its tooltip what it is."""
    element = "ib"[token.at % 2]
    ring = ' class="k"' if token.token_id in control_tokens else ""
    what = "context" if token.kind == "context" else f"{WORDS[token.kind]} ×{token.weight:.3g}"
    quoted = "".join(_written(kind, text) for kind, text in parts(token.piece))
    title = escape(f"{token.token_id} · {what} · '{quoted}'")
    return f'<{element}{ring} title="{title}">{"".join(_drawn(*part) for part in parts(token.piece))}</{element}>'


def _written(kind: str, text: str) -> str:
    """A part of a piece within its tooltip."""
    return {"newline": "\\n", "tab": "\\t"}.get(kind, text)


def _drawn(kind: str, text: str) -> str:
    """A part of a piece on the page; <u> is what stands for a character that is not shown as itself."""
    marks = {"newline": "<u>⏎</u>\n", "tab": "<u>⇥</u>\t", "empty": "<u>∅</u>"}
    if kind in marks:
        return marks[kind]
    return escape(text) if kind == "text" else f"<u>{escape(text)}</u>"
