"""The training rows and the held-out rows of a run, out of prepared parts; no row stands on both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from qadapt.data.held_out import draw_held_out, is_near, repeated_rows, shared_rows
from qadapt.data.preparation import Found
from qadapt.data.prepared import Part
from qadapt.data.rows import Rows, RowSet
from qadapt.data.store import Hashes, Numbers, Store
from qadapt.errors import BadData

_MOST_PLACES = 3
_PART_ROWS = 1_000_000


@dataclass(frozen=True)
class Split:
    """Rows, and what was found when they were divided.

    Attributes:
        rows: The rows of the run.
        repeated_rows: Training rows that are equal to another one before them.
        dropped_rows: Drawn rows that are neither trained on nor held out, because an equal one is trained on:
            pieces of documents, and rows of which other turns are learned.
        asked_rows: So many rows were to be drawn.
        shared: Rows of held-out sources that are left out because they are trained on, too.
        known: Held-out rows whose first answer is trained on, after the same prompt.
    """

    rows: Rows
    repeated_rows: int
    dropped_rows: int = 0
    asked_rows: int = 0
    shared: Found = field(default_factory=Found)
    known: Found = field(default_factory=Found)


def split_rows(train: Part, held_out: Part | None, *, share: float, seed: int, pad_id: int) -> Split:
    """Divides the rows.

    Args:
        train: What is trained on, or, with a share, also held out.
        held_out: What is held out, if it has its own sources.
        share: Without `held_out`: this share of the rows is, drawn; 0: none.
        seed: Of the draw.
        pad_id: The token that fills rows up.

    Raises:
        BadData: A part would have no rows, or most rows of the held-out sources are trained on.
    """
    if held_out is None and share:
        return _drawn(train, share=share, seed=seed, pad_id=pad_id)
    store = train.prepared.store
    repeated = repeated_rows(store.hashes())
    if held_out is None:
        return Split(Rows(RowSet(store), RowSet([]), pad_id, train.source_rows), repeated)
    own, all_rows = held_out.prepared.store, np.arange(len(store), dtype=np.uint32)
    twice = shared_rows(_in_parts(store.hashes, all_rows), own.hashes())
    apart = np.delete(np.arange(len(own), dtype=np.uint32), twice)
    shared = _shared(store, own, twice)
    if len(twice) * 2 > len(own):
        raise _overlap(shared)
    rows = Rows(RowSet(store), RowSet(own, apart if len(twice) else None), pad_id, train.source_rows)
    known = _known(store, all_rows, own, apart=apart)
    return Split(rows, repeated, shared=shared, known=known)


def _drawn(train: Part, *, share: float, seed: int, pad_id: int) -> Split:
    store = train.prepared.store
    is_apart = _draw(store, share=share, seed=seed)
    kept, apart = _indices(~is_apart), _indices(is_apart)
    del is_apart
    twice = shared_rows(_in_parts(store.hashes, kept), store.hashes(apart))
    apart = np.delete(apart, twice)
    if not len(apart):
        raise BadData(
            "Every row that was drawn to be held out is trained on, too, as a piece of another document.",
            cure="Change data.held_out_fraction, or hold out a file with data.held_out.",
        )
    repeated = repeated_rows(store.hashes(kept))
    ends = np.searchsorted(kept, list(accumulate(train.source_rows)))
    source_rows = tuple(int(count) for count in np.diff(ends, prepend=0))
    rows = Rows(RowSet(store, kept), RowSet(store, apart), pad_id, source_rows)
    asked = round(len(store) * share)
    return Split(rows, repeated, len(twice), asked, known=_known(store, kept, store, apart=apart))


def _draw(store: Store, *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out; those that begin alike go together, unless nearly all of them do.

    So a conversation that was unrolled turn by turn is on one side.
    """
    try:
        is_apart = draw_held_out(store.openings(), store.numbers(), share=share, seed=seed)
        if is_near(int(np.count_nonzero(is_apart)), round(len(store) * share)):
            return is_apart
    except BadData:  # of one group; or a share of nothing, which the next one says again
        pass
    return draw_held_out(store.hashes(), store.numbers(), share=share, seed=seed)


def _indices(flags: NDArray[np.bool_]) -> Numbers:
    return np.flatnonzero(flags).astype(np.uint32)


def _in_parts(column: Callable[[Numbers], Hashes], rows: Numbers) -> Iterator[Hashes]:
    """Some rows' values of a column, so that never all of them are in memory."""
    for start in range(0, len(rows), _PART_ROWS):
        yield column(rows[start : start + _PART_ROWS])


def _known(train: Store, kept: Numbers, held_out: Store, *, apart: Numbers) -> Found:
    alike = shared_rows(_in_parts(train.openings, kept), held_out.openings(apart))
    return Found(len(alike), [held_out.row(int(apart[index])).place for index in alike[:_MOST_PLACES]])


def _shared(train: Store, held_out: Store, twice: Numbers) -> Found:
    found = Found(len(twice))
    for index in twice[:_MOST_PLACES]:
        equal = (train.hashes() == held_out.hashes(np.array([index], np.uint32))).argmax()
        found.places.append(f"{held_out.row(int(index)).place} (as {train.row(int(equal)).place})")
    return found


def _overlap(shared: Found) -> BadData:
    more = ", ..." if shared.count > len(shared.places) else ""
    return BadData(
        f"{shared.count:,} held-out {'row is' if shared.count == 1 else 'rows are'} also trained on, more "
        f"than half of them, so their loss would say nothing: {', '.join(shared.places)}{more}.",
        cure="Remove them from one of the two, or let data.held_out_fraction draw rows instead of "
        "data.held_out.",
    )
