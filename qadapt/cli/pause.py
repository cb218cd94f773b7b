"""`qadapt pause` and `qadapt save`: ask a run that another process works on, and say what became of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
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

    asked = _asked(run, folder, "pause")
    error_console().print("finishing the micro-batch, then saving", markup=False)
    _wait(asked, lambda: any(isinstance(event, Stopped) for event in asked.said()))
    left = next((event for event in asked.said() if isinstance(event, Stopped | RunFinished)), None)
    if isinstance(left, Stopped):
        _say(f"paused after step {left.step:,}, saved; its memory is free. Go on with: qadapt resume {run}")
    elif left is not None:
        _say(f"the run finished meanwhile, after step {left.step:,}; `qadapt export {run}` writes the model")
    else:
        raise BadRun(
            f"The run {run} ended before it could pause; it is saved up to step {_saved_step(asked.run):,}.",
            cure=f"What it said in its own terminal tells why; `qadapt resume {run}` goes on.",
        )


def save(run: Run, folder: Folder = "runs") -> None:
    """Asks a running run to write a checkpoint now and to go on, and waits until it is written.

    Example: `qadapt save my-run`.
    """
    from qadapt.errors import BadRun
    from qadapt.events import CheckpointSaved, Paused

    def is_saved() -> bool:
        is_new = any(isinstance(event, CheckpointSaved) for event in asked.said())
        return is_new or isinstance(_events(asked.run)[-1], Paused)  # it saved before it began to wait

    asked = _asked(run, folder, "save")
    error_console().print("finishing the step, then saving", markup=False)
    _wait(asked, is_saved)
    if asked.is_open() or not is_saved():
        raise BadRun(
            f"The run {run} ended before it could save; it is saved up to step {_saved_step(asked.run):,}.",
            cure=f"`qadapt watch {run} --once` shows how it ended.",
        )
    last = _events(asked.run)[-1]
    then = f"waits: {last.reason}" if isinstance(last, Paused) else "goes on"
    _say(f"saved after step {_saved_step(asked.run):,}; the run {then}")


@dataclass(frozen=True)
class Asked:
    """A run that was asked for something, when its journal had so many events."""

    run: RunFolder
    request: control.Request
    events_before: int

    def is_open(self) -> bool:
        """Whether the request still waits."""
        return control.is_asked(self.run.path, self.request)

    def said(self) -> list[Event]:
        """What the run said since."""
        return _events(self.run)[self.events_before :]


def _asked(run: str, folder: str, request: control.Request) -> Asked:
    from qadapt.errors import BadRun
    from qadapt.run_folder import find_run, is_worked_on

    found = find_run(run, folder)
    if not is_worked_on(found):
        raise BadRun(
            f"No process works on the run {run}, so there is none to {request}.",
            cure=f"`qadapt watch {run} --once` shows where it stands; `qadapt resume {run}` goes on.",
        )
    asked = Asked(found, request, len(_events(found)))
    control.ask(found.path, request)
    return asked


def _wait(asked: Asked, is_done: Callable[[], bool]) -> None:
    """Waits until the request is done, and for one to leave until the process has left.

    A process that takes the run up clears away what it was asked before: then it is asked again.
    """
    from qadapt.events import Stopped
    from qadapt.run_folder import is_worked_on

    try:
        while is_worked_on(asked.run):
            if not asked.is_open():
                if not is_done():
                    control.ask(asked.run.path, asked.request)
                elif not isinstance(_events(asked.run)[-1], Stopped):
                    return
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        error_console().print("left; the run does what it was asked for", markup=False)
        raise


def _events(run: RunFolder) -> list[Event]:
    from qadapt.view.journal import read_events

    return read_events(run.path) if run.path.is_dir() else []


def _saved_step(run: RunFolder) -> int:
    from qadapt.events import CheckpointSaved
    from qadapt.view.journal import effective

    events = effective(_events(run))
    return max((event.step for event in events if isinstance(event, CheckpointSaved)), default=0)


def _say(text: str) -> None:
    console().print(text, markup=False, soft_wrap=True)
