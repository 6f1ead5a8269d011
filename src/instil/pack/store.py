"""Prepared examples on disk: an Arrow file keyed by digest, memory-mapped, absent or complete."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import orjson
import pyarrow as pa

from instil.files import publish, sha256_of
from instil.pack.prefixes import Prefixes
from instil.types import Example

HASHES = "sha256.json"
FORMAT = 4  # part of the digest: a changed layout is prepared anew, never misread

SCHEMA = pa.schema(
    [
        ("tokens", pa.large_list(pa.int32())),  # empty where another example's tokens begin with these
        ("start", pa.int64()),  # of the prompt in the tokens of all
        ("prompt_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("weights", pa.large_list(pa.float32())),
        ("origin", pa.large_string()),
        ("turn", pa.int32()),
        ("task", pa.large_string()),
        ("kinds", pa.large_list(pa.int8())),
        ("cut_tokens", pa.int32()),
        ("source", pa.int32()),
    ]
)


class ExampleStore(Sequence[Example]):
    """The examples of one side (train or held-out), read from a memory-mapped file.

    prefixes: what the examples have in common, with their lengths; prompt_tokens, answer_tokens, target_tokens [n]: counts of
    each example, targets being answer tokens with weight > 0; source [n]: which of the sources it is from.
    """

    def __init__(self, path: Path):
        table = _mapped(path)
        self._path = path
        self._origin, self._turn, self._task = (table.column(name) for name in ("origin", "turn", "task"))
        self._cut = table.column("cut_tokens")
        self._tokens, self._start = _ragged(table, "tokens")[1], table.column("start").to_numpy()
        self._kinds, self._weights = _ragged(table, "kinds"), _ragged(table, "weights")
        self.source = table.column("source").to_numpy()
        self.prompt_tokens = table.column("prompt_tokens").to_numpy().astype(np.int64)
        self.answer_tokens = table.column("answer_tokens").to_numpy().astype(np.int64)
        self.lengths = self.prompt_tokens + self.answer_tokens - 1
        counted = np.concatenate([[0], np.cumsum(self._weights[1] > 0)])
        self.target_tokens = counted[self._weights[0][1:]] - counted[self._weights[0][:-1]]

    @cached_property
    def highest_token(self) -> int:
        """The highest token id in any example, -1 where there is none."""
        return int(self._tokens.max(initial=-1))

    @cached_property
    def prefixes(self) -> Prefixes:
        """As found when the examples were published; found now where they were only written."""
        if not _beside(self._path).exists():
            return Prefixes.of(self)
        table = _mapped(_beside(self._path))
        columns = (table.column(name).to_numpy() for name in ("rank", "common", "family", "turns"))
        return Prefixes(self.lengths, *columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Example:  # type: ignore[override]
        if not 0 <= i < len(self):
            raise IndexError(i)
        middle = self._start[i] + self.prompt_tokens[i]
        weights, kinds = (values[offsets[i] : offsets[i + 1]] for offsets, values in (self._weights, self._kinds))
        return Example(
            self._tokens[self._start[i] : middle], self._tokens[middle : middle + self.answer_tokens[i]], weights,
            self._origin[i].as_py(), self._turn[i].as_py(), self._task[i].as_py(), kinds, self._cut[i].as_py(),
            int(self.source[i]),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().combine_chunks()


def _beside(path: Path) -> Path:
    """The file of what the examples of another file have in common."""
    return path.with_suffix(".prefixes")


def _ragged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column as (offsets [n+1], values), without copying the values."""
    column = table.column(name)
    array = column.chunk(0) if column.num_chunks else pa.array([], SCHEMA.field(name).type)
    return array.offsets.to_numpy(), array.values.to_numpy()


def write_examples(path: Path, examples: Iterable[Example]) -> None:
    """Write one Arrow file; the caller publishes it (see `publish`)."""
    examples = list(examples)

    def ragged(arrays: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum([len(a) for a in arrays], dtype=np.int64)]).astype(np.int64)
        values = np.concatenate(arrays) if arrays else np.zeros(0)
        return pa.LargeListArray.from_arrays(
            pa.array(offsets, pa.int64()), pa.array(values.astype(kind.to_pandas_dtype()))
        )

    own, starts = _sequences(examples)
    columns = [
        ragged(own, pa.int32()),
        pa.array(starts, pa.int64()),
        pa.array([len(e.prompt_tokens) for e in examples], pa.int32()),
        pa.array([len(e.answer_tokens) for e in examples], pa.int32()),
        ragged([e.weights for e in examples], pa.float32()),
        pa.array([e.origin for e in examples], pa.large_string()),
        pa.array([e.turn for e in examples], pa.int32()),
        pa.array([e.task for e in examples], pa.large_string()),
        ragged([e.kinds for e in examples], pa.int8()),
        pa.array([e.cut_tokens for e in examples], pa.int32()),
        pa.array([e.source for e in examples], pa.int32()),
    ]
    _write(path, pa.Table.from_arrays(columns, schema=SCHEMA))


def _sequences(examples: Sequence[Example]) -> tuple[list[np.ndarray], list[int]]:
    """The tokens that each example adds to those of all, and where each example's begin.

    A turn of a conversation whose tokens are the beginning of the next turn's adds none.
    """
    own: list[np.ndarray] = []
    back: list[int] = []  # where the tokens begin, counted from the end of all
    size = 0
    later = np.zeros(0, np.int32)
    for e in reversed(examples):
        p, n = len(e.prompt_tokens), len(e.prompt_tokens) + len(e.answer_tokens)
        begins = n <= len(later) and np.array_equal(later[:p], e.prompt_tokens)
        if begins and np.array_equal(later[p:n], e.answer_tokens):
            own.append(later[:0])
        else:
            later = np.concatenate([e.prompt_tokens, e.answer_tokens])
            own.append(later)
            size += len(later)
        back.append(size)
    return own[::-1], [size - b for b in reversed(back)]


def write_prefixes(path: Path, prefixes: Prefixes) -> None:
    """Write what the examples of the file at `path` have in common beside it."""
    names = ("rank", "common", "family", "turns")
    _write(_beside(path), pa.table({name: getattr(prefixes, name) for name in names}))


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def store_key(parts: object) -> str:
    """The digest of everything the prepared examples depend on (data, tokenizer, template, options), 16 hex digits."""
    return hashlib.sha256(orjson.dumps([FORMAT, parts], option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def publish_examples(folder: Path, sides: Mapping[str, Sequence[Example]], record: dict[str, object]) -> None:
    """Make `folder` with `<side>.arrow`, `record.json` and the hashes of all in sha256.json: complete or absent."""

    def fill(partial: Path) -> None:
        for side, examples in sides.items():
            write_examples(partial / f"{side}.arrow", examples)
            write_prefixes(partial / f"{side}.arrow", Prefixes.of(examples))
        (partial / "record.json").write_bytes(orjson.dumps(record, option=orjson.OPT_INDENT_2))
        (partial / HASHES).write_bytes(orjson.dumps(sha256_of(partial), option=orjson.OPT_SORT_KEYS))

    publish(folder, fill)


def damage(folder: Path) -> str | None:
    """None where every file of published examples is what was written, else what is wrong."""
    try:
        expected, found = orjson.loads((folder / HASHES).read_bytes()), sha256_of(folder)
    except (OSError, ValueError) as error:
        return f"{HASHES} cannot be read ({type(error).__name__})"
    wrong = [name for name in {*expected, *found} if expected.get(name) != found.get(name)]
    return f"{min(wrong)} is not what was written" if wrong else None


def open_store(folder: Path) -> tuple[dict[str, ExampleStore], dict[str, object]]:
    """The published sides and their record."""
    sides = {file.stem: ExampleStore(file) for file in sorted(folder.glob("*.arrow"))}
    return sides, orjson.loads((folder / "record.json").read_bytes())
