"""An estimate or a plan as plain values for `--json`: the fields of `schemas/estimate.schema.json`.

Bytes and seconds are numbers in the unit their name says; unknown is null. A field is only ever added; a
change of meaning raises the number in `schema`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qadapt.hardware.target import Target
from qadapt.plan.estimate import Estimate, disk_parts
from qadapt.plan.fit import Plan
from qadapt.plan.knobs import micro_batches
from qadapt.plan.ladder import Change
from qadapt.shape import ModelShape

SCHEMA = "qadapt/estimate/1"


def estimate_record(
    shape: ModelShape,
    estimate: Estimate,
    *,
    target: Target,
    rows_per_step: int,
    changes: Sequence[Change] = (),
) -> dict[str, Any]:
    """The values of an estimate; `changes` are the ladder's, when it does not fit."""
    count = micro_batches(rows_per_step, estimate.setting.rows)
    seconds = estimate.seconds_per_step
    return {
        "schema": SCHEMA,
        "model": {"name": shape.name, "parameters": shape.parameters},
        "target": {
            "name": target.name,
            "device": target.device,
            "free_bytes": target.free_bytes,
            "assumption": target.assumption,
        },
        "setting": dataclasses.asdict(estimate.setting),
        "peak_allocated_bytes": estimate.peak_allocated_bytes,
        "peak_phase": estimate.peak_phase,
        "phase_bytes": estimate.phase_bytes,
        "categories": estimate.categories,
        "reserved_bytes": {"low": estimate.reserved_low_bytes, "high": estimate.reserved_high_bytes},
        "context_bytes": estimate.context_bytes,
        "context_range_bytes": dict(zip(("low", "high"), estimate.context_range_bytes, strict=True)),
        "needed_bytes": estimate.needed_bytes,
        "error_bytes": estimate.error_bytes,
        "host_bytes": estimate.host_bytes,
        "pinned_bytes": estimate.pinned_bytes,
        "disk_bytes": estimate.disk_bytes,
        "disk_parts": disk_parts(shape, estimate.setting),
        "micro_batches_per_step": count,
        "seconds_per_micro_batch": seconds,
        "seconds_per_1000_steps": None if seconds is None else 1000 * count * seconds,
        "fits": estimate.fits(target.free_bytes),
        "exact": estimate.exact,
        "relative_error": estimate.relative_error,
        "changes": [
            {
                "change": change.text,
                "bytes_won": change.bytes_won,
                "seconds_lost_per_step": change.seconds_lost,
                "is_enough": change.is_enough,
            }
            for change in changes
        ],
    }


def plan_record(shape: ModelShape, plan: Plan, *, target: Target, rows_per_step: int) -> dict[str, Any]:
    """The values of a plan: its estimate's, and why each knob stands where it does."""
    record = estimate_record(shape, plan.estimate, target=target, rows_per_step=rows_per_step)
    return record | {"budget_bytes": plan.budget_bytes, "reasons": list(plan.reasons)}
