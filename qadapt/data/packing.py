"""Which rows of a step share a micro-batch when rows lie one after another instead of being filled up.

Best-fit decreasing: the longest row first, each into the fullest bin that still holds it; at most 11/9 of the
fewest bins and a little (Johnson 1974; for training rows arXiv:2107.02027). Only the rows of one step are
packed together, so a step takes the rows it takes without packing and its gradient is the same sum. Knows
lengths, no tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows, bin by bin, each row whole and in one bin.

    Of bins that are equally full the first one is taken, of rows that are equally long the first one comes
    first: the same lengths always give the same bins.

    Args:
        lengths: Tokens of each row.
        capacity: The most tokens of a bin; no row may be longer.
    """
    assert not lengths or max(lengths) <= capacity, f"a row of {max(lengths)} tokens, a bin of {capacity}"
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (tokens that are free, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(spaces, (lengths[index], 0))
        if place == len(spaces):
            free, chosen = capacity, len(bins)
            bins.append([])
        else:
            free, chosen = spaces.pop(place)
        bins[chosen].append(index)
        insort(spaces, (free - lengths[index], chosen))
    return bins
