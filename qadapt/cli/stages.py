"""The stages of a long command while they happen: a bar for each on a terminal, else a line.

Draws what events say; knows no command.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from qadapt.events import Event, StageAdvanced

Result = TypeVar("Result")


def drawn(work: Generator[Event, None, Result], console: Console) -> Result:
    """Draws what happens while it does, as `drawn_stages`; the result."""
    from qadapt.stage import go_through

    with drawn_stages(console) as draw:
        return go_through(work, draw)


@contextmanager
def drawn_stages(console: Console) -> Iterator[Callable[[Event], None]]:
    """What draws an event, while open: stages and their progress, and warnings; other events say nothing.

    Args:
        console: Where to draw.
    """
    from functools import partial

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from qadapt.events import StageAdvanced, StageStarted, Warned

    column = partial(TextColumn, markup=False)
    columns = (column("{task.description}"), BarColumn(), column("{task.fields[count]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        stages = _Stages(bars)

        def draw(event: Event) -> None:
            if isinstance(event, StageStarted):
                stages.begin(event.stage)
                if not console.is_terminal:
                    console.print(event.stage, markup=False)
            elif isinstance(event, StageAdvanced):
                stages.advance(event)
            elif isinstance(event, Warned):
                console.print(f"{event.message} {event.cure}", markup=False)

        yield draw
        stages.end()


class _Stages:
    """The bars of a command, in the order of its stages; a stage that counts nothing moves to and fro.

    Args:
        bars: Where they are drawn.
    """

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._running: dict[str, TaskID] = {}

    def begin(self, stage: str) -> None:
        """Those before it have ended; a stage may come twice."""
        self.end()
        self._running = {stage: self._bars.add_task(stage, total=None, count="")}

    def advance(self, event: StageAdvanced) -> None:
        """A stage, or a part of it that has a name of its own, has come so far."""
        from qadapt.units import format_bytes

        if event.unit == "bytes":
            count = f"{format_bytes(event.done)} of {format_bytes(event.total)}"
        else:
            count = f"{event.done:,} of {event.total:,} {event.unit}"
        if event.stage not in self._running:
            self._running[event.stage] = self._bars.add_task(event.stage, total=None, count=count)
        total = event.total or None
        self._bars.update(self._running[event.stage], completed=event.done, total=total, count=count)

    def end(self) -> None:
        """What was running has ended."""
        for task in self._bars.tasks:
            if task.id in self._running.values() and not task.total:
                self._bars.update(task.id, completed=1, total=1)
        self._running = {}
