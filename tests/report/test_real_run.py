"""The page of a run that was really made: its ledger has rows of every fate, and what the page says is counted by hand."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import tiny

SPACED = tiny.CHATML.replace("role }}\n", "role }}: ").replace("assistant\n", "assistant: ")
QUESTION, LONG = "say red and the user say blue and the assistant say gold", " ".join(tiny.WORDS * 2)


def two_turns(first: str, second: str) -> dict[str, object]:
    """A conversation of two questions and their answers."""
    return {"messages": [*tiny.row(QUESTION, first)["messages"], *tiny.row(QUESTION, second)["messages"]]}


def test_page_of_a_run_with_rows_of_every_fate(tmp_path: Path) -> None:
    "Rows used, trimmed, used in part and dropped: the ledger balances, each rule is told, boundaries are counted."
    tiny.write_model(tmp_path / "m", template=SPACED)
    used = [tiny.row(f"say {i}", "red") for i in range(4)]  # `red` is no part of a longer token
    cut = [two_turns("white", "lime")] * 2
    split, dropped = two_turns("white", LONG), tiny.row("say", LONG)
    file = tiny.write_rows(tmp_path / "a.jsonl", [*used, *cut, split, dropped, tiny.row("say", "green")])
    said = tiny.command(
        "train", "--model", tmp_path / "m", "--data", file, f"run.dir={tmp_path}", "run.name=r", *tiny.FAST,
        "pack.tokens=70", "data.too_long=trim-context", "data.drop_most=1", "data.heldout=0", "train.steps=1",
    )  # fmt: skip
    assert said.code == 0, said.err
    lines = (tmp_path / "r" / "ledger.jsonl").read_text().splitlines()
    fates = [json.loads(line)["fate"] for line in lines]
    assert fates == ["used"] * 4 + ["cut"] * 2 + ["split", "dropped", "used"]
    source = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    source = re.sub(r"<style.*?</style>", "", source, flags=re.DOTALL)
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", source)).split())
    assert "The ledger balances" in text
    assert "no ledger entries" not in text
    for expected in (
        "to learn 8 1 10 ",  # 4 + 1 of one example, 2 of two, 1 of which one of two is left
        "too_long row dropped 1 11.1 %", "too_long some examples left out 1 11.1 %",
        "trim-context old turns left out 2 22.2 %", "boundaries inside a token 1 ",
    ):  # fmt: skip
        assert expected in text, (expected, text)
