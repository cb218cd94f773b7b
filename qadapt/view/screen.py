"""Shows a run while it happens: the live dashboard on a terminal, plain lines elsewhere.

The run is pulled from here (`for event in events`), and drawing never breaks it: a live picture is drawn by
another thread, which only reads the latest state; a closed pipe or terminal ends the printing, not the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from qadapt.events import Event
from qadapt.view.dashboard import Dashboard
from qadapt.view.lines import Lines, summary
from qadapt.view.state import RunState, fold, fold_all

REFRESHES_PER_SECOND = 4  # a picture costs about 10 ms of one core: 4 % of it


def show(
    events: Iterable[Event],
    *,
    console: Console,
    is_live: bool,
    is_quiet: bool,
    before: Iterable[Event] = (),
    now: Callable[[], float] = time.time,
) -> RunState:
    """Goes through the events, showing each, and returns the state after the last.

    Errors and interrupts of the run pass through, after the screen is as it was.

    Args:
        events: The run.
        console: Where to draw.
        is_live: Draw the dashboard and keep it up to date; plain lines otherwise, and where the console's
            encoding has no lines and dots to draw with.
        is_quiet: Show warnings and the end only, in plain lines.
        before: What earlier processes did on this run: known to the picture, not shown as news.
        now: The clock, in seconds since the epoch.
    """
    state = fold_all(before)
    if is_live and not is_quiet and not console.options.ascii_only:
        state = _drawn(state, events, console=console, now=now)
        lines = [*_warnings(state), *summary(state)]
    else:
        state = _printed(state, events, console=console, lines=Lines(is_quiet=is_quiet))
        lines = summary(state)
    for line in lines:
        _print(console, line)
    return state


class _Picture:
    """The latest state, drawn for the moment it is looked at."""

    def __init__(self, state: RunState, now: Callable[[], float]) -> None:
        self.state = state
        self.now = now

    def draw(self) -> Dashboard:
        return Dashboard(self.state, self.now())


def _drawn(
    state: RunState, events: Iterable[Event], *, console: Console, now: Callable[[], float]
) -> RunState:
    picture = _Picture(state, now)
    live = Live(
        get_renderable=picture.draw, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=False
    )
    with _while_it_is_read(console):
        live.start()
    try:
        for event in events:
            picture.state = fold(picture.state, event)
    finally:
        with _while_it_is_read(console):
            live.stop()
    return picture.state


def _printed(state: RunState, events: Iterable[Event], *, console: Console, lines: Lines) -> RunState:
    for event in events:
        state = fold(state, event)
        for line in lines.of(event, state):
            _print(console, line)
    return state


def _warnings(state: RunState) -> list[str]:
    # The list of last events may have cut them, and leaves out the cures.
    return [f"{warned.message}\n  {warned.cure}" for warned in state.warnings[-3:]]


def _print(console: Console, line: str) -> None:
    writable = line.encode(console.encoding, "replace").decode(console.encoding)
    with _while_it_is_read(console):
        console.print(Text(writable), soft_wrap=True)


@contextmanager
def _while_it_is_read(console: Console) -> Iterator[None]:
    """Makes a console silent that nobody reads any more."""
    try:
        yield
    except (SystemExit, OSError):  # so rich leaves when a pipe is closed, and so a closed terminal is told
        console.quiet = True
