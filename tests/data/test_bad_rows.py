"""Every row of the table of bad inputs (its first 42) that the data stage answers for: exit code, place, one line."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instil.data.mixture import leaks, load_conversations
from instil.data.spec import SourceSpec
from instil.errors import InstilError, problem_lines

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
GOOD = {"messages": [USER, ANSWER]}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The current folder, so that paths in messages are short."""
    monkeypatch.chdir(tmp_path)


def lines(*rows: object) -> bytes:
    return b"".join((row if isinstance(row, str) else json.dumps(row)).encode() + b"\n" for row in rows)


def said(content: object = "Hello", role: object = "assistant", **more: object) -> dict:
    return {"messages": [USER, {"role": role, "content": content, **more}]}


def numbered(count: int, odd: dict[int, dict]) -> bytes:
    """Different good rows, with others at some lines."""
    every = ({"prompt": f"p{i}", "completion": "c"} for i in range(1, count + 1))
    return lines(*(odd.get(i, row) for i, row in enumerate(every, start=1)))


def refusal(path: str, **options) -> InstilError:
    """The error of a load. Nothing but InstilError may come out, and each problem is one line."""
    with pytest.raises(InstilError) as caught:
        load_conversations([path], **options)
    assert all("\n" not in line for line in caught.value.lines())
    return caught.value


def parquet(**columns: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def archive(kind: str) -> bytes:
    Path("member").write_text("x")
    if kind == "zip":
        with zipfile.ZipFile("made", "w") as made:
            made.write("member", "../evil.jsonl")
    else:
        with tarfile.open("made", "w") as made:
            made.add("member", "../evil.jsonl")
    return Path("made").read_bytes()


def names(cases: list) -> list[str]:
    return [f"row {case[0]}, {i}" for i, case in enumerate(cases)]


# Row of the table, name of the file, its bytes, and how the first line of the error begins.
REFUSED = [
    (1, "f", lines(GOOD, '{"a": 1,}'), "f:2: broken JSON at column 8: comma after the last element; "),
    (2, "f", lines(GOOD) + b'{"messages": [{"ro', "f:2: the JSON stops in the middle of a value (column 19): file truncated?"),
    (3, "f", b"", "f: 0 rows (the file is empty); "),
    (5, "f", b"<!DOCTYPE html><html>404</html>", "f: looks like HTML or XML, not JSONL; "),
    (9, "f", '{"a": "café"}\n'.encode("latin-1"), "f:1: byte 0xe9 at offset 10 is not UTF-8 (Windows-1252 or Latin-1?); "),
    (10, "f", lines(GOOD).decode().encode("utf-16"), "f: looks like UTF-16 text; "),
    (11, "f", lines(GOOD, '{"messages": [{"role": "user", "content": "\\ud800"}]}'), "f:2: messages[0].content: lone sur"),
    (12, "f", numbered(100, {5: {"prompt": "\0", "completion": "c"}, 9: {"prompt": "x", "completion": "\x01"}}),
     "f: 2 of 100 rows hold NUL or control characters (f:5, f:9); "),
    (13, "f", lines(GOOD, '{"messages": [], "messages": []}'), "f:2: the key 'messages' stands twice in one object; "),
    (14, "f", lines('{"messages": NaN}'), "f:1: NaN is not JSON; "),
    (14, "f", lines('{"messages": -Infinity}'), "f:1: -Infinity is not JSON; "),
    (15, "f", lines(GOOD, "[1]"), "f:2: the row is a list, not an object; "),
    (15, "f", lines(GOOD, "3"), "f:2: the row is a number, not an object; "),
    (15, "f", lines(GOOD, "null"), "f:2: the row is null, not an object; "),
    (16, "f", lines("[" * 10_000), "f:1: nested too deep; "),
    (16, "f", lines('{"a":' * 10_000), "f:1: "),
    (16, "f", lines('{"a":' + "[" * 10_000 + "]" * 10_000 + "}"), "f:1: nested more than 100 levels deep; "),
    (16, "f", gzip.compress(b'{"a": "' + b"x" * (300 * 2**20), 1), "f:1: the line is longer than 67,108,864 bytes; "),
    (17, "f", lines(GOOD, {"message": []}), "f:2: messages: is missing (keys: message; "),
    (17, "f", lines({"prompt": "p", "completion": "c"}, {"prompt": "p"}), "f:2: completion: is missing (keys: prompt; "),
    (18, "f", lines(said(None)), "f:1: messages[1].content: is null, not text; "),
    (19, "f", lines(said(3)), "f:1: messages[1].content: is a number, not text; "),
    (19, "f", lines(said({"a": 1})), "f:1: messages[1].content: is an object, not text; "),
    (19, "f", lines(said([{"type": "image"}])), "f:1: messages[1].content[0]: is a part of type 'image'"),
    (20, "f", lines({"messages": [{"content": "x"}]}), "f:1: messages[0].role: is missing (keys: content); add one of"),
    (20, "f", lines(said(role="asistant")), "f:1: messages[1].role: 'asistant' is not a role; did you mean 'assistant'?"),
    (20, "f", lines(said(role="Assistant")), "f:1: messages[1].role: 'Assistant' is not a role; did you mean 'assistant'?"),
    (20, "f", lines(said(role="bot")), "f:1: messages[1].role: 'bot' is not a role; did you mean 'assistant'?"),
    (25, "f", numbered(60_000, {50_000: {"prompt": 7, "completion": "c"}}), "f:50000: prompt: is a number here, but text"),
    (25, "f", lines(GOOD, {"messages": "x"}), "f:2: messages: is text here, but a list in f:1; "),
    (28, "f", lines(said(" "), said("")), "f: 0 of 2 rows left (empty_answer 2); "),
    (29, "f", lines(said("", tool_calls=[{"function": {"name": "f", "arguments": "{a: 1}"}}])),
     "f:1: messages[1].tool_calls[0].arguments: broken JSON at column 2"),
    (29, "f", lines({"messages": [USER, {"role": "tool", "content": "1"}, ANSWER]}), "f:1: message 2 is a tool result, but no"),
    (31, "f.csv", b"prompt,completion\np,c\np\n", "f.csv:3: the row has 1 values, the header 2; "),
    (31, "f.csv", b'prompt,completion\np,"c\n', "f.csv:2: a quote is opened in this row and not closed; "),
    (32, "f", parquet(a=[1, 2])[:-9], "f: not a whole Parquet file ("),
    (32, "f.parquet", b"not it", "f.parquet: not a Parquet file (no PAR1 at its start); "),
    (32, "f", b"PARE" + b"x" * 40, "f: looks like an encrypted Parquet file; "),
    (33, "f", parquet(a=pa.array([b"0123456789abcdef"], pa.uuid())), "f: column 'a' has the extension type "),
    (36, "f", "zip", "f: looks like a zip archive; unpack it first"),
    (36, "f", "tar", "f: looks like a tar archive; unpack it first"),
    (37, "f.py", b"import os", "f.py: is a Python script, not data; "),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "content", "expected"), REFUSED, ids=names(REFUSED))
def test_a_bad_file_is_refused_with_its_place(row, name, content, expected):
    """Exit 3; the line names file, line and field, and says what to do."""
    Path(name).write_bytes(archive(content) if isinstance(content, str) else content)
    error = refusal(name)
    assert error.exit_code == 3
    first = error.lines()[0]
    assert first.startswith(expected), first
    assert "; " in first


CSV = b'prompt,completion\np,"=HYPERLINK(""http://x"")"\n'

# Row of the table, bytes, how many conversations come out, and a piece of what is told.
ACCEPTED = [
    (4, b"\r\n" + lines(GOOD).replace(b"\n", b"\r\n") + b"\r\n \n", 1, "3 blank lines skipped"),
    (6, json.dumps([GOOD, said("x")], indent=2).encode(), 2, "JSON array"),
    (7, gzip.compress(lines(GOOD)), 1, "is gzip data, whatever its name"),
    (8, b"\xef\xbb\xbf" + lines(GOOD), 1, "JSONL"),
    (12, numbered(300, {7: {"prompt": "a\0b", "completion": "c"}}), 300, "1 rows hold NUL or control characters (f.jsonl:7)"),
    (21, lines(GOOD, said(" \n")), 1, "1 rows dropped (empty_answer) (f.jsonl:2)"),
    (22, lines(GOOD, {"messages": [USER]}), 1, "1 rows dropped (no_answer) (f.jsonl:2)"),
    (23, lines({"messages": [ANSWER, USER, ANSWER]}), 1, "messages"),  # the template judges the first answer
    (23, lines({"messages": [USER, USER, ANSWER]}), 1, "messages"),
    (23, lines({"messages": [USER, ANSWER, USER]}), 1, "1 rows end with messages after the last answer"),
    (30, lines(GOOD, said("x"), GOOD), 3, "1 of 3 conversations repeat an earlier one (f.jsonl:3 = f.jsonl:1)"),
    (41, lines(said("\x1b[31mred\x1b]8;;http://x\x1b\\link")), 1, "1 rows hold terminal escapes (ESC) (f.jsonl:1)"),
    (42, lines(said("a\u202eb\u200bc")), 1, "messages"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "content", "count", "told"), ACCEPTED, ids=names(ACCEPTED))
def test_an_odd_file_is_read_and_told(row, content, count, told):
    """What is not wrong is read, and what the user should know of it is said."""
    Path("f.jsonl").write_bytes(content)
    loaded = load_conversations(["f.jsonl"])
    assert len(loaded.conversations) == count
    assert any(told in sentence for sentence in (*loaded.notes, *loaded.recognised))


@pytest.mark.parametrize(("row", "content"), [(21, lines(GOOD, said(" "))), (22, lines(GOOD, {"messages": [USER]}))])
def test_under_strict_a_row_without_an_answer_is_an_error(row, content):
    """Rows 21 and 22: exit 3 instead of a dropped row."""
    Path("f").write_bytes(content)
    error = refusal("f", strict=True)
    assert (error.exit_code, [problem.place for problem in error.problems]) == (3, ["f:2"])


def test_row_30_a_row_on_both_sides_is_a_leak():
    """Duplicates on both sides of the split are problems with both places."""
    Path("a").write_bytes(lines(GOOD))
    Path("b").write_bytes(lines(said("x"), GOOD))
    train, heldout = (load_conversations([name]).conversations for name in "ab")
    assert [str(problem) for problem in leaks(train, heldout)] == [
        "b:2: this held-out row is also trained on (a:1); remove one of the two"
    ]


def test_row_31_formulas_are_text():
    """Nothing interprets a cell."""
    Path("f.csv").write_bytes(CSV)
    assert load_conversations(["f.csv"]).conversations[0].messages[1].content == '=HYPERLINK("http://x")'


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("no*.jsonl", "no*.jsonl: matches no data file; "),
        ("empty", "empty: no data file in the folder, it is empty; "),
        ("fifo", "fifo: is not a regular file; "),
        ("/dev/zero", "/dev/zero: is not a regular file; "),
        ("gone.jsonl", "gone.jsonl: no such file; "),
        ("dangling", "dangling: no such file; "),
        ("loop", "loop: cannot be read ("),
    ],
)
def test_row_34_only_regular_files_are_opened(path, expected):
    """A pattern without matches, folders, pipes, devices and links that lead nowhere."""
    os.mkdir("empty")
    os.mkfifo("fifo")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    error = refusal(path)
    assert (error.exit_code, len(error.problems)) == (3, 1)
    assert str(error).startswith(expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_row_34_an_unreadable_file_is_named():
    """Permissions are part of the path to check."""
    Path("f").write_bytes(lines(GOOD))
    os.chmod("f", 0)
    assert str(refusal("f")).startswith("f: cannot be read (Permission denied)")


def test_row_35_a_link_out_of_the_folder_is_followed():
    """On the command line the links are the user's own."""
    os.makedirs("root/data")
    Path("outside.jsonl").write_bytes(lines(GOOD))
    Path("root/data/link.jsonl").symlink_to("../../outside.jsonl")
    assert load_conversations(["root/data"]).conversations[0].origin == "root/data/link.jsonl:1"


@pytest.mark.parametrize("name", ["hub:../../x", "hub:org/../../etc/passwd", "hub:org/name/../../../x"])
def test_row_38_a_name_that_is_a_path_traversal_is_a_usage_error(name):
    """Exit 2, and nothing is looked up."""
    assert refusal(name).exit_code == 2


@pytest.mark.parametrize(
    ("row", "url"),
    [
        (39, "file:///etc/passwd"),
        (39, "http://169.254.169.254/latest"),
        (40, "https://me:s3cret@host.org/x.jsonl?sig=s3cret"),
    ],
)
def test_rows_39_and_40_urls_are_refused_without_their_secrets(row, url):
    """Nothing is fetched, so nothing private can be reached; a password is masked."""
    error = refusal(url)
    assert error.exit_code == 3
    assert "download it first" in str(error)
    assert "s3cret" not in str(error)


@pytest.mark.parametrize("text", ["\x1b]8;;http://evil\x1b\\", "a\u202eb\u2066c", "\u200b\ufeff", "\x9b31m"])
def test_rows_41_and_42_texts_are_kept_to_the_character(text):
    """What a preview must escape, training must see as it is."""
    Path("f").write_bytes(lines(said(f"x{text}")))
    assert load_conversations(["f"]).conversations[0].messages[1].content == f"x{text}"


FAULTS: list[Callable[[int], object]] = [
    lambda i: '{"a": 1,}',
    lambda i: f'{{"prompt": "p{i}", "prompt": 1}}',
    lambda i: {"prompt": i, "completion": "c"},
    lambda i: {"prompt": f"p{i}"},
    lambda i: [i],
    lambda i: {"prompt": f"p{i}", "completion": "\0"},
]


@pytest.mark.parametrize("fault", FAULTS)
def test_ten_thousand_faults_are_a_page_and_not_a_book(fault):
    """20 problems of a kind, then their number; all of them are counted."""
    Path("f").write_bytes(lines({"prompt": "p", "completion": "c"}, *(fault(i) for i in range(9_999))))
    error = refusal("f")
    assert len(error.lines()) <= 22
    assert len(error.problems) in (1, 9_999)
    assert problem_lines(error.problems) == error.lines()


def test_a_source_that_cannot_be_meant_is_a_usage_error():
    """Exit 2, before the file is opened."""
    with pytest.raises(InstilError) as caught:
        load_conversations([SourceSpec("gone.jsonl", {"promt": "q"}, repeat=-1)])
    assert (caught.value.exit_code, len(caught.value.problems)) == (2, 2)
