"""Which rows are held out, which are equal, and which stand on both sides: by hashes of rows alone.

Equal rows are held out together or not at all, so no held-out row is trained on. Whether a row is held out
depends on its tokens and the seed, so a file that grows keeps nearly all rows on their side. All is done with
arrays of hashes, 8 bytes per row, sorted in place.

Legend: N rows.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from qadapt.data.store import Hashes, Numbers
from qadapt.errors import BadData

_CHUNK = 1_000_000


def draw_held_out(hashes: Hashes, numbers: Numbers, *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out, (N,).

    Args:
        hashes: Of each row, (N,); given up to this function, which overwrites them.
        numbers: Of each row, the row of the sources that it is a piece of, (N,); pieces stay together.
        share: About this share of the rows, at least one.
        seed: Of the draw.

    Raises:
        BadData: One of the two parts would have no rows.
    """
    ranks = _mixed(hashes, seed=seed)
    if len(numbers) and (numbers[1:] == numbers[:-1]).any():
        ranks = ranks[_first_pieces(numbers)]
    count = round(len(ranks) * share)
    if not 0 < count < len(ranks):
        raise _no_parts(share, rows=len(ranks), count=count)
    ordered = ranks.copy()
    ordered.partition(count - 1)
    is_apart: NDArray[np.bool_] = ranks <= ordered[count - 1]
    if is_apart.all():
        raise _no_parts(share, rows=len(ranks), count=len(ranks))
    return is_apart


def repeated_rows(hashes: Hashes) -> int:
    """How many rows are equal to one before them; sorts the hashes in place."""
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def shared_rows(hashes: Hashes, among: Hashes) -> Numbers:
    """Indices of those of `among` that are equal to one of `hashes`, ascending."""
    order = among.argsort(kind="stable").astype(np.uint32)
    ordered = among[order]
    is_shared = np.zeros(len(among), np.bool_)
    for start in range(0, len(hashes), _CHUNK):
        chunk = hashes[start : start + _CHUNK]
        first, last = np.searchsorted(ordered, chunk), np.searchsorted(ordered, chunk, side="right")
        for begin, end in np.unique(np.stack([first, last])[:, last > first], axis=1).T.tolist():
            is_shared[begin:end] = True
    return np.sort(order[is_shared])


def _mixed(hashes: Hashes, *, seed: int) -> Hashes:
    """Other numbers in place of the hashes, as if drawn, equal for equal ones (the end of SplitMix64)."""
    digest = hashlib.sha256(f"held-out/{seed}".encode()).digest()
    salt = np.uint64(int.from_bytes(digest[:8], "little"))
    for start in range(0, len(hashes), _CHUNK):
        part = hashes[start : start + _CHUNK]
        part ^= salt
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            part ^= part >> np.uint64(shift)
            part *= np.uint64(factor)
        part ^= part >> np.uint64(31)
    return hashes


def _first_pieces(numbers: Numbers) -> Numbers:
    """Of each row, the index of the first row with its number, (N,)."""
    first = np.arange(len(numbers), dtype=np.uint32)
    first[1:][numbers[1:] == numbers[:-1]] = 0
    np.maximum.accumulate(first, out=first)
    return first


def _no_parts(share: float, *, rows: int, count: int) -> BadData:
    return BadData(
        f"data.held_out_fraction {share} of {rows} rows is {count}; both parts need rows, and equal rows go "
        "to the same one.",
        cure="Change the fraction, or give more rows.",
    )
