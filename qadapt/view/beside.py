"""Two answers to one question, side by side where there is room, else one below the other.

While they are written, the picture keeps to the screen: of what is longer, the end is drawn. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from qadapt.view.visible import printable
from qadapt.view.wrapping import wrapped

NARROWEST = 36
"""Columns under which text in two columns is no pleasure to read."""
_GAP = 3
_TAB = 4


@dataclass(frozen=True)
class Beside:
    """Some answers, each with its title.

    Attributes:
        answers: Title and text of each.
        most_lines: Lines of the picture; None: as many as it takes.
    """

    answers: tuple[tuple[str, str], ...]
    most_lines: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = len(self.answers)
        width = (options.max_width - _GAP * (count - 1)) // count
        if width >= NARROWEST:
            yield self._columns(width)
            return
        most = None if self.most_lines is None else self.most_lines // count - 1
        for number, (title, text) in enumerate(self.answers):
            if number:
                yield Text()
            yield from _column(title, text, width=options.max_width, most_lines=most)

    def _columns(self, width: int) -> Table:
        table = Table(box=None, show_header=False, padding=(0, _GAP, 0, 0), pad_edge=False)
        for _ in self.answers:
            table.add_column(width=width, no_wrap=True)
        columns = [
            _column(title, text, width=width, most_lines=self.most_lines) for title, text in self.answers
        ]
        table.add_row(*(Text("\n").join(column) for column in columns))
        return table


def _column(title: str, text: str, *, width: int, most_lines: int | None) -> Iterator[Text]:
    lines = list(wrapped([(printable(text).expandtabs(_TAB), Style())], width))
    yield Text(title, style="bold", no_wrap=True)
    yield from lines if most_lines is None else lines[-max(1, most_lines - 1) :]
