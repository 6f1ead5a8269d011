"""`instil inspect`: the rows that were asked for, as lines, in colours or as a page; refused rows are said at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

KEYS = ["origin", "turn", "prompt_tokens", "answer_tokens", "weights", "prompt_text", "answer_text"]
TWO_TURNS = {
    "messages": [
        {"role": "user", "content": "say red"}, {"role": "assistant", "content": "gold"},
        {"role": "user", "content": "say 漢"}, {"role": "assistant", "content": "lime"},
    ]
}  # fmt: skip


def test_rows_are_counted_not_examples(model: Path, tmp_path: Path) -> None:
    """--rows 1:3 is the second and third row, with all their turns; the lines have the contract's keys, in order."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [TWO_TURNS, tiny.row("a", "b"), TWO_TURNS, tiny.row("c", "d")])
    said = tiny.command("inspect", file, "--model", model, "--json", "--rows", "1:3")
    lines = [json.loads(line) for line in said.out.splitlines()]
    assert [(line["origin"], line["turn"]) for line in lines] == [(f"{file}:2", 0), (f"{file}:3", 0), (f"{file}:3", 1)]
    assert [list(line)[:7] for line in lines] == [KEYS] * 3


def test_one_number_is_one_row(model: Path, data: Path) -> None:
    """--rows 5 is --rows 5:6."""
    said = tiny.command("inspect", data, "--model", model, "--json", "--rows", "5")
    assert [json.loads(line)["origin"] for line in said.out.splitlines()] == [f"{data}:6"]


def test_rows_that_are_not_there(model: Path, data: Path) -> None:
    """A range behind the last row gives no line, and says how many rows there are."""
    said = tiny.command("inspect", data, "--model", model, "--json", "--rows", "100:200")
    assert (said.code, said.out) == (0, "")
    assert said.err == ["no example: --rows 100:200 selects none of 40 rows"]


def test_refused_rows_do_not_hide_the_good_ones(model: Path, tmp_path: Path) -> None:
    """A row that is refused, here for a control token, is said at the end, with exit code 3, after the others."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("a", "red"), tiny.row("<|im_end|>", "b"), TWO_TURNS])
    words = ("inspect", file, "--model", model, "chat.control_text=reject")
    lines = tiny.command(*words, "--json")
    assert [json.loads(line)["origin"] for line in lines.out.splitlines()] == [f"{file}:{n}" for n in (1, 3, 3)]
    assert lines.code == 3
    assert [line for line in lines.err if line.startswith(f"{file}:2")] == lines.err
    page = tmp_path / "page.html"
    assert tiny.command(*words, "--html", page).code == 3
    assert page.read_text(encoding="utf-8").count("<article") == 3
    assert f"{file}:2: messages[0].content: contains the control token" in page.read_text(encoding="utf-8")


def test_what_training_would_drop_is_said(model: Path, tmp_path: Path) -> None:
    """A chosen row without an example is named with the reason, so that nothing is missing without a word."""
    rows = [tiny.row("a", "red"), tiny.row("b", " "), tiny.row("x" * 300, "c"), tiny.row("d", "lime")]
    file = tiny.write_rows(tmp_path / "a.jsonl", rows)
    shown = tiny.command("inspect", file, "--model", model, "--rows", "0:4")
    assert shown.code == 0
    empty, long = shown.err
    assert empty == f"{file}:2: left out (empty_answer): the assistant says nothing in message 2 of 2"
    assert long.startswith(f"{file}:3: turn 0 left out (too_long): ")
    assert long.endswith(" answer tokens, more than 256")
    assert tiny.command("inspect", file, "--model", model, "--rows", "3:4").err == []
    lines = tiny.command("inspect", file, "--model", model, "--json")
    assert ([json.loads(line)["origin"] for line in lines.out.splitlines()], lines.err) == (
        [f"{file}:1", f"{file}:4"], shown.err
    )  # fmt: skip


def test_the_page_is_written_and_named(model: Path, data: Path, tmp_path: Path) -> None:
    """--html writes every row, unless --rows says which, and the last line says how to open it."""
    page = tmp_path / "my page.html"
    said = tiny.command("inspect", data, "--model", model, "--html", page)
    assert (said.code, said.err) == (0, [])
    assert said.out == f"40 of 40 examples; open '{page}'\n"
    assert page.read_text(encoding="utf-8").count("<article") == 40
    assert tiny.command("inspect", data, "--model", model, "--html", page, "--rows", "2:4").code == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 2
    assert f"{data}:3" in text
    assert "2 of 40" in text
    assert [path.name for path in tmp_path.iterdir()] == ["my page.html"]


def test_lines_and_a_page_at_once(model: Path, data: Path, tmp_path: Path) -> None:
    """With --json stdout has the lines alone; where the page is goes to people."""
    page = tmp_path / "page.html"
    said = tiny.command("inspect", data, "--model", model, "--json", "--html", page, "--rows", "0:2")
    assert len([json.loads(line) for line in said.out.splitlines()]) == 2
    assert said.err == [f"2 of 2 examples; open {page}"]


@pytest.mark.parametrize("name", ["train.jsonl", "no/such/folder/page.html", "folder.html"])
def test_a_page_never_replaces_data(model: Path, data: Path, tmp_path: Path, name: str) -> None:
    """--html wants a name that ends in .html in a folder that is there: exit 2, and nothing is touched."""
    (tmp_path / "train.jsonl").write_bytes(data.read_bytes())
    (tmp_path / "folder.html").mkdir()
    said = tiny.command("inspect", tmp_path / "train.jsonl", "--model", model, "--html", tmp_path / name)
    assert said.code == 2
    assert said.err[0].startswith("--html: ")
    assert tiny.same(tmp_path / "train.jsonl", data)


def test_a_torn_character_is_shown_once(model: Path, tmp_path: Path) -> None:
    """漢 lies in three tokens of this model: two bytes are marked, and the third token shows it."""
    file = tiny.write_rows(tmp_path / "a.jsonl", [tiny.row("a", "漢!")])
    shown = tiny.command("inspect", file, "--model", model).out
    assert "⟦<0xE6><0xBC>漢!<|im_end|>⟧" in shown


def test_settings_stand_behind_the_files(model: Path, data: Path) -> None:
    """section.key=value is no file; an unknown key is refused with the nearest one."""
    assert tiny.command("inspect", data, "--model", model, "pack.tokens=64", "--rows", "0:1").code == 0
    said = tiny.command("inspect", data, "--model", model, "pack.token=64")
    assert said.code == 2
    assert "pack.tokens" in said.err[0]


def test_a_file_may_have_an_equals_sign(model: Path, data: Path, tmp_path: Path) -> None:
    """What is there is a file."""
    odd = tmp_path / "a=b.jsonl"
    odd.write_bytes(data.read_bytes())
    assert tiny.command("inspect", odd, "--model", model, "--json").out.count("\n") == 40


def test_a_template_of_the_user(model: Path, data: Path, tmp_path: Path) -> None:
    """--template FILE decides the prompt, and the page names it."""
    file = tmp_path / "other.jinja"
    file.write_text(tiny.CHATML.replace("assistant\n", "assistant:\n").replace("message.role", "message.role ~ ':'"))
    page = tmp_path / "page.html"
    words = ("inspect", data, "--model", model, "--template", file, "--json", "--rows", "0", "--html", page)
    assert json.loads(tiny.command(*words).out)["prompt_text"].endswith("<|im_start|>assistant:\n")
    assert str(file) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_that_stops_is_no_bug(model: Path, data: Path, words: list[str]) -> None:
    """`instil inspect ... | head -1` ends with exit code 0 and says nothing."""
    code = "from instil.cli.main import main; main()"
    arguments = [str(data), "--model", str(model), "--rows", "0:40", *words]
    process = subprocess.Popen(
        [sys.executable, "-c", code, "inspect", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")
