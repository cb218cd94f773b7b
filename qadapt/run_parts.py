"""The parts of a run, each made from its section of the recipe: what `run.py` strings together."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.adapters.new_rows import new_rows_of
from qadapt.cache import ignore
from qadapt.data.batches import widest_share
from qadapt.data.conversation import Conversation
from qadapt.data.new_tokens import absent_ids
from qadapt.data.order import Order
from qadapt.data.prompt import PromptContract, load_contract
from qadapt.data.rows import Rows, make_rows, split_conversations
from qadapt.data.sources import MOST_LISTED, SUFFIXES, RowReader, Skipped
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadRun
from qadapt.events import AdapterAttached, BaseLoaded, DataReady, Event, RunStarted, StageStarted, Warned
from qadapt.hardware.calibration import kind_of, remember
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES, choose_adapter_dtype, choose_compute_dtype, choose_device
from qadapt.model.source import ModelFiles, find_model
from qadapt.planning import AdapterType, ComputeType, ask_of
from qadapt.recipe import Recipe
from qadapt.run_folder import RunFolder
from qadapt.shape import ModelShape, find_shape, table_rows
from qadapt.stage import Report, with_progress
from qadapt.train.loop import LoopSettings
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.stored_plan import Ingredients, StoredPlan

SHARE_STEPS = 2000  # so many steps are looked at for the widest micro-batch


@dataclass(frozen=True)
class Material:
    """What a run is made of before anything is on the device."""

    files: ModelFiles
    contract: PromptContract
    rows: Rows
    skipped: tuple[Skipped, ...] = ()

    @property
    def ingredients(self) -> Ingredients:
        """What must be the same when the run is resumed."""
        return Ingredients(
            base=self.files.fingerprint, template=self.contract.fingerprint, rows=self.rows.fingerprint
        )


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that the run can be found and gone on with from any folder."""
    values = recipe.model_dump()
    for source in values["data"]["sources"]:
        source["path"] = str(Path(source["path"]).absolute())
    if recipe.data.held_out is not None:
        values["data"]["held_out"] = str(Path(recipe.data.held_out).absolute())
    if Path(recipe.model.source).exists():
        values["model"]["source"] = str(Path(recipe.model.source).absolute())
    return Recipe.model_validate(values)


def prepare(recipe: Recipe, *, revision: str | None) -> Generator[Event, None, Material]:
    """Reads the recipe's rows, finds its base (fetching or converting it the first time), renders the rows.

    The rows come first: a mistake in them costs no download.
    """
    yield StageStarted(stage="reading the rows")
    reader = row_reader(recipe, skips_malformed=recipe.data.malformed == "skip")
    kept, apart = _conversations(recipe, reader)
    yield from _left_out(reader)
    source = recipe.model.source
    files = yield from with_progress(
        "finding the base", lambda report: find_model(source, revision=revision, report=report)
    )
    contract = load_contract(files.folder, new_tokens=recipe.data.new_tokens)
    rows = make_rows(kept, apart, contract, length=recipe.data.length)
    for message, cure in rows.warnings:
        yield Warned(message=message, cure=cure)
    yield from _never_seen(contract, rows)
    yield DataReady(
        rows=len(rows.train),
        held_out_rows=len(rows.held_out),
        tokens=rows.tokens,
        supervised_tokens=rows.supervised_tokens,
        truncated_rows=rows.truncated,
        longest_row_tokens=rows.longest,
        formats=tuple(reader.formats),
    )
    return Material(files, contract, rows, tuple(reader.skipped))


def _never_seen(contract: PromptContract, rows: Rows) -> Iterator[Warned]:
    absent = absent_ids(rows.train, contract.new_ids)
    if absent:
        names = ", ".join(contract.tokenizer.convert_ids_to_tokens(list(absent)))
        yield Warned(
            message=f"No training row has these of data.new_tokens: {names}. They stay untrained.",
            cure="Write them into the rows or the template, or leave them out of data.new_tokens.",
        )


def row_reader(recipe: Recipe, *, skips_malformed: bool) -> RowReader:
    """How files are read that look like the recipe's."""
    columns = {str(known): name for known, name in recipe.data.columns.items()}
    return RowReader(form=recipe.data.format, columns=columns, skips_malformed=skips_malformed)


def _left_out(reader: RowReader) -> Iterator[Warned]:
    if reader.skipped:
        places = ", ".join(each.place for each in reader.skipped[:3])
        count = reader.skipped_rows
        listed = "them all" if count <= MOST_LISTED else f"the first {MOST_LISTED:,}"
        yield Warned(
            message=f"{count:,} malformed {'row is' if count == 1 else 'rows are'} left out, as asked: "
            f"{places}{', ...' if count > 3 else ''}; the first because of: {reader.skipped[0].problem}",
            cure=f"The run's skipped.jsonl lists {listed}; data.malformed=error stops at the first.",
        )
    if reader.other_files:
        names = ", ".join(path.name for path in reader.other_files[:3])
        yield Warned(
            message=f"{len(reader.other_files):,} files in the folders of rows are not read: {names}"
            f"{', ...' if len(reader.other_files) > 3 else ''}.",
            cure=f"Rows are in files that end in {', '.join(SUFFIXES)}.",
        )


def skipped_lines(skipped: Sequence[Skipped]) -> str:
    """The rows that were left out as JSON lines, for the run's folder."""
    return "".join(json.dumps({"place": row.place, "problem": row.problem}) + "\n" for row in skipped)


def _conversations(recipe: Recipe, reader: RowReader) -> tuple[list[Conversation], list[Conversation]]:
    data = recipe.data
    return split_conversations(
        [(Path(source.path), source.limit) for source in data.sources],
        reader=reader,
        held_out=Path(data.held_out) if data.held_out is not None else data.held_out_fraction,
        seed=recipe.train.seed,
    )


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


def conversations_to_evaluate(recipe: Recipe, data: Path | None) -> list[Conversation]:
    """The conversations of a file, or those that the recipe's run held out.

    Raises:
        BadRun: No file is given and the run held out none.
    """
    if data is not None:
        rows = row_reader(recipe, skips_malformed=False).rows(data)
        return [row for row in rows if isinstance(row, Conversation)]
    # what the run left out of these rows stands in its folder already
    _, apart = _conversations(recipe, row_reader(recipe, skips_malformed=recipe.data.malformed == "skip"))
    if not apart:
        raise BadRun(f"The run {recipe.run.name} held out no rows.", cure="Give a file of rows with --data.")
    return apart


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


def step_count(recipe: Recipe, rows: Rows) -> int:
    """Optimizer steps of the run: the recipe's, or what its passes over the rows come to."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    return order_of(recipe, rows).step_count(recipe.train.epochs)


def order_of(recipe: Recipe, rows: Rows) -> Order:
    """Which rows each step takes."""
    lengths = np.fromiter((len(row) for row in rows.train), np.int32, len(rows.train))
    return Order(
        lengths, rows_per_step=recipe.train.rows_per_step, seed=recipe.train.seed, kind=recipe.data.order
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
        new_tokens=recipe.data.new_tokens,
        end_ids=tuple(sorted(material.contract.end_ids & frozenset(material.contract.new_ids))),
    )
