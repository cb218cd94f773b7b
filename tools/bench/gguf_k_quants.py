"""K-quants made by llama.cpp's own library: is every value on the nearest step that its block's scales make?

    python tools/bench/gguf_k_quants.py

The proof of an export (`qadapt/export/gguf_types.py`) holds K-quants against the scales that lie in the file.
Numbers of many kinds (weights' own, heavy tails, spikes, blocks of other sizes) are quantized by the library
that `foreign.py` brings. Shown are, for each type, how near the largest error comes to the bound, which is 1
where it is exact; the same of what a block's magnitude allows; and of tensors that are stronger by 2^-1 to
2^-9 the weakest change that puts a value out of bounds. Exits with 1 if a value that the library made is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from foreign import runtime

from qadapt.export.gguf_types import allowed_error, nearest_step_error

KINDS = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")
SHAPE = (256, 1024)
Rows = npt.NDArray[np.float32]


def library(folder: Path) -> ctypes.CDLL:
    """ggml's quantizers; ends the program where there are none."""
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    found = next((path for name in names for path in folder.rglob(name)), None)
    if found is None:
        sys.exit(f"There is no library of ggml in {folder}.")
    loaded = ctypes.CDLL(str(found))
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes, pointer = [ctypes.c_int64] * 3, ctypes.c_void_p
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *sizes, pointer]
    return loaded


def quantized(rows: Rows, kind: str, ggml: ctypes.CDLL) -> npt.NDArray[np.uint8]:
    """Rows, rounded to float16 first, as the library stores them."""
    type_ = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[type_]
    given = np.ascontiguousarray(rows.astype(np.float16).astype(np.float32))
    stored = np.zeros((len(rows), rows.shape[1] // values * size), np.uint8)
    ggml.ggml_quantize_chunk(int(type_), given.ctypes.data, stored.ctypes.data, 0, *rows.shape, None)
    return stored


def kinds_of_numbers(draw: np.random.Generator) -> Iterator[npt.NDArray[np.float64]]:
    normal = draw.standard_normal(SHAPE)
    yield normal * 0.02
    yield np.clip(draw.standard_t(1, SHAPE), -3e4, 3e4) * 0.02
    yield draw.uniform(-1, 1, SHAPE)
    yield draw.uniform(0, 1, SHAPE)
    yield -1 + 0.01 * normal
    yield np.where(np.arange(SHAPE[1]) % 32 == 7, 5, normal * 1e-3)
    yield np.where(draw.random(SHAPE) < 0.99, 0, normal)
    yield normal * 10.0 ** draw.integers(-6, 1, (SHAPE[0], SHAPE[1] // 16)).repeat(16, axis=1)
    yield np.sign(normal)
    yield normal * 1e-6


def weakest_found(rows: Rows, kind: str, ggml: ctypes.CDLL) -> int:
    """The smallest change of strength, as a power of 2, that puts a value out of bounds."""
    for power in range(1, 10):
        stored = quantized(rows * (1 + 2.0**-power), kind, ggml)
        lost = np.abs(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]) - rows)
        if (lost <= nearest_step_error(rows, stored, kind)).all():
            return 1 - power
    return -power


def main() -> int:
    ggml, beyond = library(runtime()), 0
    for kind in KINDS:
        nearest, part = 0.0, 0.0
        for numbers in kinds_of_numbers(np.random.default_rng(0)):
            rows = numbers.astype(np.float32)
            stored = quantized(rows, kind, ggml)
            lost = np.abs(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]) - rows)
            bound, allowed = nearest_step_error(rows, stored, kind), allowed_error(rows, kind)
            beyond += int((lost > np.minimum(bound, allowed)).sum())
            nearest, part = max(nearest, (lost / bound).max()), max(part, (lost / allowed).max())
        normal = (np.random.default_rng(1).standard_normal(SHAPE) * 0.02).astype(np.float32)
        print(
            f"{kind:7} at most {nearest:.3f} of the bound of its own steps, {part:.2f} of what a block's "
            f"magnitude allows; strength is seen down to 2^{weakest_found(normal, kind, ggml)}"
        )
    print(f"{beyond} values out of bounds")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
