"""How written numbers differ from exact ones: within one rounding, beside a tie, or wrong.

A number is right if it is the rounding of something within the error that the exact number may have: rounding
never turns an order around, so it lies between the roundings of both ends. Steps of a few bits are wider than
what most adapters change, so of a quantized tensor it is counted, too, how many numbers are not on the step
that the exact ones come to: a change too small to be seen in one number shows in a million. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qadapt.export.reference import Exact

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""The integers of the same size, by type."""
_MOST_MOVED, _FEW = 0.0005, 64
"""Share of the numbers of a quantized tensor, and how many in any case, that may be on another step: sums in
fp32 move few (of 134 million of the demo none in Q8_0, 123 in F16), but a block of 32 where they decide its
scale."""


@dataclass(frozen=True)
class Spot:
    """A number that is wrong: its row and place in the row, what is written and what should be."""

    row: int
    column: int
    written: float
    exact: float


@dataclass(frozen=True)
class Difference:
    """How a tensor, or several, differ from what they should be.

    `wrong` numbers lie in `wrong_rows` rows, `lost` of them NaN or infinite; `spot` is the first one. The
    others that are not the rounding of the exact number are `near_ties`, up to `worst_ulps` from it. `moved`
    are the quantized ones on another step than the exact ones come to, `moved_spot` is the first.
    """

    name: str = ""
    elements: int = 0
    near_ties: int = 0
    worst_ulps: int = 0
    worst_at: str = ""
    wrong: int = 0
    wrong_rows: int = 0
    lost: int = 0
    spot: Spot | None = None
    moved: int = 0
    moved_spot: Spot | None = None

    @property
    def is_wrong(self) -> bool:
        """Whether a number is wrong, or more are moved than sums in another order explain."""
        return self.wrong > 0 or self.moved > max(_FEW, _MOST_MOVED * self.elements)

    @property
    def first_spot(self) -> Spot:
        """Where to look for what is wrong."""
        found = self.spot or self.moved_spot
        assert found is not None
        return found

    def with_more(self, more: Difference) -> Difference:
        """The sum of this and another one."""
        worst = max(self, more, key=lambda each: each.worst_ulps)
        return replace(
            self,
            elements=self.elements + more.elements,
            near_ties=self.near_ties + more.near_ties,
            worst_ulps=worst.worst_ulps,
            worst_at=worst.worst_at,
            wrong=self.wrong + more.wrong,
            wrong_rows=self.wrong_rows + more.wrong_rows,
            lost=self.lost + more.lost,
            spot=self.spot or more.spot,
            moved=self.moved + more.moved,
            moved_spot=self.moved_spot or more.moved_spot,
        )


def difference(
    name: str,
    values: Tensor,
    exact: Exact,
    *,
    first: int = 0,
    bound: Tensor | None = None,
    moved: Tensor | None = None,
) -> Difference:
    """How rows of a tensor differ from the exact ones.

    Args:
        name: The tensor.
        values: (rows, I) as written.
        exact: What they should be.
        first: Number of the first row.
        bound: The most that each may differ beside the error of `exact`; None: one rounding.
        moved: Which of them are not on the step that the exact ones come to; None: there are no steps.
    """
    found = Difference(name, elements=values.numel())
    flat, middle = values.reshape(-1), exact.values.reshape(-1)
    if values.dtype not in _BITS:
        return _wrong(found, values, exact, (flat != middle).nonzero().view(-1), first=first)
    if bound is not None:
        allowed = bound.expand_as(values).reshape(-1) + exact.error_at(torch.arange(len(flat)))
        is_off = ~((flat.double() - middle.double()).abs() <= allowed)
        found = _wrong(found, values, exact, is_off.nonzero().view(-1), first=first)
        return found if moved is None else _moved(found, values, exact, moved.reshape(-1), first=first)
    rounded = rounding(middle, values.dtype)
    places = _unequal(flat, rounded)
    if not len(places):
        return found
    seen, error = flat[places], exact.error_at(places)
    low, high = (rounding(middle[places].double() + off, values.dtype) for off in (-error, error))
    is_near = (low <= seen) & (seen <= high) & seen.isfinite()
    if is_near.any():
        steps = _steps(seen[is_near], rounded[places[is_near]])
        row, column = divmod(int(places[is_near][steps.argmax()]), values.shape[1])
        found = replace(
            found,
            near_ties=int((steps > 0).sum()),
            worst_ulps=int(steps.max()),
            worst_at=f"{name}[{first + row}, {column}]",
        )
    return _wrong(found, values, exact, places[~is_near], first=first)


def rounding(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Exact numbers in a type, by way of fp32 as a merge rounds them."""
    return exact.float().to(dtype)


def ulps(values: Tensor, others: Tensor) -> Tensor:
    """How many steps of their type lie between numbers that are finite."""
    return (_ordinal(values) - _ordinal(others)).abs()


def _unequal(flat: Tensor, rounded: Tensor) -> Tensor:
    """(n,) the places where numbers are not the same, or not finite."""
    bits = _BITS[flat.dtype]
    is_unequal = flat.view(bits) != rounded.view(bits)
    if not rounded.float().sum().isfinite():
        is_unequal |= ~flat.isfinite()
    return is_unequal.nonzero().view(-1)


def _steps(seen: Tensor, rounded: Tensor) -> Tensor:
    """How many steps of their type lie between numbers; in fp32 steps of the largest of them.

    There a sum may be off by many steps of its own where it comes out near 0.
    """
    if seen.dtype is not torch.float32:
        return ulps(seen, rounded)
    step = torch.finfo(torch.float32).eps * rounded.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((seen - rounded).abs() / step).ceil().long()


def _wrong(found: Difference, values: Tensor, exact: Exact, places: Tensor, *, first: int) -> Difference:
    if not len(places):
        return found
    seen = values.reshape(-1)[places]
    return replace(
        found,
        wrong=len(places),
        wrong_rows=len((places // values.shape[1]).unique()),
        lost=int((~seen.isfinite()).sum()),
        spot=_spot(values, exact, int(places[0]), first=first),
    )


def _moved(found: Difference, values: Tensor, exact: Exact, is_moved: Tensor, *, first: int) -> Difference:
    places = is_moved.nonzero().view(-1)
    if not len(places):
        return found
    return replace(found, moved=len(places), moved_spot=_spot(values, exact, int(places[0]), first=first))


def _spot(values: Tensor, exact: Exact, place: int, *, first: int) -> Spot:
    row, column = divmod(place, values.shape[1])
    return Spot(first + row, column, values[row, column].item(), exact.values[row, column].item())


def _ordinal(values: Tensor) -> Tensor:
    """Numbers as integers in the same order, neighbours one apart."""
    bits = _BITS[values.dtype]
    integers = values.contiguous().view(bits).long()
    return torch.where(integers < 0, -(integers & torch.iinfo(bits).max), integers)
