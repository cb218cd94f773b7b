"""The plan of a run: what its recipe asks for its rows as they are, and the fastest way that fits.

Asks the closed form (`estimating/question.py`) for rows filled up and for rows packed, and takes the faster
of the two. Loads nothing; `model.py` executes it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

from qadapt.data.batches import length_step, widest_share
from qadapt.data.step_sample import StepSample
from qadapt.engine.documents import kernel_problem
from qadapt.errors import DoesNotFit
from qadapt.estimating.planning import AdapterType, ComputeType, ask_of
from qadapt.estimating.question import Question
from qadapt.model.precision import DTYPES, choose_adapter_dtype, choose_compute_dtype, choose_device
from qadapt.plan.fit import Plan
from qadapt.plan.packing import PACKABLE, Way, check_packable, choose_way, packed_plan
from qadapt.recipe import Recipe
from qadapt.running.material import Material, order_of, step_count
from qadapt.shape import ModelShape, find_shape, table_rows
from qadapt.train.stored_plan import StoredPlan

SHARE_STEPS = 2000  # so many steps are looked at for the widest micro-batch


def make_plan(recipe: Recipe, material: Material) -> StoredPlan:
    """The fastest setting that fits this machine now, for the rows as they are.

    Raises:
        BadRecipe: The recipe asks for something this device or model has not.
        DoesNotFit: No setting fits; the cure lists the cheapest changes.
    """
    plan = plan_rows(
        padded_question(recipe, material), step_sample(recipe, material), packing=recipe.data.packing
    )
    return StoredPlan(
        steps=step_count(recipe, material.rows),
        device=plan.setting.device,
        micro_batch=plan.setting.rows,
        recompute=plan.setting.recompute,
        compute_dtype=plan.setting.compute_dtype,
        adapter_dtype=plan.setting.adapter_dtype,
        optimizer=plan.setting.optimizer,
        predicted=plan.estimate.categories,
        predicted_peak_bytes=plan.estimate.peak_allocated_bytes,
        budget_bytes=plan.budget_bytes,
        reasons=tuple(plan.reasons),
        revision=material.files.revision,
        ingredients=material.ingredients,
        packed=plan.setting.packed,
        packed_tokens=plan.setting.tokens if plan.setting.packed else 0,
        packed_learned=plan.setting.supervised_tokens if plan.setting.packed else 0,
        loss_chunk=plan.setting.loss_chunk,
        mlp_tiles=plan.setting.mlp_tiles,
        offload=plan.setting.offload,
        recipe=recipe.model_dump(mode="json"),
    )


def padded_question(recipe: Recipe, material: Material) -> Question:
    """What a run asks of its plan, its rows as they are and filled up.

    Raises:
        BadRecipe: The recipe asks for something this device or model has not.
    """
    device = choose_device(recipe.memory.device)
    rows = material.rows
    compute_dtype = choose_compute_dtype(recipe.memory.compute_dtype, device)
    adapter_dtype = choose_adapter_dtype(recipe.adapter.dtype, compute_dtype)
    question = ask_of(
        recipe,
        device=cast(Literal["cpu", "cuda"], device.type),
        shape=_shape_with_room(material),
        types=(cast(ComputeType, compute_dtype), cast(AdapterType, adapter_dtype)),
    )
    steps = min(step_count(recipe, rows), SHARE_STEPS)
    share = widest_share(rows.train, steps=steps, order=order_of(recipe, rows))
    problem = kernel_problem(question.closed, device=device, dtype=DTYPES[compute_dtype])
    return question.changed(
        {
            "length": rows.longest,
            "supervised_share": share,
            "packed": False,
            "one_by_one": problem is not None,
        }
    )


def _shape_with_room(material: Material) -> ModelShape:
    """The model's shape, its table with room for the new tokens."""
    shape = find_shape(str(material.files.folder))
    rows = table_rows(shape.vocabulary, max(material.contract.new_ids, default=-1) + 1)
    return replace(shape, name=material.files.name, vocabulary=rows)


def step_sample(recipe: Recipe, material: Material) -> StepSample:
    """How the rows of the run's steps lie."""
    rows, steps = material.rows, step_count(recipe, material.rows)
    device = choose_device(recipe.memory.device)
    compute_dtype = choose_compute_dtype(recipe.memory.compute_dtype, device)
    return StepSample(
        rows.train,
        order_of(recipe, rows),
        steps=steps,
        held_out=rows.held_out,
        length_step=length_step(device.type, compute_dtype),
    )


def plan_rows(padded: Question, sample: StepSample, *, packing: bool | Literal["auto"]) -> Plan:
    """The fastest plan for rows as they are, filled up or packed; packing changes no result.

    Args:
        padded: The question for rows that are filled up to the longest.
        sample: How the rows of steps lie.
        packing: The recipe's `data.packing`.

    Raises:
        Unsupported: Rows are to be packed, and the model's cannot be.
        DoesNotFit: No setting fits; the cure lists the cheapest changes.
    """
    shape = padded.closed
    card = padded.target.card
    if packing is False:
        return padded.plan()
    if shape.family not in PACKABLE and packing == "auto":
        reason = f"rows are filled up: nothing shows that {shape.family} can pack them."
        return _with_reason(padded.plan(), reason)
    check_packable(shape.family)
    try:
        packed = _packed_plan(padded, sample)
    except DoesNotFit:
        if packing is True:
            raise
        reason = "rows are filled up: not even the smallest packed micro-batch fits."
        return _with_reason(padded.plan(), reason)
    way = Way(packed, sample.packed(packed.setting.tokens))
    try:
        plan = padded.plan() if packing == "auto" else packed
    except DoesNotFit:
        plan = packed
    filled_up = sample.filled_up(plan.setting.rows)
    if plan is packed:
        return packed_plan(shape, way, filled_up, card=card)
    return choose_way(shape, Way(plan, filled_up), way, card=card)


def _with_reason(plan: Plan, reason: str) -> Plan:
    return replace(plan, reasons=(*plan.reasons, reason))


def _packed_plan(padded: Question, sample: StepSample) -> Plan:
    """The fastest packed plan, for the fullest micro-batch of the steps that were looked at.

    It has the most tokens, learned tokens and documents that any of them has, and room for any row alone.
    What a step that nobody looked at or an evaluation has beyond that goes into another micro-batch
    (`LoopSettings`). How many tokens are learned at once depends on how many rows a micro-batch holds, which
    is what is planned: the share is raised until it is enough for the plan it gives.
    """
    most: dict[str, object] = {
        "packed": True,
        "documents": padded.rows_per_step,
        "step_tokens": max(sample.most_tokens, padded.setting.length),
    }
    asked = padded.changed(most)
    tokens, share = asked.setting.tokens, 0.0
    while (needed := max(sample.packed(tokens).most_head_tokens, sample.most_learned) / tokens) > share:
        share = needed
        plan = asked.changed({"supervised_share": share}).plan()
        tokens = plan.setting.tokens
    return plan
