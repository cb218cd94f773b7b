"""Rows to micro-batches: filled up to the longest, or packed. Which rows a step takes says `order.py`.

Legend: B rows, T tokens, K positions that predict a learned token in any row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qadapt.data.order import Order
from qadapt.data.packing import pack
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Flags, Tokens
from qadapt.engine.documents import Documents, documents_of
from qadapt.engine.host import sent
from qadapt.engine.loss import IGNORED

ROWS_IN_MEMORY = 512
LENGTH_STEP = 32
"""Tokens from one length of filled-up rows to the next on a CPU in 16 bits: oneDNN keeps half a MiB for each
size of a product that it has met, which comes to about 16 MiB for a length (`tools/bench/LOG.md`)."""


def length_step(device: str, compute_dtype: str) -> int:
    """The number of tokens of which the lengths of filled-up rows are multiples."""
    return LENGTH_STEP if device == "cpu" and compute_dtype != "fp32" else 1


def filled_length(longest: int, *, step: int, most: int) -> int:
    """What rows are filled up to: a multiple of `step`, but no more than `most`, unless a row has more."""
    return max(longest, min(most, -(-longest // step) * step))


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, filled up at the end to one length; or packed, one after another in a single row.

    There is no attention mask. Filled up: attention is causal and padding stands at the end, so no token sees
    any. Packed: `documents` says where each row lies, and none sees another (`engine/documents.py`).
    """

    input_ids: Tensor  # (B, T); packed: (1, T of all rows)
    positions: Tensor  # (K,) whose prediction is learned in at least one row
    targets: Tensor  # (B, K) the next token, or IGNORED
    tokens: int  # without padding
    supervised_tokens: int
    documents: Documents | None = None
    loss_chunk: int = 0  # tokens at the head at once (`engine/loss.py`); 0: all

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return MicroBatch(
            sent(self.input_ids, device),
            sent(self.positions, device),
            sent(self.targets, device),
            self.tokens,
            self.supervised_tokens,
            self.documents and self.documents.to(device),
            self.loss_chunk,
        )


def widest_share(rows: RowSet, *, steps: int, order: Order) -> float:
    """The largest share of the longest row's positions that reaches the head in the first `steps` steps.

    A position reaches the head if any row of the micro-batch learns its next token, so splitting a step into
    smaller micro-batches never sends more.
    """
    longest = int(rows.lengths.max())
    widest = 0
    for step in range(steps):
        learned = [rows[index].supervised[1:] for index in order.rows_of_step(step)]
        widest = max(widest, sum(map(any, zip_longest(*learned))))
    return widest / longest


def micro_batches(
    rows: Sequence[Tokens], *, size: int, pad_id: int, length_step: int = 1, most: int = 0
) -> list[MicroBatch]:
    """Rows in micro-batches of at most `size`, those of like length together, so that little is padding.

    The order within a step does not matter: its gradient is the sum over all learned tokens.

    Args:
        rows: All of them.
        size: The most rows of a micro-batch.
        pad_id: The token that fills up.
        length_step: They are filled up to a multiple of so many tokens,
        most: but to no more than so many, unless a row has more.
    """
    by_length = sorted(rows, key=len, reverse=True)
    parts = [by_length[first : first + size] for first in range(0, len(by_length), size)]
    return [
        collate(part, pad_id=pad_id, least=filled_length(len(part[0]), step=length_step, most=most))
        for part in parts
    ]


@dataclass(frozen=True)
class Division:
    """How rows become micro-batches; a function that can be handed to another process.

    Attributes:
        pad_id: The token that fills up.
        rows: The most rows of a micro-batch that is filled up.
        packed: Rows are packed instead.
        tokens: The most tokens of a packed micro-batch, unless a single row has more.
        learned: The most learned tokens of a packed micro-batch, unless a single row has more.
        halvings: How often these numbers are halved, since memory ran out.
        loss_chunk: Learned tokens of a micro-batch at the head at once; 0: all.
        length_step: Rows that are not packed are filled up to a multiple of so many tokens,
        most: but to no more than so many, unless a row has more.
    """

    pad_id: int
    rows: int
    packed: bool = False
    tokens: int = 0
    learned: int = 0
    halvings: int = 0
    loss_chunk: int = 0
    length_step: int = 1
    most: int = 0

    def __call__(self, rows: Sequence[Tokens]) -> list[MicroBatch]:
        """The micro-batches of some rows."""
        return [replace(batch, loss_chunk=self.loss_chunk) for batch in self._divided(rows)]

    def _divided(self, rows: Sequence[Tokens]) -> list[MicroBatch]:
        if not self.packed:
            return micro_batches(
                rows, size=self.size, pad_id=self.pad_id, length_step=self.length_step, most=self.most
            )
        capacity = max(self.size, *map(len, rows))
        return packed_batches(rows, capacity=capacity, most_learned=self._halved(self.learned))

    @property
    def size(self) -> int:
        """The most rows of a micro-batch; packed: the most tokens."""
        return self._halved(self.tokens if self.packed else self.rows)

    def half(self) -> Division | None:
        """The same with half the size; None if it is 1."""
        return replace(self, halvings=self.halvings + 1) if self.size > 1 else None

    def smaller(self, rows: Sequence[Tokens]) -> Division | None:
        """The next half that divides these rows further; None if each one is alone already."""
        count = len(self(rows))
        found: Division | None = self
        while found is not None and len(found(rows)) == count:
            found = found.half()
        return found

    def down_to(self, size: int) -> Division:
        """The first half whose size is at most so much."""
        found: Division | None = self
        while found is not None and found.size > size:
            found = found.half()
        assert found is not None, f"{size} is no size"
        return found

    def _halved(self, number: int) -> int:
        return -(-number // (1 << self.halvings))


def all_batches(
    rows: Sequence[Tokens],
    divide: Callable[[Sequence[Tokens]], list[MicroBatch]],
    *,
    at_once: int | None = None,
) -> Iterator[MicroBatch]:
    """Micro-batches of any number of rows, of which only `at_once` are divided and in memory at a time."""
    size = at_once or ROWS_IN_MEMORY
    for first in range(0, len(rows), size):
        yield from divide(rows[first : first + size])


def packed_batches(
    rows: Sequence[Tokens], *, capacity: int, most_learned: int | None = None
) -> list[MicroBatch]:
    """Rows in packed micro-batches.

    Args:
        rows: All of them.
        capacity: The most tokens of a micro-batch; no row may be longer.
        most_learned: The most learned tokens of a micro-batch, unless a single row has more; None: any.
    """
    bins = pack([len(row) for row in rows], capacity)
    parts = [[rows[index] for index in chosen] for chosen in bins]
    if most_learned is not None:
        parts = [part for whole in parts for part in _learning_at_most(whole, most_learned)]
    return [concatenate(part) for part in parts]


def _learning_at_most(rows: Sequence[Tokens], most: int) -> list[list[Tokens]]:
    """The rows in order, a new part begun where the learned tokens would be too many."""
    parts: list[list[Tokens]] = [[]]
    learned = 0
    for row in rows:
        if parts[-1] and learned + row.supervised_count > most:
            parts.append([])
            learned = 0
        parts[-1].append(row)
        learned += row.supervised_count
    return parts


def collate(rows: Sequence[Tokens], *, pad_id: int, least: int = 0) -> MicroBatch:
    """One micro-batch of the rows, filled up to the longest, or to `least` tokens if that is more."""
    longest = max(least, *map(len, rows))
    input_ids = np.full((len(rows), longest), pad_id, np.int64)
    learned = np.zeros((len(rows), longest), np.bool_)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row.ids
        learned[index, : len(row)] = row.supervised
    return _micro_batch(input_ids, learned, rows, documents=None)


def concatenate(rows: Sequence[Tokens]) -> MicroBatch:
    """One packed micro-batch: the rows one after another, each a document of its own.

    The first token of a row is never learned: its predecessor is another document's last.
    """
    documents = documents_of([len(row) for row in rows])
    input_ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    learned = np.concatenate([row.supervised for row in rows])
    learned[list(documents.bounds[:-1])] = False
    return _micro_batch(input_ids[None], learned[None], rows, documents=documents)


def _micro_batch(
    input_ids: NDArray[np.int64], learned: Flags, rows: Sequence[Tokens], *, documents: Documents | None
) -> MicroBatch:
    """`input_ids` and `learned` are (B, T)."""
    positions = learned[:, 1:].any(axis=0).nonzero()[0]
    targets = np.where(learned[:, positions + 1], input_ids[:, positions + 1], IGNORED)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        tokens=sum(map(len, rows)),
        supervised_tokens=sum(row.supervised_count for row in rows),
        documents=documents,
    )
