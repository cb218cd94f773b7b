"""A curve of any length in bounded memory: neighbouring steps are merged into stretches when there are many.

All stretches span the same number of points, so the start of a long run is as fine as its end; the first and
the last point, the lowest value with its step, and all sums stay exact. Thinning by dropping points was not
taken: it keeps either the extremes or the mean, a stretch keeps both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

LIMIT = 512  # stretches; a chart 140 columns wide has 280 dots


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points of a curve as one; `low`, `high` and the mean are over finite values only."""

    first_step: int
    last_step: int
    points: int
    finite: int
    total: float
    low: float
    low_step: int
    high: float
    tokens: int = 0
    supervised_tokens: int = 0

    @property
    def mean(self) -> float:
        """The mean of the finite values; NaN when there is none."""
        return self.total / self.finite if self.finite else math.nan


@dataclass(frozen=True)
class Series:
    """Values by step, oldest first, as at most `LIMIT` stretches of `width` points each."""

    stretches: tuple[Stretch, ...] = ()
    width: int = 1
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None

    def __bool__(self) -> bool:
        return bool(self.stretches)

    @property
    def points(self) -> int:
        """How many values went in."""
        return sum(stretch.points for stretch in self.stretches)

    @property
    def tokens(self) -> int:
        """All tokens of the steps."""
        return sum(stretch.tokens for stretch in self.stretches)

    @property
    def supervised_tokens(self) -> int:
        """The tokens of the steps that the loss was taken over."""
        return sum(stretch.supervised_tokens for stretch in self.stretches)

    @property
    def lowest(self) -> tuple[int, float] | None:
        """Step and value of the lowest finite value; the first of equals."""
        finite = [stretch for stretch in self.stretches if stretch.finite]
        if not finite:
            return None
        best = min(finite, key=lambda stretch: stretch.low)
        return best.low_step, best.low

    def add(self, step: int, value: float, *, tokens: int = 0, supervised_tokens: int = 0) -> Series:
        """The series with one more value at its end."""
        point = _point(step, value, tokens=tokens, supervised_tokens=supervised_tokens)
        stretches = self.stretches
        if stretches and stretches[-1].points < self.width:
            stretches = (*stretches[:-1], _merged(stretches[-1], point))
        else:
            stretches = (*stretches, point)
        width = self.width
        if len(stretches) > LIMIT:
            stretches, width = _halved(stretches), width * 2
        return Series(stretches, width, self.first or (step, value), (step, value))

    def up_to(self, step: int) -> Series:
        """The series without the steps above `step`; a stretch around it is cut in proportion."""
        kept = tuple(
            stretch if stretch.last_step <= step else _cut(stretch, step)
            for stretch in self.stretches
            if stretch.first_step <= step
        )
        if not kept:
            return Series()
        last = self.last if self.last is None or self.last[0] <= step else (kept[-1].last_step, kept[-1].mean)
        return replace(self, stretches=kept, last=last)


def _point(step: int, value: float, *, tokens: int, supervised_tokens: int) -> Stretch:
    if math.isfinite(value):
        return Stretch(step, step, 1, 1, value, value, step, value, tokens, supervised_tokens)
    return Stretch(step, step, 1, 0, 0.0, math.inf, step, -math.inf, tokens, supervised_tokens)


def _merged(left: Stretch, right: Stretch) -> Stretch:
    return Stretch(
        left.first_step,
        right.last_step,
        left.points + right.points,
        left.finite + right.finite,
        left.total + right.total,
        min(left.low, right.low),
        left.low_step if left.low <= right.low else right.low_step,
        max(left.high, right.high),
        left.tokens + right.tokens,
        left.supervised_tokens + right.supervised_tokens,
    )


def _halved(stretches: tuple[Stretch, ...]) -> tuple[Stretch, ...]:
    pairs = [_merged(left, right) for left, right in zip(stretches[0::2], stretches[1::2], strict=False)]
    return tuple(pairs) + (stretches[-1:] if len(stretches) % 2 else ())


def _cut(stretch: Stretch, step: int) -> Stretch:
    share = (step - stretch.first_step + 1) / (stretch.last_step - stretch.first_step + 1)
    finite = max(1, round(stretch.finite * share)) if stretch.finite else 0
    return replace(
        stretch,
        last_step=step,
        points=max(1, round(stretch.points * share)),
        finite=finite,
        total=stretch.mean * finite if finite else 0.0,
        low_step=min(stretch.low_step, step),
        tokens=round(stretch.tokens * share),
        supervised_tokens=round(stretch.supervised_tokens * share),
    )
