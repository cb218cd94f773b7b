"""Prepared rows on disk: an Arrow file that is read through memory mapping, so rows take no process memory.

Knows tokens and no text, no template, no cache. A store is a folder with `rows.arrow`, one record batch after
another, and `facts.json`, which is written last and says what was prepared, how many bytes the file has and
their checksum. Learned tokens stand as bounds (start, end, start, end, ...), so that a token costs 4 bytes.

Legend: N rows, T tokens of a row, S learned spans of a row.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from qadapt.data.tokens import Flags, Ids, Tokens

ROWS_FILE, FACTS_FILE = "rows.arrow", "facts.json"
BATCH_ROWS = 4096
BATCH_TOKENS = 4_194_304  # Arrow's lists count in 32 bits, and a batch is held in memory while it is made

_CHECKED_WHOLE_BYTES = 1024**3
_CHECKED_PIECE_BYTES = 1024**2

_SCHEMA = pyarrow.schema(
    [
        ("ids", pyarrow.list_(pyarrow.int32())),
        ("learned", pyarrow.list_(pyarrow.int32())),
        ("place", pyarrow.string()),
        ("number", pyarrow.uint32()),
        ("supervised", pyarrow.int32()),
        ("hash", pyarrow.uint64()),
        ("opening", pyarrow.uint64()),
    ]
)

Bounds = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Counts = NDArray[np.int32]
Numbers = NDArray[np.uint32]


class Damaged(Exception):
    """A store that is not what was written; says how. Whoever opens it makes it anew."""


class StoreWriter:
    """Writes rows to a new store; its folder exists and is empty. Use it in `with`.

    Args:
        folder: Of the store.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / ROWS_FILE).open("wb")
        self._writer = pyarrow.ipc.new_file(self._file, _SCHEMA)
        self._digest = hashlib.sha256()
        self._rows: list[Tokens] = []
        self._numbers: list[int] = []
        self._waiting_tokens = 0
        self.rows = self.tokens = self.supervised_tokens = 0  # added so far

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, row: Tokens, *, number: int) -> None:
        """Adds a row.

        Args:
            row: At least one token.
            number: Of the row in its sources, from 0, that it was made of; several may come from one.
        """
        self._rows.append(row)
        self._numbers.append(number)
        self._waiting_tokens += len(row)
        self.rows += 1
        if len(self._rows) == BATCH_ROWS or self._waiting_tokens >= BATCH_TOKENS:
            self._write_batch()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Completes the store; `facts` are kept beside what it knows itself."""
        if self._rows:
            self._write_batch()
        self._writer.close()
        self._file.close()
        own = {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "digest": self._digest.hexdigest(),
            "bytes": (self._folder / ROWS_FILE).stat().st_size,
            "checksum": _checksum(self._folder / ROWS_FILE),
        }
        text = json.dumps({**facts, **own}, indent=2)
        (self._folder / FACTS_FILE).write_text(text + "\n", encoding="utf-8")

    def _write_batch(self) -> None:
        offsets = _offsets([len(row) for row in self._rows])
        ids = _lists(np.concatenate([row.ids for row in self._rows]), offsets)
        bounds, supervised = _bounds(np.concatenate([row.supervised for row in self._rows]), offsets)
        learned = _lists(*bounds)
        columns = [
            ids,
            learned,
            pyarrow.array([row.place for row in self._rows], pyarrow.string()),
            pyarrow.array(self._numbers, pyarrow.uint32()),
            pyarrow.array(supervised, pyarrow.int32()),
            *self._hashes(bounds),
        ]
        self._writer.write_batch(pyarrow.record_batch(columns, schema=_SCHEMA))
        for part in (ids.offsets, ids.values, learned.offsets, learned.values):
            self._digest.update(part.to_numpy().tobytes())
        self.tokens += self._waiting_tokens
        self.supervised_tokens += int(supervised.sum())
        self._rows, self._numbers, self._waiting_tokens = [], [], 0

    def _hashes(self, bounds: tuple[Bounds, Bounds]) -> list[pyarrow.Array]:
        """Of each row, a hash of all tokens, and one up to the end of what is learned first."""
        values, offsets = bounds[0], bounds[1].tolist()
        hashes = [row_hash(row.ids) for row in self._rows]
        openings = [*hashes]
        for number, (row, first, after) in enumerate(zip(self._rows, offsets, offsets[1:], strict=False)):
            if after > first and (end := values[first + 1]) < len(row):
                openings[number] = row_hash(row.ids[:end])
        return [pyarrow.array(each, pyarrow.uint64()) for each in (hashes, openings)]


@dataclass(frozen=True)
class _Batch:
    """The columns of one record batch as they lie in the file."""

    id_offsets: Bounds  # (n + 1,)
    ids: Bounds
    learned_offsets: Bounds  # (n + 1,)
    learned: Bounds
    places: pyarrow.StringArray
    numbers: Numbers  # (n,)
    supervised: Counts  # (n,)
    hashes: Hashes  # (n,)
    openings: Hashes  # (n,)


class Store:
    """A store that was written, opened for reading.

    Args:
        folder: Of the store.

    Raises:
        Damaged: A file is missing, cut off or changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = _facts(folder)
        try:
            self._mapped = pyarrow.memory_map(str(folder / ROWS_FILE))
            reader = pyarrow.ipc.open_file(self._mapped)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
            self._batches = [_columns(batch) for batch in batches]
        except (OSError, pyarrow.ArrowException) as error:
            raise Damaged(f"{folder / ROWS_FILE} cannot be read: {error}") from None
        self._starts = list(accumulate((len(batch.numbers) for batch in self._batches), initial=0))
        if self._starts[-1] != self.facts["rows"]:
            raise Damaged(f"{folder} has {self._starts[-1]} rows instead of {self.facts['rows']}.")

    def __len__(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[type[Store], tuple[Path]]:
        return Store, (self.folder,)

    @property
    def digest(self) -> str:
        """SHA-256 over every token and whether it is learned."""
        return str(self.facts["digest"])

    def row(self, index: int) -> Tokens:
        """A row, copied out of the file."""
        number = bisect_right(self._starts, index) - 1
        batch, at = self._batches[number], index - self._starts[number]
        ids = batch.ids[batch.id_offsets[at] : batch.id_offsets[at + 1]].copy()
        bounds = batch.learned[batch.learned_offsets[at] : batch.learned_offsets[at + 1]]
        return Tokens(ids, _flags(bounds, length=len(ids)), batch.places[at].as_py())

    def lengths(self) -> Counts:
        """Tokens of each row, (N,)."""
        return _joined([np.diff(batch.id_offsets) for batch in self._batches], np.int32)

    def supervised_counts(self) -> Counts:
        """Learned tokens of each row, (N,)."""
        return _joined([batch.supervised for batch in self._batches], np.int32)

    def hashes(self, chosen: Numbers | None = None) -> Hashes:
        """A hash of each row's tokens, (N,); equal rows have equal ones.

        Args:
            chosen: Of these rows only, ascending.
        """
        return self._picked([batch.hashes for batch in self._batches], chosen)

    def openings(self, chosen: Numbers | None = None) -> Hashes:
        """A hash of each row's tokens up to the end of its first learned turn, (N,); see `hashes`."""
        return self._picked([batch.openings for batch in self._batches], chosen)

    def numbers(self) -> Numbers:
        """Of each row, the number of the row in its sources that it was made of, (N,)."""
        return _joined([batch.numbers for batch in self._batches], np.uint32)

    def _picked(self, column: list[Hashes], chosen: Numbers | None) -> Hashes:
        """A column as a whole, or some of its values, read batch by batch: no more than those in memory."""
        if chosen is None:
            return _joined(column, np.uint64)
        edges = np.searchsorted(chosen, self._starts)
        parts = zip(column, self._starts, edges[:-1], edges[1:], strict=False)
        return _joined(
            [part[chosen[first:after] - start] for part, start, first, after in parts if after > first],
            np.uint64,
        )

    def check(self) -> None:
        """Reads the file and compares it with its checksum.

        Beyond a GiB, evenly spread parts of it stand for the whole.

        Raises:
            Damaged: It was changed.
        """
        if _checksum(self.folder / ROWS_FILE) != self.facts["checksum"]:
            raise Damaged(f"{self.folder / ROWS_FILE} was changed after it was written.")


def row_hash(ids: Ids) -> int:
    """64 bits that tell different tokens apart (of 10 million rows, two collide with a chance of 3e-6)."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        expected, there = facts["bytes"], (folder / ROWS_FILE).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{folder / FACTS_FILE} cannot be read: {error}") from None
    if there != expected:
        raise Damaged(f"{folder / ROWS_FILE} has {there} bytes instead of {expected}.")
    return facts


def _columns(batch: pyarrow.RecordBatch) -> _Batch:
    ids, learned = batch.column("ids"), batch.column("learned")
    return _Batch(
        id_offsets=_array(ids.offsets),
        ids=_array(ids.values),
        learned_offsets=_array(learned.offsets),
        learned=_array(learned.values),
        places=batch.column("place"),
        numbers=_array(batch.column("number")),
        supervised=_array(batch.column("supervised")),
        hashes=_array(batch.column("hash")),
        openings=_array(batch.column("opening")),
    )


def _array(values: pyarrow.Array) -> NDArray[Any]:
    """A view of it; Arrow's own `to_numpy` imports pandas, where it is installed."""
    if values.null_count:
        raise pyarrow.ArrowInvalid("a column lacks values")
    return np.from_dlpack(values)


def _joined(arrays: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.empty(0, kind)


def _offsets(lengths: Sequence[int] | NDArray[np.int64]) -> Bounds:
    """Where each list begins among the values of all, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _lists(values: NDArray[np.int32], offsets: Bounds) -> pyarrow.ListArray:
    return pyarrow.ListArray.from_arrays(
        pyarrow.array(offsets), pyarrow.array(values.astype(np.int32, copy=False))
    )


def _bounds(supervised: Flags, offsets: Bounds) -> tuple[tuple[Bounds, Bounds], Counts]:
    """Of the rows of a batch, one after another: where learned spans start and end, and learned tokens.

    Returns:
        The bounds of all rows (2 S,) with the offsets of each row's; and how many tokens each row learns, its
        first one not counted, (n,).
    """
    first = offsets[:-1]
    before, after = np.roll(supervised, 1), np.roll(supervised, -1)
    before[first] = False
    after[offsets[1:] - 1] = False
    starts, ends = np.flatnonzero(supervised & ~before), np.flatnonzero(supervised & ~after) + 1
    row = np.searchsorted(first, starts, side="right") - 1
    values = (np.stack([starts, ends], axis=1) - first[row][:, None]).ravel().astype(np.int32)
    learned = np.add.reduceat(supervised, first, dtype=np.int32) - supervised[first]
    return (values, _offsets(2 * np.bincount(row, minlength=len(first)))), learned


def _flags(bounds: Bounds, *, length: int) -> Flags:
    flags = np.zeros(length, np.bool_)
    for start, end in bounds.reshape(-1, 2).tolist():
        flags[start:end] = True
    return flags


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _CHECKED_WHOLE_BYTES:
            while piece := file.read(_CHECKED_PIECE_BYTES):
                digest.update(piece)
        else:
            pieces = _CHECKED_WHOLE_BYTES // _CHECKED_PIECE_BYTES
            for number in range(pieces):
                file.seek((size - _CHECKED_PIECE_BYTES) * number // (pieces - 1))
                digest.update(file.read(_CHECKED_PIECE_BYTES))
    return digest.hexdigest()
