"""The command line: one verb a file; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from instil import __version__
from instil.cli import chat, check, evaluate, explain, inspect, plan, train
from instil.cli.console import share_cores

app = typer.Typer(
    name="instil",
    help="Supervised fine-tuning of language models, done right, provably, and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, evaluate, chat, plan, inspect, check, explain):
    verb.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"instil {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The `instil` command."""
    share_cores()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()
