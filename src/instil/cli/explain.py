"""`instil explain`: what became of one row of a run, and when it is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from instil.cli.console import errors, put, put_json

if TYPE_CHECKING:
    from instil.explain import ExplainedExample, Explanation, Use

FATES = {
    "used": "used",
    "split": "used in part",
    "cut": "used, with old turns left out of the prompt",
    "dropped": "dropped",
}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("explain")(explain)


def explain(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder; the run need not be finished.")],
    row: Annotated[str, typer.Argument(metavar="FILE:LINE", help="A row, as the ledger and the errors name it.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show what became of a row of RUN: its fate, its examples, and the steps and packs that train on them."""
    with errors():
        from instil.explain import explain as run_explain

        found = run_explain(run, row)
        if json:
            put_json(found.as_dict())
        else:
            for line in lines(found):
                put(line)


def lines(found: Explanation) -> list[str]:
    """An explanation for people."""
    entry = found.ledger
    why = f" ({entry.rule}: {entry.reason})" if entry.rule else ""
    said = [f"{found.origin}: {FATES[entry.fate]}{why}; {_side(found)}"]
    for example in found.examples:
        said += _example(example, found)
    if found.examples and entry.side == "train" and found.steps_done < found.steps:
        said.append(f"the run is at step {found.steps_done:,} of {found.steps:,}; later steps are yet to come")
    return said


def _side(found: Explanation) -> str:
    if not found.examples:
        return "nothing of it is trained on"
    if found.ledger.side == "train":
        return f"{len(found.examples)} to learn from"
    measured = f"; {found.measured_examples} of its examples are in the held-out loss of the run"
    return f"held out: measured, never trained on{measured}"


def _example(example: ExplainedExample, found: Explanation) -> list[str]:
    task = f", task {example.task}" if example.task else ""
    cut = f", {example.cut_tokens:,} cut" if example.cut_tokens else ""
    head = (
        f"  turn {example.turn}{task}: {example.prompt_tokens:,} prompt and {example.answer_tokens:,} answer tokens{cut}, "
        f"{example.target_tokens:,} targets of weight {example.weight_sum:g}"
    )
    if found.ledger.side == "train" and not example.uses:
        return [head, "    in no step: the run ends before"]
    return [head, *(f"    {_use(use, found.steps)}" for use in example.uses)]


def _use(use: Use, steps: int) -> str:
    loss = "yet to come" if use.loss is None else f"loss of the step {use.loss:.4f}"
    return (
        f"epoch {use.epoch + 1}, step {use.step:,} of {steps:,}, pack {use.pack} of {use.packs} "
        f"with {use.others:,} other examples: {loss}"
    )
