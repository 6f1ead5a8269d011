"""`instil check`: every pair of the user's rows made and certified, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from instil.cli.console import errors, looked_at, put, put_json, say

if TYPE_CHECKING:
    from instil.audit import Checked


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("check")(check)


def check(
    data: Annotated[
        list[str], typer.Argument(metavar="DATA... [section.key=value ...]", help="Files to check; settings.")
    ],
    model: Annotated[str, typer.Option(help="Hub name, folder, .gguf file, or demo; weights are not needed.")],
    heldout: Annotated[str | None, typer.Option(help="File that must not share rows with DATA.")] = None,
    template: Annotated[
        str | None, typer.Option(help="Chat template file (or its name) in place of the default.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Rows that would be dropped for what they hold are errors.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Make every example of DATA as training would, and prove each against what the server sends."""
    with errors():
        from instil.audit import check_config
        from instil.errors import problem_lines

        words = [*data, "data.strict=true"] if strict else data
        found = check_config(looked_at(words, model, template, heldout))
        if json:
            put_json(found.as_dict())
        for line in problem_lines(found.problems):
            say(line)
        if not json:
            _report(found)
        if found.exit_code:
            raise typer.Exit(found.exit_code)


def _report(found: Checked) -> None:
    """The certificate for people."""
    for line in (*found.recognised, *(f"note: {note}" for note in found.notes)):
        put(line)
    if found.certificate:
        c, t = found.certificate, found.tokens
        put(f"{found.rows:,} rows, {found.examples:,} examples: {t['prompt']:,} prompt, {t['answer']:,} answer, "
            f"{t['cut']:,} cut, {t['dropped']:,} dropped tokens")  # fmt: skip
        kinds = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in c["target_kinds"].items() if n)
        put(f"{c['target_tokens']:,} targets: {kinds}")
        for ending in c["terminators"]:
            ids = ", ".join(map(str, ending["ids"]))
            put(f"answers end with {ending['text']!r} (token {ids}), a target: {ending['source']}")
        put(f"{c['checked']:,} of {c['examples']:,} examples certified: {c['by_edit']:,} by the edit test, "
            f"{c['by_rendering']:,} by rendering again, {c['as_given']:,} as given; "
            f"{c['by_library']:,} token by token against the tokenizers library")  # fmt: skip
    put("ok" if found.ok else f"not ok: {len(found.problems):,} problem{'s' * (len(found.problems) != 1)}")
