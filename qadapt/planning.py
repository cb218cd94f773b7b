"""Estimate and plan: a model or a recipe in, bytes and seconds out, before anything is loaded. No torch.

The functions `estimate` and `plan` are qadapt's Python surface; the commands of the same names and a run ask
through the same `Question`. A known model is estimated without reading any recipe (pydantic costs start-up
time).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qadapt.errors import BadModel
from qadapt.hardware.target import Target, find_target
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.fit import Plan, fit
from qadapt.plan.knobs import PLANNED
from qadapt.plan.ladder import Change, ladder
from qadapt.plan.setting import Setting, auto_dtypes, check_setting, setting_of
from qadapt.shape import ModelShape, find_shape
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
    **step: object,
) -> Estimate:
    """What one micro-batch takes, by category.

    Args:
        model: A known model, a folder with a config.json, or a recipe (a file or a shipped name).
        overrides: `section.key=value` texts, as in a recipe.
        card: A card's name; default: this machine.
        vram: What is free on the card, such as `7.3GiB`.
        step: Fields of `Setting` to change: `length`, `rows`, `rank`, `recompute`, `supervised_share`.

    Raises:
        QadaptError: The model, the card, an override or a number is wrong.
    """
    question = ask(model, overrides, card=card, vram=vram).changed(step)
    return question.estimate()


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


@dataclass(frozen=True)
class Question:
    """What is asked: a model, a step of it, where, and how many rows one optimizer step has."""

    shape: ModelShape
    setting: Setting
    target: Target
    rows_per_step: int
    free: frozenset[str]

    def changed(self, step: dict[str, object]) -> Question:
        """The question with fields of its setting changed; without a recipe, one forward pass is a step."""
        setting = dataclasses.replace(self.setting, **step)  # type: ignore[arg-type]
        check_setting(self.shape, setting)
        rows_per_step = max(self.rows_per_step, setting.rows) if self.rows_per_step else setting.rows
        setting = dataclasses.replace(setting, accumulates=rows_per_step > setting.rows)
        return dataclasses.replace(self, setting=setting, rows_per_step=rows_per_step)

    def estimate(self) -> Estimate:
        """What one micro-batch takes."""
        return estimate_step(self.shape, self.setting, card=self.target.card)

    def changes(self) -> tuple[Change, ...]:
        """The cheapest changes that would make it fit."""
        return ladder(
            self.shape,
            self.setting,
            budget_bytes=self.target.free_bytes,
            rows_per_step=self.rows_per_step,
            card=self.target.card,
        )

    def plan(self) -> Plan:
        """The fastest setting of the free knobs that fits.

        Raises:
            DoesNotFit: None does.
        """
        return fit(
            self.shape,
            self.setting,
            budget_bytes=self.target.free_bytes,
            rows_per_step=self.rows_per_step,
            free=self.free,
            card=self.target.card,
        )


def ask(model: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
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


def ask_recipe(recipe: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
    """What a recipe asks, on a card, an amount of memory, or this machine.

    Raises:
        QadaptError: The recipe, its model or the card is wrong.
    """
    from qadapt.recipe_file import read_recipe

    return ask_of(read_recipe(recipe, overrides), card=card, vram=vram)


def _ask_overridden(model: str, overrides: Sequence[str], *, card: str | None, vram: str | None) -> Question:
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
    return ask_of(check_recipe(values, origin="the overrides"), card=card, vram=vram)


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
        shape: The model's shape, if it is at hand; default: a known model's.
        types: Of products and of adapters, if they have been chosen; default: by the card.

    Raises:
        QadaptError: The model or the card is wrong.
    """
    target = find_target(card, vram, device=device or recipe.memory.device)
    if recipe.memory.budget is not None and vram is None:
        free_bytes = parse_bytes(recipe.memory.budget)
        target = dataclasses.replace(target, free_bytes=free_bytes, assumption="memory.budget")
    compute_dtype, adapter_dtype = types or auto_dtypes(target.device, has_bf16=target.has_bf16)
    chosen = shape or find_shape(recipe.model.source)
    setting = setting_of(
        recipe, chosen, device=target.device, compute_dtype=compute_dtype, adapter_dtype=adapter_dtype
    )
    wanted = {"micro_batch": recipe.memory.micro_batch, "recompute": recipe.memory.recompute}
    free = frozenset(name for name in PLANNED if wanted[name] == "auto")
    return Question(chosen, setting, target, recipe.train.rows_per_step, free)


def _is_recipe(name: str) -> bool:
    from qadapt.recipe_file import shipped_recipes

    return Path(name).is_file() or name in shipped_recipes()
