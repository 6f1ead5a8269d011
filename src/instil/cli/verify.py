"""`instil verify`: prove on this machine that a run resumes exactly and that every hash of it holds."""

from __future__ import annotations

from typing import Annotated

import typer

from instil.cli.console import errors, put, put_json, say, unwinding


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("verify")(verify)


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder; the run need not be finished.")],
    steps: Annotated[int, typer.Option(min=0, help="Steps of the trial run; 0 = only the hashes.")] = 4,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Check every hash of RUN, and that a few of its steps, killed and resumed, end as without the kill, to the bit."""
    with errors(), unwinding():
        from instil.verify import verify as run_verify

        found = run_verify(run, steps=steps, say=say)
        if json:
            put_json(found.as_dict())
        else:
            put("all of it holds" if found.ok else "NOT all of it holds")
        raise typer.Exit(0 if found.ok else 5)
