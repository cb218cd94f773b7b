"""Estimate and plan: a model or a recipe in, bytes and seconds out, before anything is loaded. No torch.

The functions `estimate` and `plan` are qadapt's Python surface; the commands of the same names and a run ask
through the same `Question`. A known model is estimated without reading any recipe (pydantic costs start-up
time).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qadapt.errors import BadModel, NoClosedForm
from qadapt.estimating.question import Outline, Question
from qadapt.hardware.target import Target, find_target
from qadapt.plan.estimate import Estimate
from qadapt.plan.fit import Plan
from qadapt.plan.knobs import PLANNED
from qadapt.plan.packing import unseen_rows_notes
from qadapt.plan.recipe_setting import not_offloaded, setting_of
from qadapt.plan.setting import Setting, auto_dtypes, check_numbers
from qadapt.shape import ModelConfig, ModelShape, find_config, shape_from_config
from qadapt.units import parse_bytes

if TYPE_CHECKING:
    from qadapt.recipe import Recipe

ComputeType = Literal["bf16", "fp16", "fp32"]
AdapterType = Literal["bf16", "fp32"]


def estimate(
    model: str,
    overrides: Sequence[str] = (),
    *,
    card: str | None = None,
    vram: str | None = None,
    exact: bool = False,
    **step: object,
) -> Estimate:
    """What one micro-batch takes, by category.

    Args:
        model: A known model, a folder with a config.json, or a recipe (a file or a shipped name).
        overrides: `section.key=value` texts, as in a recipe.
        card: A card's name; default: this machine.
        vram: What is free on the card, such as `7.3GiB`.
        exact: Count it on the step itself, without its memory: takes seconds, and imports torch. A decoder
            without a closed form is always counted so.
        step: Fields of `Setting` to change: `length`, `rows`, `rank`, `recompute`, `supervised_share`.

    Raises:
        QadaptError: The model, the card, an override or a number is wrong.
    """
    question = ask(model, overrides, card=card, vram=vram).changed(step)
    return question.dry_run().estimate if exact or question.shape is None else question.estimate()


def plan(
    recipe: str, overrides: Sequence[str] = (), *, card: str | None = None, vram: str | None = None
) -> Plan:
    """The fastest way to run a recipe within a card's memory.

    Args:
        recipe: A recipe file, or the name of a shipped one.
        overrides: `section.key=value` texts.
        card: A card's name; default: this machine.
        vram: What is free on the card, such as `7.3GiB`.

    Raises:
        DoesNotFit: No setting fits; the cure lists the cheapest changes.
        QadaptError: The recipe, its model or the card is wrong.
    """
    return ask_recipe(recipe, overrides, card=card, vram=vram).plan()


def ask(model: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """What `estimate` is asked: a recipe's step, or a known model with usual settings.

    Raises:
        QadaptError: The model, the card or an override is wrong.
    """
    if Path(model).suffix in (".yaml", ".yml"):
        return ask_recipe(model, overrides, card=card, vram=vram)
    try:
        config = find_config(model)
    except BadModel:
        if not _is_recipe(model):
            raise
        return ask_recipe(model, overrides, card=card, vram=vram)
    if overrides:
        return _ask_overridden(model, overrides, card=card, vram=vram)
    setting, target = _usual(find_target(card, vram), length=min(2048, Outline.of(config).context))
    return Question(_shape_of(config), setting, target, 0, PLANNED, config)


def ask_models(*, card: str | None, vram: str | None) -> Question:
    """What `estimate --max model` asks without naming a model: usual settings."""
    setting, target = _usual(find_target(card, vram), length=2048)
    return Question(None, setting, target, 0, PLANNED)


def _usual(target: Target, *, length: int) -> tuple[Setting, Target]:
    compute_dtype, adapter_dtype = auto_dtypes(target.device, has_bf16=target.has_bf16)
    setting = Setting(
        length=length,
        compute_dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
        optimizer="adamw-8bit" if target.device == "cuda" else "adamw",
        accumulates=False,
        device=target.device,
    )
    return setting, target


def _shape_of(config: ModelConfig) -> ModelShape | None:
    try:
        return shape_from_config(config.values, name=config.name)
    except NoClosedForm:
        return None


def ask_recipe(recipe: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """What a recipe asks, on a card, an amount of memory, or this machine.

    Raises:
        QadaptError: The recipe, its model or the card is wrong.
    """
    from qadapt.recipe_file import read_recipe

    read = read_recipe(recipe, overrides)
    question = ask_of(read, card=card, vram=vram)
    notes = unseen_rows_notes(read.data.packing, question.shape, rows_per_step=question.rows_per_step)
    return dataclasses.replace(question, notes=(*question.notes, *notes))


def _ask_overridden(model: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """A known model with a recipe's defaults, overridden; one row is a step unless an override says more."""
    from qadapt.recipe_file import apply_override, check_recipe

    length = min(2048, Outline.of(find_config(model)).context)
    values: dict[str, object] = {
        "model": {"source": model},
        "data": {"sources": [{"path": "rows.jsonl"}], "length": length},
        "train": {"rows_per_step": 1},
        "run": {"name": "estimate"},
    }
    for override in overrides:
        apply_override(values, override)
    question = ask_of(check_recipe(values, origin="the overrides"), card=card, vram=vram)
    if any(override.partition("=")[0].strip() == "train.rows_per_step" for override in overrides):
        return question
    return dataclasses.replace(question, rows_per_step=0)


def ask_of(
    recipe: Recipe,
    *,
    card: str | None = None,
    vram: str | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    shape: ModelShape | None = None,
    types: tuple[ComputeType, AdapterType] | None = None,
) -> Question:
    """What a checked recipe asks.

    Args:
        recipe: The recipe.
        card: A card's name; default: this machine.
        vram: What is free on the card.
        device: Where it will run, if that has been chosen; default: the recipe's.
        shape: The model's shape, if it is at hand, with room for new tokens; default: a known model's.
        types: Of products and of adapters, if they have been chosen; default: by the card.

    Raises:
        QadaptError: The model or the card is wrong.
    """
    from qadapt.fusing import fused_on

    target = find_target(card, vram, device=device or recipe.memory.device)
    if recipe.memory.budget is not None and vram is None:
        free_bytes = parse_bytes(recipe.memory.budget)
        target = dataclasses.replace(target, free_bytes=free_bytes, assumption="memory.budget")
    compute_dtype, adapter_dtype = types or auto_dtypes(target.device, has_bf16=target.has_bf16)
    tokens = len(recipe.data.new_tokens)
    config = find_config(recipe.model.source).with_room(tokens) if shape is None else None
    chosen = shape if config is None else _shape_of(config)
    setting = setting_of(
        recipe, chosen, device=target.device, compute_dtype=compute_dtype, adapter_dtype=adapter_dtype
    )
    setting = dataclasses.replace(setting, fused=fused_on(recipe, chosen))
    memory = recipe.memory
    wanted = {"micro_batch": memory.micro_batch, "recompute": memory.recompute, "offload": memory.offload}
    free = frozenset(name for name in PLANNED if wanted.get(name, "auto") == "auto")
    if config is not None and chosen is None:
        check_numbers(Outline.of(config), setting)
    left = not_offloaded(memory.offload, setting.offload)
    notes = () if left is None else (left,)
    return Question(chosen, setting, target, recipe.train.rows_per_step, free, config, notes)


def _is_recipe(name: str) -> bool:
    from qadapt.recipe_file import shipped_recipes

    return Path(name).is_file() or name in shipped_recipes()
