"""What `qadapt data check --json` prints: the fields of `schemas/data.schema.json`.

Tokens, bytes and seconds are numbers in the unit their name says; unknown is null. A field is only ever
added; a change of meaning raises the number in `schema`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qadapt.data.check import DataReport

SCHEMA = "qadapt/data/1"


def data_record(report: DataReport) -> dict[str, Any]:
    """The values of a report."""
    layout, forecast = report.layout, report.forecast
    return {
        "schema": SCHEMA,
        "name": report.name,
        "model": report.model,
        "rows": report.rows,
        "held_out_rows": report.held_out_rows,
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "supervised_share": report.supervised_share,
        "data_length": report.length,
        "lengths": dataclasses.asdict(report.lengths)
        | {"histogram": {"width": report.histogram.width, "counts": list(report.histogram.counts)}},
        "formats": dict(report.formats),
        "skipped_rows": report.skipped_rows,
        "cut_rows": dict(report.cut),
        "left_out_rows": dict(report.left_out),
        "duplicate_rows": report.duplicates,
        "noted_rows": dict(report.notes),
        "new_tokens": dict(report.new_tokens),
        "prompt": dict(report.prompt),
        "steps": report.steps,
        "rows_per_step": report.rows_per_step,
        "pass_rows": report.pass_rows,
        "pass_tokens": report.pass_tokens,
        "is_packed": report.is_packed,
        "layout": dataclasses.asdict(layout),
        "forecast": {
            "device": forecast.device or None,
            "peak_bytes": forecast.peak_bytes,
            "budget_bytes": forecast.budget_bytes,
            "seconds_per_step": forecast.seconds_per_step,
            "problem": forecast.problem or None,
        },
        "problems": [dataclasses.asdict(finding) for finding in report.findings],
    }
