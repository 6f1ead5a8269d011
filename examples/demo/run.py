"""The demo: make the data, measure the base model, fine-tune, measure again, show both side by side."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import orjson
import typer

import instil
from data import write
from instil.cli.console import counter, duration, errors, put, say, share_cores, step_printer
from instil.cli.evaluate import table
from instil.evaluate.tasks import TaskSummary

HERE = Path(__file__).parent
DATA = Path("runs/demo-data")
TRAIN_ROWS, HELDOUT_ROWS, SEED = 1240, 200, 0


def main() -> None:
    """All of it; `overrides` of the configuration may follow on the command line, as in `instil train`."""
    began = time.monotonic()
    config = instil.load_config(HERE / "config.yaml", sys.argv[1:])
    DATA.mkdir(parents=True, exist_ok=True)
    write(DATA, train=TRAIN_ROWS, heldout=HELDOUT_ROWS, seed=SEED)
    say(f"1/4  {TRAIN_ROWS:,} training and {HELDOUT_ROWS:,} held-out rows made in {DATA}; no name, product or phrasing "
        "of the held-out rows occurs in training")  # fmt: skip
    say(f"2/4  the base model answers the {HELDOUT_ROWS:,} held-out rows")
    base = measured(config.model, DATA / "base.json")
    say("3/4  fine-tuning")
    run = instil.train(config, listener=instil.Listener(say, step_printer()))
    say("4/4  the tuned model answers the same rows")
    tuned = measured(str(run), run / "tuned.json")
    summary = orjson.loads((run / "summary.json").read_bytes())
    put("\n" + table([base, tuned], ["base", "tuned"]))
    put(f"\n{summary['target_tokens_per_s']:,.0f} target tokens/s ({summary['computed_tokens_per_s']:,.0f} computed), "
        f"training {duration(summary['train_seconds'])}, all of it {duration(time.monotonic() - began)}, "
        f"peak memory {summary['peak_memory_bytes'] / 1e9:.1f} GB")  # fmt: skip
    put(f"the run is in {run} (report.html, model/, ledger.jsonl, metrics.jsonl). Try next:\n"
        f"  .venv/bin/instil chat {run} --base\n"
        f"  .venv/bin/instil inspect {DATA}/train.jsonl --model demo\n"
        f"  .venv/bin/instil train --model demo --data YOUR.jsonl")  # fmt: skip


def measured(model: str, file: Path) -> instil.Evaluation:
    """Measure on the held-out rows, or read what an earlier start of the demo measured."""
    if file.exists():
        from instil.measure import Answer

        found = orjson.loads(file.read_bytes())
        for summary in found["tasks"].values():
            del summary["exact_share"]
        found["tasks"] = {task: TaskSummary(**summary) for task, summary in found["tasks"].items()}
        found["answers"] = [Answer(**answer) for answer in found["answers"]]
        return instil.Evaluation(**found)
    evaluation = instil.evaluate(model, str(DATA / "heldout.jsonl"), progress=counter("answers"))
    file.write_bytes(orjson.dumps(evaluation.as_dict()))
    return evaluation


if __name__ == "__main__":
    share_cores()
    try:
        with errors():
            main()
    except typer.Exit as end:  # outside a typer command nobody else turns it into an exit code
        sys.exit(end.exit_code)
