"""The rows of a run: sequences of tokens that are read when they are asked for, and their lengths in memory.

Knows tokens and stores; no files of rows, no templates.

Legend: N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from qadapt.data.store import Numbers, Store
from qadapt.data.tokens import Tokens

Number = TypeVar("Number", bound=np.generic)


class RowSet(Sequence[Tokens]):
    """Rows of a store, or of a list. In memory are 12 bytes per row: two counts, and which row it is.

    Args:
        source: Where the rows lie.
        chosen: Which of them, in this order; None: all.

    Attributes:
        lengths: Tokens of each row, (N,), with virtual tokens in front (`behind`).
        supervised_counts: Learned tokens of each row, (N,).
    """

    def __init__(self, source: Store | Sequence[Tokens], chosen: Numbers | None = None) -> None:
        self._source = source
        self._chosen = chosen
        self._front = 0
        if isinstance(source, Store):
            self.lengths = _picked(source.lengths(), chosen)
            self.supervised_counts = _picked(source.supervised_counts(), chosen)
        else:
            count = len(source)
            self.lengths = _picked(np.fromiter(map(len, source), np.int32, count), chosen)
            learned = np.fromiter((row.supervised_count for row in source), np.int32, count)
            self.supervised_counts = _picked(learned, chosen)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...

    @overload
    def __getitem__(self, index: slice) -> RowSet: ...

    def __getitem__(self, index: int | slice) -> Tokens | RowSet:
        if isinstance(index, slice):
            return self._part(index)
        at = range(len(self))[index]
        if self._chosen is not None:
            at = int(self._chosen[at])
        row = self._source.row(at) if isinstance(self._source, Store) else self._source[at]
        return row.behind(self._front) if self._front else row

    def _part(self, index: slice) -> RowSet:
        part = copy(self)
        part.lengths, part.supervised_counts = self.lengths[index], self.supervised_counts[index]
        if self._chosen is None:
            part._chosen = np.arange(*index.indices(len(self)), dtype=np.uint32)
        else:
            part._chosen = self._chosen[index]
        return part

    def behind(self, count: int) -> RowSet:
        """The rows behind so many virtual tokens each (`engine/front.py`); 0: as they are without any."""
        if count == self._front:
            return self
        rows = copy(self)
        rows.lengths, rows._front = self.lengths + np.int32(count - self._front), count
        return rows

    def numbers(self) -> Numbers:
        """Of each row of a store, the number of the row in its sources that it was made of, (N,)."""
        assert isinstance(self._source, Store)
        return _picked(self._source.numbers(), self._chosen)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens of all rows."""
        return int(self.supervised_counts.sum(dtype=np.int64))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every token, whether it is learned, and the order of the rows."""
        digest = hashlib.sha256()
        if isinstance(self._source, Store):
            digest.update(self._source.digest.encode())
        else:
            for row in self._source:
                digest.update(len(row).to_bytes(8, "little") + row.ids.tobytes() + row.supervised.tobytes())
        if self._chosen is not None:
            digest.update(np.ascontiguousarray(self._chosen).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Rows:
    """All rows of a run, and the token that fills them up.

    `source_rows` are the training rows of each source, in order.
    """

    train: RowSet
    held_out: RowSet
    pad_id: int
    source_rows: tuple[int, ...]

    def behind(self, count: int) -> Rows:
        """All rows behind so many virtual tokens each."""
        return replace(self, train=self.train.behind(count), held_out=self.held_out.behind(count))

    @property
    def tokens(self) -> int:
        """Tokens of the training rows, each counted once."""
        return self.train.tokens

    @property
    def supervised_tokens(self) -> int:
        """Learned tokens of the training rows, each counted once."""
        return self.train.supervised_tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest row, held-out ones included."""
        return max(int(part.lengths.max(initial=0)) for part in (self.train, self.held_out))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every token and whether it is learned."""
        parts = (self.train.fingerprint, self.held_out.fingerprint)
        return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _picked(values: NDArray[Number], chosen: Numbers | None) -> NDArray[Number]:
    return values if chosen is None else values[chosen]
