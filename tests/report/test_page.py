"""page: a run folder written by hand gives a page with its numbers, safe to open, whatever is missing, torn or hostile."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from instil.errors import MachineError, UsageError
from instil.report.page import write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}
HOSTILE = "<img src=x onerror=alert(1)></script><b>\u202e\x1b[31m"
ROWS = {"rows": 6, "used_rows": 4, "dropped_rows": 2, "examples": 5, "prompt_tokens": 1100, "answer_tokens": 350}
CONFIG = "model: demo  # hub name\ntrain:\n  lr: 0.0002  # peak learning rate\n"


class Page(HTMLParser):
    """Tags, attributes and text of a page; every opened element must be closed, in order."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> does not match"
        self.text += " " if tag in ("td", "th", "dt", "dd", "div") else ""

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """The attributes of every such element."""
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def metric(step: int, loss: float | None = 2.0, **more: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "loss": loss, "accuracy": 0.5, "lr": 1e-4, "grad_norm": 1.0, "target_tokens": 100,
            "computed_tokens": 300, "examples": 2, "seconds": 0.5} | more  # fmt: skip


def entry(origin: str, side: str, *counts: int, rule: str = "", reason: str = "", fate: str = "used") -> dict[str, Any]:
    examples, prompt, answer = counts or (0, 0, 0)
    return {"origin": origin, "fate": fate if counts else "dropped", "side": side, "examples": examples,
            "prompt_tokens": prompt, "answer_tokens": answer, "rule": rule, "reason": reason}  # fmt: skip


LEDGER = [
    entry("d.jsonl:1", "train", 2, 400, 100),
    entry("d.jsonl:2", "train", 1, 300, 100),
    entry("d.jsonl:3", "train", 1, 200, 50, fate="split", rule="too_long", reason="1 of 2 examples"),
    entry("d.jsonl:4", "heldout", 1, 200, 100),
    entry("d.jsonl:5", "train", rule="no_answer", reason="no assistant turn"),
    entry("d.jsonl:6", "heldout", rule="no_answer", reason="no assistant turn"),
]
SUMMARY = {
    "steps": 3, "epochs": 2, "loss_before": 2.31447, "loss_after": 1.87219, "target_tokens": 12345,
    "heldout_losses": {"0": 2.31447, "2": 2.0, "3": 1.87219}, "computed_tokens": 56789, "target_tokens_per_s": 1234.5,
    "computed_tokens_per_s": 5678.9, "train_seconds": 245.0, "seconds": 301.0, "peak_memory_bytes": 3 << 30, "rows": ROWS,
}  # fmt: skip
MANIFEST = {
    "model": {"name": "org/model-1", "revision": "abc", "fingerprint": "f" * 64},
    "tokenizer_sha256": "1" * 64, "template_sha256": "2" * 64, "data_sha256": {"d.jsonl": "3" * 64}, "date": "2026-01-02",
    "certificate": {
        "train": {
            "examples": 5, "checked": 5, "prompt_tokens": 1000, "answer_tokens": 300, "target_tokens": 300,
            "terminator": {"text": "<|im_end|>", "id": 2}, "uses_date": False, "notes": {"merged_boundaries": 3},
        },
        "heldout": {},
    },
    "rows": ROWS, "numerics": {"device": "cpu", "precision": "bf16", "threads": 4},
    "versions": {"instil": "9.8.7", "torch": "2.13.0"}, "machine": "Linux x86_64, 16 cores", "byteorder": "little",
}  # fmt: skip


def write(folder: Path, **files: Any) -> Path:
    """A finished run's files, each replaced where given; None leaves it out."""
    content = {
        "config": CONFIG, "manifest": MANIFEST, "summary": SUMMARY, "ledger": LEDGER,
        "metrics": [metric(1, 2.5), metric(2, 2.25, heldout_loss=2.0), metric(3, 2.125, heldout_loss=1.87219)],
    } | files  # fmt: skip
    names = {"config": "config.yaml", "manifest": "manifest.json", "summary": "summary.json",
             "ledger": "ledger.jsonl", "metrics": "metrics.jsonl"}  # fmt: skip
    folder.mkdir(exist_ok=True)
    for key, value in content.items():
        if isinstance(value, list):
            value = "".join(json.dumps(line) + "\n" for line in value)
        elif isinstance(value, dict):
            value = json.dumps(value)
        if value is not None:
            (folder / names[key]).write_text(value, encoding="utf-8")
    return folder


def page_of(folder: Path) -> Page:
    """The page of a run folder; every page must be well-formed, free of scripts and of NaN, and fetch nothing."""
    path = write_report(folder)
    assert path == folder / "report.html"
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "<script" not in source.lower()
    assert not re.search(
        r"\bnan\b|\binf\b|\bNone\b|Undefined", page.text + " ".join(str(a) for _, a in page.tags if "d" in a)
    )
    assert not [a for _, a in page.tags if {"src", "href", "srcset", "data"} & a.keys()]
    return page


def points(d: str | None) -> int:
    return len(re.findall("[ML]", d or ""))


def test_page_says_the_headline_numbers(tmp_path):
    "Held-out loss before and after, speed, steps, tokens, memory and time stand on the page."
    text = page_of(write(tmp_path / "my-run")).text
    for expected in (
        "my-run", "2.314 → 1.872", "−0.4423", "perplexity 10.1 → 6.5", "1,234", "5,679", "12,345", "56,789", "3 GiB",
        "4 min 05 s", "2 epochs",
    ):  # fmt: skip
        assert expected in text, expected


def test_page_says_how_the_rows_fared(tmp_path):
    "Rows, examples and tokens of each side, each rule with its first rows, and that the sums balance."
    text = " ".join(page_of(write(tmp_path / "r")).text.split())
    for expected in (
        "to learn 3 1 4 900 250", "held out 1 1 1 200 100", "all 4 2 5 1,100 350", "d.jsonl:5: no assistant turn",
        "no_answer row dropped 2 33.3 %", "too_long some examples left out 1 16.7 % d.jsonl:3: 1 of 2 examples",
        "The ledger balances",
    ):  # fmt: skip
        assert expected in text, expected


def test_an_unbalanced_ledger_is_said(tmp_path):
    "A ledger that lost a row does not pass for balanced."
    text = page_of(write(tmp_path / "r", ledger=LEDGER[1:])).text
    assert "does not balance" in text
    assert "examples: 3 in the ledger, 5 recorded" in text
    assert "The ledger balances" not in text


def test_page_shows_certificate_configuration_and_machine(tmp_path):
    "What was checked, the digests, the configuration as it is, versions and machine."
    text = page_of(write(tmp_path / "r")).text
    for expected in (
        "✓ 5 of 5 examples", "<|im_end|> (token 2)", "boundaries inside a token 3",
        "f" * 64, "1" * 64, "2" * 64, "3" * 64, "2.13.0", "2026-01-02",
        "  lr: 0.0002  # peak learning rate\n", "Linux x86_64, 16 cores", "org/model-1",
    ):  # fmt: skip
        assert expected in text, expected


def test_an_incomplete_certificate_gets_no_tick(tmp_path):
    "4 checked of 5 examples is a fault."
    certificate = {"train": MANIFEST["certificate"]["train"] | {"checked": 4}}
    text = page_of(write(tmp_path / "r", manifest=MANIFEST | {"certificate": certificate})).text
    assert "✗ 4 of 5 examples" in text


def test_sharing_is_stated_only_where_it_is_exact(tmp_path):
    "Two passes over 250 answer tokens, 4 pairs of 900 + 250 tokens less the last of each: 2 * 1146 = 2292 alone."
    text = page_of(write(tmp_path / "a", summary=SUMMARY | {"target_tokens": 500, "computed_tokens": 1146})).text
    assert "would have taken 2,292 tokens" in text
    assert "saved 50.0 %" in text
    text = page_of(write(tmp_path / "b", summary=SUMMARY | {"target_tokens": 499, "computed_tokens": 1146})).text
    assert "would have taken" not in text


def test_the_loss_is_drawn_at_its_steps(tmp_path):
    "Points of the path lie in proportion to step and loss; held-out losses are dots at their steps, step 0 included."
    chart = page_of(write(tmp_path / "r"))
    d = chart.all("path")[0]["d"]
    (x1, y1), (x2, y2), (x3, y3) = [tuple(map(float, p.split())) for p in re.split("[ML]", d)[1:]]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)
    assert (y2 - y1) == pytest.approx(2 * (y3 - y2), abs=0.3)  # 2.5 to 2.25 to 2.125, downwards on the page
    assert y3 > y1
    large = chart.all("circle")[:3]
    assert [float(dot["cx"]) for dot in large] == pytest.approx([x1 - (x2 - x1), x2, x3], abs=0.2)
    assert "step 2: 2.000" in chart.text


@pytest.mark.parametrize(("steps", "drawn"), [(9, 9), (300, 300), (1000, 1000), (20_000, 1000)])
def test_paths_have_a_point_for_each_step_up_to_a_bound(tmp_path, steps, drawn):
    "All steps up to 1,000; above, no more than that, and the page stays small."
    metrics = [metric(i, 2 + (i % 7) / 10) for i in range(1, steps + 1)]
    folder = write(tmp_path / "r", metrics=metrics, summary=SUMMARY | {"heldout_losses": {}})
    counts = [points(a["d"]) for a in page_of(folder).all("path")]
    assert counts[0] == drawn if steps <= 1000 else 900 <= counts[0] <= 1000
    assert max(counts) <= 1000
    assert (folder / "report.html").stat().st_size < 200_000


def test_a_spike_among_many_steps_is_drawn(tmp_path):
    "Thinning out keeps extremes: one bad step of 20,000 is where an engineer looks."
    metrics = [metric(i, 50.0 if i == 12_345 else 2.0) for i in range(1, 20_001)]
    d = page_of(write(tmp_path / "r", metrics=metrics, summary=SUMMARY | {"heldout_losses": {}})).all("path")[0]["d"]
    heights = [float(p.split()[1]) for p in re.split("[ML]", d)[1:]]
    assert min(heights) < 30 < 200 < sorted(heights)[1]


def test_one_step(tmp_path):
    "A run of one step has a dot where others have a line."
    summary = SUMMARY | {"steps": 1, "heldout_losses": {}, "loss_before": None, "loss_after": None}
    page = page_of(write(tmp_path / "r", metrics=[metric(1, 2.5, lr=0.0)], summary=summary))
    assert {points(a["d"]) for a in page.all("path")} == {1}
    assert all("single" in a["class"] for a in page.all("path"))


def test_without_heldout(tmp_path):
    "Nothing held out: the page says so, shows the training loss instead and no dots."
    summary = SUMMARY | {"heldout_losses": {}, "loss_before": None, "loss_after": None}
    page = page_of(write(tmp_path / "r", summary=summary, metrics=[metric(1, 2.5), metric(2, 2.25)]))
    assert "not measured" in page.text
    assert "the last training loss was 2.250" in page.text
    assert not page.all("circle")


def test_a_rising_heldout_loss_is_said(tmp_path):
    "The lowest held-out loss was earlier: overfitting is named, with its step."
    summary = SUMMARY | {"loss_after": 2.5, "heldout_losses": {"0": 2.31447, "2": 2.0, "3": 2.5}}
    page = page_of(write(tmp_path / "r", summary=summary))
    assert "lowest at step 2 (2.000) and rose to 2.500" in page.text
    assert page.all("div", **{"class": "card bad"})


def test_a_torn_last_line_is_skipped_and_said(tmp_path):
    "The run was killed while writing: the page shows the steps before, and says what it left out."
    lines = "".join(json.dumps(metric(i)) + "\n" for i in (1, 2)) + '{"step": 3, "lo'
    page = page_of(write(tmp_path / "r", metrics=lines, summary=None))
    assert "torn" in page.text
    assert "not finished: it is at step 2" in page.text
    assert points(page.all("path")[0]["d"]) == 2
    assert "200" in page.text  # target tokens of the two steps


def test_a_bad_line_within_is_said_too(tmp_path):
    "An unreadable line that is not the last is named by its number."
    lines = json.dumps(metric(1)) + "\nrubbish\n" + json.dumps(metric(2)) + "\n"
    page = page_of(write(tmp_path / "r", metrics=lines))
    assert "(line 2)" in page.text
    assert "torn" not in page.text


def test_missing_numbers_leave_gaps(tmp_path):
    "null, absent and absurd values are not drawn and not printed."
    metrics = [metric(1), metric(2, None), {"step": 3}, metric(4, 1e300, grad_norm=-1e308, lr=5e-324), metric(5)]
    page = page_of(
        write(tmp_path / "r", metrics=metrics, summary=SUMMARY | {"peak_memory_bytes": None, "seconds": None})
    )
    assert points(page.all("path")[0]["d"]) == 2


@pytest.mark.parametrize("missing", ["config", "manifest", "summary", "ledger", "metrics"])
def test_any_one_file_may_be_missing(tmp_path, missing):
    "What is not there is left out."
    page_of(write(tmp_path / "r", **{missing: None}))


@pytest.mark.parametrize("alone", ["config", "manifest", "summary", "ledger", "metrics"])
def test_any_one_file_is_enough(tmp_path, alone):
    "So does a folder with only one of them."
    page_of(
        write(tmp_path / "r", **{f: None for f in ("config", "manifest", "summary", "ledger", "metrics") if f != alone})
    )


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", "null", '{"certificate": 3, "rows": [], "versions": "x", "model": null}']
)
def test_documents_of_another_shape_do_no_harm(tmp_path, content):
    "Broken or foreign JSON leaves its section out."
    page_of(write(tmp_path / "r", manifest=content, summary=content, ledger=content + "\n", metrics=content))


def test_nothing_from_data_is_markup(tmp_path):
    "Run name, origins, rules, reasons, config, model and versions may hold HTML, escapes and bidi overrides: all is text."
    folder = tmp_path / HOSTILE.replace("/", "∕")
    ledger = [
        *LEDGER,
        entry(HOSTILE, "train", rule=HOSTILE, reason=HOSTILE),
        entry("x:1", "train", 1, 1, 1, rule=HOSTILE),
    ]
    certificate = {"train": MANIFEST["certificate"]["train"] | {"terminator": {"text": HOSTILE, "id": HOSTILE}}}
    manifest = MANIFEST | {
        "model": {"name": HOSTILE, "fingerprint": HOSTILE}, "data_sha256": {HOSTILE: HOSTILE}, "machine": HOSTILE,
        "certificate": certificate, "versions": {"instil": HOSTILE, HOSTILE: HOSTILE}, "numerics": {"device": HOSTILE},
    }  # fmt: skip
    page = page_of(write(folder, ledger=ledger, manifest=manifest, config=f"model: {HOSTILE}  # {HOSTILE}\n"))
    source = (folder / "report.html").read_text(encoding="utf-8")
    plain = page_of(write(tmp_path / "plain"))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert page.text.count("<img src=x onerror=alert(1)></script><b>\\u202e\\x1b[31m") >= 12
    assert "\u202e" not in source
    assert "\x1b" not in source


def test_the_policy_forbids_everything_but_styles(tmp_path):
    "A browser is told to run and fetch nothing."
    (policy,) = page_of(write(tmp_path / "r")).all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_equal_folders_give_equal_pages(tmp_path):
    "The page has no clock and no order of its own."
    first = write_report(write(tmp_path / "a")).read_bytes().replace(b">a<", b">b<")
    assert first == write_report(write(tmp_path / "b")).read_bytes()


def test_an_old_page_survives_a_failed_write(tmp_path, monkeypatch):
    "The file is the old one or the new one; no draft stays behind."
    folder = write(tmp_path / "r")
    (folder / "report.html").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match=r"report\.html: cannot be written \(No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "old"
    assert sorted(p.name for p in folder.iterdir() if "report" in p.name) == ["report.html"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    "Nothing is written into somebody's folder."
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="is not a run folder"):
        write_report(tmp_path)
    with pytest.raises(UsageError, match="is not there"):
        write_report(tmp_path / "absent")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
