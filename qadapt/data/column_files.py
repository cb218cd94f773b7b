"""Rows out of Parquet and Arrow files, a batch at a time, through the Arrow library that `datasets` brings.

Yields as `text_files.py` does: each row with its place, or the `BadData` of a row that cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qadapt.errors import BadData

if TYPE_CHECKING:
    import pyarrow

BATCH_ROWS = 1000
FETCH = "Get the whole file again."
_PARQUET_MARK = b"PAR1"
_ARROW_FILE_MARK = b"ARROW1"
# the format allows a stream without it, which looks like one that is cut there
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a Parquet file.

    Raises:
        BadData: The file is cut off, damaged, or names a column twice.
    """
    import pyarrow.parquet

    start, end = _ends(path)
    if start.startswith(_PARQUET_MARK) and not end.endswith(_PARQUET_MARK):
        raise _cut_off(path)
    with _named(path), pyarrow.parquet.ParquetFile(path) as file:
        _check_names(file.schema_arrow, path=path)
        yield from _rows(file.iter_batches(BATCH_ROWS), path=path)


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
            yield from _rows(_checked(stream), path=path)
        else:
            file = pyarrow.ipc.open_file(source)
            _check_names(file.schema, path=path)
            batches = (file.get_batch(index) for index in range(file.num_record_batches))
            yield from _rows(_checked(batches), path=path)


def _checked(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
    """Batches whose offsets stay within their buffers: an Arrow file is memory as it was written."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows(batches: Iterator[pyarrow.RecordBatch], *, path: Path) -> Iterator[tuple[str, object]]:
    number = 0
    for batch in batches:
        for first in range(0, batch.num_rows, BATCH_ROWS):
            for row in _values(batch.slice(first, BATCH_ROWS)):
                number += 1
                place = f"{path}, row {number}"
                if isinstance(row, UnicodeDecodeError):
                    row = BadData(f"{place}: not UTF-8 text: {row.reason}.", cure="Correct the row.")
                yield place, row


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
