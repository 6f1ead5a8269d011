"""Whatever the files hold, loading them gives conversations or a DataError, and every row is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from instil.data.mixture import load_conversations
from instil.data.rows import parse_rows
from instil.data.sources import Row, Source
from instil.data.spec import MAPPING_KEYS, SourceSpec, spec_problems
from instil.errors import DataError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [{"type": "text", "value": "Hello"}]}]
ROWS = [
    {"text": "Q: x\nA: y"},
    {"messages": TALK, "tools": '[{"name": "f"}]', "weight": 1},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": '{"name": "f"}'}]},
    {"prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}},
    {"prompt": "p", "completion": "c"},
    {"instruction": "i", "input": "", "output": "o", "history": [["a", "b"]]},
    {"instruction": "i", "instances": [{"input": "x", "output": "y"}]},
    {"question": "q", "answer": "a"},
    {"prompt_tokens": [1], "answer_tokens": [2], "weights": [1]},
    {"input_ids": [1, 2], "labels": [-100, 2]},
]


def zstd(raw: bytes) -> bytes:
    return pa.Codec("zstd").compress(raw).to_pybytes()


def files() -> list[tuple[str, bytes]]:
    """Valid files of every container, by the ending of their names."""
    jsonl = [json.dumps(row).encode() + b"\n" for row in ROWS]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"prompt": "p", "completion": "c"}] * 3), sink)
    table = b'prompt,completion,weight\np,"c, d",1\nq,"e\nf",2\n'
    plain = [*((".jsonl", line * 2) for line in jsonl), (".json", json.dumps(ROWS[1:2] * 2, indent=1).encode())]
    plain += [(".csv", table), (".tsv", table.replace(b",", b"\t")), (".parquet", sink.getvalue())]
    packed = [(f"{ending}.gz", gzip.compress(raw)) for ending, raw in plain[-5:]]
    return [*plain, *packed, *((f"{ending}.zst", zstd(raw)) for ending, raw in plain[-5:])]


FILES = files()
MORE = {"system", "task", "template_args", "role", "content", "from", "value"}
KEYS = sorted({key for row in ROWS for key in row} | MORE)
NUMBERS = st.integers(-200, 2**70) | st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=4) | st.sampled_from(KEYS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from(sorted(MAPPING_KEYS)), JSON, max_size=4)


def test_every_valid_file_loads():
    """What is mutated below is valid to begin with."""
    with tempfile.TemporaryDirectory() as folder:
        for ending, raw in FILES:
            path = Path(folder, f"x{ending}")
            path.write_bytes(raw)
            mapping = {"text": "text", "split_at": "\nA: "} if b'{"text"' in raw else {}
            loaded = load_conversations([SourceSpec(str(path), mapping)])
            assert len(loaded.conversations) >= 2, ending


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FILES), st.data())
def test_mutated_files_raise_only_our_errors(file, data):
    """Bytes changed, cut out, doubled or put in: rows or problems, never another exception."""
    ending, raw = file[0], bytearray(file[1])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        upto = min(len(raw), at + data.draw(st.integers(0, 9)))
        raw[at:upto] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"\\ud800", b"null", b"\n", raw[at:upto] * 2])
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{ending}")
        path.write_bytes(raw)
        assert all(problem.place.startswith(str(path)) for problem in problems_of(str(path)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ROWS), JSON, st.data())
def test_rows_with_any_json_value_anywhere_raise_nothing(row, value, data):
    """A value of any kind in the place of any part of a row; each row is used, dropped or has a problem."""
    row = json.loads(json.dumps(row))
    spot, key = row, data.draw(st.sampled_from(sorted(row)))
    while isinstance(spot[key], dict | list) and spot[key] and data.draw(st.booleans()):
        spot = spot[key]
        key = data.draw(st.sampled_from(sorted(spot) if isinstance(spot, dict) else range(len(spot))))
    spot[key] = value
    accounted(row, {})


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), MAPPINGS)
def test_any_row_under_any_mapping_raises_nothing(row, mapping):
    """A mapping is refused by its own check, or read as it says."""
    if not spec_problems(SourceSpec("f", mapping)):
        accounted(row, mapping)
    accounted(row, {"prompt": ["prompt", "a.0.b"], "completion": "completion", "weight": "weight"})
    accounted(row, {"messages": "messages", "role": "role", "calls": "content"})


def accounted(row, mapping):
    result = parse_rows(Source("f", "JSONL", (Row(row, "f:1"),), 0, ()), "train", mapping)
    used, dropped = bool(result.conversations), bool(result.dropped)
    assert used + dropped == 1 or result.problems


def problems_of(path):
    """Only DataError (exit 3) may come out of a file."""
    try:
        load_conversations([path])
    except DataError as error:
        return error.problems
    return ()
