"""`qadapt train` and `qadapt resume`: a run with its dashboard, and a polite Ctrl-C."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt import control
from qadapt.cli.screen import console, error_console
from qadapt.errors import BadOutput

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
    rehearse_only: Annotated[
        bool, typer.Option("--rehearse-only", help="Stop after the rehearsal, and leave no run behind.")
    ] = False,
) -> None:
    """Trains a recipe. Ctrl-C finishes the micro-batch, saves and leaves; a second one leaves now, whole.

    Examples: `qadapt train my-recipe.yaml`, `qadapt train llama-3.1-8b-qlora-12gb train.learning_rate=1e-4
    data.length=1024 run.name=first`. Whether the longest rows fit, in a minute: `qadapt train my-recipe.yaml
    --rehearse-only`.
    """
    from qadapt.recipe_file import read_recipe

    checked = read_recipe(recipe, overrides or [])
    run_folder = Path(checked.run.folder) / checked.run.name

    def begin() -> Iterator[Event]:
        from qadapt.run import rehearse
        from qadapt.run import train as train_recipe

        return (rehearse if rehearse_only else train_recipe)(checked)

    _watch_over(_begun(begin), run_folder, is_quiet=quiet, is_plain=plain)


def resume(
    run: Annotated[str, typer.Argument(help="Name of the run, or the path of its folder.")],
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    replan: Annotated[
        bool,
        typer.Option("--replan", help="Plan anew for this machine as it is now, and its memory section."),
    ] = False,
    allow_change: Annotated[
        bool,
        typer.Option("--allow-change", help="Go on though recipe, base, template or rows changed; recorded."),
    ] = False,
    quiet: Quiet = False,
    plain: Plain = False,
) -> None:
    """Goes on with a run that was stopped, killed or lost power, exactly where its newest checkpoint stands.

    Nothing is planned anew, and what changed since the run began is refused by name, unless you ask for it.
    Examples: `qadapt resume my-run`; on another card, or with another memory.budget in the run's recipe.yaml:
    `qadapt resume my-run --replan`.
    """
    from qadapt.run_folder import find_run
    from qadapt.view.journal import read_events

    run_folder = find_run(run, folder).path
    before = read_events(run_folder)

    def begin() -> Iterator[Event]:
        from qadapt.run import resume as resume_run

        return resume_run(run, folder=folder, replan=replan, allow_change=allow_change)

    _watch_over(_begun(begin), run_folder, is_quiet=quiet, is_plain=plain, before=before)


def _begun(begin: Callable[[], Iterator[Event]]) -> Iterator[Event]:
    """The events of a run, after one that is on the screen while the heavy libraries are imported."""
    from qadapt.events import StageStarted
    from qadapt.view.lines import STARTING

    yield StageStarted(stage=STARTING)
    yield from begin()


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
def _polite_interrupt(run_folder: Path) -> Iterator[Watch]:
    """A first Ctrl-C (or SIGTERM, SIGHUP, Ctrl-Break) asks the run to save and leave; a second leaves now.

    Before the first step, or a wait for it, there is nothing to save, and Ctrl-C leaves at once. That the
    terminal is closed is often said twice, by the system and the shell: only the first SIGHUP counts.
    """
    has_begun = is_asked = False

    def watched(events: Iterable[Event]) -> Iterator[Event]:
        nonlocal has_begun
        for event in events:
            has_begun = has_begun or type(event).__name__ in ("StepDone", "Paused")
            yield event

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        if is_asked and signal.Signals(number).name == "SIGHUP":
            return
        if is_asked or not has_begun:
            raise KeyboardInterrupt
        is_asked = True
        try:
            control.ask(run_folder, "stop")
        except BadOutput:  # nor could it be saved there
            raise KeyboardInterrupt from None
        # RuntimeError: the signal came in the middle of printing something else. The others: nobody reads any
        # more, as when Ctrl-C ended the other end of a pipe, too, or the terminal was closed.
        with suppress(RuntimeError, SystemExit, OSError):
            error_console().print("finishing the micro-batch, then saving; Ctrl-C again leaves now")

    before = {each: signal.signal(each, handle) for each in _leaving_signals()}
    try:
        yield watched
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _leaving_signals() -> tuple[signal.Signals, ...]:
    if sys.platform == "win32":
        return (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup: the run outlives its terminal
        return (signal.SIGINT, signal.SIGTERM)
    return (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
