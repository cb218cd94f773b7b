"""What every tensor of an export should be, in float64, and how far a merge in fp32 may be from it.

A merge computes W + Σ scale · B · A in fp32 and rounds once. In fp32 a sum of R products, in any order, is
off by at most about R · u times the sum of their magnitudes, u = 2^-24 (Higham, "Accuracy and Stability of
Numerical Algorithms", 2002, §3.1). So a written number is right if it is the rounding of some number within
that distance of the exact one: nearly always exactly one number, beside a tie two neighbours. By the
Cauchy-Schwarz inequality the sum of magnitudes is at most |row of B| · |column of A|: no second product.

Legend: O output rows, I input columns of a weight, R rank, V rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from qadapt.adapters.facts import FACTS_FILE, read_facts
from qadapt.engine.linear import LEAST_LENGTH
from qadapt.errors import BadExport
from qadapt.export.held_base import HeldBase
from qadapt.export.reference_changes import Change, Layout, Pair, Turn, changes_of, layout_of
from qadapt.export.reference_ties import expected_ties
from qadapt.export.stored_tensors import StoredTensors
from qadapt.model.folder import weight_files
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import row_elements, rows_of
from qadapt.shape import table_rows

_U = 2.0**-24
"""Half a step of fp32 at 1."""
_MORE_ROUNDINGS = 4
"""Of scale, product and sum, beside those of the R products."""
_CHUNK_ELEMENTS = 1 << 18


Error = tuple[Tensor, Tensor]
"""Errors (rows, 1) · (1, I) of the numbers."""


@dataclass(frozen=True)
class View:
    """Which merge is computed: on which base, the adapter how strong, the scales' mean how far moved."""

    base: str
    strength: float = 1.0
    nudge: int = 0


@dataclass(frozen=True)
class Exact:
    """(rows, I) exact numbers, and how far a merge in fp32 may be from each.

    By the sum of its `errors` and by `relative` of the number itself.
    """

    values: Tensor
    errors: tuple[Error, ...] = ()
    relative: float = 0.0

    def error_at(self, places: Tensor) -> Tensor:
        """(n,) the errors of numbers, by their places in the flattened rows."""
        columns = self.values.shape[1]
        row, column = places // columns, places % columns
        error = self.values.reshape(-1)[places].double().abs() * self.relative
        for of_rows, of_columns in self.errors:
            error += of_rows.reshape(-1)[row] * of_columns.reshape(-1)[column]
        return error


class Reference:
    """The tensors that an export of a base and its adapters must have.

    Attributes:
        entries: Name → its type in the base, and the shape it must have.
        layout: Where embedding and head are.
        is_tied: Whether embedding and head still are one table after the merge.
        view: The merge that was asked for.

    Args:
        base: The base's numbers.
        changes: What the adapters change.
        layout: The base's.
        asked: `dequantized` or `original`.

    Raises:
        BadExport: The adapters change a tensor that the base lacks.
    """

    def __init__(self, base: HeldBase, changes: Mapping[str, Change], *, layout: Layout, asked: str) -> None:
        self._base = base
        ties = expected_ties(changes, base.entries, layout)
        self._changes, self._sources, self.is_tied = ties.changes, ties.sources, ties.is_tied
        self.layout, self.view = layout, View(asked)
        if unknown := sorted(set(self._changes) - set(self._sources)):
            raise BadExport(
                f"The adapter changes {unknown[0]}, which the base lacks.",
                cure="Give the base that this adapter was trained on.",
            )
        self.entries = {name: self._entry(name) for name in self._sources}
        self._norms_of = lru_cache(maxsize=4)(self._column_norms)

    def _entry(self, name: str) -> TensorEntry:
        entry, change = self._base.entries[self._sources[name]], self._changes.get(name, Change())
        shape = entry.shape if change.whole is None else tuple(change.whole.shape)
        if change.tokens is not None:
            shape = (table_rows(shape[0], max(change.tokens.ids) + 1), *shape[1:])
        return TensorEntry(name, entry.dtype, shape)

    @property
    def other_base(self) -> str | None:
        """The base that was not asked for; None if it cannot be computed."""
        if self.view.base == "dequantized":
            return "original"
        return "dequantized" if self._base.is_known_as_held else None

    def is_nudged(self, name: str) -> bool:
        """Whether the last bit of the mean of its scales decides numbers of a tensor."""
        return self.view.base == "dequantized" and self._base.is_nudged(self._sources[name])

    def prepare(self, name: str, view: View) -> None:
        """Computes what all rows of a tensor need, before threads ask for them."""
        if view.base == "dequantized":
            self._base.prepare(self._sources[name], nudge=view.nudge)
        for index, pair in enumerate(self._changes.get(name, Change()).pairs):
            if pair.of_columns:
                self._norms_of(name, index, view)

    def rows(self, name: str, first: int, last: int, *, view: View) -> Exact:
        """The rows of a tensor from `first` up to, not including, `last`.

        Args:
            name: A key of `entries`.
            first: First row.
            last: The row after the last one.
            view: Which merge; `strength` 0 is the base without the adapter.
        """
        change = self._changes.get(name)
        if change is None or view.strength == 0:
            return Exact(self._base_rows(name, first, last, view))
        exact = self._changed(name, change, (first, last), view)
        if change.tokens is not None:
            for token, row in zip(change.tokens.ids, change.tokens.values, strict=True):
                if first <= token < last:
                    exact.values[token - first] = row
        return exact

    def _changed(self, name: str, change: Change, span: tuple[int, int], view: View) -> Exact:
        base = self._start(name, change, span, view)
        if change.turn is not None:
            return _turned(base, change.turn, strength=view.strength)
        if not change.pairs and change.factor is None:
            return Exact(base)
        values, errors = base, list[Error]()
        for index, pair in enumerate(change.pairs):
            values = _added(values, pair, span, strength=view.strength)
            errors.append(_error(pair, span, strength=view.strength))
            if pair.magnitude is not None:  # it is alone
                values, errors = self._directed(
                    name, index, Exact(values, tuple(errors)), span=span, view=view
                )
        if change.factor is not None:
            factor = change.factor if change.factor.shape[0] == 1 else change.factor[slice(*span)]
            values = values * (1 + view.strength * (factor - 1))
        return Exact(values, tuple(errors), relative=(2 + len(change.pairs)) * _U)

    def _directed(
        self, name: str, index: int, total: Exact, *, span: tuple[int, int], view: View
    ) -> tuple[Tensor, list[Error]]:
        """A sum with the lengths of a magnitude; a sum of n squares is off by about √n roundings."""
        magnitude, ((of_rows, of_columns),) = self._changes[name].pairs[index].magnitude, total.errors
        assert magnitude is not None
        if self._changes[name].pairs[index].of_columns:
            terms = rows_of(self.entries[name])
            lengths = self._norms_of(name, index, view)
            factor = magnitude.reshape(1, -1) / lengths.clamp_min(LEAST_LENGTH)
            of_columns = of_columns * factor.abs()
        else:
            terms = total.values.shape[1]
            lengths = total.values.norm(dim=1, keepdim=True).clamp_min(LEAST_LENGTH)
            factor = magnitude.reshape(-1, 1)[slice(*span)] / lengths
            of_rows = of_rows * factor.abs()
        directed = total.values * factor
        off = 2 * (math.sqrt(terms) + _MORE_ROUNDINGS) * _U * directed.abs().amax(1, keepdim=True)
        return directed, [(of_rows, of_columns), (off, torch.ones_like(of_columns))]

    def _start(self, name: str, change: Change, span: tuple[int, int], view: View) -> Tensor:
        """(rows, I) the base's rows or what stands in their place, in float64 and in memory of their own."""
        if change.whole is None:
            return self._base_rows(name, *span, view).to(torch.float64, copy=True)
        return change.whole[slice(*span)].to(torch.float64, copy=True).reshape(span[1] - span[0], -1)

    def _column_norms(self, name: str, index: int, view: View) -> Tensor:
        """(1, I) the norm of each column of a table with one of its updates."""
        change, entry = self._changes[name], self.entries[name]
        squares = torch.zeros(1, row_elements(entry), dtype=torch.float64)
        for span in spans(entry):
            total = _added(
                self._start(name, change, span, view), change.pairs[index], span, strength=view.strength
            )
            squares += total.square().sum(0, keepdim=True)
        return squares.sqrt()

    def _base_rows(self, name: str, first: int, last: int, view: View) -> Tensor:
        """Rows of the base; what is beyond its table is zero."""
        source = self._sources[name]
        end = rows_of(self._base.entries[source])
        start, stop = min(first, end), min(last, end)
        if view.base == "original":
            rows = self._base.published(source, start, stop)
        else:
            rows = self._base.held(source, start, stop, nudge=view.nudge)
        if stop == last:
            return rows
        return torch.cat([rows, rows.new_zeros(last - max(first, end), rows.shape[1])])


def spans(entry: TensorEntry) -> Iterator[tuple[int, int]]:
    """First row, and the row after the last one, of each chunk of a tensor that fits a processor's cache."""
    step = max(1, _CHUNK_ELEMENTS // max(1, row_elements(entry)))
    for first in range(0, rows_of(entry), step):
        yield first, min(first + step, rows_of(entry))


def _added(base: Tensor, pair: Pair, span: tuple[int, int], *, strength: float) -> Tensor:
    return base.addmm(pair.left[slice(*span)], pair.right, alpha=pair.scale * strength)


def _turned(base: Tensor, turn: Turn, *, strength: float) -> Exact:
    """The rows turned; of S products each, of rotations that are sums of products of S, three times over."""
    count, width, _ = turn.beyond.shape
    blocks = base.reshape(-1, count, width)
    added = torch.einsum("nkc,kcd->nkd", blocks, turn.beyond).reshape(base.shape)
    rounding = _U * (4 * width + 4 * _MORE_ROUNDINGS) * abs(strength)
    error = base.norm(dim=1, keepdim=True) * rounding, turn.magnitudes
    return Exact(base + strength * added, (error,), relative=2 * _U)


def _error(pair: Pair, span: tuple[int, int], *, strength: float) -> Error:
    """How far an update computed in fp32 may be from the exact one."""
    rounding = _U * (len(pair.right) + _MORE_ROUNDINGS) * abs(pair.scale * strength)
    of_rows = pair.left[slice(*span)].norm(dim=1, keepdim=True) * rounding
    return of_rows, pair.right.norm(dim=0, keepdim=True)


@contextmanager
def open_reference(
    model_folder: Path, adapters: Sequence[tuple[Path, float]], *, base: str
) -> Iterator[Reference]:
    """The reference of an export, its files open.

    Args:
        model_folder: The base.
        adapters: PEFT folders, each with the weight of its update. How the base was held stands beside the
            first one.
        base: `dequantized` or `original`.

    Raises:
        BadModel: The base cannot be read.
        BadRun: Base `dequantized`, and no facts say how it was held.
        BadExport: An adapter contradicts itself or the base.
        Unsupported: An adapter cannot be proven.
    """
    folder = adapters[0][0]
    facts = read_facts(folder) if base == "dequantized" or (folder / FACTS_FILE).is_file() else None
    with StoredTensors(weight_files(model_folder, name=model_folder.name)) as stored:
        layout = layout_of(model_folder)
        changes = changes_of(model_folder, adapters)
        yield Reference(HeldBase(stored, facts, layout.linears), changes, layout=layout, asked=base)
