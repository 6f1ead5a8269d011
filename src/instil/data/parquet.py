"""A Parquet file in, its rows out as plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

from instil.errors import DataError, Problem

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1024  # converted to Python at a time


def parquet_rows(stream: IO[bytes], path: str) -> Iterator[dict[str, Any] | Problem]:
    """Each row as a dict, in order; a Problem where a row cannot be read.

    A Parquet struct cannot leave a field out, it can only hold null. So nulls in it are read as absent: otherwise one
    message with a `name` would give every message of the file a `name` of null.
    Raises DataError when the file as a whole cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(stream)
        _refuse_columns(file.schema_arrow, path)
        row = 1
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for value in _batch_rows(batch):
                if isinstance(value, dict):
                    yield value
                else:
                    yield Problem(
                        f"{path}:{row}", f"the row cannot be read ({value})", "write the row again", "parquet"
                    )
                row += 1
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError.at(path, f"not a whole Parquet file ({reason})", "write or fetch it again", "parquet") from None


def _refuse_columns(schema: pyarrow.Schema, path: str) -> None:
    names = schema.names
    for name in names:
        if names.count(name) > 1:
            raise DataError.at(path, f"two columns are called {name!r}", "rename one of them", "duplicate_key")
    for field in schema:
        if _is_extension(field):
            what = f"column {field.name!r} has the extension type {field.type}"
            raise DataError.at(path, what, "write it as text, list or struct columns", "parquet")


def _is_extension(field: pyarrow.Field) -> bool:
    """Whether the column, or one inside it, has a type that only a plug-in can interpret (once even by unpickling)."""
    import pyarrow

    if isinstance(field.type, pyarrow.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        return True
    return any(_is_extension(field.type.field(i)) for i in range(field.type.num_fields))


def _batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch; for one that has no Python value, the reason as text."""
    try:
        yield from [_present(value) for value in batch.to_pylist()]
        return
    except (ValueError, OverflowError):  # text that is not UTF-8, a date outside Python's range
        pass
    for i in range(batch.num_rows):
        try:
            value = _present(batch.slice(i, 1).to_pylist()[0])
        except (ValueError, OverflowError) as error:
            yield str(error)
        else:
            yield value


def _present(value: Any) -> Any:
    """The value without the null fields of its structs."""
    if isinstance(value, dict):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_present(inner) for inner in value]
    return value
