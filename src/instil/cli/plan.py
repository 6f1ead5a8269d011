"""`instil plan`: what a training would do and need, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from instil.cli.console import errors, looked_at, put_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from instil.forecast import Forecast


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plan")(plan)


def plan(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml] [section.key=value ...]", help="Configuration.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name, folder, .gguf file, or demo; config.json is enough.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="File to learn from; may be given again.")] = None,
    heldout: Annotated[str | None, typer.Option(help="File (or share of the rows) to measure on.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
    measure: Annotated[bool, typer.Option(help="Time some packs with the model on this machine.")] = True,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Count what `instil train` with the same arguments would do: tokens, packs, steps, FLOPs, memory and time."""
    with errors():
        config = looked_at(arguments or [], model, template, heldout, config=True, data=data)
        from instil.forecast import forecast

        found = forecast(config, measure=measure, say=say)
        if json:
            put_json(found.as_dict())
            return
        from rich.console import Console

        console = Console(highlight=False)
        for table in tables(found):
            console.print(table)
        if found.chosen:
            settings = ", ".join(f"{key}={value}" for key, value in found.chosen.items())
            console.print(f"chosen for you: {settings}", markup=False)


def tables(found: Forecast) -> list[Table]:
    """The counts; what the run needs; and the mix, where there is more than one source."""
    return [counts(found), needs(found), *([mix(found)] if len(found.mix) > 1 else [])]


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def counts(found: Forecast) -> Table:
    """What there is, what an epoch uses of it, and what the whole run trains on."""
    table = _table("what is trained on", "", "once", "an epoch", "the run")
    names = {"examples": "examples", "prompt_tokens": "prompt tokens", "answer_tokens": "answer tokens",
             "target_tokens": "target tokens", "unshared_tokens": "tokens without sharing",
             "computed_tokens": "computed tokens"}  # fmt: skip
    table.add_row("rows", f"{found.rows:,}", "", "")
    for key, name in names.items():
        table.add_row(name, *(f"{getattr(work, key):,}" for work in (found.once, found.epoch, found.run)))
    for key in ("packs", "steps"):
        table.add_row(key, "", *(f"{getattr(work, key):,}" for work in (found.epoch, found.run)))
    if found.heldout_examples:
        table.add_row("held-out examples", f"{found.heldout_examples:,}", "", "")
    return table


def needs(found: Forecast) -> Table:
    """FLOPs, memory, time."""
    from instil.report.quantities import duration, size

    table = _table("what it takes", "", "")
    table.add_row("packs of", f"{found.capacity_tokens:,} tokens, {found.packing_efficiency:.2%} full")
    table.add_row("computation", _flops(found.flops))
    table.add_row("peak memory", f"about {size(found.peak_memory_bytes)}")
    table.add_row("time", found.untimed if found.seconds is None else f"about {duration(found.seconds)}")
    return table


def mix(found: Forecast) -> Table:
    """What each source is of an epoch."""
    table = _table("the mix of an epoch", "source", "asked", "has", "used", "target tokens", "share")
    for use in found.mix:
        n = use.used
        table.add_row(
            use.path, use.asked, f"{use.examples:,}", f"{n.examples:,}", f"{n.target_tokens:,}", f"{n.share:.1%}"
        )
    return table


def _flops(flops: int) -> str:
    """12.3 TFLOP."""
    for name, scale in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3g} {name}FLOP"
    return f"{flops / 1e6:.3g} MFLOP"
