"""Which rows a step takes: a pure function of the step, so there is no position to save. Knows no tokens."""

from __future__ import annotations

import random
from functools import lru_cache


def rows_of_step(step: int, *, row_count: int, rows_per_step: int, seed: int) -> list[int]:
    """Indices of the rows that step `step` (from 0) takes; each pass has its own seeded order."""
    first = step * rows_per_step
    return [_row_at(position, row_count, seed) for position in range(first, first + rows_per_step)]


def _row_at(position: int, row_count: int, seed: int) -> int:
    epoch, index = divmod(position, row_count)
    return _order(epoch, row_count, seed)[index]


@lru_cache(maxsize=2)  # a step may span two passes
def _order(epoch: int, row_count: int, seed: int) -> tuple[int, ...]:
    order = list(range(row_count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)
