"""`instil fork`: go on from a run's newest checkpoint under other settings, as another run."""

from __future__ import annotations

from typing import Annotated

import typer

from instil.cli.console import errors, put, put_json, say, unwinding


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("fork")(fork)


def fork(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder with a checkpoint.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The new run's name.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]", help="What is to be otherwise.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make a run NAME that goes on from RUN's newest checkpoint under other settings or data; RUN stays as it is."""
    with errors(), unwinding():
        from instil.fork import fork as make_fork

        folder, step = make_fork(run, name, settings or [])
        if json:
            put_json({"run": str(folder), "step": step})
        else:
            put(str(folder))
        say(f"next: instil train {folder} goes on after step {step:,}")
