"""`qadapt adapters combine`: one adapter made of several, by weighted sums of what they change."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qadapt.cli.screen import console, error_console

if TYPE_CHECKING:
    from qadapt.export.combine import Combined


def combine(
    parts: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER=WEIGHT...",
            help="Runs, folders of adapters, or names of the store, each with its weight; less than 0 takes "
            "it away.",
        ),
    ],
    *,
    to: Annotated[Path, typer.Option(help="The folder to be.")],
    how: Annotated[
        str,
        typer.Option(
            help="sum: exactly; or of each change a share of its numbers only: magnitude (the largest), dare "
            "(any, scaled up), ties and dare-ties (the mean of those that agree in sign); of bottlenecks "
            "upper: those of a share of the layers, the upper ones (AdapterDrop)."
        ),
    ] = "sum",
    rank: Annotated[
        int | None, typer.Option(help="Compress to this rank, by SVD; default: the sum of the ranks.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="The share of the numbers of each change, or of layers, that stays: above 0, up to 1."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what dare keeps.")] = 0,
    folder: Annotated[str, typer.Option(help="Where the runs are.")] = "runs",
    store: Annotated[str, typer.Option(help="Where the store is.")] = "adapters",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")] = False,
) -> None:
    """Makes one adapter of several: the sum of what each changes, times its weight; and says what is lost.

    What has no sum (DoRA, IA3, whole tensors, new tokens) is refused; with the weight 1 and alone it is
    copied. Bottleneck adapters are averaged. The result is an adapter like any other, with the prompts of the
    first.

    Examples: `qadapt adapters combine summaries=0.7 tone=0.3 --to both`, `qadapt adapters combine both=1
    tone=-0.3 --to without`, `qadapt adapters combine a=1 b=1 --how ties --density 0.2 --rank 32 --to merged`.
    """
    import json as json_text

    from qadapt.cli.stages import drawn
    from qadapt.export.combine import Way
    from qadapt.export.combine import combine as combine_adapters
    from qadapt.trained.adapter import find_trained

    weights = [_weighted(part) for part in parts]
    chosen = [(find_trained(name, folder=folder, store=store).adapter, weight) for name, weight in weights]
    way = Way(how, rank=rank, density=density, seed=seed)
    made = drawn(combine_adapters(chosen, to, way=way), error_console())
    if json:
        typer.echo(json_text.dumps(result_values(made), indent=2))
    else:
        for line in sentences(made):
            console().print(line, markup=False, soft_wrap=True)


def result_values(made: Combined) -> dict[str, object]:
    """What `--json` prints: `schema` 1, folder, weights, rank, dtype, bytes, error, worst, worst_error."""
    return {
        "schema": 1,
        "folder": str(made.folder),
        "weights": made.weights,
        "rank": made.rank,
        "dtype": made.dtype,
        "bytes": made.bytes,
        "error": made.error,
        "worst": made.worst,
        "worst_error": made.worst_error,
    }


def sentences(made: Combined) -> list[str]:
    """What there is to say of an adapter that was made."""
    from qadapt.adapters.facts import is_side_car
    from qadapt.units import format_bytes

    size = format_bytes(made.bytes)
    if not made.weights:
        return [f"a copy, {size}: {made.folder}"]
    what, wide = ("tensors", "width") if is_side_car(made.folder) else ("weights", "rank")
    lines = [f"{made.weights} {what}, {wide} {made.rank}, {made.dtype}, {size}: {made.folder}"]
    if not made.error:
        return [*lines, "It is what was asked for, to the bit."]
    lost = f"What is written differs by {made.error:.3g} of what was asked for (relative, Frobenius norm)"
    return [*lines, f"{lost}; most in {made.worst}: {made.worst_error:.3g}."]


def _weighted(part: str) -> tuple[str, float]:
    """The name and the weight of an adapter."""
    from qadapt.errors import BadRecipe

    name, _, weight = part.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        name = ""
    if not name:
        raise BadRecipe(
            f"{part!r} is no adapter with its weight.", cure="Give each as name=weight, such as mine=0.7."
        )
    return name, number
