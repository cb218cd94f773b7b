"""Where commands write: results to the console, errors to the other one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(*, is_quiet: bool = False) -> Console:
    """The console of results."""
    from rich.console import Console

    return Console(quiet=is_quiet, highlight=False)


def error_console() -> Console:
    """The console of errors and notices: results stay clean for a pipe."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
