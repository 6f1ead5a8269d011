"""table: CSV and TSV give rows of texts, or say in which row they break."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instil.data.mixture import load_conversations
from instil.data.sources import read_rows
from instil.errors import DataError

CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=8)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(name: str, content: str | bytes) -> list[str]:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        read_rows(name)
    return caught.value.lines()


@given(
    st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5),
    st.sampled_from([",", "\t"]),
    st.booleans(),
    st.booleans(),
)
def test_what_the_standard_writer_writes_comes_back(rows, delimiter, bom, zipped):
    """Quotes, delimiters and line breaks inside values: equal rows, each with the line on which it starts."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(["a", "b"])
    writer.writerows(rows)
    raw = b"\xef\xbb\xbf" * bom + text.getvalue().encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, ("rows.csv" if delimiter == "," else "rows.tsv") + ".gz" * zipped)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
        source = read_rows(path)
    assert [tuple(row.value.values()) for row in source.rows] == rows
    line, starts = 2, []
    for row in rows:
        starts.append(line)
        line += 1 + sum(cell.count("\n") for cell in row)
    assert [row.origin for row in source.rows] == [f"{path}:{start}" for start in starts]
    assert source.container == ("CSV" if delimiter == "," else "TSV") + " in gzip" * zipped


def test_a_table_is_read_as_a_conversation(here):
    """The header names the columns; formulas are text, an empty cell says nothing, a number may be a weight."""
    Path("t.csv").write_text('prompt,completion,weight,tools,system\nHi,"=HYPERLINK(""u"")",0.5,,\n\nq,a,,,s\n')
    loaded = load_conversations(["t.csv"])
    assert [each.messages[-1].content for each in loaded.conversations] == ['=HYPERLINK("u")', "a"]
    assert [each.weight for each in loaded.conversations] == [0.5, 1.0]
    assert loaded.recognised == ("t.csv: CSV, 2 rows, prompt-completion (1 blank line skipped)",)


def test_messages_in_a_cell_are_json(here):
    """A list of messages can only stand in a table as JSON text."""
    Path("t.csv").write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""Hi""}, {""role"": ""assistant"", ""content"": ""x""}]"\n'
    )
    assert [m.content for m in load_conversations(["t.csv"]).conversations[0].messages] == ["Hi", "x"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n3\n4,5,6\n", ["t.csv:3: the row has 1 values, the header 2", "t.csv:4: the row has 3 values"]),
        ('a,b\n1,"2\n3,4\n5,6\n', ["t.csv:2: a quote is opened in this row and not closed; close it"]),
        ('a,b\n"1"x,2\n', ["t.csv:2: text follows the quote that ends a value"]),
        ("a,a\n1,2\n", ["t.csv:1: two columns are called 'a'; rename one of them"]),
        ("a,\n1,2\n", ["t.csv:1: column 2 of the header has no name"]),
        ("a;b\n1;2\n", ["t.csv:1: the header has one column, 'a;b', so ';' seems to be the delimiter"]),
        ("a,b\n", ["t.csv: 0 rows (the file is empty)"]),
        ("", ["t.csv: 0 rows (the file is empty)"]),
        (b"a,b\n1,caf\xe9\n", ["t.csv:2: byte 0xe9 at offset 9 is not UTF-8"]),
        (b"a,b\r1,2\r", ["t.csv:1: not a row of a table ("]),
    ],
)
def test_a_broken_table_is_named_with_its_row(here, content, expected):
    """Ragged rows, open quotes, headers that name nothing."""
    lines = lines_of("t.csv", content)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines


def test_json_under_the_name_of_a_table_is_json(here):
    """The content decides where it can."""
    Path("t.csv").write_text('{"a": 1}\n')
    assert read_rows("t.csv").container == "JSONL"


def test_a_value_may_be_longer_than_the_standard_limit(here):
    """Python's csv stops at 131,072 characters; answers do not."""
    Path("t.csv").write_text("a,b\n1," + "x" * 200_000 + "\n")
    assert len(read_rows("t.csv").rows[0].value["b"]) == 200_000
