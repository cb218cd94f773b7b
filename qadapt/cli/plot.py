"""Writes the picture of a step's memory: whole or not at all, and refused before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qadapt.errors import BadOutput, BadRecipe
from qadapt.plan.answer import Answer
from qadapt.plan.setting import ALLOCATION_BYTES
from qadapt.plan.trace import TraceEvent


def check_plot(path: Path) -> None:
    """Refuses what cannot become a picture.

    Raises:
        BadRecipe: The name does not end in .svg.
        BadOutput: It is a folder, or lies in none.
    """
    if path.suffix.lower() != ".svg":
        raise BadRecipe(
            f"--plot is {str(path)!r}: the picture is an SVG.", cure="Give a file such as memory.svg."
        )
    if path.is_dir():
        raise BadOutput(
            f"--plot is {str(path)!r}, which is a folder.", cure="Give a file such as memory.svg."
        )
    if not path.absolute().parent.is_dir():
        raise BadOutput(
            f"--plot is {str(path)!r}, and there is no folder {str(path.parent)!r}.",
            cure="Make the folder first, or give another one.",
        )


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
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        temporary.replace(path)
    except OSError as error:
        raise BadOutput(
            f"{path} cannot be written: {error.strerror}.",
            cure="Give a place that is writable for this user and has room.",
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()
