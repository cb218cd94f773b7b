"""Predicted against measured memory as a table with bars. A rich renderable; fits its width."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from qadapt.units import format_bytes
from qadapt.view.memory import MemoryRow, difference_percent

CLOSE_PERCENT = 5.0  # a peak this near to its prediction is as good as foretold

_SHORT_TITLES = {
    "quantization_constants": "constants",
    "unquantized": "unquantized",
    "recompute_boundaries": "boundaries",
}


@dataclass(frozen=True)
class MemoryTable:
    """One line per category and one for the peak.

    Args:
        rows: The categories.
        predicted_peak_bytes: None when not predicted.
        measured_peak_bytes: None when not measured.
    """

    rows: tuple[MemoryRow, ...]
    predicted_peak_bytes: int | None
    measured_peak_bytes: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        is_short = options.max_width < 62
        name_width = 14 if is_short else 23
        bar_width = max(4, options.max_width - name_width - 1 - 2 * 11)
        amounts = [amount for row in self.rows for amount in (row.predicted_bytes, row.measured_bytes)]
        largest = max([amount or 0 for amount in amounts], default=0) or 1
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=name_width, no_wrap=True, style="dim")
        table.add_column(width=10, justify="right", no_wrap=True)
        table.add_column(width=10, justify="right", no_wrap=True)
        table.add_column(width=bar_width, no_wrap=True)
        legend = Text("━ measured ─ predicted" if bar_width >= 22 else "", style="dim")
        table.add_row("", Text("predicted", style="dim"), Text("measured", style="dim"), legend)
        for row in self.rows:
            title = _SHORT_TITLES.get(row.category, row.title) if is_short else row.title
            bar = memory_bar(row.predicted_bytes, row.measured_bytes, largest=largest, width=bar_width)
            table.add_row(title, _amount(row.predicted_bytes), _amount(row.measured_bytes), bar)
        peaks = (_amount(self.predicted_peak_bytes, "bold"), _amount(self.measured_peak_bytes, "bold"))
        table.add_row(Text("peak", style="not dim bold"), *peaks, self._difference())
        yield from console.render(table, options)

    def _difference(self) -> Text:
        percent = difference_percent(self.predicted_peak_bytes, self.measured_peak_bytes)
        if percent is None:
            return Text()
        words = f"{percent:+.{1 if abs(percent) < 10 else 0}f} %"
        return Text(words, style="bold green" if abs(percent) <= CLOSE_PERCENT else "bold yellow")


def memory_bar(predicted_bytes: int | None, measured_bytes: int | None, *, largest: int, width: int) -> Text:
    """Measured bytes as a heavy line, what is missing to the prediction light, what is above in yellow.

    Args:
        predicted_bytes: None when not predicted.
        measured_bytes: None when not measured.
        largest: Bytes of the full width.
        width: Columns.
    """
    measured = (measured_bytes or 0) / largest * width
    predicted = (predicted_bytes or 0) / largest * width
    halves = round(measured * 2) or int(bool(measured_bytes))
    text = Text("━" * (halves // 2) + "╸" * (halves % 2), style="cyan")
    if predicted_bytes is not None and measured > predicted * (1 + CLOSE_PERCENT / 100):
        text.stylize("yellow", min(len(text), int(predicted)))
    text.append("─" * (round(predicted) - len(text)), style="dim")
    return text


def _amount(amount: int | None, style: str = "") -> Text:
    return Text("–" if amount is None else format_bytes(amount), style=style)
