"""The command line: one verb a file; nothing heavy is imported before a verb runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from instil import __version__
from instil.cli import chat, check, evaluate, explain, fork, inspect, plan, replay, train, verify
from instil.cli.console import share_cores


class Verb(TyperCommand):
    """A verb whose options are given once: of two values the last would win in silence. (--data may be given again.)"""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        options = [option for option in given if option.param_type_name == "option" and not option.multiple]
        for option in dict.fromkeys(options):
            if options.count(option) > 1:
                ctx.fail(f"{option.opts[0]} is given {options.count(option)} times; give it once")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="instil",
    help="Supervised fine-tuning of language models, done right, provably, and fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (train, evaluate, chat, plan, inspect, check, explain, fork, verify, replay):
    verb.register(app)
for command in app.registered_commands:
    command.cls = Verb


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


def _with_utf8_names() -> None:
    """Names of files are UTF-8, also in a locale of ASCII, where Python would garble them: it begins again in its UTF-8 mode.

    What is printed stays in the locale's encoding.
    """
    if sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return
    printed = f"{sys.stdout.encoding or 'ascii'}:backslashreplace"
    os.environ.update({"PYTHONUTF8": "1", "PYTHONIOENCODING": os.environ.get("PYTHONIOENCODING", printed)})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def main() -> None:
    """The `instil` command."""
    _with_utf8_names()
    share_cores()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app()
