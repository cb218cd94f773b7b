"""Answers as plain values for `--json`: the fields of `schemas/estimate.schema.json` and its neighbours.

Bytes and seconds are numbers in the unit their name says; unknown is null. A field is only ever added; a
change of meaning raises the number in `schema`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from qadapt.hardware.calibration import Calibration
from qadapt.hardware.target import Target
from qadapt.plan.answer import Answer, CardAnswer
from qadapt.plan.fit import Plan
from qadapt.plan.inverse import ModelAnswer, Most
from qadapt.plan.ladder import Change
from qadapt.plan.room import Room

SCHEMA = "qadapt/estimate/1"
MAX_SCHEMA = "qadapt/max/1"
CARDS_SCHEMA = "qadapt/cards/1"


def estimate_record(answer: Answer) -> dict[str, Any]:
    """The values of an estimate."""
    estimate = answer.estimate
    return {
        "schema": SCHEMA,
        "model": {"name": answer.name, "parameters": answer.parameters},
        "target": _target(answer.target),
        "setting": dataclasses.asdict(estimate.setting),
        "peak_allocated_bytes": estimate.peak_allocated_bytes,
        "peak_phase": estimate.peak_phase,
        "peak_module": answer.module or None,
        "phase_bytes": estimate.phase_bytes,
        "categories": estimate.categories,
        "reserved_bytes": dict(zip(("low", "high"), answer.reserved_bytes, strict=True)),
        "context_bytes": estimate.context_bytes,
        "context_range_bytes": dict(zip(("low", "high"), estimate.context_range_bytes, strict=True)),
        "needed_bytes": estimate.needed_bytes,
        "error_bytes": answer.error_bytes,
        "host_bytes": estimate.host_bytes,
        "pinned_bytes": estimate.pinned_bytes,
        "disk_bytes": estimate.disk_bytes,
        "disk_parts": dict(answer.disk),
        "micro_batches_per_step": answer.micro_batches_per_step,
        "seconds_per_micro_batch": estimate.seconds_per_step,
        "seconds_per_1000_steps": answer.seconds_per_1000_steps,
        "fits": answer.verdict == "fits",
        "verdict": answer.verdict,
        "exact": estimate.exact,
        "relative_error": estimate.relative_error,
        "calibration": _calibration(answer.calibration),
        "routing_bytes": _range(answer.routing_bytes),
        "notes": list(answer.notes),
        "changes": [_change(change) for change in answer.changes],
    }


def _range(ends: tuple[int, int] | None) -> dict[str, int] | None:
    return None if ends is None else {"low": ends[0], "high": ends[1]}


def plan_record(answer: Answer, plan: Plan) -> dict[str, Any]:
    """The values of a plan: its estimate's, and why each knob stands where it does."""
    return estimate_record(answer) | {"budget_bytes": plan.budget_bytes, "reasons": list(plan.reasons)}


def most_record(answer: Answer, found: Most) -> dict[str, Any]:
    """The values of the largest length, number of rows or rank; `answer` is the step at it, or at 1."""
    above = found.next_estimate
    return {
        "schema": MAX_SCHEMA,
        "asked": found.what,
        "value": found.value,
        "ceiling": found.ceiling.value,
        "ceiling_reason": found.ceiling.reason,
        "is_at_ceiling": found.is_at_ceiling,
        "one_more": above and {"needed_bytes": above.needed_bytes, "error_bytes": above.error_bytes},
        "estimate": estimate_record(answer),
    }


def models_record(answers: Sequence[ModelAnswer], target: Target, room: Room) -> dict[str, Any]:
    """The values of the largest model, and of every other one."""
    fitting = [answer.shape.name for answer in answers if answer.fits]
    return {
        "schema": MAX_SCHEMA,
        "asked": "model",
        "value": fitting[0] if fitting else None,
        "target": _target(target),
        "models": [
            {
                "name": answer.shape.name,
                "same_shape": list(answer.same),
                "parameters": answer.shape.parameters,
                "needed_bytes": answer.estimate and answer.estimate.needed_bytes,
                "error_bytes": answer.estimate and room.error_bytes(answer.estimate),
                "fits": answer.fits,
                "refusal": answer.refusal,
            }
            for answer in answers
        ],
    }


def cards_record(rows: Sequence[CardAnswer], *, asked: str | None) -> dict[str, Any]:
    """The values of every card; `asked` names the field whose largest value was asked for."""
    first = rows[0].answer
    return {
        "schema": CARDS_SCHEMA,
        "asked": asked,
        "model": {"name": first.name, "parameters": first.parameters},
        "cards": [
            {
                "name": row.answer.target.name,
                "free_bytes": row.answer.target.free_bytes,
                "assumption": row.answer.target.assumption,
                "value": row.most and row.most.value,
                "needed_bytes": row.answer.estimate.needed_bytes,
                "error_bytes": row.answer.error_bytes,
                "fits": row.answer.verdict == "fits",
                "verdict": row.answer.verdict,
                "seconds_per_1000_steps": row.answer.seconds_per_1000_steps,
                "setting": dataclasses.asdict(row.answer.estimate.setting),
            }
            for row in rows
        ],
    }


def _target(target: Target) -> dict[str, Any]:
    return {
        "name": target.name,
        "device": target.device,
        "free_bytes": target.free_bytes,
        "assumption": target.assumption,
        "is_here": target.is_here,
        "may_spill": target.may_spill,
    }


def _calibration(calibration: Calibration | None) -> dict[str, Any] | None:
    return None if calibration is None else dataclasses.asdict(calibration)


def _change(change: Change) -> dict[str, Any]:
    return {
        "change": change.text,
        "bytes_won": change.bytes_won,
        "seconds_lost_per_step": change.seconds_lost,
        "is_enough": change.is_enough,
    }
