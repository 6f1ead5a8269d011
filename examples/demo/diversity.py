"""The same cost, two kinds of data: few names and phrasings seen twice, or many seen once; measured on unseen ones.

    .venv/bin/python examples/demo/diversity.py

The wide run is the demo's own (it is trained first if it is not there yet). Writes diversity.json and diversity.svg.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
from run import DATA, HELDOUT_ROWS, HERE, SEED, TRAIN_ROWS, measured

import instil
from data import write
from instil.cli.console import errors, put, say, share_cores, step_printer

NARROW = Path("runs/demo-narrow-data")
BARS = (("valid", "valid JSON"), ("values", "right values"), ("exact", "exact records"))


def main() -> None:
    """Train both, measure both on the same held-out rows, draw."""
    write(DATA, train=TRAIN_ROWS, heldout=HELDOUT_ROWS, seed=SEED)
    write(NARROW, train=TRAIN_ROWS // 2, heldout=HELDOUT_ROWS, seed=SEED, variety="narrow")
    narrow = ["run.name=demo-narrow", f"data.train={NARROW}/train.jsonl", "train.epochs=2"]
    results = {}
    for name, overrides in (("wide", []), ("narrow", narrow)):
        say(name)
        run = instil.train(
            instil.load_config(HERE / "config.yaml", overrides), listener=instil.Listener(say, step_printer())
        )
        tuned = measured(str(run), run / "tuned.json").tasks["record"]
        summary = orjson.loads((run / "summary.json").read_bytes())
        results[name] = {
            **variety_of(DATA if name == "wide" else NARROW),
            "epochs": summary["epochs"],
            "computed_tokens": summary["computed_tokens"],
            "heldout_loss": summary["loss_after"],
            "records": tuned.rows,
            "valid": tuned.valid_rows / tuned.rows,
            "values": tuned.values,
            "exact": tuned.exact_rows / tuned.rows,
        }
    (HERE / "diversity.json").write_bytes(orjson.dumps(results, option=orjson.OPT_INDENT_2))
    (HERE / "diversity.svg").write_text(picture(results), encoding="utf-8")
    put(orjson.dumps(results, option=orjson.OPT_INDENT_2).decode())


def variety_of(folder: Path) -> dict[str, int]:
    """How many rows there are to learn, and how many different names and products their records hold."""
    rows = [orjson.loads(line) for line in (folder / "train.jsonl").read_bytes().splitlines()]
    records = [orjson.loads(row["messages"][-1]["content"]) for row in rows if row["task"] == "record"]
    return {
        "rows": len(rows),
        "names": len({record["name"].split(" ", 1)[1] for record in records}),
        "products": len({record["product"].split(" ", 1)[1] for record in records}),
    }


def picture(results: dict[str, Any]) -> str:
    """Two groups of three bars, in per cent."""
    n, w = results["narrow"], results["wide"]
    rows = [
        ("narrow", f"{n['names']} names, {n['products']} products; {n['rows']:,} rows x {n['epochs']}", n, "#9aa4af"),
        ("wide", f"{w['names']:,} names, {w['products']:,} products; {w['rows']:,} rows x {w['epochs']}", w, "#2f8f4e"),
    ]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 250" font-family="system-ui, sans-serif" '
        'font-size="13" role="img" aria-label="Held-out scores after training on narrow and on wide data">',
        "<style>.b{fill:#fff}.t{fill:#1f2328}.m{fill:#59636e}@media (prefers-color-scheme: dark){.b{fill:#0d1117}"
        ".t{fill:#e6edf3}.m{fill:#9198a1}}</style>",
        '<rect class="b" width="640" height="250"/>',
    ]
    y = 24
    for name, what, scores, colour in rows:
        parts.append(f'<text x="16" y="{y}" class="t" font-weight="600">{name}</text>')
        parts.append(f'<text x="76" y="{y}" class="m">{what}; {scores["computed_tokens"]:,} tokens computed</text>')
        for key, label in BARS:
            y += 26
            share = scores[key]
            parts.append(f'<text x="120" y="{y}" class="t" text-anchor="end">{label}</text>')
            parts.append(
                f'<rect x="130" y="{y - 13}" width="{max(1, 430 * share):.0f}" height="17" rx="3" fill="{colour}"/>'
            )
            parts.append(f'<text x="{138 + 430 * share:.0f}" y="{y}" class="t">{share:.1%}</text>')
        y += 38
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    share_cores()
    with errors():
        main()
