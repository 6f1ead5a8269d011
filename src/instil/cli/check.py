"""`instil check`: every pair of the user's rows made and certified, before anything is trained."""

from __future__ import annotations

from typing import Annotated

import typer

from instil.cli.console import errors, put, put_json, say


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("check")(check)


def check(
    data: Annotated[list[str], typer.Argument(metavar="DATA", help="Files to check.")],
    model: Annotated[str, typer.Option(help="Hub name, folder, .gguf file, or demo; weights are not needed.")],
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make every example of DATA as training would, and prove each against what the server sends."""
    with errors():
        from instil.errors import problem_lines
        from instil.prepare import check as run_check

        found = run_check(data, model, template)
        if json:
            put_json(found.as_dict())
        for line in problem_lines(found.problems):
            say(line)
        if not json and found.certificate:
            c, t = found.certificate, found.tokens
            put(f"{found.rows:,} rows, {found.examples:,} examples: {t['prompt']:,} prompt, {t['answer']:,} answer, "
                f"{t['cut']:,} cut, {t['dropped']:,} dropped tokens")  # fmt: skip
            put(f"every answer ends with {c['terminator']['text']!r} (token {c['terminator']['id']}), a target; "
                f"{c['checked']:,} of {c['examples']:,} examples certified")  # fmt: skip
        if not json:
            put("ok" if found.ok else f"not ok: {len(found.problems):,} problems")
        if found.exit_code:
            raise typer.Exit(found.exit_code)
