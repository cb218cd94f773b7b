"""Rows out of Parquet and Arrow files, a batch at a time, through the Arrow library that `datasets` brings.

Yields as `json_files.py` does: each row with its place, or the `BadData` of a row that cannot be read. What
is no row's own is taken off again: a column of records gives each record the keys of all of them, those that
it lacks as null, so null within a record is left out; and a column of JSON texts is what the texts say.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapt.data.reading.opened import FETCH
from qadapt.errors import BadData

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000
BUFFER_BYTES = 2**20
_PARQUET_MARK = b"PAR1"
_ARROW_FILE_MARK = b"ARROW1"
# the format allows a stream without it, which looks like one that is cut there
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

_Restore = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a Parquet file, also of one large row group never more than some pages at once.

    Raises:
        BadData: The file is cut off, damaged, or names a column twice.
    """
    import pyarrow.parquet

    start, end = _ends(path)
    if start.startswith(_PARQUET_MARK) and not end.endswith(_PARQUET_MARK):
        raise _cut_off(path)
    with _named(path), pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
        _check_names(file.schema_arrow, path=path)
        yield from batch_rows(file.iter_batches(BATCH_ROWS), of=f"{path}")


def read_arrow(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of an Arrow file, of either kind (stream, as `datasets` writes it, or random access).

    Raises:
        BadData: The file is cut off, damaged, or names a column twice.
    """
    import pyarrow

    start, end = _ends(path)
    is_stream = not start.startswith(_ARROW_FILE_MARK)
    if not (end.endswith(_STREAM_END) if is_stream else end.endswith(_ARROW_FILE_MARK)):
        raise _cut_off(path)
    with _named(path), pyarrow.memory_map(str(path)) as source:
        if is_stream:
            stream = pyarrow.ipc.open_stream(source)
            _check_names(stream.schema, path=path)
            yield from batch_rows(_checked(stream), of=f"{path}")
        else:
            file = pyarrow.ipc.open_file(source)
            _check_names(file.schema, path=path)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from batch_rows(_checked(batches), of=f"{path}")


def batch_rows(batches: Iterable[pyarrow.RecordBatch], *, of: str) -> Iterator[tuple[str, object]]:
    """The rows of batches one after another, numbered through, each with its place.

    Args:
        batches: Of one schema.
        of: Names what the rows are of for people.
    """
    number = 0
    for batch in batches:
        restores = {field.name: _restore(field.type) for field in batch.schema}
        for first in range(0, batch.num_rows, BATCH_ROWS):
            for row in _values(batch.slice(first, BATCH_ROWS)):
                number += 1
                place = f"{of}, row {number}"
                if isinstance(row, UnicodeDecodeError):
                    problem = BadData(f"{place}: not UTF-8 text: {row.reason}.", cure="Correct the row.")
                    yield place, problem
                else:
                    yield place, _restored(row, restores, place=place)


def _restored(row: Any, restores: dict[str, _Restore | None], *, place: str) -> object:
    try:
        return {
            name: restore(value) if (restore := restores[name]) is not None and value is not None else value
            for name, value in row.items()
        }
    except (ValueError, RecursionError) as error:
        return BadData(f"{place}: a JSON text cannot be read: {error}.", cure="Correct the row.")


def _restore(kind: pyarrow.DataType) -> _Restore | None:
    """What makes a value of a type what it was before it stood in a table; None for what it is already."""
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return json.loads
    if pyarrow.types.is_struct(kind):
        inner = {field.name: _restore(field.type) for field in kind}
        return lambda record: {
            name: restore(value) if (restore := inner[name]) is not None else value
            for name, value in record.items()
            if value is not None
        }
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        of_items = _restore(kind.value_type)
        if of_items is not None:
            return lambda items: [None if item is None else of_items(item) for item in items]
    return None


def _checked(batches: Iterable[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Batches whose offsets stay within their buffers: an Arrow file is memory as it was written."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _values(batch: pyarrow.RecordBatch) -> list[object]:
    """The rows of a batch; one that holds no text where it says so is its error."""
    try:
        rows: list[object] = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            return [error]
        rows = [row for index in range(batch.num_rows) for row in _values(batch.slice(index, 1))]
    return rows


def _check_names(schema: pyarrow.Schema, *, path: Path) -> None:
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise BadData(f"{path} has two columns named {twice[0]!r}.", cure="Rename one of them.")


def _ends(path: Path) -> tuple[bytes, bytes]:
    """The first and the last eight bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            file.seek(max(0, path.stat().st_size - 8))
            return start, file.read()
    except OSError as error:
        raise BadData(f"{path} cannot be read: {error}", cure="Give a readable file.") from None


def _cut_off(path: Path) -> BadData:
    return BadData(f"{path}: the file is cut off in the middle: its end mark is missing.", cure=FETCH)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns what the library says about a file into an error that names it."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadData(f"{path} cannot be read: {reason}", cure=FETCH) from None
