"""The token account balances: whatever the rows, every token is prompt, answer, cut or dropped, and every row has a fate."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from instil.account import drop_problem
from instil.config import load_config
from instil.data.ledger import LedgerEntry
from instil.errors import DataError
from instil.folder import RunFolder
from instil.prepare import Prepared, data_digests, open_chat, prepare
from instil.types import KINDS

SIDES = ("train", "heldout")
FATES = {"used", "split", "cut", "dropped"}

WORDS = st.sampled_from(["red", "say plum", "ä 🙂", "x" * 25, "lime\n", "<|im_end|>"])
BLANK = st.sampled_from(["", " ", "\n"])
WEIGHTS = st.sampled_from([None, None, None, None, 0.5, 2, 0])
RARELY = st.integers(0, 12).map(lambda n: n == 7)


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A question and an answer, which may be weighted, and is seldom blank."""
    answer: dict[str, Any] = {"role": "assistant", "content": draw(BLANK if draw(RARELY) else WORDS)}
    weight = draw(WEIGHTS)
    return [{"role": "user", "content": draw(WORDS)}, answer if weight is None else answer | {"weight": weight}]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A row: a few turns, perhaps a system message, perhaps a last question that nobody answers."""
    messages = [message for turn in draw(st.lists(turns(), min_size=1, max_size=3)) for message in turn]
    if draw(st.booleans()):
        messages.insert(0, {"role": "system", "content": draw(WORDS)})
    if draw(RARELY):
        messages = messages[:-1]
    row: dict[str, Any] = {"messages": messages}
    weight = draw(WEIGHTS)
    return row if weight is None else row | {"weight": weight}


ROWS = st.lists(conversations(), min_size=2, max_size=6)
SETTINGS = st.fixed_dictionaries(
    {
        "pack.tokens": st.sampled_from([None, 30, 50, 80, 120]),
        "data.too_long": st.sampled_from(["drop", "trim-context"]),
        "targets.turns": st.sampled_from(["all", "last", "everything"]),
        "targets.loss_per": st.sampled_from(["token", "example"]),
        "targets.answer": st.sampled_from([0.0, 0.5, 1.0]),
    }
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer and template."""
    return tiny.write_model(tmp_path_factory.mktemp("account") / "m", weights=False)


@cache
def theirs(model: Path) -> Any:
    """transformers' tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


class Books:
    """The rows of one run, as written and as kept: account, ledger and stored examples by side."""

    def __init__(self, model: Path, folder: Path, rows: list[Any], held: list[Any] | float, given: dict[str, Any]):
        data = tiny.write_rows(folder / "a.jsonl", rows)
        heldout = held if isinstance(held, float) else str(tiny.write_rows(folder / "h.jsonl", held))
        self.rows = {f"{data}:{i + 1}": row for i, row in enumerate(rows)}
        if not isinstance(held, float):
            self.rows |= {f"{heldout}:{i + 1}": row for i, row in enumerate(held)}
        least = {"model": str(model), "data.train": [str(data)], "data.heldout": heldout, "data.drop_most": 1.0}
        config = load_config(None, (), least | {"data.leak": "drop"} | given)
        (folder / "run").mkdir()
        run = RunFolder(folder / "run")
        found: Prepared = prepare(config, model, open_chat(model, None), data_digests(config), run)
        self.account = found.record["account"]
        self.counts = found.record["rows"]
        self.ledger = [json.loads(line) for line in run.ledger.read_text().splitlines()]
        self.examples = {"train": list(found.train), "heldout": list(found.heldout or ())}

    def lines(self, side: str) -> list[dict[str, Any]]:
        return [line for line in self.ledger if line["side"] == side]


def books(
    model: Path, rows: list[Any], held: list[Any] | float = 0.0, given: dict[str, Any] | None = None
) -> Books | None:
    """None where nothing is left to train on, which is an error of its own."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Books(model, Path(folder), rows, held, given or {})
        except DataError as error:
            if {problem.rule for problem in error.problems} != {"no_rows"}:
                raise
            return None


def check_balance(found: Books) -> None:
    """The account, the ledger and the stored examples say the same, and nothing is missing."""
    assert [line["origin"] for line in found.ledger] == list(found.rows)  # each row once, in order
    assert {line["fate"] for line in found.ledger} <= FATES
    for side in SIDES:
        account, lines, examples = found.account[side], found.lines(side), found.examples[side]
        assert account["raw_tokens"] == sum(
            account[f"{part}_tokens"] for part in ("prompt", "answer", "cut", "dropped")
        )
        for part in ("examples", "prompt_tokens", "answer_tokens", "cut_tokens", "dropped_tokens"):
            assert account[part] == sum(line[part] for line in lines), part
        assert account["rows"] == len(lines)
        assert account["examples"] == len(examples)
        assert account["prompt_tokens"] == sum(len(e.prompt_tokens) for e in examples)
        assert account["answer_tokens"] == sum(len(e.answer_tokens) for e in examples)
        assert account["cut_tokens"] == sum(e.cut_tokens for e in examples)
        assert account["unshared_tokens"] == sum(e.length_tokens for e in examples)
        kinds = Counter(KINDS[k] for e in examples for k, w in zip(e.kinds, e.weights, strict=True) if w > 0)
        assert account["target_tokens_by_kind"] == kinds
        assert account["target_tokens"] == kinds.total() == sum(int(np.count_nonzero(e.weights)) for e in examples)
        tokens = account["prompt_tokens"] + account["answer_tokens"]
        assert account["target_share"] == (kinds.total() / tokens if tokens else 0)
        gone = [line for line in lines if line["fate"] == "dropped"]
        assert account["dropped_rows_by_rule"] == Counter(line["rule"] for line in gone)
        assert all(line["rule"] and line["reason"] for line in lines if line["fate"] != "used")
        by_row = Counter(e.origin for e in examples)
        assert by_row == {line["origin"]: line["examples"] for line in lines if line["fate"] != "dropped"}
        assert all(line["examples"] == line["prompt_tokens"] == line["answer_tokens"] == 0 for line in gone)
        assert all(e.weights[-1] > 0 for e in examples)  # every stored example teaches where to stop
    assert found.counts["used_rows"] + found.counts["dropped_rows"] == found.counts["rows"] == len(found.rows)
    assert found.counts["used_rows"] == sum(line["fate"] != "dropped" for line in found.ledger)


def expected_tokens(model: Path, row: dict[str, Any], turns: str) -> int:
    """Tokens of all pairs of a row, by transformers: each learnt turn's prompt as served, and its answer.

    0 for a row that is dropped before pairs are made: an answer is blank, or there is none, or all weigh 0.
    """
    tokenizer, messages = theirs(model), row["messages"]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if any(not messages[i]["content"].strip() for i in answers):
        return 0
    learnt = [i for i in answers if messages[i].get("weight", 1) > 0 and row.get("weight", 1) > 0]
    total = 0
    for i in learnt[-1:] if turns == "last" else learnt:
        prompt = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True, tokenize=False)
        answer = f"{messages[i]['content']}<|im_end|>"
        total += sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, answer))
    return total


def untyped(row: dict[str, Any]) -> bool:
    """Without typed control tokens, which the plain tokenizer of the oracle would take for real ones."""
    return "<|" not in json.dumps(row)


@settings(deadline=None, max_examples=120)
@given(rows=ROWS, share=st.sampled_from([0.0, 0.5]), given=SETTINGS)
def test_every_token_is_accounted_for(model: Path, rows: list[Any], share: float, given: dict[str, Any]) -> None:
    """Rows of any kind, any limit, policy and split: account = ledger = stored examples; raw tokens are transformers'."""
    found = books(model, rows, share, given)
    if found is None:
        return
    check_balance(found)
    for line in found.ledger:
        if untyped(row := found.rows[line["origin"]]):
            parts = ("prompt_tokens", "answer_tokens", "cut_tokens", "dropped_tokens")
            assert sum(line[part] for part in parts) == expected_tokens(model, row, given["targets.turns"])
    if all(untyped(row) for row in found.rows.values()):
        raw = sum(found.account[side]["raw_tokens"] for side in SIDES)
        assert raw == sum(expected_tokens(model, row, given["targets.turns"]) for row in found.rows.values())


@settings(deadline=None, max_examples=40)
@given(rows=ROWS, held=ROWS, given=SETTINGS)
def test_a_heldout_file_is_accounted_for_too(
    model: Path, rows: list[Any], held: list[Any], given: dict[str, Any]
) -> None:
    """Two files, shared rows dropped from the training side: each row of both has its line, and the sums balance."""
    found = books(model, rows + held[:1], held, given)
    if found is not None:
        check_balance(found)


def test_the_fates_are_those_of_the_rows(model: Path) -> None:
    """One row of each: learnt whole, a talk that loses an old turn, one that loses its long answer, one that is too long."""
    talk = [message for word in ("red", "blue", "lime") for message in tiny.row(f"say {word}", word)["messages"]]
    second_long = [*tiny.row("say red", "blue")["messages"], *tiny.row("say lime", "x" * 60)["messages"]]
    rows = [tiny.row("say red", "blue"), {"messages": talk}, {"messages": second_long}, tiny.row("say", "y" * 90)]
    limit = expected_tokens(model, {"messages": talk[:4]}, "last") - 1  # two turns fit, three do not
    assert expected_tokens(model, {"messages": second_long}, "last") - 1 > limit
    found = books(model, rows, given={"pack.tokens": limit, "data.too_long": "trim-context"})
    assert found is not None
    check_balance(found)
    assert [line["fate"] for line in found.ledger] == ["used", "cut", "split", "dropped"]
    assert [line["rule"] for line in found.ledger] == ["", "trim-context", "too_long", "too_long"]
    whole = expected_tokens(model, {"messages": talk}, "last")
    (last,) = (e for e in found.examples["train"] if e.cut_tokens)
    assert last.turn == 2
    assert whole == len(last.prompt_tokens) + len(last.answer_tokens) + last.cut_tokens
    assert found.ledger[2]["dropped_tokens"] == expected_tokens(model, {"messages": second_long}, "last")
    assert found.account["train"]["dropped_examples"] == 2


def test_a_lost_token_is_caught(model: Path) -> None:
    """The balance fires on planted faults: a token too few in the ledger, a line that is missing, a target not counted."""
    for fault in range(3):
        found = books(model, tiny.some_rows(4))
        assert found is not None
        check_balance(found)
        if fault == 0:
            found.ledger[2]["prompt_tokens"] -= 1
        elif fault == 1:
            del found.ledger[1]
        else:
            found.account["train"]["target_tokens_by_kind"]["answer"] -= 1
        with pytest.raises(AssertionError):
            check_balance(found)


# ── how much may be dropped ──────────────────────────────────────────────────────────────────────────────────────────


def entries(dropped: int, rows: int, rule: str = "empty_answer") -> list[LedgerEntry]:
    """A ledger whose first rows are dropped."""
    return [
        LedgerEntry(f"a:{i + 1}", "dropped" if i < dropped else "used", "train", rule=rule, reason="because")
        for i in range(rows)
    ]


@given(rows=st.integers(1, 400), data=st.data())
def test_exactly_the_share_may_be_dropped(rows: int, data: st.DataObject) -> None:
    """dropped / rows is allowed by drop_most of exactly that share, not by less, and by the share that is proposed."""
    dropped = data.draw(st.integers(1, rows))
    ledger = entries(dropped, rows)
    assert drop_problem(ledger, dropped / rows, True, "a") is None
    problem = drop_problem(ledger, np.nextafter(dropped / rows, 0), True, "a")
    assert problem is not None
    assert problem.what.startswith(f"{dropped:,} of {rows:,} rows would be dropped, more than ")
    proposed = float(problem.remedy.rpartition("=")[2])
    assert dropped / rows <= proposed < dropped / rows + 0.01 + 1e-9
    assert drop_problem(ledger, proposed, True, "a") is None


def test_each_reason_is_named_with_its_first_row() -> None:
    """Rules in the order of their first row, with count and reason; without a row left, that is what is said."""
    ledger = [*entries(2, 3), LedgerEntry("b:1", "dropped", "train", rule="too_long", reason="it is long")]
    problem = drop_problem(ledger, 0.5, True, "a")
    assert problem is not None
    assert problem.what == (
        "3 of 4 rows would be dropped, more than 50%: empty_answer 2 (a:1: because); too_long 1 (b:1: it is long)"
    )
    nothing = drop_problem(ledger, 1.0, False, "a")
    assert nothing is not None
    assert (nothing.rule, nothing.what.partition(": ")[0]) == ("no_rows", "0 of 4 rows left to train on")


def test_rows_that_are_errors_do_not_count_as_dropped() -> None:
    """They are reported by themselves: no setting would allow them."""
    ledger = entries(2, 4, rule="control-token")
    assert drop_problem(ledger, 0.0, True, "a", {"a:1", "a:2"}) is None
    problem = drop_problem(ledger, 0.0, True, "a", {"a:1"})
    assert problem is not None
    assert problem.what.startswith("1 of 4 rows would be dropped")
