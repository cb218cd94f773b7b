"""`qadapt estimate` and `qadapt plan`: what a step takes, and the fastest way to make it fit. No torch.

A known model is estimated without reading any recipe (pydantic costs start-up time).
"""

from __future__ import annotations

import dataclasses
import json as json_text
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qadapt.errors import BadModel, BadRecipe
from qadapt.hardware.cards import cards as all_cards
from qadapt.hardware.target import Target, find_target
from qadapt.plan.estimate import estimate_step
from qadapt.plan.fit import fit
from qadapt.plan.knobs import PLANNED
from qadapt.plan.ladder import Change, ladder
from qadapt.plan.record import estimate_record, plan_record
from qadapt.plan.setting import Setting, auto_dtypes, check_setting, setting_of
from qadapt.shape import ModelShape, find_shape, known_models
from qadapt.units import parse_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from qadapt.recipe import Recipe

CardOption = Annotated[
    str | None, typer.Option(help="A card, such as `RTX 4060`; `--cards` lists them. Default: this machine.")
]
VramOption = Annotated[str | None, typer.Option(help="What is free on the card, such as 7.3GiB.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the values as JSON (schemas/estimate.schema.json).")
]


@dataclass(frozen=True)
class Question:
    """What is asked: a model, a step of it, where, and how many rows one optimizer step has."""

    shape: ModelShape
    setting: Setting
    target: Target
    rows_per_step: int
    free: frozenset[str]


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
    recompute: Annotated[str | None, typer.Option(help="all or none: activation checkpointing.")] = None,
    supervised: Annotated[
        float | None, typer.Option(help="Share of the tokens that the loss counts; unknown counts as all.")
    ] = None,
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
        _print(_catalogue(is_cards=cards))
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
    question = _changed(question, changes, is_recipe=question.rows_per_step > 0)
    _answer_estimate(question, is_json=json)


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe: a file, or the name of a shipped one.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value.", show_default=False)
    ] = None,
    *,
    card: CardOption = None,
    vram: VramOption = None,
    json: JsonOption = False,
) -> None:
    """The fastest way to run a recipe within a card's memory, each choice with its price.

    Examples: `qadapt plan my.yaml`, `qadapt plan llama-3.1-8b-qlora-8gb --card "RTX 4060"
    memory.recompute=all`.
    """
    from qadapt.view.tables import EstimateTable, PlanTable

    question = ask_recipe(recipe, overrides or (), card=card, vram=vram)
    found = fit(
        question.shape,
        question.setting,
        budget_bytes=question.target.free_bytes,
        rows_per_step=question.rows_per_step,
        free=question.free,
        card=question.target.card,
    )
    if json:
        record = plan_record(
            question.shape, found, target=question.target, rows_per_step=question.rows_per_step
        )
        typer.echo(json_text.dumps(record, indent=2))
        return
    table = EstimateTable(question.shape, found.estimate, question.target, question.rows_per_step)
    _print(PlanTable(table, found.reasons))


def ask(
    model: str, overrides: list[str] | tuple[str, ...], *, card: str | None, vram: str | None
) -> Question:
    """What `estimate` is asked: a recipe's step, or a known model with usual settings.

    Raises:
        QadaptError: The model, the card or an override is wrong.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        return ask_recipe(model, overrides, card=card, vram=vram)
    try:
        shape = find_shape(model)
    except BadModel:
        if not _is_recipe(model):
            raise
        return ask_recipe(model, overrides, card=card, vram=vram)
    if overrides:
        return _ask_overridden(model, overrides, card=card, vram=vram)
    target = find_target(card, vram)
    compute_dtype, adapter_dtype = auto_dtypes(target.device, has_bf16=target.has_bf16)
    setting = Setting(
        length=min(2048, shape.context),
        compute_dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
        optimizer="adamw-8bit" if target.device == "cuda" else "adamw",
        accumulates=False,
        device=target.device,
    )
    return Question(shape, setting, target, 0, frozenset())


def ask_recipe(
    recipe: str, overrides: list[str] | tuple[str, ...], *, card: str | None, vram: str | None
) -> Question:
    """What a recipe asks, on a card, an amount of memory, or this machine.

    Raises:
        QadaptError: The recipe, its model or the card is wrong.
    """
    from qadapt.recipe_file import read_recipe

    return _of_recipe(read_recipe(recipe, overrides), card=card, vram=vram)


def _ask_overridden(
    model: str, overrides: list[str] | tuple[str, ...], *, card: str | None, vram: str | None
) -> Question:
    """A known model with a recipe's defaults, overridden; one row is a step unless an override says more."""
    from qadapt.recipe_file import apply_override, check_recipe

    values: dict[str, object] = {
        "model": {"source": model},
        "data": {"sources": [{"path": "rows.jsonl"}], "length": min(2048, find_shape(model).context)},
        "train": {"rows_per_step": 1},
        "run": {"name": "estimate"},
    }
    for override in overrides:
        apply_override(values, override)
    return _of_recipe(check_recipe(values, origin="the overrides"), card=card, vram=vram)


def _of_recipe(recipe: Recipe, *, card: str | None, vram: str | None) -> Question:
    shape = find_shape(recipe.model.source)
    target = find_target(card, vram, device=recipe.memory.device)
    if recipe.memory.budget is not None and vram is None:
        target = dataclasses.replace(
            target, free_bytes=parse_bytes(recipe.memory.budget), assumption="memory.budget"
        )
    compute_dtype, adapter_dtype = auto_dtypes(target.device, has_bf16=target.has_bf16)
    setting = setting_of(
        recipe, shape, device=target.device, compute_dtype=compute_dtype, adapter_dtype=adapter_dtype
    )
    wanted = {"micro_batch": recipe.memory.micro_batch, "recompute": recipe.memory.recompute}
    free = frozenset(name for name in PLANNED if wanted[name] == "auto")
    return Question(shape, setting, target, recipe.train.rows_per_step, free)


def _changed(question: Question, changes: dict[str, object], *, is_recipe: bool) -> Question:
    """The question with the command's own options applied; without a recipe one forward pass is a step."""
    setting = dataclasses.replace(question.setting, **changes)  # type: ignore[arg-type]
    check_setting(question.shape, setting)
    rows_per_step = max(question.rows_per_step, setting.rows) if is_recipe else setting.rows
    setting = dataclasses.replace(setting, accumulates=rows_per_step > setting.rows)
    return dataclasses.replace(question, setting=setting, rows_per_step=rows_per_step)


def _answer_estimate(question: Question, *, is_json: bool) -> None:
    found = estimate_step(question.shape, question.setting, card=question.target.card)
    changes: tuple[Change, ...] = ()
    if not found.fits(question.target.free_bytes):
        changes = ladder(
            question.shape,
            question.setting,
            budget_bytes=question.target.free_bytes,
            rows_per_step=question.rows_per_step,
            card=question.target.card,
        )
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

    _print(EstimateTable(question.shape, found, question.target, question.rows_per_step, changes))


def _recompute(word: str) -> Literal["all", "none"]:
    if word == "all" or word == "none":
        return word  # type: ignore[return-value]
    raise BadRecipe(f"--recompute is {word!r}.", cure="Give all or none.")


def _is_recipe(name: str) -> bool:
    from qadapt.recipe_file import shipped_recipes

    return Path(name).is_file() or name in shipped_recipes()


def _catalogue(*, is_cards: bool) -> RenderableType:
    from qadapt.view.tables import catalogue_table, models_table

    if is_cards:
        return catalogue_table(all_cards())
    return models_table([find_shape(name) for name in known_models()])


def _print(table: RenderableType) -> None:
    from rich.console import Console

    Console().print(table)
