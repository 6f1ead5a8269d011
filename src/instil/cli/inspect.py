"""`instil inspect`: rows as the model will see them, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instil.cli.console import errors, looked_at, put, put_json, say

if TYPE_CHECKING:
    from instil.errors import Problem
    from instil.prepare import Chat
    from instil.types import Example

SHOWN_ROWS = 3  # in a terminal, unless --rows says more


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)


def inspect(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA... [section.key=value ...]", help="Files to look into; settings.")
    ],
    model: Annotated[str, typer.Option(help="Hub name, folder, .gguf file, or demo; weights are not needed.")],
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Rows A to B-1, counted from 0.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for the browser instead.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per example on stdout, all rows.")] = False,
) -> None:
    """Show the examples of DATA: dim context, highlighted targets. In a terminal 3 rows unless --rows says more."""
    with errors():
        from instil.errors import DataError, problem_lines

        if html is not None:
            _refuse_page(html)
        chosen = _range(rows) if rows else slice(None) if json or html else slice(0, SHOWN_ROWS)
        found = _examples(data, model, template, chosen)
        if not found.rows:
            say(f"no example: --rows {rows} selects none of {found.all_rows:,} rows")
        if json:
            _put_lines(found)
        if html is not None and (found.examples or not found.problems):
            _write_page(html, found, model, limited=rows is None, tell=say if json else put)
        if not json and html is None:
            _show(found)
        for line in problem_lines(found.left_out):
            say(line)
        if found.problems:
            raise DataError(*found.problems)


@dataclass(frozen=True)
class _Found:
    """The examples of the chosen rows, and of how many rows. files: a sentence each; problems: of refused rows.

    left_out: rows and examples that training would drop.
    """

    chat: Chat
    examples: Sequence[Example]
    problems: Sequence[Problem]
    files: Sequence[str]
    rows: int
    all_rows: int
    dropped_tokens: int = 0
    left_out: Sequence[Problem] = ()

    def pieces(self, example: Example) -> list[str]:
        """What each token adds to the text."""
        from instil.report.decoding import pieces

        tokenizer = self.chat.tokenizer
        tokens = [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]
        return pieces(tokens, tokenizer.decode, tokenizer.backend.id_to_token)

    def control_tokens(self) -> set[int]:
        """The ids of the control tokens."""
        return set(self.chat.tokenizer.control_tokens.values())


def _examples(words: Sequence[str], model: str, template: str | None, chosen: slice) -> _Found:
    """Read the files and make the examples of the chosen rows, counted as they stand in the files."""
    from instil.chat.pairs import make_examples
    from instil.data.ledger import LedgerEntry, in_source_order
    from instil.data.mixture import load_conversations
    from instil.errors import Problem
    from instil.model.locate import locate
    from instil.prepare import chat_options, open_chat, sources

    config = looked_at(words, model, template)
    folder = locate(config.model, need_weights=False).path
    chat = open_chat(folder, config.template, args=config.chat.template_args)
    loaded = load_conversations(sources(config), strict=config.data.strict)
    used = [LedgerEntry(each.origin, "used", "train") for each in loaded.conversations]
    origins = list(dict.fromkeys(each.origin for each in in_source_order([*used, *loaded.dropped])))
    wanted = set(origins[chosen])
    rows = [each for each in loaded.conversations if each.origin in wanted]
    pairs = make_examples(rows, chat.tokenizer, chat.template, chat_options(config, folder, chat.tokenizer))
    dropped = sum(each.prompt_tokens + each.answer_tokens for each in pairs.dropped)
    left_out = [
        Problem(each.origin, f"left out ({each.rule}): {each.reason}", "", each.rule)
        for each in loaded.dropped
        if each.origin in wanted
    ]
    for each in pairs.dropped if config.data.too_long != "error" else ():
        what = f"turn {each.turn} left out (too_long): {each.prompt_tokens:,} prompt and {each.answer_tokens:,} answer "
        left_out.append(Problem(each.origin, f"{what}tokens, more than {each.limit_tokens:,}", "", "too_long"))
    return _Found(
        chat, pairs.examples, pairs.problems, loaded.recognised, len(wanted), len(origins), dropped, left_out
    )  # fmt: skip


def _put_lines(found: _Found) -> None:
    """One JSON document an example."""
    decode = found.chat.tokenizer.decode
    for example in found.examples:
        prompt, answer = example.prompt_tokens.tolist(), example.answer_tokens.tolist()
        line: dict[str, Any] = {
            "origin": example.origin,
            "turn": example.turn,
            "prompt_tokens": prompt,
            "answer_tokens": answer,
            "weights": example.weights.tolist(),
            "prompt_text": decode(prompt),
            "answer_text": decode(answer),
        }
        put_json(line)


def _show(found: _Found) -> None:
    """The legend and the examples, as the terminal can show them."""
    from rich.console import Console

    from instil.report.kinds import token_account
    from instil.report.tokens import legend, look_for, print_example

    console = Console(highlight=False)
    kinds = {kind for kind, n in token_account(found.examples).targets.items() if n}
    try:
        console.print(legend(look_for(console), kinds))
        for example in found.examples:
            console.print()
            print_example(console, example, found.pieces(example), control_tokens=found.control_tokens())
    except SystemExit:  # rich's own way out, with code 1, when the reader is gone
        raise BrokenPipeError from None


def _write_page(file: Path, found: _Found, model: str, *, limited: bool, tell: Callable[[str], None]) -> None:
    """The page, and the line that says where it is."""
    import shlex

    from instil.report.dataset import About, write_dataset

    about = About(
        model=model,
        template=found.chat.template.place,
        template_sha256=found.chat.template.digest,
        tokenizer_sha256=found.chat.tokenizer.digest,
        files=tuple(found.files),
        rows=found.rows,
        all_rows=found.all_rows,
        dropped_tokens=found.dropped_tokens,
        problems=tuple(found.problems),
    )
    shown = write_dataset(
        file, found.examples, found.pieces, about, control_tokens=found.control_tokens(), limited=limited
    )
    tell(f"{shown:,} of {len(found.examples):,} examples; open {shlex.quote(str(file))}")


def _refuse_page(file: Path) -> None:
    """Raises UsageError before the work where the page cannot or should not be written there."""
    from instil.errors import UsageError

    if file.suffix.lower() not in (".html", ".htm"):
        raise UsageError.at("--html", f"{str(file)!r} does not end in .html", "name a page, so that no data is lost")
    if not file.parent.is_dir() or file.is_dir():
        what = "is a folder" if file.is_dir() else "lies in a folder that is not there"
        raise UsageError.at("--html", f"{str(file)!r} {what}", "name a file in a folder that is there")


def _range(text: str) -> slice:
    """A:B as a slice; A or B may be left out."""
    from instil.errors import UsageError

    first, sign, last = text.partition(":")
    try:
        if not sign:
            return slice(int(first), int(first) + 1)
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError:
        raise UsageError.at("--rows", f"{text!r} is not A:B", "write for instance --rows 0:10") from None
