"""A run's state as plain numbers for programs. The field names are a frozen surface (tests/test_state.py)."""

from __future__ import annotations

import math
from dataclasses import asdict

from qadapt.events import Event
from qadapt.view.memory import difference_percent, memory_rows
from qadapt.view.state import RunState


def figures(state: RunState, now: float) -> dict[str, object]:
    """The state as plain numbers for programs: what `qadapt watch --json` prints.

    Fields, null where unknown and in place of NaN: `schema` (1), `name`, `model`, `method`, `device`,
    `status` (`waiting`, `preparing`, `training`, `paused`, `stopped`, `finished`, or `ended` when its
    process is gone and did not say so), `stage`, `step`, `steps`,
    `loss`, `recent_loss`, `evaluation_loss`, `best_step`, `best_loss`, `learning_rate`, `gradient_norm`,
    `tokens`, `supervised_share`, `tokens_per_second`, `elapsed_seconds`, `seconds_left`, `silent_seconds`,
    `saved_step`, `memory` (a list of `category`, `predicted_bytes`, `measured_bytes`),
    `predicted_peak_bytes`, `peak_bytes`, `peak_difference_percent`, `budget_bytes`, `rehearsal`
    (`predicted_peak_bytes`, `measured_peak_bytes`, `longest_row_tokens`, `parts`: seconds of each), `eased`
    (a list of `step`, `phase`, `knob`, `value`, `price`), `skipped_steps` (whose update was left out),
    `samples` (the latest for each prompt: `step`, `prompt`, `answer`, `base_answer`, `divergence`),
    `warnings` (a list of `message`, `cure`, `step`), `pause_reason`, `stop_reason`, `adapter`.

    Args:
        state: The run.
        now: The moment, in seconds since the epoch.
    """
    run, step = state.run, state.step
    best_step, best_loss = state.best or (None, None)
    return {
        "schema": 1,
        "name": run.name if run else None,
        "model": run.model if run else None,
        "method": run.method if run else None,
        "device": run.device if run else None,
        "status": state.status,
        "stage": state.stage.name if state.stage else None,
        "step": state.done_steps,
        "steps": state.total_steps or None,
        "loss": _finite(step.loss if step else None),
        "recent_loss": _finite(state.recent_loss),
        "evaluation_loss": _finite(state.evaluations.last[1] if state.evaluations.last else None),
        "best_step": best_step,
        "best_loss": best_loss,
        "learning_rate": _finite(step.learning_rate if step else None),
        "gradient_norm": _finite(step.gradient_norm if step else None),
        "tokens": state.losses.tokens,
        "supervised_share": state.supervised_share,
        "tokens_per_second": state.tokens_per_second,
        "elapsed_seconds": state.elapsed_seconds(now),
        "seconds_left": state.seconds_left(now),
        "silent_seconds": state.silent_seconds(now),
        "saved_step": state.saved_step,
        **_memory(state),
        "rehearsal": _fields(state.rehearsed) if state.rehearsed else None,
        "eased": [_fields(eased) for eased in state.eased],
        "skipped_steps": list(state.skipped_steps),
        "samples": [_fields(sample) for sample in state.samples],
        "warnings": [_fields(warned) for warned in state.warnings],
        "pause_reason": state.paused.reason if state.paused else None,
        "stop_reason": state.stopped.reason if state.stopped else None,
        "adapter": state.finished.adapter if state.finished else None,
    }


def _memory(state: RunState) -> dict[str, object]:
    plan = state.plan
    rows = memory_rows(plan.predicted if plan else {}, state.memory.measured if state.memory else {})
    predicted_peak_bytes = plan.predicted_peak_bytes if plan else None
    return {
        "memory": [
            {
                "category": row.category,
                "predicted_bytes": row.predicted_bytes,
                "measured_bytes": row.measured_bytes,
            }
            for row in rows
        ],
        "predicted_peak_bytes": predicted_peak_bytes,
        "peak_bytes": state.peak_bytes,
        "peak_difference_percent": difference_percent(predicted_peak_bytes, state.peak_bytes),
        "budget_bytes": plan.budget_bytes if plan else None,
    }


def _fields(event: Event) -> dict[str, object]:
    """An event's fields, its time left out, null in place of NaN."""
    values = {name: value for name, value in asdict(event).items() if name != "time"}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
