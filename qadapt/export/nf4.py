"""The NF4 round trip of a weight, in chunks of rows, bit for bit that of bitsandbytes on the whole tensor.

What a QLoRA adapter was trained on is not the published weight but its 4-bit image (arXiv:2305.14314): blocks
of 64 values along the row-major tensor, scaled by their largest magnitude. With double quantization those
scales are themselves 8-bit, less the mean over the *whole* tensor: so a first pass collects them (1/64 of the
values), and a second one dequantizes. The mean's last bit may depend on the number of threads.

Chunks are dequantized as one long row: bitsandbytes 0.50.2 takes scales of wrong blocks on AVX512 CPUs if I
is a multiple of 16 but not of 64 (`tests/test_merge.py` has the case), and compiles for seconds if I is odd.

Legend: O output rows, I input columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from bitsandbytes.functional import (
    dequantize_4bit,
    dequantize_blockwise,
    quantize_4bit,
    quantize_blockwise,
)

from qadapt.export.threads import in_order

BLOCK = 64
_SCALE_BLOCK = 256
_SMALLEST_SCALE = 1e-38
"""bitsandbytes' lowest scale of an incomplete last block."""

Rows = Callable[[int, int], torch.Tensor]
"""The rows from a first one up to, not including, a last one: (rows, I); may be called by several threads."""


def row_grid(columns: int) -> int:
    """Rows after which a block starts anew: chunks of a multiple of them quantize as the whole does."""
    return BLOCK // math.gcd(BLOCK, columns)


def dequantized_rows(
    rows: Rows, *, shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, chunk_rows: int
) -> Rows:
    """What 4-bit storage makes of a weight.

    Args:
        rows: The weight.
        shape: (O, I).
        dtype: The type the base was loaded in: the values are rounded to it before and after.
        double_quant: Whether the scales are 8-bit.
        chunk_rows: Rows to look at together, a multiple of `row_grid`.

    Returns:
        The dequantized rows in `dtype`; the first row asked for must be a multiple of `row_grid`.
    """
    scales = _stored_scales(rows, shape=shape, dtype=dtype, chunk_rows=chunk_rows) if double_quant else None
    columns = shape[1]

    def dequantized(first: int, last: int) -> torch.Tensor:
        assert first % row_grid(columns) == 0, "a row within a block"
        packed, state = quantize_4bit(rows(first, last).to(dtype), blocksize=BLOCK, quant_type="nf4")
        if scales is not None:
            start = first * columns // BLOCK
            state.absmax = scales[start : start + state.absmax.numel()]
        count = (last - first) * columns
        state.shape = torch.Size((1, count + count % 2))
        weight: torch.Tensor = dequantize_4bit(packed, state)
        return weight.view(-1)[:count].view(-1, columns)

    return dequantized


def _stored_scales(
    rows: Rows, *, shape: tuple[int, int], dtype: torch.dtype, chunk_rows: int
) -> torch.Tensor:
    """The scales of all blocks after their own 8-bit round trip."""

    def of_chunk(first: int) -> torch.Tensor:
        return _scales(rows(first, min(first + chunk_rows, shape[0])).to(dtype))

    scales = torch.cat(list(in_order(partial(of_chunk, first) for first in range(0, shape[0], chunk_rows))))
    mean = scales.mean()
    codes, state = quantize_blockwise(scales - mean, blocksize=_SCALE_BLOCK)
    restored: torch.Tensor = dequantize_blockwise(codes, state)
    return restored + mean


def _scales(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, in fp32."""
    flat = weight.reshape(-1)
    whole = flat.numel() // BLOCK * BLOCK
    low, high = flat[:whole].view(-1, BLOCK).aminmax(dim=1)
    scales = torch.maximum(-low, high).float()
    if whole == flat.numel():
        return scales
    tail = flat[whole:].abs().max().float().clamp(min=_SMALLEST_SCALE)
    return torch.cat([scales, tail[None]])
