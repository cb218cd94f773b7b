"""The parts of a run, each made from its section of the recipe: what `run.py` strings together."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Literal, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.adapters.new_rows import new_rows_of
from qadapt.cache import ignore
from qadapt.data.batches import widest_share
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadRun
from qadapt.events import AdapterAttached, BaseLoaded, Event, RunStarted, StageStarted
from qadapt.hardware.calibration import kind_of, remember
from qadapt.material import Material, order_of, step_count
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES, choose_adapter_dtype, choose_compute_dtype, choose_device
from qadapt.model.source import ModelFiles, find_model
from qadapt.planning import AdapterType, ComputeType, ask_of
from qadapt.recipe import Recipe
from qadapt.run_folder import RunFolder
from qadapt.shape import ModelShape, find_shape, table_rows
from qadapt.stage import Report
from qadapt.train.loop import LoopSettings
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.stored_plan import StoredPlan

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
    device, rows = choose_device(recipe.memory.device), material.rows
    compute_dtype = choose_compute_dtype(recipe.memory.compute_dtype, device)
    adapter_dtype = choose_adapter_dtype(recipe.adapter.dtype, compute_dtype)
    question = ask_of(
        recipe,
        device=cast(Literal["cpu", "cuda"], device.type),
        shape=_shape_with_room(material),
        types=(cast(ComputeType, compute_dtype), cast(AdapterType, adapter_dtype)),
    )
    steps = step_count(recipe, rows)
    share = widest_share(rows.train, steps=min(steps, SHARE_STEPS), order=order_of(recipe, rows))
    plan = question.changed({"length": rows.longest, "supervised_share": share}).plan()
    return StoredPlan(
        steps=steps,
        device=device.type,
        micro_batch=plan.setting.rows,
        recompute=plan.setting.recompute,
        compute_dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
        optimizer=plan.setting.optimizer,
        predicted=plan.estimate.categories,
        predicted_peak_bytes=plan.estimate.peak_allocated_bytes,
        budget_bytes=plan.budget_bytes,
        reasons=tuple(plan.reasons),
        revision=material.files.revision,
        ingredients=material.ingredients,
    )


def _shape_with_room(material: Material) -> ModelShape:
    """The model's shape, its table with room for the new tokens."""
    shape = find_shape(str(material.files.folder))
    needed = max(material.contract.new_ids, default=-1) + 1
    rows = table_rows(shape.vocabulary, needed)
    return replace(shape, name=material.files.name, vocabulary=rows)


def started(recipe: Recipe, plan: StoredPlan, run: RunFolder) -> RunStarted:
    """What is trained on what."""
    return RunStarted(
        name=recipe.run.name,
        model=recipe.model.source,
        method=f"{recipe.adapter.method}, rank {recipe.adapter.rank}",
        device=plan.device,
        steps=plan.steps,
        folder=str(run.path),
    )


def environment() -> dict[str, object]:
    """Versions and machine, for the run's folder."""
    packages = ("qadapt", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
    return {
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "processor": platform.machine(),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }


def place_base(
    recipe: Recipe, plan: StoredPlan, files: ModelFiles
) -> Generator[Event, None, PreTrainedModel]:
    """Loads the frozen base as planned."""
    is_quantized = recipe.model.quantization == "nf4"
    yield StageStarted(stage="loading the base in 4 bits" if is_quantized else "loading the base")
    start = time.monotonic()
    base = load_base(
        files.folder,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        dtype=DTYPES[plan.compute_dtype],
        device=choose_device(plan.device),
    )
    set_recompute(base, plan.recompute)
    yield BaseLoaded(resident_bytes=base.get_memory_footprint(), seconds=time.monotonic() - start)
    return base


def adapt(
    recipe: Recipe, plan: StoredPlan, base: PreTrainedModel, *, new_ids: Sequence[int]
) -> Generator[Event, None, PeftModel]:
    """Attaches the recipe's adapter to the base, and the rows of its new tokens."""
    adapter = recipe.adapter
    base_parameters = base.num_parameters()
    lora = Lora(rank=adapter.rank, alpha=adapter.alpha, dropout=adapter.dropout, targets=adapter.targets)
    model = attach_lora(base, lora, dtype=DTYPES[plan.adapter_dtype], seed=recipe.train.seed, new_ids=new_ids)
    trained = trainable(model)
    yield AdapterAttached(
        trainable=sum(parameter.numel() for parameter in trained.values()),
        adapted_layers=(len(trained) - len(new_rows_of(model))) // 2,
        base_parameters=base_parameters,
        new_tokens=len(new_ids),
    )
    return model


def optimizer_of(recipe: Recipe, plan: StoredPlan, model: PeftModel) -> AdapterOptimizer:
    """The optimizer over the adapter."""
    section = recipe.train
    return make_optimizer(
        trainable(model),
        kind=plan.optimizer,
        betas=(section.beta1, section.beta2),
        weight_decay=section.weight_decay,
    )


def loop_settings(recipe: Recipe, plan: StoredPlan) -> LoopSettings:
    """What the loop needs of the recipe and the plan."""
    section = recipe.train
    return LoopSettings(
        steps=plan.steps,
        micro_batch=plan.micro_batch,
        learning_rate=section.learning_rate,
        schedule=section.schedule,
        warmup_steps=section.warmup_steps,
        final_share=section.final_share,
        clip_norm=section.clip_norm,
        evaluate_every=section.evaluate_every,
        patience=section.patience,
        checkpoint_every=section.checkpoint_every,
        keep_checkpoints=section.keep_checkpoints,
    )


def remember_peak(recipe: Recipe, plan: StoredPlan, *, measured_bytes: int) -> None:
    """Keeps how far the plan's peak was from the measured one, for later estimates on this machine."""
    device = torch.cuda.get_device_name() if plan.device == "cuda" else "cpu"
    kind = kind_of(
        model=recipe.model.source,
        device=device,
        method=recipe.adapter.method,
        quantization=recipe.model.quantization,
    )
    remember(kind, predicted_bytes=plan.predicted_peak_bytes, measured_bytes=measured_bytes)


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
    )
