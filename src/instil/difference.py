"""Where a changed data file begins to differ from the rows that a run was prepared from."""

from __future__ import annotations

from instil.config import Config
from instil.data.ledger import read_ledger, row_digests
from instil.data.mixture import load_conversations
from instil.errors import DataError
from instil.folder import RunFolder
from instil.prepare import heldout_sources, sources


def first_difference(run: RunFolder, config: Config, file: str, was: str) -> str:
    """The first row of a file that is not what the run's ledger has, in words. was: what the ledger calls the file."""
    try:
        before = {e.origin: e.digest for e in read_ledger(run.ledger)}
        now: dict[str, str] = {}
        for some, side in ((sources(config), "train"), (heldout_sources(config), "heldout")):
            if some:
                loaded = load_conversations(some, side, strict=False)  # type: ignore[arg-type]
                now |= {entry.origin: "" for entry in loaded.dropped} | row_digests(loaded.conversations)
    except DataError as error:
        return str(error.problems[0]).removesuffix(".")
    sides = ((before, was), (now, file))
    old, new = ({line_of(o): d for o, d in rows.items() if o.rpartition(":")[0] == name} for rows, name in sides)
    if not any(old.values()):
        return "which row differs cannot be told, as its ledger has no digests"
    for line in sorted({*old, *new}):
        if line not in new:
            return f"{file}:{line} is gone" + ("" if any(other > line for other in new) else ", as is all behind it")
        if line not in old:
            return f"{file}:{line} is new" + (f", {len(new) - len(old):,} rows more" if len(new) > len(old) else "")
        if old[line] != new[line]:
            return f"{file}:{line} is the first row that differs"
    return "its rows are the same, only their spelling differs"


def line_of(origin: str) -> int:
    """812 of train.jsonl:812."""
    return int(origin.rpartition(":")[2])
