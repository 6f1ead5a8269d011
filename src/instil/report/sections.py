"""What the page says: the evidence of a run in, headline numbers, charts and tables out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from instil.report.charts import LARGE, NARROW, SMALL, Chart, Line, draw, smooth
from instil.report.evidence import Evidence, Side, inside
from instil.report.quantities import change, count, duration, loss, number, rate, share, size
from instil.types import Fate

SMOOTH_FROM = 10  # steps; fewer are drawn as they are
SMOOTH_SHARE = 1 / 30  # of the steps that the smoothed line averages over
RISE = 1.01  # a last held-out loss so many times the lowest is worth a remark
COUNTS = ("used_rows", "dropped_rows", "examples", "prompt_tokens", "answer_tokens")


@dataclass(frozen=True, slots=True)
class Card:
    """A headline number: what it is, the number, what to know beside it; tone is `good`, `bad` or nothing."""

    label: str
    value: str
    detail: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart with its title and a sentence about it; narrow: the same for a phone, where that differs."""

    title: str
    chart: Chart
    narrow: Chart | None = None
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text; numbers is the index of the first column that is set flush right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: int = 1


def headline(evidence: Evidence) -> list[Card]:
    """The numbers that everybody looks for first."""
    totals = _totals(evidence)
    speed, computed_speed = totals["target_tokens_per_s"], totals["computed_tokens_per_s"]
    epochs = number(evidence.summary.get("epochs"))
    target, computed = totals["target_tokens"], totals["computed_tokens"]
    whole = number(evidence.summary.get("seconds"))
    trained = totals["train_seconds"]
    longer = whole is not None and trained is not None and whole >= trained
    peak = number(evidence.summary.get("peak_memory_bytes"))
    gpu = str(inside(evidence.manifest, "numerics").get("device", "")).startswith("cuda")
    holder = "" if peak is None else "of the GPU" if gpu else "of the process"
    return [
        _loss_card(evidence),
        Card("Target tokens/s", rate(speed), f"{rate(computed_speed)} computed tokens/s"),
        Card("Steps", count(totals["steps"]), "" if epochs is None else f"{count(epochs)} epoch{'s' * (epochs != 1)}"),
        Card("Target tokens learnt", count(target), f"of {count(computed)} computed"),
        Card("Peak memory", size(peak), holder),
        Card("Training time", duration(trained), f"{duration(whole)} from start to end" if longer else ""),
    ]


def _totals(evidence: Evidence) -> dict[str, float | None]:
    """The summary's numbers, or for an unfinished run those of the metrics."""
    names = (
        "steps",
        "target_tokens",
        "computed_tokens",
        "train_seconds",
        "target_tokens_per_s",
        "computed_tokens_per_s",
    )
    if evidence.finished:
        return {name: number(evidence.summary.get(name)) for name in names}
    sums = {name: float(np.nansum(evidence.series[name])) for name in ("target_tokens", "computed_tokens", "seconds")}
    s = sums["seconds"]
    steps = float(evidence.steps[-1]) if len(evidence.steps) else 0.0
    speeds = [sums[name] / s if s else None for name in ("target_tokens", "computed_tokens")]
    return dict(zip(names, (steps, sums["target_tokens"], sums["computed_tokens"], s, *speeds), strict=True))


def _loss_card(evidence: Evidence) -> Card:
    held = evidence.heldout
    before = number(evidence.summary.get("loss_before"))
    after = number(evidence.summary.get("loss_after"))
    if before is None:
        before = held.get(0)
    if after is None and held and max(held) > 0:
        after = held[max(held)]
    label = "Held-out loss, nats per target token"
    if before is None and after is None:
        losses = evidence.series["loss"]
        seen = losses[np.isfinite(losses)]
        last = f"the last training loss was {loss(float(seen[-1]))}" if len(seen) else ""
        return Card(label, "not measured" if evidence.finished else "not measured yet", last)
    if before is None:
        return Card(label, loss(after), f"at step {max(held):,}" if held else "")
    if after is None:
        return Card(label, loss(before), "before the first step")
    parts = [change(after - before) if after != before else "unchanged"]
    if max(before, after) < 20:
        parts.append(f"perplexity {rate(math.exp(before))} → {rate(math.exp(after))}")
    tone = "good" if after < before else "bad" if after > before else ""
    return Card(label, f"{loss(before)} → {loss(after)}", ", ".join(parts), tone)


def loss_panel(evidence: Evidence) -> Panel | None:
    """The training loss per step, raw and smoothed, with the held-out losses as dots."""
    y = evidence.series["loss"]
    known = np.isfinite(y)
    x, y = evidence.steps[known].astype(float), y[known]
    lines = [Line("raw" if len(x) >= SMOOTH_FROM else "line", x, y)]
    caption = []
    if len(x) >= SMOOTH_FROM:
        weight = evidence.series["target_tokens"][known]
        span = max(3.0, len(x) * SMOOTH_SHARE)
        lines.append(Line("line", x, smooth(y, np.where(weight > 0, weight, 1.0), span)))
        caption.append(f"The smoothed line averages over about {span:.0f} steps, by target tokens.")
    chart = draw(lines, LARGE, dots=evidence.heldout)
    if chart is None:
        return None
    held = evidence.heldout
    if held:
        best, last = min(held, key=lambda step: held[step]), max(held)
        if held[last] > held[best] * RISE and best:
            caption.append(
                f"The held-out loss was lowest at step {best:,} ({loss(held[best])}) and rose to {loss(held[last])}: "
                "fewer epochs or a lower rate may do better."
            )
    return Panel("Loss, nats per target token", chart, draw(lines, NARROW, dots=held), " ".join(caption))


def small_panels(evidence: Evidence) -> list[Panel]:
    """Learning rate, gradient norm and accuracy over the steps, each where the metrics have it."""
    panels = []
    for name, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm, before clipping"),
        ("accuracy", "First-choice accuracy on targets"),
    ):
        y = evidence.series[name]
        known = np.isfinite(y)
        line = Line("line", evidence.steps[known].astype(float), y[known])
        chart = draw([line], SMALL, zero=name == "lr", log=name == "grad_norm")
        if chart is not None:
            panels.append(Panel(title, chart))
    return panels


def row_bar(evidence: Evidence) -> list[tuple[str, str, int, float]]:
    """The rows as parts of one bar: (kind, label, rows, percent)."""
    if evidence.ledger is None:
        return []
    train, heldout = evidence.ledger.sides["train"], evidence.ledger.sides["heldout"]
    parts = [
        ("train", "learnt", train.used_rows),
        ("heldout", "held out", heldout.used_rows),
        ("dropped", "dropped", evidence.ledger.total("dropped_rows")),
    ]
    whole = sum(rows for _, _, rows in parts)
    return [(kind, label, rows, 100 * rows / whole) for kind, label, rows in parts if rows and whole]


def account(evidence: Evidence) -> Table | None:
    """Rows, examples and tokens, by side; from the run's own sums where there is no ledger."""
    head = ("", "rows used", "rows dropped", "examples", "prompt tokens", "answer tokens")

    def cells(label: str, side: Side) -> tuple[str, ...]:
        return (label, *(count(getattr(side, name)) for name in COUNTS))

    if evidence.ledger is not None:
        whole = Side(*(evidence.ledger.total(name) for name in COUNTS))
        sides = evidence.ledger.sides
        rows = (cells("to learn", sides["train"]), cells("held out", sides["heldout"]), cells("all", whole))
        return Table(head, rows)
    sums = _recorded_rows(evidence)
    return Table(head, (("all", *(count(number(sums.get(name))) for name in COUNTS)),)) if sums else None


def _recorded_rows(evidence: Evidence) -> Mapping[str, Any]:
    return inside(evidence.summary, "rows") or inside(evidence.manifest, "rows")


def imbalances(evidence: Evidence) -> list[str] | None:
    """Where the ledger's sums are not those that the run recorded; None where there is nothing to compare."""
    sums = _recorded_rows(evidence)
    if evidence.ledger is None or not sums:
        return None
    found = [(name, evidence.ledger.total(name), number(sums.get(name))) for name in COUNTS if name in sums]
    return [f"{n}: {count(a)} in the ledger, {count(b)} recorded" for n, a, b in found if a != b]


def rules(evidence: Evidence) -> list[tuple[str, str, str, str, list[str]]]:
    """(rule, what it did, rows, share of all rows, the first rows with the reason)."""
    if evidence.ledger is None:
        return []
    whole = evidence.ledger.total("used_rows") + evidence.ledger.total("dropped_rows")
    did: dict[Fate, str] = {
        "used": "row used", "split": "some examples left out", "cut": "old turns left out", "dropped": "row dropped"
    }  # fmt: skip
    return [
        (r.name, did[r.fate], count(r.rows), share(r.rows, whole), [": ".join(filter(None, pair)) for pair in r.first])
        for r in evidence.ledger.rules
    ]


def learnt(evidence: Evidence) -> list[str]:
    """Sentences about what was learnt and computed. Sharing is stated only where the passes over the data are whole."""
    totals, lines = _totals(evidence), []
    target, computed = totals["target_tokens"], totals["computed_tokens"]
    if target and computed:
        lines.append(f"{count(target)} target tokens learnt, {count(computed)} tokens computed: "
                     f"{share(target, computed)} of the computation is targets.")  # fmt: skip
    train = evidence.ledger.sides["train"] if evidence.ledger else Side()
    if target and computed and train.answer_tokens:
        passes, rest = divmod(target, train.answer_tokens)
        alone = passes * (train.prompt_tokens + train.answer_tokens - train.examples)
        if passes and not rest and alone > computed:
            lines.append(f"Computing every pair alone would have taken {count(alone)} tokens: shared prefixes were "
                         f"computed once, which saved {share(alone - computed, alone)}.")  # fmt: skip
    return lines


@dataclass(frozen=True, slots=True)
class Certified:
    """One side's certificate as text. ok: every example was checked."""

    side: str
    ok: bool
    checked: str
    facts: tuple[tuple[str, str], ...]


def certificates(evidence: Evidence) -> list[Certified]:
    """manifest.json's certificates; an empty one (a side without rows) is left out."""
    found = []
    for side, label in (("train", "to learn"), ("heldout", "held out")):
        record = inside(evidence.manifest, "certificate", side)
        if not record:
            continue
        checked, examples = number(record.get("checked")), number(record.get("examples"))
        end = inside(record, "terminator")
        facts = (
            ("every answer ends with", f"{end.get('text', '')} (token {end.get('id', '')})" if end else ""),
            (
                "prompt / answer tokens",
                " / ".join(count(number(record.get(f"{s}_tokens"))) for s in ("prompt", "answer")),
            ),
            ("target tokens", count(number(record.get("target_tokens")))),
            ("boundaries inside a token", count(number(inside(record, "notes").get("merged_boundaries", 0)))),
            ("template asks for the date", "yes" if record.get("uses_date") else "no"),
        )
        ok = checked is not None and checked == examples
        found.append(Certified(label, ok, f"{count(checked)} of {count(examples)}", facts))
    return found


def digests(evidence: Evidence) -> list[tuple[str, str]]:
    """(what, sha256) of model, tokenizer, template and data files."""
    manifest = evidence.manifest
    certificate = inside(manifest, "certificate", "train")
    found = [("model", inside(manifest, "model").get("fingerprint"))]
    found += [
        (kind, manifest.get(f"{kind}_sha256") or certificate.get(f"{kind}_sha256"))
        for kind in ("tokenizer", "template")
    ]
    files = inside(manifest, "data_sha256") or inside(certificate, "data_sha256")
    return [(str(what), str(digest)) for what, digest in [*found, *files.items()] if digest]


def machine(evidence: Evidence) -> list[tuple[str, str]]:
    """(what, value): where and with what the run was made."""
    manifest = evidence.manifest
    model, numerics = inside(manifest, "model"), inside(manifest, "numerics")
    facts = [
        ("model", model.get("name")),
        ("revision", model.get("revision")),
        ("device", ", ".join(str(numerics[k]) for k in ("device", "device_name") if numerics.get(k))),
        ("precision", numerics.get("precision")),
        ("threads", numerics.get("threads")),
        ("machine", manifest.get("machine")),
        ("date seen by the template", manifest.get("date")),
        *inside(manifest, "versions").items(),
    ]
    return [(str(what), str(value)) for what, value in facts if value not in (None, "")]
