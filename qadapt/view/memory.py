"""Predicted and measured bytes side by side, category by category. Pure arithmetic; draws nothing.

What a step takes beyond the static categories may be measured as one sum (`working`): then the predictions of
the working categories are summed too, so that like is compared with like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qadapt.plan.categories import CATEGORIES, STATIC, TITLES, WORKING

WORKING_SUM = "working"


@dataclass(frozen=True)
class MemoryRow:
    """One category; None where there is no number (not predicted, or not measured yet)."""

    category: str
    title: str
    predicted_bytes: int | None
    measured_bytes: int | None


def memory_rows(
    predicted: Mapping[str, int], measured: Mapping[str, int], *, is_compact: bool = False
) -> tuple[MemoryRow, ...]:
    """The categories with a number other than zero, static ones first.

    Args:
        predicted: Predicted bytes by category; empty when nothing was planned.
        measured: Measured bytes by category; empty when nothing was measured. Besides the categories it may
            hold `working`, the sum of the working categories.
        is_compact: Sum the working categories even where they were measured one by one.
    """
    as_sum = is_compact or not any(category in measured for category in WORKING)
    rows = [_row(category, predicted=predicted, measured=measured) for category in STATIC]
    if as_sum:
        rows.append(MemoryRow(WORKING_SUM, "working memory", _working_sum(predicted), _working_sum(measured)))
    else:
        rows.extend(_row(category, predicted=predicted, measured=measured) for category in WORKING)
    known = {*CATEGORIES, WORKING_SUM}
    others = sorted({*predicted, *measured} - known)
    rows.extend(_row(category, predicted=predicted, measured=measured) for category in others)
    return tuple(row for row in rows if row.predicted_bytes or row.measured_bytes)


def difference_percent(predicted_bytes: int | None, measured_bytes: int | None) -> float | None:
    """Percent by which the measured bytes are above the predicted ones; None when one is unknown."""
    if not predicted_bytes or measured_bytes is None:
        return None
    return (measured_bytes - predicted_bytes) / predicted_bytes * 100


def _row(category: str, *, predicted: Mapping[str, int], measured: Mapping[str, int]) -> MemoryRow:
    title = TITLES.get(category, category.replace("_", " "))
    return MemoryRow(category, title, predicted.get(category), measured.get(category))


def _working_sum(amounts: Mapping[str, int]) -> int | None:
    if WORKING_SUM in amounts:
        return amounts[WORKING_SUM]
    given = [amounts[category] for category in WORKING if category in amounts]
    return sum(given) if given else None
