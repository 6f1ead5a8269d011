"""The token account: every token of every row is learnt, read, cut or dropped, and the sums say so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from instil.chat.pairs import Pairs
from instil.data.ledger import LedgerEntry
from instil.errors import Problem
from instil.types import KINDS


def side_account(pairs: Pairs, entries: Sequence[LedgerEntry]) -> dict[str, Any]:
    """The tokens of one side: raw = prompt + answer + cut + dropped; the answer's targets by kind.

    raw_tokens: of every pair that the rows make, before anything was cut or dropped. unshared_tokens: what would go
    through the model for each example alone, all but its last token (packs share what begins alike: summary.json says).
    target_share = target / (prompt + answer).
    """
    examples = pairs.examples
    prompt = sum(len(example.prompt_tokens) for example in examples)
    answer = sum(len(example.answer_tokens) for example in examples)
    cut = sum(example.cut_tokens for example in examples)
    dropped = sum(each.prompt_tokens + each.answer_tokens for each in pairs.dropped)
    kinds = np.zeros(len(KINDS), np.int64)
    for example in examples:
        kinds += np.bincount(example.kinds[example.weights > 0], minlength=len(KINDS))
    target = int(kinds.sum())
    by_rule = Counter(entry.rule for entry in entries if entry.fate == "dropped")
    return {
        "rows": len(entries),
        "examples": len(examples),
        "raw_tokens": prompt + answer + cut + dropped,
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "cut_tokens": cut,
        "dropped_tokens": dropped,
        "dropped_examples": len(pairs.dropped),
        "dropped_rows_by_rule": dict(by_rule),
        "target_tokens": target,
        "target_tokens_by_kind": {kind: int(n) for kind, n in zip(KINDS, kinds, strict=True) if n},
        "target_share": target / (prompt + answer) if examples else 0.0,
        "unshared_tokens": prompt + answer - len(examples),
    }


ASKED = "leak"  # rows dropped because the user said so (data.leak=drop) do not count against data.drop_most


def drop_problem(
    entries: Sequence[LedgerEntry], most: float, any_left: bool, place: str, wrong: Collection[str] = ()
) -> Problem | None:
    """What to say when nothing is left to train on, or when more rows were dropped than `most` of them.

    wrong: origins of rows that are errors: they are reported by themselves, and cannot be allowed as dropped.
    """
    gone = [entry for entry in entries if entry.fate == "dropped" and entry.origin not in wrong]
    if wrong and not gone:
        return None
    by_rule: dict[str, list[LedgerEntry]] = {}
    for entry in gone:
        by_rule.setdefault(entry.rule, []).append(entry)
    reasons = "; ".join(
        f"{rule} {len(found):,} ({found[0].origin}: {found[0].reason})" for rule, found in by_rule.items()
    )
    if not any_left:
        what = f"0 of {len(entries):,} rows left to train on: {reasons or 'all held out'}"
        return Problem(place, what, "see the reasons; raise pack.tokens or lower data.heldout", "no_rows")
    asked = sum(entry.rule == ASKED for entry in gone)
    if (len(gone) - asked) / len(entries) > most:
        what = f"{len(gone):,} of {len(entries):,} rows would be dropped, more than {most:.0%}: {reasons}"
        allowed = math.ceil(100 * (len(gone) - asked) / len(entries)) / 100  # rounded down, it would not allow them
        return Problem(place, what, f"mend the rows, or allow it with data.drop_most={allowed:.2f}", "dropped")
    return None
