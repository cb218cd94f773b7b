"""The parts of a run, each made from its section of the recipe: what `run.py` strings together."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from typing import Literal, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.fusion import read_member
from qadapt.adapters.lora import stored_bytes, trainable
from qadapt.adapters.method import Adapter, adapted_layers, attach
from qadapt.adapters.rates import rate_ratios, undecayed
from qadapt.cache import cache_folder, ignore, output_errors
from qadapt.data.batches import widest_share
from qadapt.data.prepared import skipped_lines
from qadapt.data.step_sample import StepSample
from qadapt.engine.arrangement import arrange
from qadapt.engine.documents import kernel_problem
from qadapt.engine.head import head_of
from qadapt.engine.streaming import is_pinned
from qadapt.errors import BadRun, DoesNotFit
from qadapt.events import AdapterAttached, BaseLoaded, Event, RunStarted, StageStarted, Warned
from qadapt.hardware.calibration import kind_of, remember
from qadapt.hardware.claims import SharedCard, claiming
from qadapt.material import Material, order_of, step_count
from qadapt.methods import METHODS, said
from qadapt.model.load import load_base
from qadapt.model.original import original_weights
from qadapt.model.placement import brought_parts
from qadapt.model.precision import DTYPES, choose_adapter_dtype, choose_compute_dtype, choose_device
from qadapt.model.source import ModelFiles, find_model
from qadapt.plan.fit import Plan
from qadapt.plan.packing import PACKABLE, Way, check_packable, choose_way, packed_plan
from qadapt.plan.setting import not_offloaded
from qadapt.planning import AdapterType, ComputeType, Question, ask_of
from qadapt.recipe import Recipe
from qadapt.run_folder import RunFolder
from qadapt.shape import ModelShape, find_shape, shape_from_config, table_rows
from qadapt.stage import Report
from qadapt.train.companion import companion_of
from qadapt.train.environment import environment
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.settings import LoopSettings
from qadapt.train.stored_plan import StoredPlan
from qadapt.units import parse_bytes

SHARE_STEPS = 2000  # so many steps are looked at for the widest micro-batch


def find_same_base(facts: AdapterFacts, report: Report = ignore) -> ModelFiles:
    """The files of the base that an adapter was trained on.

    Raises:
        BadRun: The files changed since.
    """
    files = find_model(facts.base, revision=facts.revision, report=report)
    if files.fingerprint != facts.fingerprint:
        raise BadRun(
            f"{facts.base} is not the model this adapter was trained on: its files changed.",
            cure="Put the files back as they were.",
        )
    return files


def make_plan(recipe: Recipe, material: Material) -> StoredPlan:
    """The fastest setting that fits this machine now, for the rows as they are.

    Raises:
        BadRecipe: The recipe asks for something this device or model has not.
        DoesNotFit: No setting fits; the cure lists the cheapest changes.
    """
    padded, sample = padded_question(recipe, material), step_sample(recipe, material)
    plan = plan_rows(padded, sample, packing=recipe.data.packing)
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
    device, rows = choose_device(recipe.memory.device), material.rows
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


def step_sample(recipe: Recipe, material: Material) -> StepSample:
    """How the rows of the run's steps lie."""
    rows, steps = material.rows, step_count(recipe, material.rows)
    return StepSample(rows.train, order_of(recipe, rows), steps=steps, held_out=rows.held_out)


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
    shape, card = padded.closed, padded.target.card
    if packing is False:
        return padded.plan()
    if shape.family not in PACKABLE and packing == "auto":
        plan, reason = padded.plan(), f"rows are filled up: nothing shows that {shape.family} can pack them."
        return replace(plan, reasons=(*plan.reasons, reason))
    check_packable(shape.family)
    try:
        packed = _packed_plan(padded, sample)
    except DoesNotFit:
        if packing is True:
            raise
        plan, reason = padded.plan(), "rows are filled up: not even the smallest packed micro-batch fits."
        return replace(plan, reasons=(*plan.reasons, reason))
    way = Way(packed, sample.packed(packed.setting.tokens))
    try:
        plan = padded.plan() if packing == "auto" else packed
    except DoesNotFit:
        plan = packed
    filled_up = sample.filled_up(plan.setting.rows)
    if plan is packed:
        return packed_plan(shape, way, filled_up, card=card)
    return choose_way(shape, Way(plan, filled_up), way, card=card)


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


def _shape_with_room(material: Material) -> ModelShape:
    """The model's shape, its table with room for the new tokens."""
    shape = find_shape(str(material.files.folder))
    rows = table_rows(shape.vocabulary, max(material.contract.new_ids, default=-1) + 1)
    return replace(shape, name=material.files.name, vocabulary=rows)


def started(recipe: Recipe, plan: StoredPlan, run: RunFolder) -> RunStarted:
    """What is trained on what."""
    return RunStarted(
        name=run.name,
        model=recipe.model.source,
        method=said(recipe.adapter.method, recipe.adapter.rank),
        device=plan.device,
        steps=plan.steps,
        folder=str(run.path),
    )


def store(run: RunFolder, plan: StoredPlan, material: Material) -> None:
    """Writes what a run is made of into its folder, the plan last: with it, the run has all it needs.

    Raises:
        BadOutput: The folder is read-only or full.
    """
    with output_errors(run.path):
        run.write_json(run.environment, environment())
        run.write_json(run.data, material.data_facts())
        if material.skipped:
            run.write(run.skipped, skipped_lines(material.skipped))
        run.identify(json.dumps(plan.recipe), *asdict(plan.ingredients).values())
        run.write_json(run.plan, plan.values())


@contextmanager
def holding_card(recipe: Recipe, run: RunFolder) -> Iterator[None]:
    """Holds the card that the recipe trains on for this run; nobody holds a CPU.

    Raises:
        BadRun: Another run trains on it.
        BadOutput: The cache, where the claims lie, cannot be written.
    """
    card, folder, budget = shared_card(recipe.memory.device), cache_folder() / "cards", recipe.memory.budget
    with ExitStack() as held:
        if card is not None:
            claim = claiming(
                folder, card, run=run.path, budget_bytes=None if budget is None else parse_bytes(budget)
            )
            with output_errors(folder):
                held.enter_context(claim)
        yield


def shared_card(device: str) -> SharedCard | None:
    """The card that a recipe's `memory.device` means on this machine; None for a CPU."""
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(chosen)
    return SharedCard(str(facts.uuid), facts.name, facts.total_memory)


def place_base(
    recipe: Recipe, plan: StoredPlan, files: ModelFiles
) -> Generator[Event, None, PreTrainedModel]:
    """Loads the frozen base as planned."""
    how = {"nf4": " in 4 bits", "int8": " in 8 bits", "none": ""}[recipe.model.quantization]
    yield StageStarted(stage=f"loading the base{how}")
    start = time.monotonic()
    base = load_base(
        files.folder,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        dtype=DTYPES[plan.compute_dtype],
        device=choose_device(plan.device),
        offload=plan.offload,
    )
    yield from _placement_warnings(recipe, plan, base)
    arrange(base, recompute=plan.recompute, tiles=plan.mlp_tiles, offload=plan.offload)
    if plan.packed and (problem := _kernel_problem(plan, base)) is not None:
        yield Warned(
            message=f"Packed rows are attended to one document after another, which is slower: the kernel "
            f"for many at once cannot be used on this card: {problem}.",
            cure="The numbers are the same; data.packing=false fills rows up instead.",
        )
    if head_of(base) is None:
        yield Warned(
            message=f"What {base.config.model_type} does with its logits is not known: all of a micro-batch "
            "are made at once.",
            cure="The numbers are the same; it takes more memory.",
        )
    yield BaseLoaded(resident_bytes=base.get_memory_footprint(), seconds=time.monotonic() - start)
    return base


def _placement_warnings(recipe: Recipe, plan: StoredPlan, base: PreTrainedModel) -> Iterator[Event]:
    """What was asked of the host's memory and is not given."""
    if (left := not_offloaded(recipe.memory.offload, plan.offload)) is not None:
        yield Warned(message=left, cure="Leave them out; nothing is lost.")
    if plan.device == "cuda" and not is_pinned(brought_parts(base, plan.offload)):
        yield Warned(
            message="The system gave too little pinned memory: the card waits for what is streamed.",
            cure="Give the machine, or WSL, more memory; the numbers are the same.",
        )


def _kernel_problem(plan: StoredPlan, base: PreTrainedModel) -> str | None:
    shape = shape_from_config(base.config.to_dict(), name=base.config.model_type)
    return kernel_problem(shape, device=choose_device(plan.device), dtype=DTYPES[plan.compute_dtype])


def adapt(
    recipe: Recipe, plan: StoredPlan, base: PreTrainedModel, *, material: Material
) -> Generator[Event, None, PeftModel]:
    """Attaches the recipe's adapter to the base, and the rows of its new tokens."""
    section, seed, dtype = recipe.adapter, recipe.train.seed, DTYPES[plan.adapter_dtype]
    base_parameters, new_ids = base.num_parameters(), material.contract.new_ids
    members = [read_member(base, each.folder, each.fused.name) for each in material.fused]
    adapter = Adapter(section.method, section.rank, section.alpha, section.dropout, section.targets)
    adapter = replace(adapter, members=members, steps=plan.steps)
    with original_weights(material.files.folder) as originals:
        model = attach(base, adapter, dtype=dtype, seed=seed, new_ids=new_ids, originals=originals)
    yield AdapterAttached(
        trainable=sum(parameter.numel() for parameter in trainable(model).values()),
        adapted_layers=adapted_layers(model),
        base_parameters=base_parameters,
        new_tokens=len(new_ids),
        stored_bytes=stored_bytes(model),
    )
    return model


def optimizer_of(recipe: Recipe, plan: StoredPlan, model: PeftModel) -> AdapterOptimizer:
    """The optimizer over the adapter."""
    section, parameters = recipe.train, trainable(model)
    optimizer = make_optimizer(
        parameters,
        kind=plan.optimizer,
        betas=(section.beta1, section.beta2),
        weight_decay=section.weight_decay,
        ratios=rate_ratios(recipe.adapter.method, parameters),
        undecayed=undecayed(parameters),
    )
    optimizer.companion = companion_of(model)
    return optimizer


def loop_settings(recipe: Recipe, plan: StoredPlan) -> LoopSettings:
    """What the loop needs of the recipe and the plan."""
    section = recipe.train
    return LoopSettings(
        steps=plan.steps,
        micro_batch=plan.micro_batch,
        packed=plan.packed,
        packed_tokens=plan.packed_tokens,
        packed_learned=plan.packed_learned,
        loss_chunk=plan.loss_chunk,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        final_share=section.final_share,
        clip_norm=section.clip_norm,
        evaluate_every=section.evaluate_every,
        patience=section.patience,
        checkpoint_every=section.checkpoint_every,
        keep_checkpoints=section.keep_checkpoints,
        keep_every=section.keep_every,
    )


def remember_peak(recipe: Recipe, plan: StoredPlan, run: RunFolder, *, measured_bytes: int) -> None:
    """Keeps how far the plan's peak was from the measured one, for later estimates on this machine.

    Called again for the same plan of the same run, it takes the place of what was kept before.
    """
    device = torch.cuda.get_device_name() if plan.device == "cuda" else "cpu"
    kind = kind_of(
        model=recipe.model.source,
        device=device,
        method=recipe.adapter.method,
        quantization=recipe.model.quantization,
    )
    remember(
        kind,
        predicted_bytes=plan.predicted_peak_bytes,
        measured_bytes=measured_bytes,
        run=f"{run.path.absolute()} {run.plan.stat().st_mtime_ns}",
    )


def adapter_facts(recipe: Recipe, plan: StoredPlan, material: Material) -> AdapterFacts:
    """What the adapter is trained on, to stand beside it."""
    return AdapterFacts(
        base=material.files.name,
        revision=material.files.revision,
        fingerprint=material.files.fingerprint,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        load_dtype=plan.compute_dtype,
        prompt_fingerprint=material.contract.fingerprint,
        mends_base=METHODS[recipe.adapter.method].mends_base,
    )
