"""parquet: rows come back as they were written, nulls in structs are absent fields, bad files are named."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.data.sources import read_rows
from instil.errors import DataError

ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "task": "greet"},
    {"messages": [{"role": "tool", "content": "", "name": "f"}]},
]


def lines_of(path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return caught.value.lines()


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.Table.from_pylist(ROWS), "rows.parquet")
    return tmp_path / "rows.parquet"


def test_rows_come_back_without_the_nulls_that_parquet_adds(file):
    """Parquet gives every message a `name`; a message that had none has none again. Origins count rows from 1."""
    source = read_rows("rows.parquet")
    assert [row.value for row in source.rows] == ROWS
    assert [row.origin for row in source.rows] == ["rows.parquet:1", "rows.parquet:2"]
    assert source.sentence("messages") == "rows.parquet: Parquet, 2 rows, messages"


def test_parquet_is_recognised_in_gzip_and_under_another_name(file):
    """The magic bytes decide."""
    (file.parent / "odd.jsonl").write_bytes(gzip.compress(file.read_bytes()))
    source = read_rows("odd.jsonl")
    assert [row.value for row in source.rows] == ROWS
    assert source.container == "Parquet in gzip"


def test_rows_keep_their_number_across_batches(tmp_path):
    """The row number does not start again in a later batch or row group."""
    path = tmp_path / "many.parquet"
    pq.write_table(pa.table({"a": list(range(3000))}), path, row_group_size=700)
    rows = read_rows(path).rows
    assert [row.value["a"] for row in rows] == list(range(3000))
    assert rows[2999].origin == f"{path}:3000"


def test_a_cut_file_is_not_a_whole_parquet_file(file):
    """Half a file, and text under the name .parquet, are each named for what they are."""
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    (line,) = lines_of("rows.parquet")
    assert line.startswith("rows.parquet: not a whole Parquet file (")
    file.write_bytes(b"text")
    assert lines_of("rows.parquet") == [
        "rows.parquet: not a Parquet file (no PAR1 at its start); write or fetch it again"
    ]
    file.write_bytes(b"PARE" + raw)
    assert lines_of("rows.parquet")[0].startswith("rows.parquet: looks like an encrypted Parquet file")


def test_extension_columns_are_refused(tmp_path):
    """A column whose type needs a plug-in (once: a pickle) is not interpreted, also inside a list."""
    for values in ([b"0123456789abcdef"], [[b"0123456789abcdef"]]):
        plain = pa.array(values, pa.list_(pa.binary(16)) if isinstance(values[0], list) else pa.binary(16))
        column = plain.cast(pa.list_(pa.uuid()) if isinstance(values[0], list) else pa.uuid())
        path = tmp_path / "x.parquet"
        pq.write_table(pa.table({"id": column}), path)
        (line,) = lines_of(path)
        assert line.startswith(f"{path}: column 'id' has the extension type ")


def test_an_unknown_extension_is_refused_too(tmp_path):
    """An extension that this process has never heard of is seen in the metadata."""
    path = tmp_path / "x.parquet"
    field = pa.field("id", pa.binary(), metadata={"ARROW:extension:name": "arrow.py_extension_type"})
    pq.write_table(pa.table([pa.array([b"x"])], schema=pa.schema([field])), path)
    assert "column 'id' has the extension type" in lines_of(path)[0]


def test_two_columns_of_one_name_are_refused(tmp_path):
    """A dict could hold only one of them."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), path)
    assert lines_of(path) == [f"{path}: two columns are called 'a'; rename one of them"]


def test_a_row_that_has_no_python_value_is_named(tmp_path):
    """Text that is not UTF-8 is found in its row; the others are still read."""
    path = tmp_path / "x.parquet"
    raw = pa.array([b"fine", b"caf\xe9", b"good"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"a": text}), path)
    (line,) = lines_of(path)
    assert line.startswith(f"{path}:2: the row cannot be read (")


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    """0 rows is an error in every container."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), path)
    assert lines_of(path) == [f"{path}: 0 rows (the file is empty); give a file with at least one row"]


@settings(max_examples=60)
@given(st.data())
def test_flipped_bytes_raise_only_data_errors(tmp_path_factory, data):
    """A damaged Parquet file is read or refused, never a crash."""
    path = tmp_path_factory.mktemp("flip") / "x.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        read_rows(path)
    except DataError:
        pass
