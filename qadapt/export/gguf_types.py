"""The types a GGUF file stores tensors in, and how far each may be from the exact value.

The numbers are made by the `gguf` package, whose blocks are those of llama.cpp. What a block of 32 values may
lose follows from its definition: the step between two stored values, and the rounding of the block's own
scale (and lowest value) to float16. Where scales are searched for, as in K-quants, they stand in the file:
each value must be on the nearest of the steps that they make. Knows no models.

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


@dataclass(frozen=True)
class _Searched:
    """A type whose scales llama.cpp searches for, before it takes for each value the nearest step they make.

    A block has `values`; `steps` of its bytes say on which step each is, the rest are scales. Between the
    lowest step and the highest lie `widest` times the widest distance of two. A search may cut off what is
    far out, and no bound for that follows from its definition: `share` of the magnitude of a block is more
    than it was seen to do (`tools/bench/gguf_k_quants.py`), and no room for scales that are 0.
    """

    values: int
    steps: slice
    widest: float
    share: float


_SEARCHED = {
    "Q6_K": _Searched(256, slice(0, 192), 63, 1 / 8),
    "Q5_K": _Searched(256, slice(16, 176), 31, 1 / 4),
    "Q4_K": _Searched(256, slice(16, 144), 15, 1 / 2),
    "Q3_K": _Searched(256, slice(0, 96), 7, 3 / 4),
    "IQ4_NL": _Searched(32, slice(2, 18), 10, 1 / 4),
}
_ROUNDING = {"F32": 0.0, "F16": 2.0**-11, "BF16": 2.0**-8}
_SMALLEST = {"F32": 0.0, "F16": 2.0**-25, "BF16": 0.0}
_SCALE_ROUNDING = 2.0**-11
_SCALE_SMALLEST = 128 * 2.0**-25
"""What the smallest step of a float16 scale is worth over at most 127 steps."""
_SEARCHED_SMALLEST = 2.0**-13
"""The same where a scale is a multiple of a float16, up to 127 times it, and over 32 steps."""
_ARITHMETIC = 1 + 1e-3
"""Merging, quantizing and back are computed in float32."""


def ggml_type(kind: str) -> gguf.GGMLQuantizationType:
    """The type by its name, such as `Q8_0`."""
    return gguf.GGMLQuantizationType[kind]


def is_quantized(kind: str) -> bool:
    """Whether values are stored in blocks with a scale."""
    return kind in _STEPS


def is_searched(kind: str) -> bool:
    """Whether llama.cpp searches for the scales of its blocks."""
    return kind in _SEARCHED


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
    if is_searched(kind):
        searched = _SEARCHED[kind]
        most = np.abs(exact.reshape(-1, searched.values)).max(axis=1) * searched.share + _SEARCHED_SMALLEST
        return np.repeat(most, searched.values).reshape(exact.shape).astype(np.float32)
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


def nearest_step_error(exact: npt.NDArray[Any], stored: npt.NDArray[np.uint8], kind: str) -> Rows:
    """The most by which each value is off on the nearest of the steps that its block's stored scales make.

    Half a step; of a value beyond all of them the distance to the last. Values are rounded to float16 first,
    which is what llama-quantize is given, and so, of some types, are scales after the choice.

    Args:
        exact: (O, I), float32 or float64.
        stored: (O, bytes of a row) as they are in the file.
        kind: A type for which `is_searched`.

    Returns:
        The shape of `exact`.
    """
    searched, size = _SEARCHED[kind], int(gguf.GGML_QUANT_SIZES[ggml_type(kind)][1])
    ends = []
    for byte in (0x00, 0xFF):
        blocks = stored.reshape(-1, size).copy()
        blocks[:, searched.steps] = byte
        ends.append(gguf.quants.dequantize(blocks.reshape(stored.shape), ggml_type(kind)))
    low, high = np.minimum(*ends), np.maximum(*ends)
    beyond = np.maximum(low - exact, exact - high)
    bound = np.maximum((high - low) / (2 * searched.widest), beyond)
    rounded = np.maximum(np.abs(exact), np.maximum(-low, high)) * _ROUNDING["F16"] + _SCALE_SMALLEST
    return np.asarray(bound * _ARITHMETIC + rounded, dtype=np.float32)
