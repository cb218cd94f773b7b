"""What a run trains, in memory: base, adapter, optimizer and what the loop is to do, each from its section.

The recipe stops here: what is called takes flat arguments. The plan is executed, never questioned
(`plan.py`).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

from peft import PeftModel
from transformers import PreTrainedModel

from qadapt.adapters.fusion import read_member
from qadapt.adapters.lora import stored_bytes, trainable
from qadapt.adapters.method import Adapter, adapted_layers, attach
from qadapt.adapters.rates import rate_ratios, undecayed
from qadapt.data.batches import length_step
from qadapt.engine.arrangement import arrange
from qadapt.engine.documents import kernel_problem
from qadapt.engine.head import head_of
from qadapt.engine.streaming import is_pinned
from qadapt.events import AdapterAttached, BaseLoaded, Event, StageStarted, Warned
from qadapt.model.load import load_base
from qadapt.model.original import original_weights
from qadapt.model.placement import brought_parts
from qadapt.model.precision import DTYPES, choose_device
from qadapt.model.source import ModelFiles
from qadapt.plan.recipe_setting import not_offloaded
from qadapt.recipe import Recipe
from qadapt.running.material import Material
from qadapt.shape import shape_from_config
from qadapt.train.companion import companion_of
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.settings import LoopSettings
from qadapt.train.stored_plan import StoredPlan


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
    section = recipe.adapter
    adapter = Adapter(
        section.method,
        section.rank,
        section.alpha,
        section.dropout,
        section.targets,
        section.nonlinearity,
        members=[read_member(base, each.folder, each.fused.name) for each in material.fused],
        steps=plan.steps,
    )
    new_ids = material.contract.new_ids
    base_parameters = base.num_parameters()
    with original_weights(material.files.folder) as originals:
        model = attach(
            base,
            adapter,
            dtype=DTYPES[plan.adapter_dtype],
            seed=recipe.train.seed,
            new_ids=new_ids,
            originals=originals,
        )
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
    section = recipe.train
    parameters = trainable(model)
    optimizer = make_optimizer(
        parameters,
        kind=plan.optimizer,
        betas=section.betas,
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
        length_step=length_step(plan.device, plan.compute_dtype),
    )
