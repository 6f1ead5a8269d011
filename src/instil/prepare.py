"""Files and a model's template to stored examples: read, split, pair, certify, record; or the stored ones again."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from instil.chat.certificate import certify
from instil.chat.template import Template, load_template
from instil.chat.tokenizer import Tokenizer, load_tokenizer
from instil.chat.turns import make_examples
from instil.config import Config
from instil.data.ledger import LedgerEntry, Side, ledger_counts, write_ledger
from instil.data.mixture import Loaded, leaks, load_conversations, split_heldout
from instil.data.sources import file_digest
from instil.errors import DataError, InstilError, ModelError, Problem
from instil.folder import RunFolder
from instil.model.locate import locate
from instil.pack.store import ExampleStore, open_store, publish, store_key
from instil.types import Conversation, Example


@dataclass(frozen=True)
class Chat:
    """A model's tokenizer and template."""

    tokenizer: Tokenizer
    template: Template


def open_chat(folder: Path, template: str | None, today: str | None = None) -> Chat:
    """From a model folder. template: a file in place of the model's own; today: the ISO date that it may ask for."""
    date = datetime.date.fromisoformat(today) if today else None
    return Chat(load_tokenizer(folder), load_template(folder, Path(template) if template else None, date))


@dataclass(frozen=True)
class Prepared:
    """The stored examples of a run. record: what was recognised, the certificate, the ledger's sums; key: their folder."""

    train: ExampleStore
    heldout: ExampleStore | None
    record: dict[str, Any]
    key: str


def data_digests(config: Config) -> dict[str, str]:
    """sha256 of every data file, by its path as given."""
    return {path: file_digest(path) for path in [*config.data.train, *_heldout_files(config)]}


def _heldout_files(config: Config) -> list[str]:
    return [config.data.heldout] if isinstance(config.data.heldout, str) else []


def prepare(config: Config, folder: Path, chat: Chat, digests: dict[str, str], run: RunFolder) -> Prepared:
    """The examples of config.data for the model in `folder`, from `packs/<key>/` when they are there already.

    key: digest of data files, tokenizer, template and options; a run that goes on keeps the key that it began with, as
    the pack that it chose would be another limit. Raises DataError with every problem found.
    """
    limit = min((n for n in (config.pack.tokens, context_tokens(folder)) if n), default=None)
    date = str(chat.template.today) if "strftime_now" in chat.template.source else ""
    options = [config.data.heldout, config.data.heldout_most, limit, date]
    key = _began_with(run) or store_key([digests, chat.tokenizer.digest, chat.template.digest, options])
    stored = run.packs / key
    if not (stored.is_dir() and run.ledger.is_file()):
        sides, record, entries = _make(config, chat, limit)
        write_ledger(run.ledger, entries)
        publish(stored, sides, record)
    found, record = open_store(stored)
    return Prepared(found["train"], found["heldout"] if len(found["heldout"]) else None, record, key)


def _began_with(run: RunFolder) -> str | None:
    """The key of a run that is there already; that its data is the same is checked (record.py: refuse_changed)."""
    return orjson.loads(run.manifest.read_bytes()).get("packs") if run.manifest.exists() else None


def _make(
    config: Config, chat: Chat, limit: int | None
) -> tuple[dict[str, list[Example]], dict[str, Any], list[LedgerEntry]]:
    """Read, split, pair, certify."""
    loaded = load_conversations(config.data.train)
    dropped, recognised, digests = list(loaded.dropped), list(loaded.recognised), dict(loaded.digests)
    if isinstance(config.data.heldout, str):
        held = load_conversations(_heldout_files(config), "heldout")
        train_rows, heldout_rows = list(loaded.conversations), list(held.conversations)
        dropped += held.dropped
        recognised += held.recognised
        digests |= held.digests
        if leaked := leaks(train_rows, heldout_rows):
            raise DataError(*leaked)
    else:
        train_rows, heldout_rows = split_heldout(loaded.conversations, config.data.heldout, config.data.heldout_most)
    sides: dict[str, list[Example]] = {}
    entries: list[LedgerEntry] = list(dropped)
    certificates: dict[str, Any] = {}
    for side, rows in (("train", train_rows), ("heldout", heldout_rows)):
        fitting, found, certificate = _side(side, rows, chat, limit, digests)  # type: ignore[arg-type]
        sides[side] = fitting
        entries += found
        certificates[side] = certificate
    counts = asdict(ledger_counts(entries))
    if not sides["train"]:
        reasons = ", ".join(f"{rule} {n}" for rule, n in counts["dropped_by_rule"].items())
        what = f"0 of {counts['rows']} rows left to train on ({reasons or 'all held out'})"
        raise DataError.at(
            ", ".join(config.data.train), what, "see the reasons; raise pack.tokens or lower data.heldout"
        )
    return sides, {"recognised": recognised, "certificate": certificates, "rows": counts}, entries


def _side(
    side: Side, rows: Sequence[Conversation], chat: Chat, limit: int | None, digests: dict[str, str]
) -> tuple[list[Example], list[LedgerEntry], dict[str, Any]]:
    """The examples of one side, with the fate of each row; over-long examples are dropped, never cut."""
    pairs = make_examples(rows, chat.tokenizer, chat.template)
    if pairs.problems:
        raise DataError(*pairs.problems)
    certificate, faults = certify(pairs.examples, rows, chat.tokenizer, chat.template, digests) if rows else ({}, [])
    if faults:
        raise ModelError(*faults)
    by_row: dict[str, list[Example]] = defaultdict(list)
    for example in pairs.examples:
        by_row[example.origin].append(example)
    fitting, entries = [], []
    for row in rows:
        examples = by_row[row.origin]
        fit = [e for e in examples if limit is None or e.length_tokens <= limit]
        fitting += fit
        long = len(examples) - len(fit)
        rule, reason = "", ""
        if long:
            rule, reason = "too_long", f"{long} of {len(examples)} examples are longer than {limit} tokens"
        elif not examples:
            rule, reason = "no_target", "every answer has weight 0"
        sums = len(fit), sum(len(e.prompt_tokens) for e in fit), sum(len(e.answer_tokens) for e in fit)
        entries.append(LedgerEntry(row.origin, "used" if fit else "dropped", side, *sums, rule, reason))
    return fitting, entries, certificate


def context_tokens(folder: Path) -> int | None:
    """max_position_embeddings of a model folder, if its config.json is there and says so."""
    try:
        found = orjson.loads((folder / "config.json").read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
    most = found.get("max_position_embeddings") or found.get("n_positions")
    return most if isinstance(most, int) and most > 0 else None


def examples(data: Sequence[str], model: str, template: str | None = None) -> list[Example]:
    """The examples that training on these files would learn, in order. model: as everywhere; weights are not needed."""
    chat = open_chat(locate(model, need_weights=False).path, template)
    pairs = make_examples(load_conversations(data).conversations, chat.tokenizer, chat.template)
    if pairs.problems:
        raise DataError(*pairs.problems)
    return pairs.examples


@dataclass(frozen=True)
class Checked:
    """What `check` found. ok = no problem; tokens = prompt, answer, cut, dropped."""

    ok: bool
    rows: int
    examples: int
    problems: tuple[Problem, ...]
    tokens: dict[str, int]
    certificate: dict[str, Any]
    exit_code: int

    def as_dict(self) -> dict[str, Any]:
        """The contract's JSON document."""
        problems = [{"origin": p.place, "rule": p.rule, "detail": f"{p.what}; {p.remedy}"} for p in self.problems]
        return {"ok": self.ok, "rows": self.rows, "examples": self.examples, "problems": problems,
                "tokens": self.tokens, "certificate": self.certificate}  # fmt: skip


def check(data: Sequence[str], model: str, template: str | None = None) -> Checked:
    """Make and certify every example of the files; problems are collected, not raised.

    Raises ModelError where there is no usable tokenizer or template at all.
    """
    folder = locate(model, need_weights=False).path
    chat = open_chat(folder, template)
    nothing = {"prompt": 0, "answer": 0, "cut": 0, "dropped": 0}
    try:
        loaded: Loaded = load_conversations(data)
        pairs = make_examples(loaded.conversations, chat.tokenizer, chat.template)
    except InstilError as error:
        return Checked(False, 0, 0, error.problems, nothing, {}, error.exit_code)
    certificate, faults = certify(pairs.examples, loaded.conversations, chat.tokenizer, chat.template, loaded.digests)
    limit = context_tokens(folder)
    kept = [e for e in pairs.examples if limit is None or e.length_tokens <= limit]
    tokens = {
        "prompt": sum(len(e.prompt_tokens) for e in kept),
        "answer": sum(len(e.answer_tokens) for e in kept),
        "cut": 0,
        "dropped": sum(e.length_tokens + 1 for e in pairs.examples) - sum(e.length_tokens + 1 for e in kept),
    }
    problems = (*pairs.problems, *faults)
    rows = len(loaded.conversations) + len(loaded.dropped)
    certificate["dropped_rows"] = {entry.origin: entry.rule for entry in loaded.dropped}
    exit_code = 3 if pairs.problems else 4 if faults else 0
    return Checked(not problems, rows, len(kept), problems, tokens, certificate, exit_code)
