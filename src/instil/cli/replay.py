"""`instil replay`: repeat the step at which a run diverged, and show where it first is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from instil.cli.console import errors, put, put_json

if TYPE_CHECKING:
    from instil.replay import Replayed

SHOWN = 10


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("replay")(replay)


def replay(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run that diverged.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Repeat the step at which RUN diverged (exit 6), from the state that was kept; nothing in RUN changes."""
    with errors():
        from instil.replay import replay as run_replay

        found = run_replay(run)
        if json:
            put_json(found.as_dict())
        else:
            for line in lines(found):
                put(line)


def lines(found: Replayed) -> list[str]:
    """A replay for people."""
    said = [
        f"step {found.step} {'diverges again' if found.diverged else 'does not diverge this time'}",
        *found.problems,
    ]
    for what, names in (("weights", found.weights), ("gradients", found.gradients)):
        if names:
            more = f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""
            said.append(f"{what} that are not finite: {', '.join(names[:SHOWN])}{more}")
    if found.first_module:
        said.append(f"the first output that is not finite is that of {found.first_module}")
    said.append("rows of the step, the worst first:")
    return said + [f"  {row}" for row in found.rows[:SHOWN]]
