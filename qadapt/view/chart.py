"""A loss curve of braille dots: training loss as a line, its noise as single dots, evaluation as diamonds.

Reads without colour: the shapes differ. Honest: values off the chart are marked at its upper edge (▴), a
loss that is no number at its lower one (×), and a single value is one mark, not a line. Knows series of
numbers, no run. Plotting with braille: the idea of drawille.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from qadapt.view.series import Series, Stretch

LINE_STYLE = Style(color="cyan")
NOISE_STYLE = Style(color="cyan", dim=True)
EVALUATION_STYLE = Style(color="magenta", bold=True)
AXIS_STYLE = Style(dim=True)
BROKEN_STYLE = Style(color="red", bold=True)

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits of a braille cell, by row and column
_SMOOTHED_PARTS = 30  # the line averages over about a thirtieth of the curve


@dataclass(frozen=True)
class LossChart:
    """Draws training and evaluation loss over the steps.

    Args:
        training: The training loss by step.
        evaluation: The evaluation loss by step.
        total_steps: Steps that were asked for; the axis grows towards them by doubling, so that the curve
            fills at least half of the width and the picture rarely jumps. 0 when unknown.
        height: Lines, axis included; at least 4.
    """

    training: Series
    evaluation: Series
    total_steps: int = 0
    height: int = 12

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        low, high = _value_range(self.training, self.evaluation)
        rows = max(2, self.height - 2)
        ticks = _ticks(low, high, rows=rows)
        margin = max(len(label) for label in ticks.values()) + 1
        columns = max(8, width - margin - 1)
        canvas = _Canvas(columns, rows, low=low, high=high, last_step=self._last_step())
        canvas.draw(self.training.stretches, self.evaluation.stretches)
        for row in range(rows):
            label = ticks.get(row, "")
            yield Segment(f"{label:>{margin - 1}} {'┤' if label else '│'}", AXIS_STYLE)
            yield from canvas.segments(row)
            yield Segment.line()
        yield Segment(" " * margin + "└" + "─" * columns, AXIS_STYLE)
        yield Segment.line()
        yield from self._step_labels(margin, columns)

    def _last_step(self) -> int:
        done = max((series.last[0] for series in (self.training, self.evaluation) if series.last), default=1)
        last = max(self.total_steps, done, 2)
        while -(-last // 2) >= max(done, 8):
            last = -(-last // 2)
        return last

    def _step_labels(self, margin: int, columns: int) -> Iterable[Segment]:
        left, right = "step 1", f"{self._last_step():,}"
        names = [("⠒⠒", LINE_STYLE, "training")]
        if self.evaluation:
            names.append(("◆", EVALUATION_STYLE, "evaluation"))
        legend_width = sum(len(mark) + 1 + len(name) for mark, _, name in names) + 3 * (len(names) - 1)
        gap = columns - len(left) - len(right)
        yield Segment(" " * (margin + 1) + left, AXIS_STYLE)
        if gap < legend_width + 4:
            yield Segment(" " * max(1, gap), AXIS_STYLE)
        else:
            before = (gap - legend_width) // 2
            yield Segment(" " * before)
            for position, (mark, style, name) in enumerate(names):
                yield Segment("   " if position else "")
                yield Segment(mark, style)
                yield Segment(f" {name}", AXIS_STYLE)
            yield Segment(" " * (gap - legend_width - before))
        yield Segment(right, AXIS_STYLE)
        yield Segment.line()


def smoothed(values: Sequence[float]) -> list[float]:
    """The values as an exponential mean without start-up bias, over about a thirtieth of the curve.

    Values that are no finite number stay NaN and leave the mean of the others alone.
    """
    keep = 1 - 1 / max(1.0, len(values) / _SMOOTHED_PARTS)
    total = weight = 0.0
    means = []
    for value in values:
        if not math.isfinite(value):
            means.append(math.nan)
            continue
        total, weight = total * keep + value, weight * keep + 1
        means.append(total / weight)
    return means


class _Canvas:
    """A grid of cells; the upper left dot is (0, 0)."""

    def __init__(self, columns: int, rows: int, *, low: float, high: float, last_step: int) -> None:
        self.columns, self.rows = columns, rows
        self.low, self.high = low, high
        self.last_step = last_step
        self.line = [[0] * columns for _ in range(rows)]
        self.noise = [[0] * columns for _ in range(rows)]
        self.marks: dict[tuple[int, int], tuple[str, Style]] = {}

    def draw(self, training: Sequence[Stretch], evaluation: Sequence[Stretch]) -> None:
        means = smoothed([stretch.mean for stretch in training])
        before: tuple[int, int] | None = None
        for stretch, mean in zip(training, means, strict=True):
            x = self._dot_column((stretch.first_step + stretch.last_step) / 2)
            if stretch.finite < stretch.points:
                self._mark(x, self.rows - 1, glyph="×", style=BROKEN_STYLE)
            if not stretch.finite:
                before = None
                continue
            for value in (stretch.low, stretch.high):
                self._noise_dot(x, value)
            here = (x, self._dot_row(mean))
            self._line_dots(before or here, here)
            before = here
        if len(training) == 1 and before is not None:
            self._mark(before[0], before[1] // 4, glyph="•", style=LINE_STYLE)
        for stretch in evaluation:
            x = self._dot_column((stretch.first_step + stretch.last_step) / 2)
            if stretch.finite:
                self._mark(x, self._dot_row(stretch.mean) // 4, glyph="◆", style=EVALUATION_STYLE)
            else:
                self._mark(x, self.rows - 1, glyph="×", style=BROKEN_STYLE)

    def segments(self, row: int) -> Iterable[Segment]:
        # Neighbours of one style as one segment: rich measures and cuts each one, several times a second.
        cells = [self._cell(row, column) for column in range(self.columns)]
        for style, group in itertools.groupby(cells, key=lambda cell: cell[1]):
            yield Segment("".join(glyph for glyph, _ in group), style)

    def _cell(self, row: int, column: int) -> tuple[str, Style | None]:
        mark = self.marks.get((row, column))
        if mark is not None:
            return mark
        if self.line[row][column]:
            return chr(0x2800 + self.line[row][column]), LINE_STYLE
        if self.noise[row][column]:
            return chr(0x2800 + self.noise[row][column]), NOISE_STYLE
        return " ", None

    def _dot_column(self, step: float) -> int:
        share = (step - 1) / max(1, self.last_step - 1)
        return min(self.columns * 2 - 1, max(0, round(share * (self.columns * 2 - 1))))

    def _dot_row(self, value: float) -> int:
        share = (self.high - value) / (self.high - self.low)
        return min(self.rows * 4 - 1, max(0, round(share * (self.rows * 4 - 1))))

    def _mark(self, x: int, row: int, *, glyph: str, style: Style) -> None:
        self.marks[row, x // 2] = (glyph, style)

    def _noise_dot(self, x: int, value: float) -> None:
        if value > self.high:
            self._mark(x, 0, glyph="▴", style=LINE_STYLE)
            return
        y = self._dot_row(value)
        self.noise[y // 4][x // 2] |= _DOTS[y % 4][x % 2]

    def _line_dots(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
        for part in range(length + 1):
            x = round(start[0] + (end[0] - start[0]) * part / length)
            y = round(start[1] + (end[1] - start[1]) * part / length)
            self.line[y // 4][x // 2] |= _DOTS[y % 4][x % 2]


def _value_range(training: Series, evaluation: Series) -> tuple[float, float]:
    trained = [one for one in training.stretches if one.finite]
    marked = [one.mean for one in evaluation.stretches if one.finite]
    values = [one.low for one in trained] + marked
    if not values:
        return 0.0, 1.0
    highs = sorted(one.high for one in trained)
    low, high = min(values), max([*highs, *marked])
    if len(highs) >= 20:  # a spike must not flatten the curve: it is marked at the edge instead
        usual = highs[math.ceil(len(highs) * 0.98) - 1]
        high = min(high, max([usual + 0.25 * (usual - low), trained[0].mean, *marked]))
    room = (high - low) * 0.04 or max(abs(low) * 0.05, 0.01)
    return (max(0.0, low - room) if low >= 0 else low - room), high + room


def _ticks(low: float, high: float, *, rows: int) -> dict[int, str]:
    """Labels at round values, by row from the top: about one in three rows, at least two where they fit."""
    wanted = max(2, min(6, rows // 3))
    size = 10.0 ** math.floor(math.log10((high - low) / wanted))
    steps = [size * factor for factor in (0.5, 1, 2, 2.5, 5, 10)]
    step = next(step for step in steps if len(_multiples(step, low=low, high=high)) <= wanted)
    decimals = max(1, -math.floor(math.log10(step) + 1e-9))
    decimals += 0 if math.isclose(step, round(step, decimals), rel_tol=1e-6) else 1
    labels: dict[int, str] = {}
    for value in _multiples(step, low=low, high=high):
        share = (high - value) / (high - low)
        labels[round(share * (rows * 4 - 1)) // 4] = f"{value:.{decimals}f}"
    return labels or {rows - 1: f"{low:.4g}"}


def _multiples(step: float, *, low: float, high: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [position * step for position in range(first, last + 1)]
