"""The types a GGUF file stores tensors in, and how far each may be from the exact value.

The numbers are made by the `gguf` package, whose blocks are those of llama.cpp. What a block of 32 values may
lose follows from its definition: the step between two stored values, and the rounding of the block's own
scale (and lowest value) to float16. Knows no models.

Legend: O rows, I columns of a tensor, N = I / 32 blocks of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from qadapt.errors import BadExport

Rows = npt.NDArray[np.float32]
GGUF_FORMS = {
    "gguf-f16": "F16", "gguf-bf16": "BF16", "gguf-q8_0": "Q8_0", "gguf-q5_1": "Q5_1", "gguf-q5_0": "Q5_0",
    "gguf-q4_1": "Q4_1", "gguf-q4_0": "Q4_0",
}  # fmt: skip
"""Forms that need no other program, with the type of their matrices in GGUF's words."""
BLOCK = 32
"""Values of a block; the columns of a quantized tensor are a multiple of it."""


@dataclass(frozen=True)
class _Steps:
    """How a block is cut into steps: `share` of its magnitude (or of its range) is half a step.

    A block with a lowest value of its own (`has_lowest`) spans its range, the others twice their magnitude.
    Values beyond `reach` of the magnitude may be cut off to it: one side has a step less than the other.
    """

    share: float
    has_lowest: bool
    reach: float = 1.0


_STEPS = {
    "Q8_0": _Steps(1 / 254, has_lowest=False),
    "Q5_1": _Steps(1 / 62, has_lowest=True),
    "Q5_0": _Steps(1 / 32, has_lowest=False, reach=15 / 16),
    "Q4_1": _Steps(1 / 30, has_lowest=True),
    "Q4_0": _Steps(1 / 16, has_lowest=False, reach=7 / 8),
}
_SEARCHED = {
    "Q6_K": (256, 1 / 8), "Q5_K": (256, 1 / 4), "Q4_K": (256, 1 / 2), "Q3_K": (256, 1.0),
    "IQ4_NL": (32, 1 / 4),
}  # fmt: skip
"""Types whose scales llama.cpp searches for: values of a block, and a wide share of its magnitude.

No bound follows from their definition; within these another tensor's numbers do not pass for the right ones.
"""
_ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
_SMALLEST = {"F32": 0.0, "F16": 2.0**-25, "BF16": 0.0}
_SCALE_ROUNDING = 2.0**-11
_SCALE_SMALLEST = 128 * 2.0**-25
"""What the smallest step of a float16 scale is worth over at most 127 steps."""
_ARITHMETIC = 1 + 1e-3
"""Merging, quantizing and back are computed in float32."""


def ggml_type(kind: str) -> gguf.GGMLQuantizationType:
    """The type by its name, such as `Q8_0`."""
    return gguf.GGMLQuantizationType[kind]


def is_quantized(kind: str) -> bool:
    """Whether values are stored in blocks with a scale."""
    return kind in _STEPS


def stored_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes that a tensor takes in a file, without what is filled up behind it."""
    block, size = map(int, gguf.GGML_QUANT_SIZES[ggml_type(kind)])
    return math.prod(shape) // block * size


def quantized(rows: Rows, kind: str, *, name: str) -> npt.NDArray[np.uint8]:
    """Whole rows as they are stored, proven to be within what the type may lose.

    Args:
        rows: (O, I) in float32; I a multiple of `BLOCK`.
        kind: A type of blocks.
        name: The tensor, for messages.

    Raises:
        BadExport: A value comes back farther off than the type allows: it is too large for a float16 scale.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        stored: npt.NDArray[np.uint8] = gguf.quants.quantize(rows, ggml_type(kind))
        lost = np.abs(gguf.quants.dequantize(stored, ggml_type(kind)) - rows)
    if not (lost <= allowed_error(rows, kind)).all():  # a NaN is not within it, either
        raise BadExport(
            f"{name} reaches {np.abs(rows).max():.6g}, which a block of {kind} does not hold.",
            cure="Export with --form gguf-bf16, which has the range of fp32.",
        )
    return stored


def allowed_error(exact: npt.NDArray[Any], kind: str) -> Rows:
    """The most that storing may change each value.

    Args:
        exact: (O, I) or (O,), float32 or float64.
        kind: The type it is stored in.

    Returns:
        The shape of `exact`.
    """
    if kind in _SEARCHED:
        block, share = _SEARCHED[kind]
        largest = np.abs(exact.reshape(-1, block)).max(axis=1)
        return np.repeat(largest * share, block).reshape(exact.shape).astype(np.float32)
    if not is_quantized(kind):
        bound = np.abs(exact) * _ROUNDING[kind] + _SMALLEST[kind]
        return np.asarray(bound * _ARITHMETIC, dtype=np.float32)
    steps = _STEPS[kind]
    blocks = exact.reshape(-1, BLOCK)
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    magnitude = np.maximum(-low, high)
    span = high - low if steps.has_lowest else magnitude
    bound = np.maximum(span * steps.share, np.abs(blocks) - steps.reach * magnitude)
    bound = bound + span * _SCALE_ROUNDING + _SCALE_SMALLEST
    if steps.has_lowest:
        bound += np.abs(low) * _SCALE_ROUNDING
    return np.asarray(bound * _ARITHMETIC, dtype=np.float32).reshape(exact.shape)
