"""`qadapt export`: a trained adapter as a model, a GGUF file or an adapter, proven; and onto a hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qadapt.events import Event, Exported
    from qadapt.export.hub import HubTarget

FormOption = Annotated[
    str | None,
    typer.Option(
        help="merged-fp16, -bf16, -fp32: a whole model; bnb-4bit: one in 4 bits; gguf-q8_0, -f16, -bf16, "
        "-q4_0, -q4_1, -q5_0, -q5_1, and -q4_k_m with llama.cpp installed; adapter or gguf-lora: the "
        "adapter alone. Default: the recipe's export.form."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Weights to merge on: dequantized (what was trained on), original, or auto (what answers "
        "held-out rows better)."
    ),
]


def export(
    run: Annotated[
        str,
        typer.Argument(help="A run, an adapter's folder, or a name, tag or version of the store."),
    ],
    form: FormOption = None,
    base: BaseOption = None,
    weight: Annotated[
        float, typer.Option(help="How much of its update is merged: 1, as it was trained.")
    ] = 1.0,
    add: Annotated[
        list[str] | None,
        typer.Option("--with", help="RUN=WEIGHT: merge the update of this one, too; may be repeated."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="The folder to be; default: export/<form> in the run's folder.")
    ] = None,
    no_proof: Annotated[
        bool, typer.Option("--no-proof", help="Do not compare it with the model that was trained.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(help="Then push it to this repository, owner/name, as `hf auth login` allows."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a new repository is private.")
    ] = False,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: Annotated[str, typer.Option(help="Where the store of adapters is.")] = "adapters",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Makes a model of an adapter, compares it with what was trained, and writes it: all of it, or nothing.

    Examples: `qadapt export my-run`, `qadapt export my-run --form gguf-q8_0`, `qadapt export my-run --form
    merged-bf16 --base auto --to models/mine`, `qadapt export my-run --form adapter --push me/mine --private`,
    `qadapt export my-run --weight 0.7 --with other=0.3 --to models/both` (only its numbers are proven then:
    no such model was trained).
    """
    import json as json_text

    from qadapt.cli.screen import console
    from qadapt.exporting.export import export as export_run

    screen = console(is_quiet=json)
    target = _hub_target(push, is_private=private)
    runs = _weighted({run: weight}, add or [])
    events = export_run(
        runs,
        form=form,
        base=base,
        to=to,
        folder=folder,
        store=store,
        proof=not no_proof,
        is_shared=target is not None,
    )
    exported = show_export(events, console=screen)
    pushed = None if target is None else _push(exported, target, console=screen)
    if json:
        typer.echo(json_text.dumps(result_values(exported, pushed=pushed), indent=2))


def _weighted(runs: dict[str, float], more: Iterable[str]) -> dict[str, float]:
    """The runs that are merged, with their weights."""
    from qadapt.errors import BadRecipe

    for given in more:
        run, _, weight = given.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            run = ""
        if not run or run in runs:
            raise BadRecipe(
                f"--with {given} names no further run with its weight.",
                cure="Give each other run once, such as --with other=0.3.",
            )
        runs[run] = number
    return runs


def _hub_target(push: str | None, *, is_private: bool) -> HubTarget | None:
    """Where to push to, checked before anything is made."""
    from qadapt.errors import BadRecipe

    if push is None:
        if is_private:
            raise BadRecipe(
                "--private says how to push, and nothing is pushed.", cure="Add --push owner/name."
            )
        return None
    from qadapt.export.hub import HubTarget, check_target

    target = HubTarget(push, is_private=is_private)
    check_target(target)
    return target


def _push(exported: Exported, target: HubTarget, *, console: Console) -> str:
    from qadapt.adapters.versions import PATTERNS
    from qadapt.export.hub import push_folder

    console.print(f"pushing to {target.name}", markup=False)
    replaces = PATTERNS if exported.form == "adapter" else ()
    address = push_folder(Path(exported.folder), target, message=f"Add {exported.form}", replaces=replaces)
    console.print(f"pushed: {address}", markup=False, soft_wrap=True)
    return address


def result_values(exported: Exported, *, pushed: str | None = None) -> dict[str, object]:
    """What `--json` prints: `schema` 1, form, base, folder, bytes, seconds, notes, pushed.

    Args:
        exported: The end of an export.
        pushed: The commit's address on a hub.
    """
    return {
        "schema": 1,
        "form": exported.form,
        "base": exported.base or None,
        "folder": exported.folder,
        "bytes": exported.bytes,
        "seconds": round(exported.seconds, 3),
        "notes": list(exported.notes),
        "pushed": pushed,
    }


def show_export(events: Iterable[Event], *, console: Console) -> Exported:
    """Draws an export while it happens: a bar for each stage on a terminal, else a line; and returns its end.

    Args:
        events: An export, whose last event is `Exported`.
        console: Where to draw.
    """
    from qadapt.cli.stages import drawn_stages
    from qadapt.events import Exported
    from qadapt.units import format_bytes, format_seconds

    exported: Exported | None = None
    with drawn_stages(console) as draw:
        for event in events:
            if isinstance(event, Exported):
                exported = event
            else:
                draw(event)
    assert exported is not None, "an export ends with Exported or an error"
    for note in exported.notes:
        console.print(note, markup=False, highlight=False)
    size, took = format_bytes(exported.bytes), format_seconds(exported.seconds)
    on = f" on the {exported.base} base" if exported.base else ""
    words = f"{exported.form}{on}: {size} in {took}, {exported.folder}"
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    return exported
