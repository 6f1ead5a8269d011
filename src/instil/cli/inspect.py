"""`instil inspect`: rows as the model will see them, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from instil.cli.console import errors, put_json


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(inspect)


def inspect(
    data: Annotated[list[str], typer.Argument(metavar="DATA", help="Files to look into.")],
    model: Annotated[str, typer.Option(help="Hub name, folder, .gguf file, or demo; weights are not needed.")],
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
    rows: Annotated[str | None, typer.Option(metavar="A:B", help="Rows A to B-1, counted from 0.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON line per example on stdout, all rows.")] = False,
) -> None:
    """Show the examples of DATA: dim context, highlighted targets. Shows 3 rows unless --rows or --json says more."""
    with errors():
        from rich.console import Console

        from instil.chat.turns import make_examples
        from instil.data.mixture import load_conversations
        from instil.errors import DataError
        from instil.model.locate import locate
        from instil.prepare import open_chat
        from instil.report.tokens import legend, look_for, print_example

        chosen = _range(rows) if rows else slice(None) if json else slice(0, 3)
        chat = open_chat(locate(model, need_weights=False).path, template)
        pairs = make_examples(load_conversations(data).conversations[chosen], chat.tokenizer, chat.template)
        decode = chat.tokenizer.decode
        console = Console(highlight=False)
        control = set(chat.tokenizer.control_tokens.values())
        if not json:
            console.print(legend(look_for(console)))
        for example in pairs.examples:
            if json:
                put_json(
                    {
                        "origin": example.origin,
                        "turn": example.turn,
                        "prompt_tokens": example.prompt_tokens.tolist(),
                        "answer_tokens": example.answer_tokens.tolist(),
                        "weights": example.weights.tolist(),
                        "prompt_text": decode(example.prompt_tokens.tolist()),
                        "answer_text": decode(example.answer_tokens.tolist()),
                    }
                )
            else:
                tokens = [*example.prompt_tokens.tolist(), *example.answer_tokens.tolist()]
                print_example(console, example, _pieces(decode, tokens), control_tokens=control)
        if pairs.problems:
            raise DataError(*pairs.problems)


def _pieces(decode: Callable[[list[int]], str], tokens: list[int]) -> list[str]:
    """What each token adds to the decoded text; a part of a character adds nothing until the character is whole."""
    pieces, shown = [], ""
    for i in range(len(tokens)):
        text = decode(tokens[: i + 1]).rstrip("\ufffd")
        pieces.append(text[len(shown) :])
        shown = max(shown, text, key=len)
    return pieces


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
