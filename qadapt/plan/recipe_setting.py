"""What a recipe asks of a step, as a `Setting`, once somebody has said on which device and in which types.

What the recipe leaves to the plan begins with what takes the least memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from qadapt.methods import METHODS
from qadapt.plan.ranks import check_steps
from qadapt.plan.setting import Setting, check_setting
from qadapt.shape import ModelShape, Part

if TYPE_CHECKING:
    from qadapt.recipe import AdapterSection, Recipe


def setting_of(
    recipe: Recipe,
    shape: ModelShape | None,
    *,
    device: Literal["cpu", "cuda"],
    compute_dtype: Literal["bf16", "fp16", "fp32"],
    adapter_dtype: Literal["bf16", "fp32"],
    supervised_share: float = 1.0,
) -> Setting:
    """The setting a recipe asks for, before the plan fills in what is `auto`, and without what is fused.

    A type that the recipe names overrules the one given here. An `auto` micro-batch starts at one row and
    `auto` recompute at every layer: the least memory, from which `fit` goes up. With `auto` packing rows are
    filled up: only who has them can say whether packing is faster. Without a shape the step is not checked.

    Raises:
        BadRecipe: See `check_setting`; or it names fewer steps than its method has a schedule for.
    """
    adapter, memory = recipe.adapter, recipe.memory
    if recipe.train.steps is not None:
        check_steps(adapter.method, recipe.train.steps)
    rows = 1 if memory.micro_batch == "auto" else memory.micro_batch
    optimizer = recipe.train.optimizer
    if optimizer == "auto":
        optimizer = "adamw-8bit" if device == "cuda" else "adamw"
    setting = Setting(
        rows=rows,
        length=recipe.data.length,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        method=adapter.method,
        rank=adapter.rank,
        dropout=adapter.dropout,
        targets=adapter.targets,
        nonlinearity=adapter.nonlinearity,
        adapter_dtype=_adapter_dtype(adapter, usual=adapter_dtype),
        compute_dtype=compute_dtype if memory.compute_dtype == "auto" else memory.compute_dtype,
        optimizer=optimizer,
        supervised_share=supervised_share,
        recompute="all" if memory.recompute == "auto" else memory.recompute,
        offload=_offload_of(recipe, device),
        accumulates=recipe.train.rows_per_step > rows,
        packed=recipe.data.packing is True,
        documents=recipe.train.rows_per_step if recipe.data.packing is True else 0,
        new_tokens=len(recipe.data.new_tokens),
        device=device,
    )
    if shape is not None:
        check_setting(shape, setting)
    return setting


def not_offloaded(asked: object, kept: Sequence[str]) -> str | None:
    """What `memory.offload` names and a CPU's step does not move, as a sentence; None if nothing."""
    left = [part for part in asked if part not in kept] if isinstance(asked, tuple) else []
    return f"memory.offload: on a CPU {' and '.join(left)} lie on the host as it is." if left else None


def _offload_of(recipe: Recipe, device: Literal["cpu", "cuda"]) -> tuple[Part, ...]:
    """What the recipe puts away; on a CPU the base lies on the host anyhow, which a run says."""
    asked = recipe.memory.offload if isinstance(recipe.memory.offload, tuple) else ()
    return tuple(part for part in asked if device == "cuda" or part == "boundaries")


def _adapter_dtype(adapter: AdapterSection, *, usual: Literal["bf16", "fp32"]) -> Literal["bf16", "fp32"]:
    if adapter.dtype != "auto":
        return adapter.dtype
    return "fp32" if METHODS[adapter.method].is_near_one else usual
