"""Files and a model's template to stored examples: read, split, pair, certify, record; or the stored ones again."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from instil.account import drop_problem, side_account
from instil.chat.pairs import TEMPLATE_RULES, Pairs, make_examples
from instil.chat.targets import Targets
from instil.chat.template import Template, load_template, named_templates
from instil.chat.tokenizer import Tokenizer, eos_ids, load_tokenizer
from instil.chat.turns import ChatOptions
from instil.config import Config, SourceConfig, load_config
from instil.data.ledger import LedgerEntry, Side, ledger_counts, row_digests, write_ledger
from instil.data.mixture import Loaded, leaks, load_conversations, source_digests, split_heldout
from instil.data.spec import SourceSpec
from instil.errors import DataError, ModelError, Problem, TemplateError
from instil.files import sha256_of_files
from instil.folder import RunFolder, read_manifest
from instil.model.locate import locate
from instil.pack.store import ExampleStore, damage, open_store, publish_examples, store_key
from instil.types import Conversation, Example
from instil.workers import Progress, certified

NOTES = {
    "merged_boundaries": "answers whose first token would join the prompt's last: tokenised on their own, as served",
    "typed_control_tokens": "control tokens typed in the data: plain text, never control tokens",
    "reasoning_left_out": "turns whose reasoning the template does not write: it is not learnt",
    "channels_closed": "answers that begin by closing the reasoning channel which the prompt opens",
    "channels_closed_by_prompt": "answers after a prompt that closes the reasoning channel itself",
    "history_rewritten": "answers after a prompt whose older part the template writes differently once they are there",
    "rows_with_null_content": "rows whose empty content beside tool calls is null, as the template writes no calls else",
    "rows_with_numbered_calls": "rows whose tool calls got ids, which they lacked and the template reads",
}


@dataclass(frozen=True)
class Chat:
    """A model's tokenizer and template, and the folder that they are from."""

    tokenizer: Tokenizer
    template: Template
    folder: Path | None = None


def open_chat(
    folder: Path, template: str | None, today: str | None = None, args: Mapping[str, Any] | None = None
) -> Chat:
    """From a model folder. template: a file, or the name of one of the model's own templates, in place of its default;
    today: the ISO date that it may ask for; args: variables for every rendering."""
    date = datetime.date.fromisoformat(today) if today else None
    name = template if template and not Path(template).exists() and template in named_templates(folder) else None
    file = Path(template) if template and name is None else None
    loaded = load_template(folder, file, date, name)
    loaded.args.update(args or {})
    return Chat(load_tokenizer(folder), loaded, folder)


def sources(config: Config) -> list[SourceSpec]:
    """The training sources with their mappings."""
    return [
        SourceSpec(each.path, each.mapping or config.data.mapping, each.repeat, each.weight)
        if isinstance(each, SourceConfig)
        else SourceSpec(each, config.data.mapping)
        for each in config.data.train
    ]


def heldout_sources(config: Config) -> list[SourceSpec]:
    """The held-out file, if one is given."""
    return [SourceSpec(config.data.heldout, config.data.mapping)] if isinstance(config.data.heldout, str) else []


def data_digests(config: Config) -> dict[str, str]:
    """sha256 of every data file, by its name in origins."""
    return source_digests([*sources(config), *heldout_sources(config)])


def chat_options(config: Config, folder: Path, tokenizer: Tokenizer) -> ChatOptions:
    """How a configuration wants pairs made, for the model in `folder`."""
    t = config.targets
    return ChatOptions(
        control_text=config.chat.control_text,
        terminator=config.chat.terminator,
        stops=stop_texts(folder, tokenizer),
        targets=Targets(t.turns, t.loss_per, t.answer, t.reasoning, t.tool_call, t.terminator),
        limit_tokens=min((n for n in (config.pack.tokens, context_tokens(folder)) if n), default=None),
        too_long=config.data.too_long,
    )


def stop_texts(folder: Path, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens at which the model's generation_config stops, as text."""
    found = _json(folder / "generation_config.json").get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    texts = (tokenizer.backend.id_to_token(each) for each in ids if isinstance(each, int))
    return tuple(text for text in texts if text)


def context_tokens(folder: Path) -> int | None:
    """max_position_embeddings of a model folder, if its config.json is there and says so."""
    found = _json(folder / "config.json")
    most = found.get("max_position_embeddings") or found.get("n_positions")
    return most if isinstance(most, int) and most > 0 else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Prepared:
    """The stored examples of a run. record: what was recognised, the certificate, the account; key: their folder."""

    train: ExampleStore
    heldout: ExampleStore | None
    record: dict[str, Any]
    key: str

    @property
    def highest_token(self) -> int:
        """The highest token id on either side: the model must have an embedding for it."""
        return max(side.highest_token for side in (self.train, self.heldout) if side is not None)

    @property
    def longest_tokens(self) -> int:
        """Of the longest example on either side: the model must not treat it otherwise in a pack than alone."""
        return max(int(side.lengths.max()) for side in (self.train, self.heldout) if side is not None)


def prepare(
    config: Config,
    folder: Path,
    chat: Chat,
    digests: dict[str, str],
    run: RunFolder,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """The examples of config.data for the model in `folder`, from `packs/<key>/` when they are there already.

    key: digest of data files, tokenizer, template and options; a run that goes on keeps the key that it began with, as
    the pack that it chose would be another limit. Stored examples that are not what was written are made anew. Raises
    DataError with every problem found.
    """
    options = chat_options(config, folder, chat.tokenizer)
    key = _began_with(run) or _key(config, chat, options, digests)
    stored = run.packs / key
    broken = damage(stored) if stored.is_dir() else None
    if broken:
        say(f"{stored}: {broken}; the examples are prepared anew")
    if broken or not (stored.is_dir() and _has_ledger(run, stored)):
        made = make(config, chat, options, progress)
        made.raise_problems()
        _refuse_moving(digests, made.digests)
        write_ledger(run.ledger, made.entries)
        publish_examples(stored, made.sides, {**made.record(), "ledger_sha256": sha256_of_files([run.ledger])[0]})
    found, record = open_store(stored)
    return Prepared(found["train"], found["heldout"] if len(found["heldout"]) else None, record, key)


def _refuse_moving(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raise DataError for files that changed between the hash that names the examples and the end of reading."""
    if moved := [file for file, digest in after.items() if before.get(file, digest) != digest]:
        what, remedy = "changed while it was read", "start again when nothing writes to it"
        raise DataError(*(Problem(file, what, remedy, "moving") for file in moved))


def _has_ledger(run: RunFolder, stored: Path) -> bool:
    """Whether the ledger is there, and that of these examples; versions before this one have not kept its hash."""
    if not run.ledger.is_file():
        return False
    expected = open_store(stored)[1].get("ledger_sha256")
    return expected is None or sha256_of_files([run.ledger]) == [expected]


def _key(config: Config, chat: Chat, options: ChatOptions, digests: dict[str, str]) -> str:
    date = str(chat.template.today) if "strftime_now" in chat.template.source else ""
    data = config.data.model_dump(exclude={"train"}) | {"train": [asdict(each) for each in sources(config)]}
    parts = [digests, chat.tokenizer.digest, chat.template.digest, chat.template.args, asdict(options), data, date]
    return store_key(parts)


def _began_with(run: RunFolder) -> str | None:
    """The key of a run that is there already; that its data is the same is checked (record.py: refuse_changed)."""
    return read_manifest(run).get("packs")


@dataclass
class Made:
    """The examples of a configuration before anything is written: by side, with the fate of every row.

    row_problems: of the user's data; pair_problems: pairs that do not hold what the server would see. digests: sha256 of
    each file when it had been read.
    """

    sides: dict[str, list[Example]] = field(default_factory=lambda: {"train": [], "heldout": []})
    entries: list[LedgerEntry] = field(default_factory=list)
    recognised: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    certificates: dict[str, Any] = field(default_factory=dict)
    accounts: dict[str, Any] = field(default_factory=dict)
    row_problems: list[Problem] = field(default_factory=list)
    pair_problems: list[Problem] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def raise_problems(self) -> None:
        """Raise what is wrong, the data first."""
        if self.row_problems:
            raise TemplateError(*self.row_problems) if self.exit_code == 4 else DataError(*self.row_problems)
        if self.pair_problems:
            raise ModelError(*self.pair_problems)

    @property
    def exit_code(self) -> int:
        """3 where a row is wrong; 4 where it is the template that cannot do with the rows, or a pair that is wrong.

        A template that raises over single rows (roles that do not alternate) speaks of the rows.
        """
        if any(
            problem.rule not in TEMPLATE_RULES or problem.rule == "template-raises" for problem in self.row_problems
        ):
            return 3
        return 4 if self.row_problems or self.pair_problems else 0

    def record(self) -> dict[str, Any]:
        """What is kept beside the examples."""
        return {
            "recognised": self.recognised,
            "notes": self.notes,
            "certificate": self.certificates,
            "account": self.accounts,
            "rows": asdict(ledger_counts(self.entries)),
        }


def make(config: Config, chat: Chat, options: ChatOptions, progress: Progress | None = None) -> Made:
    """Read, split, pair, certify; what is wrong with rows is collected. progress: (rows done, rows of the side)."""
    made = Made()
    loaded = load_conversations(sources(config), strict=config.data.strict)
    train_rows, heldout_rows = list(loaded.conversations), []
    digests = dict(loaded.digests)
    _told(loaded, made)
    if isinstance(config.data.heldout, str):
        held = load_conversations(heldout_sources(config), "heldout", strict=config.data.strict)
        heldout_rows = list(held.conversations)
        digests |= held.digests
        _told(held, made)
        train_rows = _without_leaks(train_rows, heldout_rows, config, made)
    elif config.data.heldout:
        train_rows, heldout_rows = split_heldout(train_rows, config.data.heldout, config.data.heldout_most)
    made.digests = digests
    sides: tuple[tuple[Side, list[Conversation]], ...] = (("train", train_rows), ("heldout", heldout_rows))
    for side, rows in sides:
        _side(side, rows, chat, options, digests, made, progress)
    rank = {file: number for number, file in enumerate(digests)}
    made.entries.sort(key=lambda entry: rank.get(entry.origin.rpartition(":")[0], len(rank)))
    wrong, left = {_origin(problem) for problem in made.row_problems}, bool(made.sides["train"])
    if problem := drop_problem(made.entries, config.data.drop_most, left, _paths(config), wrong):
        made.row_problems.append(problem)
    made.notes += [*chat.template.notices, *chat.tokenizer.notes, *_stop_notes(chat)]
    kinds = made.accounts["train"]["target_tokens_by_kind"]
    if "prompt" in kinds:
        share = kinds["prompt"] / made.accounts["train"]["target_tokens"]
        made.notes.append(f"prompts are learnt too (targets.turns=everything): they take {share:.1%} of the targets")
    if chat.template.uses_date:
        made.notes.append(f"the template asks for the date: it is told {chat.template.today} throughout this run")
    return made


def _stop_notes(chat: Chat) -> list[str]:
    """Where the model's files name different ends, which is common, and harmless here: the template shows the end."""
    named = eos_ids(chat.folder, chat.tokenizer) if chat.folder is not None else {}
    first = {file: found[0][0] for file, found in named.items() if found and found[0][0]}
    if len(set(first.values())) < 2:
        return []
    told = ", ".join(f"{file}: {text!r}" for file, text in first.items())
    return [f"the model's files name different eos tokens ({told}); answers end as the template shows"]


def _paths(config: Config) -> str:
    return ", ".join(spec.path for spec in sources(config))


def _origin(problem: Problem) -> str:
    """The row that a problem is of."""
    return problem.place.partition(": ")[0]


def _told(loaded: Loaded, made: Made) -> None:
    made.entries += loaded.dropped
    made.recognised += loaded.recognised
    made.notes += loaded.notes


def _without_leaks(
    train: list[Conversation], heldout: Sequence[Conversation], config: Config, made: Made
) -> list[Conversation]:
    """The training rows, those that are held out as well dealt with as configured."""
    if config.data.leak == "error":
        made.row_problems += leaks(train, heldout)
        return train
    leaked = {problem.place for problem in leaks(heldout, train)}
    if leaked and config.data.leak == "allow":
        made.notes.append(f"{len(leaked):,} training rows are held out as well (data.leak=allow)")
        return train
    reason = "the row is held out as well"
    made.entries += [LedgerEntry(origin, "dropped", "train", rule="leak", reason=reason) for origin in sorted(leaked)]
    return [row for row in train if row.origin not in leaked]


def _side(
    side: Side,
    rows: Sequence[Conversation],
    chat: Chat,
    options: ChatOptions,
    digests: dict[str, str],
    made: Made,
    progress: Progress | None,
) -> None:
    """The examples of one side, with the fate of each row; over-long examples are dropped or trimmed, never cut."""
    found = certified(rows, chat.tokenizer, chat.template, options, digests, progress)
    pairs = found.pairs
    made.row_problems += pairs.problems
    made.pair_problems += found.faults
    made.certificates[side] = {**found.certificate, "notes": pairs.notes}
    made.notes += [f"{count:,} {NOTES[what]}" for what, count in pairs.notes.items()]
    made.notes += _certificate_notes(side, found.certificate)
    made.sides[side] = pairs.examples
    made.entries += _fates(side, rows, pairs, options)
    made.accounts[side] = side_account(pairs, [entry for entry in made.entries if entry.side == side])


def _certificate_notes(side: Side, certificate: Mapping[str, Any]) -> list[str]:
    """What of a certificate a user should read."""
    notes = []
    if lossy := certificate.get("lossy_texts"):
        shown = ", ".join(repr(text) for text in lossy[:3])
        notes.append(f"{side}: the tokenizer cannot write every character of {len(lossy)} texts ({shown}, ...)")
    blocks = certificate.get("generation_blocks", {})
    if blocks.get("differ"):
        what = "the template's own {% generation %} blocks mark something else than the answer through its terminator"
        notes.append(
            f"{side}: in {blocks['differ']:,} rows {what} ({blocks['first'][0]}); what the server sends decides"
        )
    return notes


def _fates(side: Side, rows: Sequence[Conversation], pairs: Pairs, options: ChatOptions) -> list[LedgerEntry]:
    """What became of each row."""
    by_row: dict[str, list[Example]] = defaultdict(list)
    for example in pairs.examples:
        by_row[example.origin].append(example)
    long = defaultdict(list)
    for each in pairs.dropped:
        long[each.origin].append(each)
    wrong = {_origin(problem): problem for problem in pairs.problems}
    digests = row_digests(rows)
    entries = []
    for origin in dict.fromkeys(row.origin for row in rows):
        examples, dropped = by_row[origin], long[origin]
        cut = sum(example.cut_tokens for example in examples)
        rule, reason = "", ""
        if dropped:
            rule = "too_long"
            reason = f"{len(dropped)} of {len(dropped) + len(examples)} examples need more than {options.limit_tokens} tokens"
        elif origin in wrong:
            rule, reason = wrong[origin].rule, wrong[origin].what
        elif not examples:
            rule, reason = "no_target", "every answer has weight 0"
        elif cut:
            rule, reason = "trim-context", f"old turns of {cut} tokens left the prompt so that the answer fits"
        entries.append(
            LedgerEntry(
                origin, "dropped" if not examples else "split" if dropped else "cut" if cut else "used", side,
                len(examples), sum(len(e.prompt_tokens) for e in examples), sum(len(e.answer_tokens) for e in examples),
                cut, sum(each.prompt_tokens + each.answer_tokens for each in dropped), rule, reason, digests[origin],
            )
        )  # fmt: skip
    return entries


def configured(
    data: Sequence[str], model: str, template: str | None = None, settings: Mapping[str, Any] | None = None
) -> Config:
    """A configuration for looking at data: settings are dotted keys with their values."""
    given = {"model": model, "data.train": list(data), "template": template, "data.heldout": 0.0, **(settings or {})}
    return load_config(None, given={key: value for key, value in given.items() if value is not None})


def examples(
    data: Sequence[str], model: str, template: str | None = None, settings: Mapping[str, Any] | None = None
) -> list[Example]:
    """The examples that training on these files would learn, in order. model: as everywhere; weights are not needed.

    settings: dotted configuration keys, {"targets.turns": "last"}. Raises DataError for rows that cannot be used.
    """
    config = configured(data, model, template, settings)
    folder = locate(config.model, need_weights=False).path
    chat = open_chat(folder, config.template, args=config.chat.template_args)
    rows = load_conversations(sources(config), strict=config.data.strict).conversations
    pairs = make_examples(rows, chat.tokenizer, chat.template, chat_options(config, folder, chat.tokenizer))
    if pairs.problems:
        raise DataError(*pairs.problems)
    return pairs.examples
