"""`qadapt estimate` and `qadapt plan`: what a step takes, and the fastest way to make it fit. No torch."""

from __future__ import annotations

import json as json_text
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qadapt.cli.screen import console
from qadapt.errors import BadRecipe
from qadapt.hardware.cards import cards as all_cards
from qadapt.plan.record import estimate_record, plan_record
from qadapt.plan.setting import Recompute
from qadapt.planning import Question, ask, ask_recipe
from qadapt.shape import find_config, known_models, known_shapes

if TYPE_CHECKING:
    from rich.console import RenderableType

CardOption = Annotated[
    str | None, typer.Option(help="A card, such as `RTX 4060`; `--cards` lists them. Default: this machine.")
]
VramOption = Annotated[str | None, typer.Option(help="What is free on the card, such as 7.3GiB.")]
SupervisedOption = Annotated[
    float | None,
    typer.Option(help="Share of the tokens that the loss counts, such as 0.4. Default: all, the worst case."),
]
RECOMPUTE_WORDS: tuple[Literal["all", "none"], ...] = ("all", "none")
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the values as JSON (schemas/estimate.schema.json).")
]


def estimate(
    model: Annotated[
        str | None, typer.Argument(help="A known model, a folder with a config.json, or a recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, as in a recipe.", show_default=False)
    ] = None,
    *,
    card: CardOption = None,
    vram: VramOption = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows in one forward pass.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    recompute: Annotated[
        str | None, typer.Option(help="Activation checkpointing: all, none, or how many of the first layers.")
    ] = None,
    supervised: SupervisedOption = None,
    models: Annotated[bool, typer.Option("--models", help="List the known models and leave.")] = False,
    cards: Annotated[bool, typer.Option("--cards", help="List the known cards and leave.")] = False,
    json: JsonOption = False,
) -> None:
    """What one training step takes, by category, and whether it fits. Reads no weights, needs no GPU.

    Examples: `qadapt estimate Llama-3.1-8B --card "RTX 4060" --length 2048`,
    `qadapt estimate llama-3.1-8b-qlora-8gb data.length=1024 --vram 7.3GiB`, `qadapt estimate --models`.

    With --json the output has at least: schema, peak_allocated_bytes, categories (name to bytes at the peak),
    reserved_bytes (low, high), context_bytes, host_bytes, disk_bytes, fits, exact.
    """
    if models or cards:
        console().print(_catalogue(is_cards=cards))
        return
    if model is None:
        raise BadRecipe(
            "`qadapt estimate` needs a model or a recipe.",
            cure="Give one, such as Llama-3.1-8B; `qadapt estimate --models` lists the known ones.",
        )
    question = ask(model, overrides or (), card=card, vram=vram)
    asked = {"length": length, "rows": rows, "rank": rank, "supervised_share": supervised}
    changes: dict[str, object] = {name: value for name, value in asked.items() if value is not None}
    if recompute is not None:
        changes["recompute"] = _recompute(recompute)
    _answer_estimate(question.changed(changes), is_json=json)


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value.", show_default=False)
    ] = None,
    *,
    card: CardOption = None,
    vram: VramOption = None,
    supervised: SupervisedOption = None,
    json: JsonOption = False,
) -> None:
    """The fastest way to run a recipe within a card's memory, each choice with its price.

    Examples: `qadapt plan my.yaml`, `qadapt plan llama-3.1-8b-qlora-8gb --card "RTX 4060"
    memory.recompute=all`.
    """
    from qadapt.view.tables import EstimateTable, PlanTable

    question = ask_recipe(recipe, overrides or (), card=card, vram=vram)
    if supervised is not None:
        question = question.changed({"supervised_share": supervised})
    found = question.plan()
    if json:
        record = plan_record(
            question.shape, found, target=question.target, rows_per_step=question.rows_per_step
        )
        typer.echo(json_text.dumps(record, indent=2))
        return
    table = EstimateTable(question.shape, found.estimate, question.target, question.rows_per_step)
    console().print(PlanTable(table, found.reasons))


def _recompute(text: str) -> Recompute:
    for word in RECOMPUTE_WORDS:
        if text == word:
            return word
    try:
        return int(text)
    except ValueError:
        raise BadRecipe(
            f"--recompute is {text!r}.", cure="Give all, none, or how many of the first layers."
        ) from None


def _answer_estimate(question: Question, *, is_json: bool) -> None:
    found = question.estimate()
    changes = () if found.fits(question.target.free_bytes) else question.changes()
    if is_json:
        record = estimate_record(
            question.shape,
            found,
            target=question.target,
            rows_per_step=question.rows_per_step,
            changes=changes,
        )
        typer.echo(json_text.dumps(record, indent=2))
        return
    from qadapt.view.tables import EstimateTable

    console().print(EstimateTable(question.shape, found, question.target, question.rows_per_step, changes))


def _catalogue(*, is_cards: bool) -> RenderableType:
    from qadapt.view.tables import catalogue_table, models_table

    if is_cards:
        return catalogue_table(all_cards())
    shapes = known_shapes()
    proven = {shape.name for shape in shapes}
    return models_table(shapes, [find_config(name) for name in known_models() if name not in proven])
