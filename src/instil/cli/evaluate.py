"""`instil evaluate`: the held-out loss, and answers scored by exact rules."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from instil.cli.console import counter, errors, put, put_json, say


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("evaluate")(evaluate)


def evaluate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a model.")],
    data: Annotated[str | None, typer.Option(help="File to measure on; default: the run's held-out rows.")] = None,
    base: Annotated[bool, typer.Option(help="Measure the run's base model beside it.")] = False,
    rows: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; default: twice the longest expected.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 = always the likeliest token.")] = 0.0,
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure RUN on held-out rows: loss of the answers, and exact-rule scores of what it generates."""
    with errors():
        from instil.evaluate.generate import Sampling
        from instil.measure import evaluate as measure

        found = []
        for is_base in (True, False) if base else (False,):
            say(f"measuring {'the base of ' if is_base else ''}{run}")
            found.append(
                measure(
                    run,
                    data,
                    template=template,
                    base=is_base,
                    rows=rows,
                    sampling=Sampling(max_tokens, temperature),
                    progress=counter("answers"),
                )
            )
        if json:
            put_json({"base": found[0].as_dict(), "tuned": found[1].as_dict()} if base else found[0].as_dict())
        else:
            put(table(found, ["base", "tuned"] if base else [run]))


def table(found: list[Any], names: list[str]) -> str:
    """Evaluations side by side: a row for the loss, one for each task and score."""
    lines: list[list[str]] = [["", *names]]
    lines.append(["answer loss, nats per target token", *(f"{e.loss:.4f}" for e in found)])
    for task in found[0].tasks:
        summaries = [e.tasks[task] for e in found]
        lines.append([f"{task}: exactly right, of {summaries[0].rows}", *(f"{s.exact_share:.1%}" for s in summaries)])
        if summaries[0].json_rows and summaries[0].json_rows == summaries[0].rows:
            lines.append([f"{task}: valid JSON", *(f"{s.valid_rows / s.json_rows:.1%}" for s in summaries)])
            lines.append([f"{task}: right keys", *(f"{s.keys_rows / s.json_rows:.1%}" for s in summaries)])
            lines.append([f"{task}: right values", *(f"{s.values:.1%}" for s in summaries)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        line[0].ljust(widths[0]) + "".join(f"  {cell.rjust(w)}" for cell, w in zip(line[1:], widths[1:], strict=True))
        for line in lines
    )
