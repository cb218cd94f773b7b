"""`qadapt train` and `qadapt resume`: a run with its dashboard, and a polite Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt import control
from qadapt.cli.screen import console, error_console

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qadapt.events import Event

Watch = Callable[["Iterable[Event]"], "Iterator[Event]"]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and the end only.")]
Plain = Annotated[bool, typer.Option("--plain", help="Print lines instead of the live screen.")]


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Fields of the recipe to change."),
    ] = None,
    quiet: Quiet = False,
    plain: Plain = False,
) -> None:
    """Trains a recipe. Ctrl-C finishes the step, saves and leaves; a second one leaves now, still whole.

    Examples: `qadapt train my-recipe.yaml`, `qadapt train llama-3.1-8b-qlora-12gb train.learning_rate=1e-4
    data.length=1024 run.name=first`.
    """
    from qadapt.recipe_file import read_recipe

    checked = read_recipe(recipe, overrides or [])
    run_folder = Path(checked.run.folder) / checked.run.name
    with _announced("starting"):
        from qadapt.run import train as train_recipe
    _watch_over(train_recipe(checked), run_folder, is_quiet=quiet, is_plain=plain)


def resume(
    run: Annotated[str, typer.Argument(help="Name of the run, or the path of its folder.")],
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    quiet: Quiet = False,
    plain: Plain = False,
) -> None:
    """Goes on with a run that was stopped, killed or lost power, exactly where its newest checkpoint stands.

    Example: `qadapt resume my-run`.
    """
    from qadapt.run_folder import find_run
    from qadapt.view.journal import read_events

    run_folder = find_run(run, folder).path
    before = read_events(run_folder)
    with _announced("starting"):
        from qadapt.run import resume as resume_run
    _watch_over(resume_run(run, folder=folder), run_folder, is_quiet=quiet, is_plain=plain, before=before)


def _watch_over(
    events: Iterator[Event],
    run_folder: Path,
    *,
    is_quiet: bool,
    is_plain: bool,
    before: Iterable[Event] = (),
) -> None:
    from qadapt.view.screen import show

    screen = console()
    with _polite_interrupt(run_folder) as watched:
        state = show(
            watched(events),
            console=screen,
            is_live=screen.is_terminal and not is_plain,
            is_quiet=is_quiet,
            before=before,
        )
    if state.stopped is not None:
        raise typer.Exit(130)


@contextmanager
def _announced(text: str) -> Iterator[None]:
    """Shows a word while the heavy libraries are imported (some seconds), on a terminal only."""
    screen = error_console()
    if not screen.is_terminal:
        yield
        return
    with screen.status(text):
        yield


@contextmanager
def _polite_interrupt(run_folder: Path) -> Iterator[Watch]:
    """From the first step on, a first Ctrl-C (or SIGTERM) asks the run to save and leave; a second leaves.

    Before the first step there is nothing to save, and Ctrl-C leaves at once.
    """
    has_begun = False

    def watched(events: Iterable[Event]) -> Iterator[Event]:
        nonlocal has_begun
        for event in events:
            has_begun = has_begun or type(event).__name__ == "StepDone"
            yield event

    def handle(number: int, frame: FrameType | None) -> None:
        if not has_begun or control.is_asked(run_folder, "stop"):
            raise KeyboardInterrupt
        control.ask(run_folder, "stop")
        error_console().print("finishing the step, then saving; Ctrl-C again leaves now", markup=False)

    before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield watched
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
