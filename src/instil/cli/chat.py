"""`instil chat`: talk to a run; answers stream; --base shows what the base model would have said."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from instil.cli.console import errors, say
from instil.report.escape import visible_lines


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("chat")(chat)


def chat(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a model.")],
    base: Annotated[bool, typer.Option(help="Show the run's base model beside the tuned one.")] = False,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 = always the likeliest token.")] = 0.0,
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
) -> None:
    """Talk to RUN, a line a message; an empty line or Ctrl-D ends. `/new` starts over."""
    with errors():
        from instil.evaluate.generate import Sampling
        from instil.measure import open_model
        from instil.types import Message

        sides: dict[str, Any] = {}
        if base:
            sides["base"] = open_model(run, template=template, base=True)
        sides["tuned" if base else ""] = open_model(run, template=template)
        opening = [Message("system", system)] if system else []
        talks = {name: list(opening) for name in sides}
        say("say something; an empty line ends, /new starts over")
        while (line := _read()) is not None:
            if line == "/new":
                talks = {name: list(opening) for name in sides}
                continue
            for name, ready in sides.items():
                talks[name].append(Message("user", line))
                if name:
                    print(f"[{name}] ", end="", flush=True)
                answer = _answer(ready, talks[name], Sampling(max_tokens, temperature))
                talks[name].append(Message("assistant", answer))


def _read() -> str | None:
    """The next message; None at the end."""
    try:
        line = input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    return line or None


def _answer(ready: Any, messages: list[Any], sampling: Any) -> str:
    """Generate after the served prompt, printing text as it becomes whole characters; returns the answer."""
    from instil.chat.pairs import served_prompt
    from instil.evaluate.generate import stream
    from instil.measure import unended

    tokens: list[int] = []
    shown = 0

    def emit(token: int) -> None:
        nonlocal shown
        tokens.append(token)
        said = unended(tokens, ready)
        text = ready.chat.tokenizer.decode(said[: len(said) - _begun(said, ready.stop_sequences)], False)
        if not text.endswith("\ufffd"):
            print(visible_lines(text[shown:]), end="", flush=True)
            shown = len(text)

    prompt = served_prompt(messages, ready.chat.tokenizer, ready.chat.template)
    stream(
        ready.net, prompt, stop_ids=ready.stop_ids, sampling=sampling, emit=emit, stop_sequences=ready.stop_sequences
    )
    text: str = ready.chat.tokenizer.decode(unended(tokens, ready), False)
    print(visible_lines(text[shown:]), flush=True)
    return text


def _begun(tokens: Sequence[int], sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens at the end may become a sequence that ends the answer, and so are not shown yet."""
    return max((n for s in sequences for n in range(1, len(s)) if tuple(tokens[-n:]) == tuple(s[:n])), default=0)
