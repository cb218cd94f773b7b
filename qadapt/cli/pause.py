"""`qadapt pause` and `qadapt save`: ask a run that another process works on, and say what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt import control
from qadapt.cli.screen import console, error_console

if TYPE_CHECKING:
    from qadapt.events import Event
    from qadapt.run_folder import RunFolder

POLL_SECONDS = 0.2
Run = Annotated[str, typer.Argument(help="Name of the run, or the path of its folder.")]
Folder = Annotated[str, typer.Option(help="Where the runs are.")]


def pause(run: Run, folder: Folder = "runs") -> None:
    """Asks a running run to save and leave, so that its card is free, and waits until it has left.

    It finishes its micro-batch, not its step, and `qadapt resume` goes on exactly there.

    Example: `qadapt pause my-run`.
    """
    from qadapt.errors import BadRun
    from qadapt.events import RunFinished, Stopped

    found = _asked(run, folder, "pause", said="finishing the micro-batch, then saving")
    _wait(found, lambda: False)
    events = _events(found)
    last = events[-1] if events else None
    if isinstance(last, Stopped):
        _say(f"paused after step {last.step:,}, saved; the card is free. Go on with: qadapt resume {run}")
    elif isinstance(last, RunFinished):
        _say(f"the run finished meanwhile, after step {last.step:,}; `qadapt export {run}` writes the model")
    else:
        raise BadRun(
            f"The run {run} ended before it could pause; it is saved up to step {_saved_step(events):,}.",
            cure=f"What it said in its own terminal tells why; `qadapt resume {run}` goes on.",
        )


def save(run: Run, folder: Folder = "runs") -> None:
    """Asks a running run to write a checkpoint now and to go on, and waits until it is written.

    Example: `qadapt save my-run`.
    """
    from qadapt.errors import BadRun

    found = _asked(run, folder, "save", said="finishing the step, then saving")
    _wait(found, lambda: not control.is_asked(found.path, "save"))
    events = _events(found)
    if control.is_asked(found.path, "save"):
        raise BadRun(
            f"The run {run} ended before it could save; it is saved up to step {_saved_step(events):,}.",
            cure=f"`qadapt watch {run} --once` shows how it ended.",
        )
    _say(f"saved after step {_saved_step(events):,}; the run goes on")


def _asked(run: str, folder: str, request: control.Request, *, said: str) -> RunFolder:
    from qadapt.errors import BadRun
    from qadapt.run_folder import find_run, is_worked_on

    found = find_run(run, folder)
    if not is_worked_on(found):
        raise BadRun(
            f"No process works on the run {run}, so there is none to {request}.",
            cure=f"`qadapt watch {run} --once` shows where it stands; `qadapt resume {run}` goes on.",
        )
    control.ask(found.path, request)
    error_console().print(said, markup=False)
    return found


def _wait(run: RunFolder, is_done: Callable[[], bool]) -> None:
    from qadapt.run_folder import is_worked_on

    try:
        while not is_done() and is_worked_on(run):
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        error_console().print("left; the run does what it was asked for", markup=False)
        raise


def _events(run: RunFolder) -> list[Event]:
    from qadapt.view.journal import effective, read_events

    return effective(read_events(run.path)) if run.path.is_dir() else []


def _saved_step(events: list[Event]) -> int:
    from qadapt.events import CheckpointSaved

    return max((event.step for event in events if isinstance(event, CheckpointSaved)), default=0)


def _say(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)
