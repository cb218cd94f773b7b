"""Writes the picture of a step's memory: whole or not at all, and refused before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qadapt.cli.output_file import check_place, write_whole
from qadapt.plan.answer import Answer
from qadapt.plan.setting import ALLOCATION_BYTES
from qadapt.plan.trace import TraceEvent


def check_plot(path: Path) -> None:
    """Refuses what cannot become a picture.

    Raises:
        BadRecipe: The name does not end in .svg.
        BadOutput: It is a folder, or lies in none.
    """
    check_place(path, "--plot", what="the picture is an SVG", suffixes=(".svg",), example="memory.svg")


def write_plot(path: Path, answer: Answer, trace: Sequence[TraceEvent]) -> None:
    """Draws a step and puts the picture in its place.

    Raises:
        BadOutput: The place is read-only or full.
    """
    from qadapt.view.timeline import memory_svg

    setting, target = answer.estimate.setting, answer.target
    rows = "1 row" if setting.rows == 1 else f"{setting.rows} rows"
    title = f"{answer.name}, {rows} of {setting.length:,} tokens, on {target.name}"
    limit = target.free_bytes - answer.estimate.context_bytes
    unit = ALLOCATION_BYTES[setting.device]
    text = memory_svg(trace, title=title, limit_bytes=max(0, limit), unit_bytes=unit)
    write_whole(path, text)
