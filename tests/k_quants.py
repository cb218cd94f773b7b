"""K-quants without llama.cpp: plain scales, then for each value the nearest of the steps they make.

Written from the layout that the `gguf` package unpacks. llama.cpp searches for better scales; what it does
after that is this.
"""

from __future__ import annotations

import gguf
import numpy as np

Blocks = np.ndarray


def k_quantized(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows (O, I), I a multiple of 256, as `Q4_K` or `Q6_K`: (O, bytes of a row)."""
    blocks = rows.astype(np.float32).reshape(-1, 256)
    with np.errstate(divide="ignore", invalid="ignore"):
        packed = {"Q4_K": _q4_k, "Q6_K": _q6_k}[kind](blocks)
    assert packed.shape[1] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    return packed.reshape(len(rows), -1)


def _q4_k(blocks: Blocks) -> Blocks:
    x = blocks.reshape(-1, 8, 32)
    lowest = np.minimum(x.min(axis=-1), 0)
    d, scales = _six_bits((x.max(axis=-1) - lowest) / 15)
    d_lowest, lows = _six_bits(-lowest)
    steps, offsets = _whole(d, scales), _whole(d_lowest, lows)
    q = _nearest((x + offsets[..., None]) / steps[..., None], 0, 15).reshape(-1, 4, 2, 32)
    sides = [
        scales[:, :4] | (scales[:, 4:] >> 4) << 6,
        lows[:, :4] | (lows[:, 4:] >> 4) << 6,
        (scales[:, 4:] & 15) | (lows[:, 4:] & 15) << 4,
    ]
    return np.concatenate([_bytes(d), _bytes(d_lowest), *sides, _flat(q[:, :, 0] | q[:, :, 1] << 4)], axis=1)


def _q6_k(blocks: Blocks) -> Blocks:
    x = blocks.reshape(-1, 16, 16)
    each = np.abs(x).max(axis=-1) / 31
    d = (each.max(axis=-1, keepdims=True) / 127).astype(np.float16)
    scales = np.nan_to_num(np.rint(each / d.astype(np.float32))).astype(np.int8)
    q = _nearest(x / _whole(d, scales)[..., None] + 32, 0, 63).reshape(-1, 2, 4, 32)
    low = (q[:, :, :2] & 15) | (q[:, :, 2:] & 15) << 4
    high = sum((q[:, :, part] >> 4) << 2 * part for part in range(4))
    return np.concatenate([_flat(low), _flat(np.asarray(high)), scales.view(np.uint8), _bytes(d)], axis=1)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A float16 for a block, and for each part of it how many times that, 0 to 63."""
    d = (values.max(axis=-1, keepdims=True) / 63).astype(np.float16)
    return d, np.clip(np.nan_to_num(np.rint(values / d.astype(np.float32))), 0, 63).astype(np.uint8)


def _whole(d: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return d.astype(np.float32) * scales.astype(np.float32)


def _nearest(steps: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.clip(np.nan_to_num(np.rint(steps)), low, high).astype(np.uint8)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).astype(np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
