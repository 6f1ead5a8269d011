"""`check` before training: everything that is wrong, found to the end of the data, counted, and said once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import instil
import tiny
from instil.audit import Checked, check
from instil.config import load_config
from instil.errors import ModelError, UsageError

DOCUMENT = ["ok", "rows", "examples", "problems", "tokens", "certificate"]
PROBLEM = ["origin", "rule", "detail"]
TOKENS = ["prompt", "answer", "cut", "dropped"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights and a context of 256 tokens."""
    return tiny.write_model(tmp_path_factory.mktemp("audit") / "m")


def checked(model: Path, rows: list[Any], folder: Path, **settings: Any) -> Checked:
    """`check` of rows in a.jsonl."""
    return check([str(tiny.write_rows(folder / "a.jsonl", rows))], str(model), settings=settings)


def document(said: tiny.Said) -> dict[str, Any]:
    """The one document on stdout."""
    found: dict[str, Any] = json.loads(said.out)
    assert said.out.count("\n") == 1
    return found


# ── what is found ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_good_rows_are_ok(model: Path, tmp_path: Path) -> None:
    """No problem, exit 0, every example certified, and no token lost."""
    found = checked(model, tiny.some_rows(20), tmp_path)
    assert (found.ok, found.exit_code, found.problems) == (True, 0, ())
    assert (found.rows, found.examples, found.certificate["checked"]) == (20, 20, 20)
    assert (found.tokens["cut"], found.tokens["dropped"]) == (0, 0)
    assert found.certificate["account"]["train"]["raw_tokens"] == found.tokens["prompt"] + found.tokens["answer"]


def test_a_leak_is_named_with_both_places(model: Path, tmp_path: Path) -> None:
    """A row that is held out and trained on: rule leak, exit 3, by --heldout and by the setting alike."""
    rows = tiny.some_rows(8)
    file = tiny.write_rows(tmp_path / "h.jsonl", [tiny.row("what", "else"), rows[3], rows[5]])
    found = checked(model, rows, tmp_path, **{"data.heldout": str(file)})
    assert (found.ok, found.exit_code) == (False, 3)
    assert [(p.place, p.rule) for p in found.problems] == [(f"{file}:2", "leak"), (f"{file}:3", "leak")]
    assert f"({tmp_path / 'a.jsonl'}:4)" in found.problems[0].what
    said = tiny.command("check", tmp_path / "a.jsonl", "--model", model, "--heldout", file, "--json")
    assert said.code == 3
    assert [p["rule"] for p in document(said)["problems"]] == ["leak", "leak"]
    other = tiny.write_rows(tmp_path / "o.jsonl", [tiny.row("what", "else")])
    apart = checked(model, rows, tmp_path, **{"data.heldout": str(other)})
    assert (apart.ok, apart.rows, apart.examples) == (True, 9, 9)
    assert (apart.certificate["examples"], apart.certificate["heldout"]["examples"]) == (8, 1)
    assert set(apart.certificate["data_sha256"]) == {str(tmp_path / "a.jsonl"), str(other)}


def test_a_row_that_answers_otherwise_is_no_leak(model: Path, tmp_path: Path) -> None:
    """The same question with another answer is another row."""
    rows = tiny.some_rows(4)
    question = rows[2]["messages"][0]["content"]
    file = tiny.write_rows(tmp_path / "h.jsonl", [tiny.row(question, "something else")])
    assert checked(model, rows, tmp_path, **{"data.heldout": str(file)}).ok


def test_duplicates_are_notes(model: Path, tmp_path: Path) -> None:
    """A repeated row is no problem, as it may be meant; it is told with its places."""
    rows = tiny.some_rows(5)
    found = checked(model, [*rows, rows[1]], tmp_path)
    file = tmp_path / "a.jsonl"
    assert (found.ok, found.examples) == (True, 6)
    assert f"1 of 6 conversations repeat an earlier one ({file}:6 = {file}:2)" in found.notes
    assert list(found.notes) == found.certificate["notes"]


def test_what_is_too_long_is_counted_as_dropped(model: Path, tmp_path: Path) -> None:
    """Over-long rows are a problem above data.drop_most only; their tokens are in `dropped` either way."""
    rows = [*tiny.some_rows(3), tiny.row("x" * 300, "red")]
    found = checked(model, rows, tmp_path)
    file = tmp_path / "a.jsonl"
    assert (found.ok, found.exit_code, found.problems[0].rule) == (False, 3, "dropped")
    assert f"too_long 1 ({file}:4: 1 of 1 examples need more than 256 tokens)" in found.problems[0].what
    allowed = checked(model, rows, tmp_path, **{"data.drop_most": 0.25})
    assert (allowed.ok, allowed.rows, allowed.examples) == (True, 4, 3)
    assert allowed.tokens == found.tokens
    assert allowed.tokens["dropped"] > 300
    assert allowed.certificate["dropped_rows"] == {f"{file}:4": "too_long"}
    account = allowed.certificate["account"]["train"]
    assert (account["dropped_examples"], account["dropped_rows_by_rule"]) == (1, {"too_long": 1})


def test_problems_are_gathered_to_the_end(model: Path, tmp_path: Path) -> None:
    """A fault in the first row hides none in the last, nor in the held-out file; good rows are counted all the same."""
    rows = tiny.some_rows(30)
    rows[0] = tiny.row("say <|im_end|>", "red")
    rows[29] = tiny.row("x" * 300, "red")
    file = tiny.write_rows(tmp_path / "h.jsonl", [tiny.row("what", "<|im_start|>"), rows[7]])
    found = checked(model, rows, tmp_path, **{
        "chat.control_text": "reject", "data.too_long": "error", "data.heldout": str(file)
    })  # fmt: skip
    assert found.exit_code == 3
    data = tmp_path / "a.jsonl"
    assert {(p.place, p.rule) for p in found.problems} == {
        (f"{data}:1: messages[0].content", "control-token"), (f"{data}:30", "too_long"), (f"{file}:2", "leak"),
        (f"{file}:1: messages[1].content", "control-token"),
    }  # fmt: skip
    assert found.examples == 28 + 1


def test_every_row_of_every_file_is_read_before_anything_is_said(model: Path, tmp_path: Path) -> None:
    """Rows that cannot even be read are named together, of all files, each with line and field."""
    rows = tiny.some_rows(3)
    rows[1]["messages"][1]["role"] = "bot"
    files = [tiny.write_rows(tmp_path / name, rows) for name in ("a.jsonl", "b.jsonl")]
    found = check([str(file) for file in files], str(model))
    assert (found.exit_code, found.certificate) == (3, {})
    assert [p.place for p in found.problems] == [f"{file}:2: messages[1].role" for file in files]


def test_a_template_that_no_row_gets_through_is_one_problem(model: Path, tmp_path: Path) -> None:
    """Forty rows, one line, exit 4: it is the template that is wrong, not the rows."""
    (tmp_path / "t.jinja").write_text(tiny.REWRITES)
    file = tiny.write_rows(tmp_path / "a.jsonl", tiny.some_rows(40))
    found = check([str(file)], str(model), str(tmp_path / "t.jinja"))
    (problem,) = found.problems
    assert (found.ok, found.exit_code, problem.rule) == (False, 4, "rewrites-prompt")
    assert f"(in every row, {file}:1: messages[1] being the first)" in problem.what


def test_what_cannot_be_checked_at_all_is_an_error(model: Path, tmp_path: Path) -> None:
    """A model that is not there, and a setting that does not exist, are not findings about the data."""
    with pytest.raises(ModelError):
        checked(tmp_path / "none", tiny.some_rows(2), tmp_path)
    with pytest.raises(UsageError, match=r"data\.leek: unknown key; did you mean data\.leak\?"):
        checked(model, tiny.some_rows(2), tmp_path, **{"data.leek": "drop"})


def test_settings_are_those_of_training(model: Path, tmp_path: Path) -> None:
    """What a setting changes in the examples shows in the certificate."""
    talk = {"messages": tiny.row("say", "red")["messages"] + tiny.row("more", "lime")["messages"]}
    every, last, all_of_it = (
        checked(model, [talk], tmp_path, targets=turns) for turns in ("all", "last", "everything")
    )
    assert [found.examples for found in (every, last, all_of_it)] == [2, 1, 2]
    assert every.certificate["target_kinds"]["prompt"] == last.certificate["target_kinds"]["prompt"] == 0
    assert all_of_it.certificate["target_kinds"]["prompt"] > 0
    assert last.certificate["target_tokens"] < every.certificate["target_tokens"]


# ── the contract ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("spoil", "words", "code"),
    [
        (None, [], 0),
        ("drop", [], 3),
        ("drop", ["data.drop_most=1"], 0),
        ("drop", ["data.drop_most=1", "--strict"], 3),
        ("role", [], 3),
        ("template", [], 4),
        ("no file", [], 3),
    ],
)
def test_the_document_has_exactly_the_agreed_keys(
    spoil: str | None, words: list[str], code: int, model: Path, tmp_path: Path
) -> None:
    """ok or not, whatever is wrong: one document with these keys in this order, the exit code, a line per problem."""
    rows = tiny.some_rows(5)
    if spoil == "drop":
        rows[2]["messages"][1]["content"] = ""
    if spoil == "role":
        rows[2]["messages"][1]["role"] = "bot"
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    if spoil == "no file":
        file = tmp_path / "none.jsonl"
    (tmp_path / "t.jinja").write_text(tiny.REWRITES)
    template = ["--template", str(tmp_path / "t.jinja")] if spoil == "template" else []
    said = tiny.command("check", file, "--model", model, "--json", *template, *words)
    found = document(said)
    assert said.code == code
    assert list(found) == DOCUMENT
    assert list(found["tokens"]) == TOKENS
    assert all(type(n) is int for n in (*found["tokens"].values(), found["rows"], found["examples"]))
    assert found["ok"] is (code == 0)
    assert all(list(problem) == PROBLEM for problem in found["problems"])
    assert len(found["problems"]) == len(said.err) == (code != 0)
    for problem, line in zip(found["problems"], said.err, strict=True):
        assert line == f"{problem['origin']}: {problem['detail']}"


def test_a_planted_fault_is_exit_4_and_says_where(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token changed between making and certifying: not ok, with the turn."""
    from instil import workers

    make = workers.pairs_of

    def wrong(*args: Any) -> Any:
        pairs = make(*args)
        pairs.examples[2].prompt_tokens[3] += 1
        return pairs

    monkeypatch.setattr(workers, "pairs_of", wrong)
    found = checked(model, tiny.some_rows(4), tmp_path)
    assert (found.ok, found.exit_code) == (False, 4)
    assert {p.place for p in found.problems} == {f"{tmp_path / 'a.jsonl'}:3: turn 0"}


def test_training_writes_the_certificate_that_check_showed(model: Path, tmp_path: Path) -> None:
    """manifest.json holds, side by side, the very certificates of `check`, and the rows' counts."""
    rows = tiny.some_rows(12)
    rows[4] = tiny.row("say <|im_end|>", "red")
    held = tiny.write_rows(tmp_path / "h.jsonl", [tiny.row("what", "else"), tiny.row("who", "now")])
    found = checked(model, rows, tmp_path, **{"data.heldout": str(held), "pack.tokens": 60})
    least = {"model": str(model), "data.train": [str(tmp_path / "a.jsonl")], "data.heldout": str(held)}
    where = ("pack.tokens=60", "train.steps=1", f"run.dir={tmp_path}", "run.name=x", *tiny.FAST)
    run = instil.train(load_config(None, where, least))
    manifest = json.loads((run / "manifest.json").read_text())
    shown = json.loads(json.dumps(found.certificate))
    assert shown["notes"]  # those of check are the sentences that both sides make
    for side, certificate in (("train", shown), ("heldout", shown["heldout"])):
        kept = manifest["certificate"][side]
        assert kept["examples"] == kept["checked"] > 0
        assert {k: v for k, v in kept.items() if k != "notes"} == {k: certificate[k] for k in kept if k != "notes"}
    assert manifest["certificate"]["train"]["notes"] == {"typed_control_tokens": 1}
    assert manifest["rows"]["examples"] == found.examples
    assert manifest["rows"]["prompt_tokens"] == found.tokens["prompt"]
    assert manifest["rows"]["answer_tokens"] == found.tokens["answer"]
