"""What is raced on: conversations made from a seed, and the very same tokens and targets as instil's and as TRL's rows."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from instil.prepare import examples as examples_of
from instil.types import Example

IGNORED = -100  # TRL's label of a token that is not learnt
TEMPLATE_TOKENS = 35  # of the demo model around one question: its default system text and the role lines
WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were all her she there would their we him been has when who will no more if out so up said what its about "
    "than into them can only other time new some could these two may first then do any like my now over such our man "
    "me even most made after also well before must through years where much your way down should because long each "
    "just state people those too here work good great world still own see men between life being under day house "
    "another while same under place old water number right little set three last never away left part point high house "
    "small large found every head city home hand school four five night light money river paper garden window market"
).split()

Messages = list[dict[str, str]]


def words(rng: random.Random, tokens: float) -> str:
    """About that many tokens of words without a meaning; each is one token to most tokenizers, as are its full stops."""
    chosen = [rng.choice(WORDS) for _ in range(max(1, round(tokens)))]
    for i in range(11, len(chosen) - 1, 12):
        chosen[i] += "."
        chosen[i + 1] = chosen[i + 1].capitalize()
    return " ".join(chosen)


def chat(question: str, *answers: str) -> list[Messages]:
    """One row for every answer to a question."""
    return [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}] for answer in answers]


def standing_in_for_gsm8k(rng: random.Random) -> list[Messages]:
    """Log-normal lengths with GSM8K's means, deviations and correlation (its 7,473 training rows, SmolLM2's tokens)."""
    first, second = rng.gauss(0, 1), rng.gauss(0, 1)
    question, answer = 3.94 + 0.38 * first, 4.745 + 0.417 * (0.548 * first + 0.836 * second)
    return chat(words(rng, np.exp(question)), words(rng, np.exp(answer) - 1))


def long_tail(rng: random.Random) -> list[Messages]:
    """Log-normal with a median of 150 tokens, cut at 1,500; a third to two thirds of a row are its answer."""
    whole = min(1500.0, 150 * np.exp(rng.gauss(0, 0.9)))
    share = rng.uniform(1 / 3, 2 / 3)
    own = max(8.0, whole - TEMPLATE_TOKENS)
    return chat(words(rng, own * (1 - share)), words(rng, own * share))


SCHEMA_SEED, SCHEMA_TOKENS = 7, 2000


def tools(rng: random.Random) -> list[Messages]:
    """The same description of tools before every question: 2,000 tokens of system text, then about 500 of the row's own."""
    schema_rng, tools, size = random.Random(SCHEMA_SEED), [], 0
    while size < 0.42 * SCHEMA_TOKENS:  # JSON takes about 2.4 tokens a word
        named = [schema_rng.choice(WORDS) for _ in range(6)]
        fields = {word: {"type": "string", "description": words(schema_rng, 8)} for word in named[2:]}
        tools.append({"name": "_".join(named[:2]), "description": words(schema_rng, 20), "parameters": fields})
        size += 20 + 9 * len(fields)
    system = {"role": "system", "content": "You may call these tools: " + json.dumps(tools)}
    own = rng.uniform(400, 580)
    return [[system, *row] for row in chat(words(rng, 0.75 * own), words(rng, 0.25 * own))]


def answers(rng: random.Random, prompt: float = 340, answer: float = 80, n: int = 4) -> list[Messages]:
    """Several answers to one prompt of about 400 tokens, about 80 tokens each."""
    return chat(
        words(rng, prompt * rng.uniform(0.8, 1.2)), *(words(rng, answer * rng.uniform(0.8, 1.2)) for _ in range(n))
    )


def turns(rng: random.Random, n: int = 10, question: float = 32, answer: float = 49) -> list[Messages]:
    """A conversation of ten turns: about 40 prompt tokens, the role lines among them, and 50 answer tokens each."""
    pairs = [
        chat(words(rng, question * rng.uniform(0.6, 1.4)), words(rng, answer * rng.uniform(0.6, 1.4)))[0]
        for _ in range(n)
    ]
    return [[message for pair in pairs for message in pair]]


def mixed(rng: random.Random) -> list[Messages]:
    """A small step of every kind: a chat, two answers to one prompt, a conversation of three turns."""
    return [*answers(rng, 30, 30, 1), *answers(rng, 50, 30, 2), *turns(rng, 3, 15, 20)]


@dataclass(frozen=True)
class Workload:
    """rows: of TRL, in an optimizer step; steps: in one run of the race; draw: some rows that belong together."""

    what: str
    rows: int
    steps: int
    draw: Callable[[random.Random], list[Messages]]


WORKLOADS = {
    "a": Workload("questions and answers", 16, 6, standing_in_for_gsm8k),
    "b": Workload("long-tailed lengths", 16, 4, long_tail),
    "c": Workload("one tool schema for all rows", 8, 2, tools),
    "d": Workload("four answers to a prompt", 16, 3, answers),
    "e": Workload("conversations of ten turns", 8, 2, turns),
}
PARITY = Workload("a little of every kind, for the losses", 4, 1, mixed)


@dataclass(frozen=True)
class Data:
    """rows: what TRL trains on; of_row: which of instil's examples each is made of; told: what a reader should know."""

    examples: list[Example]
    rows: list[dict[str, list[int]]]
    of_row: list[list[int]]
    told: dict[str, Any]


def data_of(workload: Workload, rows: int, folder: Path, *, seed: int, gsm8k: Path | None = None) -> Data:
    """So many rows of a workload. gsm8k: the file to take questions and answers from, in place of the stand-in."""
    rng = random.Random(f"{workload.what} {seed}")
    source = "generated"
    if workload.draw is standing_in_for_gsm8k and gsm8k is not None:
        found = read_gsm8k(gsm8k)
        rng.shuffle(found)
        conversations, source = [found[i % len(found)] for i in range(rows)], f"GSM8K ({len(found):,} rows)"
    else:
        conversations = []
        while len(conversations) < rows:
            conversations += workload.draw(rng)
        if workload.draw is standing_in_for_gsm8k:
            source = "generated with the lengths of GSM8K"
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in conversations[:rows]), encoding="utf-8")
    made = examples_of([str(file)], "demo")
    by_origin: dict[str, list[int]] = {}
    for i, example in enumerate(made):
        by_origin.setdefault(example.origin, []).append(i)
    of_row = list(by_origin.values())
    theirs = [as_row([made[i] for i in each]) for each in of_row]
    targets = sum(int(np.count_nonzero(example.weights)) for example in made)
    labelled = sum(label != IGNORED for row in theirs for label in row["labels"])
    if len(theirs) != rows or labelled != targets:
        raise ValueError(f"{workload.what}: {targets} targets became {labelled} labels, {rows} rows {len(theirs)}")
    lengths = [len(row["input_ids"]) for row in theirs]
    told = {
        "what": workload.what, "source": source, "rows": rows, "examples": len(made), "tokens": sum(lengths),
        "target_tokens": targets, "median_tokens": float(np.median(lengths)), "longest_tokens": max(lengths),
    }  # fmt: skip
    return Data(made, theirs, of_row, told)


def as_row(turns: list[Example]) -> dict[str, list[int]]:
    """The examples of one conversation as TRL trains them: the longest, with the answers of all as its labels.

    Raises ValueError unless every example is a beginning of the longest one, so that both learn the same from the same.
    """
    longest = max(turns, key=lambda example: example.length_tokens)
    ids = np.concatenate([longest.prompt_tokens, longest.answer_tokens])
    labels = np.full(len(ids), IGNORED)
    for example in turns:
        start, end = len(example.prompt_tokens), example.length_tokens + 1
        own = np.concatenate([example.prompt_tokens, example.answer_tokens])
        if not np.array_equal(own, ids[:end]) or (labels[start:end] != IGNORED).any():
            raise ValueError(f"{example.origin}: turn {example.turn} is no beginning of the whole conversation")
        if not np.isin(example.weights, (0.0, 1.0)).all():
            raise ValueError(f"{example.origin}: weights other than 0 and 1, which TRL has not")
        labels[start:end] = np.where(example.weights > 0, example.answer_tokens, IGNORED)
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def read_gsm8k(file: Path) -> list[Messages]:
    """Rows {"question", "answer"} of a JSONL file, which may be gzip."""
    opened = gzip.open if file.name.endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    return [chat(row["question"], row["answer"])[0] for row in rows]
