"""The training rows and the held-out rows of a run, out of prepared parts; no row stands on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from qadapt.data.held_out import draw_held_out, repeated_rows, shared_rows
from qadapt.data.prepared import Part
from qadapt.data.rows import Rows, RowSet
from qadapt.data.store import Numbers, Store
from qadapt.errors import BadData

_MOST_PLACES = 3


@dataclass(frozen=True)
class Split:
    """Rows, and what was found when they were divided.

    Attributes:
        rows: The rows of the run.
        repeated_rows: Training rows that are equal to another one before them.
        dropped_rows: Drawn pieces of documents that are neither trained on nor held out, because an equal
            piece is trained on.
    """

    rows: Rows
    repeated_rows: int
    dropped_rows: int = 0


def split_rows(train: Part, held_out: Part | None, *, share: float, seed: int, pad_id: int) -> Split:
    """Divides the rows.

    Args:
        train: What is trained on, or, with a share, also held out.
        held_out: What is held out, if it has its own sources.
        share: Without `held_out`: this share of the rows is, drawn; 0: none.
        seed: Of the draw.
        pad_id: The token that fills rows up.

    Raises:
        BadData: A part would have no rows, or held-out sources have rows of the training ones.
    """
    if held_out is None and share:
        return _drawn(train, share=share, seed=seed, pad_id=pad_id)
    store = train.prepared.store
    repeated = repeated_rows(store.hashes())
    apart = RowSet([])
    if held_out is not None:
        _check_disjoint(store, held_out.prepared.store)
        apart = RowSet(held_out.prepared.store)
    rows = Rows(RowSet(store), apart, pad_id, train.source_rows)
    return Split(rows, repeated)


def _drawn(train: Part, *, share: float, seed: int, pad_id: int) -> Split:
    store = train.prepared.store
    is_apart = draw_held_out(store.hashes(), store.numbers(), share=share, seed=seed)
    kept, apart, dropped = _indices(~is_apart), _indices(is_apart), 0
    del is_apart
    if train.tally.cut.get("pieces"):  # only documents have pieces that may be equal without their whole
        hashes = store.hashes()
        twice = shared_rows(hashes[kept], hashes[apart])
        apart, dropped = np.delete(apart, twice), len(twice)
        if not len(apart):
            raise BadData(
                "Every piece of a document that was drawn to be held out is trained on, too.",
                cure="Change data.held_out_fraction, or hold out a file with data.held_out.",
            )
    repeated = repeated_rows(store.hashes()[kept])
    ends = np.searchsorted(kept, list(accumulate(train.source_rows)))
    source_rows = tuple(int(count) for count in np.diff(ends, prepend=0))
    rows = Rows(RowSet(store, kept), RowSet(store, apart), pad_id, source_rows)
    return Split(rows, repeated, dropped)


def _indices(flags: NDArray[np.bool_]) -> Numbers:
    return np.flatnonzero(flags).astype(np.uint32)


def _check_disjoint(train: Store, held_out: Store) -> None:
    hashes, apart = train.hashes(), held_out.hashes()
    shared = shared_rows(hashes, apart)
    if not len(shared):
        return
    places = [
        f"{held_out.row(int(index)).place} (as {train.row(int((hashes == apart[index]).argmax())).place})"
        for index in shared[:_MOST_PLACES]
    ]
    more = ", ..." if len(shared) > _MOST_PLACES else ""
    raise BadData(
        f"{len(shared):,} held-out {'row is' if len(shared) == 1 else 'rows are'} also trained on, so their "
        f"loss would say nothing: {', '.join(places)}{more}.",
        cure="Remove them from one of the two, or let data.held_out_fraction draw rows instead of "
        "data.held_out.",
    )
