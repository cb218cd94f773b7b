"""Where commands write: results to the console, errors to the other one."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

    from qadapt.events import Event

Result = TypeVar("Result")


def console(*, is_quiet: bool = False) -> Console:
    """The console of results."""
    from rich.console import Console

    return Console(quiet=is_quiet, highlight=False, emoji=False)


def error_console() -> Console:
    """The console of errors and notices: results stay clean for a pipe."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, emoji=False)


def watched(work: Generator[Event, None, Result], *, first: str) -> Result:
    """Goes through the events; their stages stand on a terminal while they last.

    Args:
        work: What happens.
        first: What stands there before the first of them.
    """
    from qadapt.events import StageAdvanced, StageStarted
    from qadapt.stage import go_through

    with error_console().status(first) as status:

        def draw(event: Event) -> None:
            if isinstance(event, StageStarted):
                status.update(f"{event.stage} ...")
            elif isinstance(event, StageAdvanced):
                share = f"{event.done / event.total:.0%}" if event.total else f"{event.done:,} {event.unit}"
                status.update(f"{event.stage}: {share}")

        return go_through(work, draw)
