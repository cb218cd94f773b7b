"""Which rows are held out, which are equal, and which stand on both sides: by hashes of rows alone.

Equal rows are held out together or not at all, so no held-out row is trained on. Whether a row is held out
depends on its tokens and the seed, so a file that grows keeps nearly all rows on their side. All is done with
arrays of hashes, 8 bytes per row. A group of equal rows that would make the held-out rows far more than asked
for is left to the training rows.

Legend: N rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qadapt.data.store import Hashes, Numbers
from qadapt.errors import BadData

_CHUNK = 1_000_000
_SLACK = 20
_MOST_SKIPPED = 1000


def draw_held_out(hashes: Hashes, numbers: Numbers, *, share: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out, (N,).

    Args:
        hashes: Of each row, (N,); given up to this function, which overwrites them.
        numbers: Of each row, the row of the sources that it is a piece of, (N,); pieces stay together.
        share: About this share of the rows, at least one; more only if all groups are larger.
        seed: Of the draw.

    Raises:
        BadData: One of the two parts would have no rows.
    """
    ranks = _mixed(hashes, seed=seed)
    if len(numbers) and (numbers[1:] == numbers[:-1]).any():
        ranks = ranks[_first_pieces(numbers)]
    count = round(len(ranks) * share)
    if not 0 < count < len(ranks):
        raise BadData(
            f"data.held_out_fraction {share} of {len(ranks)} rows is {count}; both parts need rows.",
            cure="Change the fraction, or give more rows.",
        )
    ordered = np.sort(ranks)
    if ordered[0] == ordered[-1]:
        raise _one_group(len(ranks), is_document=bool(numbers[0] == numbers[-1]))
    last, skipped = _chosen_ranks(ordered, count)
    is_apart: NDArray[np.bool_] = ranks <= last
    for start in range(0, len(ranks) if len(skipped) else 0, _CHUNK):
        is_apart[start : start + _CHUNK] &= ~np.isin(ranks[start : start + _CHUNK], skipped)
    return is_apart


def is_near(count: int, asked: int) -> bool:
    """Whether so many rows are about what was asked for."""
    return abs(count - asked) <= max(2, asked // 10)


def repeated_rows(hashes: Hashes) -> int:
    """How many rows are equal to one before them; sorts the hashes in place."""
    hashes.sort()
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))


def shared_rows(parts: Iterable[Hashes], among: Hashes) -> Numbers:
    """Indices of those of `among` that are equal to one in `parts`, ascending."""
    ordered = np.sort(among)
    is_shared = np.zeros(len(among), np.bool_)  # of equal ones the first
    for part in parts:
        at = np.searchsorted(ordered, part)
        at[at == len(ordered)] = 0
        is_shared[at[ordered[at] == part] if len(ordered) else []] = True
    found = [
        start + np.flatnonzero(is_shared[np.searchsorted(ordered, among[start : start + _CHUNK])])
        for start in range(0, len(among) if is_shared.any() else 0, _CHUNK)
    ]
    return np.concatenate(found).astype(np.uint32) if found else np.empty(0, np.uint32)


def _chosen_ranks(ordered: Hashes, count: int) -> tuple[np.uint64, Hashes]:
    """Up to which rank rows are held out, and the ranks before it that are not: their groups are too large.

    Args:
        ordered: Ranks of at least two kinds, ascending, (N,); equal ones are a group.
        count: About so many rows are wanted.
    """
    rows, slack = len(ordered), max(1, count // _SLACK)
    last, at, missing = np.uint64(0), 0, count
    skipped: dict[np.uint64, int] = {}
    while missing > 0 and at < rows and len(skipped) < _MOST_SKIPPED:
        edge = min(at + missing, rows)
        rank: np.uint64 = ordered[edge - 1]
        first, after = (int(np.searchsorted(ordered, rank, side=side)) for side in ("left", "right"))
        if after - edge <= slack and (after < rows or skipped):
            first, last = after, rank
        else:
            skipped[rank] = after - first
            last = ordered[first - 1] if first > at else last
        missing, at = missing - (first - at), after
    if skipped and missing > 0:
        rank = min(skipped, key=skipped.__getitem__)
        is_better = missing == count or abs(skipped[rank] - missing) < missing
        if is_better and count - missing + skipped[rank] < rows:
            del skipped[rank]
            last = max(last, rank)
    return last, np.array(sorted(skipped), np.uint64)


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


def _one_group(rows: int, *, is_document: bool) -> BadData:
    if is_document:
        return BadData(
            f"All {rows:,} rows are pieces of one document, which are held out together or not at all; both "
            "parts need rows.",
            cure="Give a file of its own with data.held_out, or the text as several documents.",
        )
    return BadData(
        f"All {rows:,} rows are equal, and equal rows go to the same one; both parts need rows.",
        cure="Give other rows, too, or hold none out.",
    )
