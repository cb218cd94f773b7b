"""`qadapt verify`: whether an export is still what it was proven to be, and the proof once more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qadapt.exporting.proving import Verified


def verify(
    export: Annotated[Path, typer.Argument(help="The folder of an export.")],
    run: Annotated[
        str | None,
        typer.Option(
            help="Its run, or adapter of the store; default: the run it lies in, or the one of its name."
        ),
    ] = None,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: Annotated[str, typer.Option(help="Where the store of adapters is.")] = "adapters",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Repeats an export's proof: the hashes of its files, and all the rest if its run and base are here.

    Ends with 2 if anything differs. Examples: `qadapt verify runs/my-run/export/merged-fp16`, `qadapt verify
    models/mine --run my-run`.
    """
    import json as json_text

    from qadapt.cli.screen import console
    from qadapt.cli.stages import drawn
    from qadapt.errors import BadExport
    from qadapt.exporting.proving import verify_export

    screen = console(is_quiet=json)
    verified = drawn(verify_export(export, run=run, folder=folder, store=store), screen)
    if json:
        typer.echo(json_text.dumps(result_values(verified), indent=2))
    else:
        _print(verified, screen)
    if verified.faults:
        raise BadExport(
            f"{export} is not the export that was proven: {'; '.join(verified.faults)}.",
            cure="Copy it again from where it is whole, or export the run again.",
        )


def result_values(verified: Verified) -> dict[str, object]:
    """What `--json` prints: `proof` is the one just made, null where it was not, for the `reason` given."""
    return {
        "schema": 1,
        "holds": not verified.faults,
        "faults": list(verified.faults),
        "files": verified.files,
        "reason": verified.reason or None,
        "proof": None if verified.proof is None else verified.proof.values(),
    }


def _print(verified: Verified, screen: Console) -> None:
    if verified.faults:
        return
    lines = [f"{verified.files} files are what was written."]
    if verified.proof is None:
        lines.append(f"The rest of the proof is not repeated: {verified.reason}")
    else:
        lines += verified.proof.sentences()
    for line in lines:
        screen.print(line, markup=False, highlight=False)
