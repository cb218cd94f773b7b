"""The bytes of a safetensors file as tensors, and back, without a copy.

Knows the names of types and nothing of files: `tensor_files.py` reads the bytes, `shards.py` writes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's type by the format's name of it."""
FORMAT_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""The format's name by torch's type."""


def tensor_of(data: bytearray | memoryview, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A tensor on the bytes of a writable buffer: no copy, the tensor changes with the buffer.

    Args:
        data: At least the bytes the shape needs; what is behind them is left out.
        dtype: The format's name of the type, such as `BF16`.
        shape: The tensor's shape.
    """
    kind = TORCH_DTYPES[dtype]
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(tuple(shape), dtype=kind)
    return torch.frombuffer(data, dtype=kind, count=count).view(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor, in row-major order: no copy if it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
