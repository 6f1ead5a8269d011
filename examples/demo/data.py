"""The demo's data: support messages to JSON records and four small tasks, made up from word lists by a seed.

    python examples/demo/data.py OUT --train 1280 --heldout 200 --seed 0 [--variety narrow]

The held-out side shares no name, no product word and no phrasing with the train side; only the task is the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

from heldout_words import HELDOUT
from train_words import NARROW, TRAIN
from words import DETERMINERS, ISSUES, MONTHS, SIZES, TITLES, Words

Side = Literal["train", "heldout"]
Variety = Literal["wide", "narrow"]
Messages = list[dict[str, str]]
Row = dict[str, Any]

SYSTEM = f"Answer in JSON: name, product, issue ({', '.join(ISSUES)}), order, ISO date, amount; null if absent."
SHORT = "Be brief."  # the system prompt of the small tasks
SMALL_TASKS = ("label", "order", "date", "surname")
BLOCK = ("record",) * 15 + ("date", *SMALL_TASKS)  # every 20 rows hold these tasks: 75 % are records, 10 % dates
GIVEN = 0.5  # chance that a message gives its order; its date; its amount
FIRST_DAY, DAYS = date(2024, 1, 1), 1096  # 2024, 2025 and 2026
TRIES = 50  # draws of a row before a repeat is accepted (narrow has few distinct small rows)


def generate(rows: int, *, seed: int, side: Side, variety: Variety = "wide") -> list[Row]:
    """The first `rows` rows of one side: {"messages": [...], "task": ...}, a function of the arguments alone.

    A longer call begins with the rows of a shorter one. `variety` changes the train side only: both kinds of
    training are judged on the same held-out rows. Rows repeat only when the words are exhausted.
    """
    if rows < 0 or side not in ("train", "heldout") or variety not in ("wide", "narrow"):
        raise ValueError(f"no such data: rows={rows}, side={side!r}, variety={variety!r}")
    words = HELDOUT if side == "heldout" else NARROW if variety == "narrow" else TRAIN
    rng = random.Random(f"{side} {seed}")
    seen: set[str] = set()
    made: list[Row] = []
    for _, task in zip(range(rows), _tasks(rng), strict=False):
        for _ in range(TRIES):
            messages = MAKERS[task](words, rng)
            text = json.dumps(messages)
            if text not in seen:
                break
        seen.add(text)
        made.append({"messages": messages, "task": task})
    return made


def write(folder: Path, *, train: int, heldout: int, seed: int, variety: Variety = "wide") -> None:
    """Write train.jsonl and heldout.jsonl into the folder, one row a line."""
    folder.mkdir(parents=True, exist_ok=True)
    sides: tuple[tuple[Side, int], ...] = (("train", train), ("heldout", heldout))
    for side, rows in sides:
        lines = [json.dumps(row) + "\n" for row in generate(rows, seed=seed, side=side, variety=variety)]
        (folder / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")


def _tasks(rng: random.Random) -> Iterator[str]:
    """Task names without end, shuffled block by block."""
    while True:
        yield from rng.sample(BLOCK, len(BLOCK))


def _record(words: Words, rng: random.Random) -> Messages:
    """A support message and its record; what the message does not give is null."""
    issue = rng.choice(ISSUES)
    given = [field for field in ("order", "date", "amount") if rng.random() < GIVEN]
    values = _values(words, rng)
    record = {
        "name": json.dumps(values["name"]),
        "product": json.dumps(values["product"]),
        "issue": json.dumps(issue),
        "order": json.dumps(values["order"]) if "order" in given else "null",
        "date": json.dumps(values["iso"]) if "date" in given else "null",
        "amount": values["amount"] if "amount" in given else "null",  # two decimals, as money is written
    }
    answer = "{" + ",".join(f'"{key}":{value}' for key, value in record.items()) + "}"
    message = _message(words, rng, issue, given).format(**values)
    return _messages(SYSTEM, message, answer)


def _label(words: Words, rng: random.Random) -> Messages:
    label = rng.choice(sorted(words.reviews))
    review = _sentence(words.reviews[label], rng).format(**_values(words, rng))
    return _messages(SHORT, f"{_sentence(words.asks['label'], rng)} {review}", label)


def _order(words: Words, rng: random.Random) -> Messages:
    values = _values(words, rng)
    parts = [_sentence(words.cues[rng.choice(ISSUES)], rng), _sentence(words.orders, rng)]
    message = " ".join([_sentence(words.asks["order"], rng), *rng.sample(parts, 2)])
    return _messages(SHORT, message.format(**values), values["order"])


def _date(words: Words, rng: random.Random) -> Messages:
    values = _values(words, rng)
    return _messages(SHORT, f"{_sentence(words.asks['date'], rng)} {values['date']}", values["iso"])


def _surname(words: Words, rng: random.Random) -> Messages:
    first, last = rng.choice(words.names)
    return _messages(SHORT, f"{_sentence(words.asks['surname'], rng)} {first} {last}", f"{last}, {first}")


MAKERS = {"record": _record, "label": _label, "order": _order, "date": _date, "surname": _surname}


def _messages(system: str, user: str, assistant: str) -> Messages:
    contents = {"system": system, "user": user, "assistant": assistant}
    return [{"role": role, "content": content} for role, content in contents.items()]


def _values(words: Words, rng: random.Random) -> dict[str, str]:
    """One value for every slot, as written in a message; `iso` is the date as an answer has it."""
    day = FIRST_DAY + timedelta(days=rng.randrange(DAYS))
    month = MONTHS[day.month - 1]  # not strftime, which follows the locale
    return {
        "name": " ".join((rng.choice(TITLES), *rng.choice(words.names))),
        "product": f"{rng.choice(SIZES)} {rng.choice(words.products)}",
        "order": str(rng.randrange(3000, 10000)),  # never a year
        "date": rng.choice((f"{day.day} {month} {day.year}", f"{month} {day.day}, {day.year}")),
        "iso": day.isoformat(),
        "amount": f"{rng.randrange(300, 10000) / 100:.2f}",
    }


def _message(words: Words, rng: random.Random, issue: str, given: list[str]) -> str:
    """The template of a support message: who writes, what is the matter, the details in any order, politeness."""
    pools = {"order": words.orders, "date": words.dates, "amount": words.amounts}
    details = [rng.choice(pools[field]) for field in rng.sample(given, len(given))]
    if rng.random() < 0.5:  # one sentence instead of several
        details = [", ".join(details)] if details else []
    body = [rng.choice(words.cues[issue]), *details]
    if rng.random() < 0.3:
        body = [*body[1:], body[0]]
    if signed := rng.random() < 0.4:
        sign_off = rng.choice(words.sign_offs)
    else:
        body = [rng.choice(words.intros), *body]
    if rng.random() < 0.2:
        body[0] = f"{rng.choice(words.greetings)}, {body[0]}"
    if rng.random() < 0.1:
        body = [*body, rng.choice(words.closings)]
    sentences = [_sentence((part,), rng) for part in body]
    return " ".join([*sentences, _capital(sign_off)] if signed else sentences)


def _sentence(phrases: tuple[str, ...], rng: random.Random) -> str:
    """One of the phrases, with a determiner, a capital and a full stop (unless it ends in a mark of its own)."""
    phrase = _capital(rng.choice(phrases).replace("{the}", rng.choice(DETERMINERS)))
    return phrase if phrase.endswith(("?", ":")) else f"{phrase}."


def _capital(phrase: str) -> str:
    return phrase[0].upper() + phrase[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--train", type=int, default=1280, help="rows to train on")
    parser.add_argument("--heldout", type=int, default=200, help="rows to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variety", choices=("wide", "narrow"), default="wide", help="of the train side")
    args = parser.parse_args()
    write(args.out, train=args.train, heldout=args.heldout, seed=args.seed, variety=args.variety)


if __name__ == "__main__":
    main()
