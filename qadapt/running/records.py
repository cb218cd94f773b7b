"""What a run tells and keeps of itself: what is trained on what, what it is made of, what it took."""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from qadapt.adapters.facts import AdapterFacts
from qadapt.cache import output_errors
from qadapt.data.prepared import skipped_lines
from qadapt.events import RunStarted
from qadapt.fusing import name_below
from qadapt.hardware.calibration import kind_of, remember
from qadapt.methods import METHODS, said
from qadapt.recipe import Recipe
from qadapt.run_folder import RunFolder
from qadapt.running.material import Material
from qadapt.train.environment import environment
from qadapt.train.stored_plan import StoredPlan


def started(recipe: Recipe, plan: StoredPlan, run: RunFolder) -> RunStarted:
    """What is trained on what."""
    return RunStarted(
        name=run.name,
        model=recipe.model.source,
        method=said(recipe.adapter.method, recipe.adapter.rank, on=name_below(recipe)),
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


def remember_peak(recipe: Recipe, plan: StoredPlan, run: RunFolder, *, measured_bytes: int) -> None:
    """Keeps how far the plan's peak was from the measured one, for later estimates on this machine.

    Called again for the same plan of the same run, it takes the place of what was kept before.
    """
    kind = kind_of(
        model=recipe.model.source,
        device=torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
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
