"""What adapters make of the rows of a tensor: in fp32 and in PEFT's order, so that no last bit differs.

A tensor is a function of its rows, and each change makes another such function of it: a tensor is never whole
in memory. One change needs all rows before the first: the lengths of a table's columns (DoRA on embeddings).

Legend: O output rows, I input columns of a weight, R rank, N new tokens, D width of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from qadapt.engine.linear import LEAST_LENGTH
from qadapt.export.nf4 import Rows
from qadapt.export.threads import in_order
from qadapt.model.tensor_files import TensorReader, row_elements
from qadapt.model.tensor_values import TORCH_DTYPES, tensor_of


@dataclass(frozen=True)
class Update:
    """What is added to one weight, in fp32: `scale` · B · A.

    With a magnitude (DoRA) the sum's rows are then given these lengths; a table's columns, whose magnitude is
    (1, I).
    """

    a: torch.Tensor  # (R, I)
    b: torch.Tensor  # (O, R)
    scale: float
    magnitude: torch.Tensor | None = None  # (O, 1) or (1, I)

    def added_to(self, base: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The rows from `first` to `last` with what is added; (last - first, I)."""
        return (self.b[first:last] @ self.a).mul_(self.scale).add_(base)


@dataclass(frozen=True)
class TokenRows:
    """Rows that stand in place of a table's own: those of new tokens."""

    ids: tuple[int, ...]
    values: torch.Tensor  # (N, D), fp32


def stored_rows(reader: TensorReader, name: str) -> Rows:
    """The rows of a tensor in open files, each range in memory of its own; (rows, I)."""
    entry = reader.entries[name]
    columns, kind = row_elements(entry), TORCH_DTYPES[entry.dtype]

    def read(first: int, last: int) -> torch.Tensor:
        buffer = np.empty((last - first) * columns * kind.itemsize, np.uint8).data
        data = reader.read_rows(name, buffer, first=first, last=last)
        return tensor_of(data, entry.dtype, (last - first, columns))

    return read


def with_token_rows(rows: Rows, count: int, new: TokenRows) -> Rows:
    """The `count` rows of a table with rows of tokens; what is beyond both is zero."""

    def replaced(first: int, last: int) -> torch.Tensor:
        merged = torch.zeros(last - first, new.values.shape[1])
        if first < count:
            merged[: count - first] = rows(first, min(last, count))
        for token, value in zip(new.ids, new.values, strict=True):
            if first <= token < last:
                merged[token - first] = value
        return merged

    return replaced


def updated(rows: Rows, updates: Sequence[Update], *, count: int, chunk_rows: int) -> Rows:
    """The `count` rows of a weight with what is added to it.

    Args:
        rows: The weight.
        updates: One, or several without a magnitude.
        count: O.
        chunk_rows: Rows to look at together.
    """
    lengths = [_lengths(rows, each, count=count, chunk_rows=chunk_rows) for each in updates]

    def merged(first: int, last: int) -> torch.Tensor:
        total = rows(first, last).float()
        for each, length in zip(updates, lengths, strict=True):
            total = each.added_to(total, first, last)
            if each.magnitude is not None:
                own = torch.linalg.norm(total, dim=1, keepdim=True) if length is None else length
                wanted = each.magnitude[first:last] if length is None else each.magnitude
                total = total.mul_(wanted / own.clamp_min(LEAST_LENGTH))
        return total

    return merged


def scaled(rows: Rows, scaling: torch.Tensor) -> Rows:
    """The rows multiplied by (O, 1), one for each row, or by (1, I), one for each column."""
    if scaling.shape[0] == 1:
        return lambda first, last: rows(first, last).float() * scaling
    return lambda first, last: rows(first, last).float() * scaling[first:last]


def turned(rows: Rows, beyond: torch.Tensor) -> Rows:
    """The rows, each block of whose columns is turned; `beyond` (K, S, S) is what is added to no rotation.

    A rotation of what a layer is given is the transposed one of its weight's columns.
    """

    def merged(first: int, last: int) -> torch.Tensor:
        flat = rows(first, last).float()
        blocks = flat.view(last - first, len(beyond), -1).transpose(0, 1)  # (K, rows, S)
        return flat + (blocks @ beyond.transpose(1, 2)).transpose(0, 1).reshape(flat.shape)

    return merged


def shifted(rows: Rows, shift: torch.Tensor) -> Rows:
    """The rows and (O, 1) added to them."""
    return lambda first, last: rows(first, last).float() + shift[first:last]


def _lengths(rows: Rows, update: Update, *, count: int, chunk_rows: int) -> torch.Tensor | None:
    """(1, I) lengths of the columns of a table's sum; None for all that is not a table with a magnitude."""
    if update.magnitude is None or update.magnitude.shape[0] != 1 or count == 1:
        return None

    def squares(first: int) -> torch.Tensor:
        last = min(first + chunk_rows, count)
        total = update.added_to(rows(first, last).float(), first, last)
        return total.double().square_().sum(0, keepdim=True)

    parts = in_order(partial(squares, first) for first in range(0, count, chunk_rows))
    return sum(parts, torch.zeros(1, update.a.shape[1], dtype=torch.float64)).sqrt().float()
