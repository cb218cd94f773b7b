"""What an export takes on the disk, known from names and shapes alone: before anything is computed.

Knows nothing of disks (`staging.py` checks them).
"""

from __future__ import annotations

import math

from qadapt.export.gguf import stored_kind
from qadapt.export.gguf_types import GGUF_FORMS, stored_bytes
from qadapt.export.llama_quantize import K_FORMS
from qadapt.export.merged_model import MergedModel
from qadapt.export.quantized import FORM as QUANTIZED
from qadapt.export.quantized import QuantizedTensors
from qadapt.export.writing import OTHER_FILES_BYTES

_WITH_K_QUANT = 4
"""Bytes for each weight: a file in 16 bits, and at most as much again for what is made of it."""


def folder_bytes(merged: MergedModel, form: str) -> int:
    """The bytes of an export's folder, with those that lie in it only for a while.

    Args:
        merged: The model, opened in the type that the form rounds it to.
        form: A form that merges, such as `merged-fp16`.
    """
    entries = merged.entries
    if form in K_FORMS:
        weights = _WITH_K_QUANT * sum(math.prod(entry.shape) for entry in entries)
    elif form in GGUF_FORMS:
        weights = sum(stored_bytes(entry.shape, stored_kind(entry, GGUF_FORMS[form])) for entry in entries)
    else:
        parts = QuantizedTensors(merged).entries if form == QUANTIZED else entries
        weights = sum(entry.size_bytes for entry in parts)
    return weights + OTHER_FILES_BYTES
