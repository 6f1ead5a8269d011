"""`check`: every pair of the user's rows made, proved and counted before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from instil.config import Config
from instil.data.ledger import ledger_counts
from instil.errors import DataError, InstilError, Problem
from instil.model.locate import locate
from instil.plan import mix_of
from instil.prepare import chat_options, configured, make, open_chat, sources


@dataclass(frozen=True)
class Checked:
    """What `check` found. ok = no problem; tokens = prompt, answer, cut, dropped; notes: what a user should know."""

    ok: bool
    rows: int
    examples: int
    problems: tuple[Problem, ...]
    tokens: dict[str, int]
    certificate: dict[str, Any]
    exit_code: int
    notes: tuple[str, ...] = ()
    recognised: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The contract's JSON document."""
        problems = [{"origin": p.place, "rule": p.rule, "detail": f"{p.what}; {p.remedy}"} for p in self.problems]
        return {"ok": self.ok, "rows": self.rows, "examples": self.examples, "problems": problems,
                "tokens": self.tokens, "certificate": self.certificate}  # fmt: skip


def check(
    data: Sequence[str], model: str, template: str | None = None, settings: Mapping[str, Any] | None = None
) -> Checked:
    """Make and certify every example of the files; problems are collected, not raised.

    settings: dotted configuration keys, {"data.heldout": "test.jsonl"}.
    Raises ModelError where there is no usable tokenizer or template at all, UsageError for wrong settings.
    """
    return check_config(configured(data, model, template, settings))


def check_config(config: Config) -> Checked:
    """`check` for a whole configuration."""
    folder = locate(config.model, need_weights=False).path
    chat = open_chat(folder, config.template, args=config.chat.template_args)
    options = chat_options(config, folder, chat.tokenizer)
    nothing = {"prompt": 0, "answer": 0, "cut": 0, "dropped": 0}
    mix_of(sources(config))
    try:
        made = make(config, chat, options)
    except InstilError as error:
        if not isinstance(error, DataError) and error.exit_code != 4:
            raise
        return Checked(False, 0, 0, error.problems, nothing, {}, error.exit_code)
    counts = ledger_counts(made.entries)
    problems = (*made.row_problems, *made.pair_problems)
    certificate = {
        **made.certificates["train"],
        "account": made.accounts,
        "notes": made.notes,
        "recognised": made.recognised,
        "dropped_rows": {entry.origin: entry.rule for entry in made.entries if entry.fate == "dropped"},
    }
    if made.sides["heldout"]:
        certificate["heldout"] = made.certificates["heldout"]
    tokens = {
        "prompt": counts.prompt_tokens,
        "answer": counts.answer_tokens,
        "cut": counts.cut_tokens,
        "dropped": counts.dropped_tokens,
    }
    return Checked(
        not problems, counts.rows, counts.examples, problems, tokens, certificate, made.exit_code, tuple(made.notes),
        tuple(made.recognised),
    )  # fmt: skip
