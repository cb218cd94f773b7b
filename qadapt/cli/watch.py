"""`qadapt watch`: the dashboard of a run from another terminal, from its `events.jsonl` alone."""

from __future__ import annotations

from typing import Annotated

import typer

from qadapt.cli.screen import console, error_console


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

    from qadapt.errors import BadOutput
    from qadapt.run_folder import find_run, is_worked_on
    from qadapt.view.dashboard import Dashboard
    from qadapt.view.figures import figures
    from qadapt.view.journal import follow, read_events
    from qadapt.view.lines import summary
    from qadapt.view.screen import show
    from qadapt.view.state import fold_all, left

    screen = console()
    found = find_run(run, folder)

    def is_left() -> bool:
        try:
            return not is_worked_on(found)
        except BadOutput:  # a folder that only may be read says nothing
            return False

    is_dead = is_left()
    state = fold_all(read_events(found.path))
    state = left(state) if is_dead else state
    if json:
        typer.echo(json_text.dumps(figures(state, time.time()), indent=2))
        return
    if (once or (is_dead and screen.is_terminal)) and not screen.options.ascii_only:
        screen.print(Dashboard(state, time.time()))
        return
    events = read_events(found.path) if once else follow(found.path, is_left=is_left)
    try:
        state = show(events, console=screen, is_live=screen.is_terminal and not once, is_quiet=False)
    except KeyboardInterrupt:
        error_console().print("left; the run goes on")
        return
    if not state.is_over and is_left():
        screen.print("\n".join(summary(left(state))), markup=False, soft_wrap=True)
