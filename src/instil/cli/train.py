"""`instil train`: fine-tune a model; the same command resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instil.cli.console import counter, errors, looked_at, put, put_json, say, step_printer, unwinding


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train")(train)


def train(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG.yaml|RUN] [section.key=value ...]", help="Configuration.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name, folder, .gguf file, run folder's model, or demo.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="File to learn from; may be given again.")] = None,
    heldout: Annotated[str | None, typer.Option(help="File (or share of the rows) to measure on.")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template file in place of the model's own.")] = None,
    fresh: Annotated[bool, typer.Option(help="Start over; an older run of that name is moved aside.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print summary.json on stdout.")] = False,
) -> None:
    """Fine-tune MODEL on the answers in DATA. The same command again resumes; so does `instil train RUN`."""
    with errors(), unwinding():
        config = looked_at(arguments or [], model, template, heldout, config=True, data=data)
        from instil.folder import refuse_busy

        refuse_busy(config)
        from instil.run import Listener
        from instil.run import train as run_train

        folder = run_train(
            config, fresh=fresh, listener=Listener(say, step_printer(), counter("rows prepared", quiet_s=3))
        )
        _report(folder, json)


def _report(folder: Path, json: bool) -> None:
    """The end: what came out, where it is, what to do next."""
    import orjson

    summary = orjson.loads((folder / "summary.json").read_bytes())
    if json:
        put_json({"run": str(folder), **summary})
    before, after = summary["loss_before"], summary["loss_after"]
    if before is not None and after is not None:
        say(f"held-out loss {before:.4f} -> {after:.4f} nats per target token")
    if summary["target_tokens_per_s"]:
        say(f"{summary['target_tokens_per_s']:,.0f} target tokens/s, {summary['computed_tokens_per_s']:,.0f} computed "
            f"tokens/s, peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB")  # fmt: skip
    if not json:
        put(str(folder))
    say(f"next: instil chat {folder} --base | instil evaluate {folder} | open {folder}/report.html")
