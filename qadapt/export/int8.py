"""The 8-bit round trip of a weight, in chunks of rows: that of bitsandbytes (arXiv:2208.07339), bit for bit.

Every row has a scale of its own, its largest magnitude, so rows may be taken in any number. On CUDA the
scale's reciprocal is rounded otherwise, so a value half way between two steps may go the other way.
"""

from __future__ import annotations

import torch
from bitsandbytes.functional import int8_vectorwise_quant

from qadapt.engine.linear import dense_int8
from qadapt.export.nf4 import Rows


def int8_rows(rows: Rows, *, dtype: torch.dtype) -> Rows:
    """What 8-bit storage makes of a weight.

    Args:
        rows: The weight.
        dtype: The type the base was loaded in, in which its products ran.

    Returns:
        The dequantized rows in `dtype`.
    """

    def dequantized(first: int, last: int) -> torch.Tensor:
        # through fp16, whatever the type: what bitsandbytes quantizes
        steps, largest, _ = int8_vectorwise_quant(rows(first, last).to(dtype).half())
        return dense_int8(steps, largest, dtype)

    return dequantized
