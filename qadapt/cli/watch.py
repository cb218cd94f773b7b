"""`qadapt watch`: the dashboard of a run from another terminal, from its `events.jsonl` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[str, typer.Argument(help="Name of the run, or the path of its folder.")],
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    once: Annotated[bool, typer.Option("--once", help="Print one picture and leave.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the numbers of this moment as JSON and leave.")
    ] = False,
) -> None:
    """Watches a run from another terminal, during it or after it ended; Ctrl-C leaves, the run goes on.

    Examples: `qadapt watch my-run`, `qadapt watch my-run --once`, `qadapt watch runs/my-run --json`.
    """
    import json as json_text
    import time

    from rich.console import Console

    from qadapt.view.dashboard import Dashboard
    from qadapt.view.figures import figures
    from qadapt.view.journal import follow, read_events
    from qadapt.view.screen import show
    from qadapt.view.state import fold_all

    console = Console()
    run_folder = find_run_folder(run, folder)
    if json:
        typer.echo(json_text.dumps(figures(fold_all(read_events(run_folder)), time.time()), indent=2))
        return
    if once and not console.options.ascii_only:
        console.print(Dashboard(fold_all(read_events(run_folder)), time.time()))
        return
    events = read_events(run_folder) if once else follow(run_folder)
    try:
        show(events, console=console, is_live=console.is_terminal and not once, is_quiet=False)
    except KeyboardInterrupt:
        console.print("left; the run goes on")


def find_run_folder(run: str, folder: str) -> Path:
    """The folder of a run given by name, or by path when the name has one; it may not exist."""
    named, given = Path(folder) / run, Path(run)
    return given if not named.is_dir() and len(given.parts) > 1 else named
