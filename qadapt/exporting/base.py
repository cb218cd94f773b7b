"""The weights that an export merges on: those asked for, all there are, or the better on held-out rows.

How two bases are compared is `export/choose_base.py`'s; here it is known of which adapter and which run.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial

import torch

from qadapt.data.tokens import Tokens
from qadapt.engine.out_of_memory import free_memory
from qadapt.errors import BadData, BadExport, BadRun
from qadapt.events import Event, Warned
from qadapt.export.choose_base import AUTO, choose_base
from qadapt.export.merge import BASES, FORMS
from qadapt.export.merged_model import open_merged
from qadapt.export.quantized import DTYPES as QUANTIZED_DTYPES
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.room import folder_bytes
from qadapt.export.staging import refuse_full
from qadapt.exporting.job import Job
from qadapt.model.precision import choose_device
from qadapt.model.source import quantized_type_of
from qadapt.trained.measuring import rows_to_evaluate


def base_of(job: Job, asked: str, *, is_measured: bool) -> Generator[Event, None, str]:
    """The weights to merge on; if that is to be measured, or must be, both are compared.

    Args:
        job: What is exported.
        asked: `dequantized`, `original`, or `auto` for the better one.
        is_measured: Whether to compare them although one is asked for.

    Raises:
        NoRoom: Something is measured, and the disk is too full for what comes of it.
        BadExport: The original ones are asked for, and there are none.
    """
    if (stored := quantized_type_of(job.facts.base)) is not None:
        known = f"The base {job.facts.base} is itself quantized ({stored})"
        cure = "train on the 16-bit model to have the choice."
        if asked == "original":
            raise BadExport(
                f"{known}: there are no original weights to merge on.", cure=f"Leave --base out, or {cure}"
            )
        if asked == AUTO:
            yield Warned(message=f"{known}: it is merged as it was trained on.", cure=cure.capitalize())
        return "dequantized"
    if asked != AUTO and not is_measured:
        return asked
    _check_room(job, asked)
    compared = partial(
        choose_base,
        job.files.folder,
        job.adapters,
        asked=asked,
        dtype=_dtype_of(job),
        rows=(yield from _held_out(job)),
    )
    is_on_cpu = job.recipe is not None and job.recipe.memory.device == "cpu"
    device = choose_device("cpu" if is_on_cpu else "auto")
    try:
        return (yield from compared(device=device))
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    free_memory(device)
    yield Warned(
        message="The card's memory ran out while the two bases were compared; that begins anew without it.",
        cure="Close what else uses the card; the numbers are the same.",
    )
    return (yield from compared(device=torch.device("cpu")))


def _check_room(job: Job, asked: str) -> None:
    """Checks the disk, and that adapters and base go together, as their writer will: before what takes time.

    Raises:
        NoRoom: The disk is too full.
        QadaptError: As `open_merged`.
    """
    base = BASES[0] if asked == AUTO else asked
    with open_merged(job.files.folder, job.adapters, base=base, dtype=_dtype_of(job)) as merged:
        refuse_full(job.target, needed_bytes=folder_bytes(merged, job.form))


def _held_out(job: Job) -> Generator[Event, None, Sequence[Tokens]]:
    """The rows that were held out; a warning if they cannot be had again."""
    recipe = job.recipe
    if recipe is None or (recipe.data.held_out is None and not recipe.data.held_out_fraction):
        return ()
    try:
        chosen = rows_to_evaluate(
            recipe, job.contract, data=None, fingerprint=job.trained.rows, conversations=0
        )
    except (BadRun, BadData) as error:
        yield Warned(message=f"The two bases cannot be compared: {error.problem}", cure=error.cure)
        return ()
    return chosen.rows


def _dtype_of(job: Job) -> str:
    """What merged weights are rounded to in a form, before it quantizes them itself."""
    if job.form == QUANTIZED:
        return QUANTIZED_DTYPES[job.facts.load_dtype]
    return FORMS.get(job.form, "F32")
