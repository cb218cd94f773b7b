"""`qadapt export`: the merged model of a finished run as a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qadapt.events import Event, Exported


def export(
    run: Annotated[str, typer.Argument(help="Name of the run, or the path of its folder.")],
    form: Annotated[
        str | None,
        typer.Option(help="merged-fp16, merged-bf16 or merged-fp32; default: the recipe's export.form."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Weights to merge on: dequantized (what was trained on) or original."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The folder to be; default: export/<form> in the run's folder.")
    ] = None,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Merges a run's adapter into its base and writes the model: all of it, or nothing.

    Examples: `qadapt export my-run`, `qadapt export my-run --form merged-bf16 --to models/mine`.
    """
    import json as json_text

    from qadapt.cli.screen import console
    from qadapt.run import export as export_run

    events = export_run(run, form=form, base=base, to=to, folder=folder)
    exported = show_export(events, console=console(is_quiet=json))
    if json:
        typer.echo(json_text.dumps(result_values(exported), indent=2))


def result_values(exported: Exported) -> dict[str, str | int | float]:
    """What `--json` prints: `schema` 1, form, base, folder, bytes, seconds."""
    return {
        "schema": 1,
        "form": exported.form,
        "base": exported.base,
        "folder": exported.folder,
        "bytes": exported.bytes,
        "seconds": round(exported.seconds, 3),
    }


def show_export(events: Iterable[Event], *, console: Console) -> Exported:
    """Draws an export while it happens: bars on a terminal, else one line per stage; and returns its end.

    Args:
        events: An export, whose last event is `Exported`.
        console: Where to draw.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from qadapt.events import Exported, StageAdvanced, StageStarted, Warned
    from qadapt.units import format_bytes, format_seconds

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    exported: Exported | None = None
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bars:
        tasks = {}
        for event in events:
            if isinstance(event, StageStarted):
                console.print(event.stage)
            elif isinstance(event, StageAdvanced):
                if event.stage not in tasks:
                    tasks[event.stage] = bars.add_task(event.stage, total=event.total)
                bars.update(tasks[event.stage], completed=event.done, total=event.total)
            elif isinstance(event, Warned):
                console.print(f"{event.message} {event.cure}", markup=False)
            elif isinstance(event, Exported):
                exported = event
    assert exported is not None, "an export ends with Exported or an error"
    size, took = format_bytes(exported.bytes), format_seconds(exported.seconds)
    words = f"{exported.form} on the {exported.base} base: {size} in {took}, {exported.folder}"
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    return exported
