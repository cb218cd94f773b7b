"""Bytes of a card's step that lie in the memory of the host beside it, and what crosses the bus for them.

torch gives pinned memory in powers of two (`CachingHostAllocator.h`). Knows no speed (`speed.py`) and nothing
of what the process takes besides. Legend: V vocabulary, D width.
"""

from __future__ import annotations

import math

from qadapt.plan.setting import Setting
from qadapt.plan.weights import STREAMED, layer_bytes
from qadapt.shape import ModelShape
from qadapt.units import MIB

SLICE_BYTES = 64 * MIB
"""Most of a head on the host that is on the card at once: a power of two, far more than a copy's start."""
BLOCK_TOKENS = 4096
"""Learned tokens whose loss is found with one coming of the head, and their gradient with another."""


def table_bytes(shape: ModelShape, setting: Setting) -> int:
    """The (V, D) table of the input embeddings, where it stays on the host: not pinned."""
    return shape.embedding_weights * setting.compute_bytes if "embeddings" in setting.offload else 0


def pinned_bytes(shape: ModelShape, setting: Setting) -> int:
    """Pinned memory, for streamed layers, for boundaries and for the head."""
    layers = shape.layers * _power_of_two(layer_bytes(shape, setting)) if "layers" in setting.offload else 0
    return layers + _boundary_parts_bytes(shape, setting) + _slices_bytes(shape, setting)


def streamed_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a micro-batch brings to the card beside computing: each layer's weights for each of two passes.

    The layers that a pass ends with are there when the next one turns round.
    """
    if "layers" not in setting.offload:
        return 0
    brought = 2 * (shape.layers - STREAMED) - setting.dropped_layers
    return max(0, brought) * layer_bytes(shape, setting)


def carried_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a micro-batch brings out and in again beside computing: inputs of recomputed layers."""
    if "boundaries" not in setting.offload or setting.device == "cpu":
        return 0
    return 2 * setting.recomputed_layers(shape.layers) * _boundary_bytes(shape, setting)


def filed_bytes(shape: ModelShape, setting: Setting) -> int:
    """What of a CPU's step lies in a temporary file: inputs of recomputed layers."""
    if "boundaries" not in setting.offload or setting.device != "cpu":
        return 0
    return setting.recomputed_layers(shape.layers) * _boundary_bytes(shape, setting)


def looked_up_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a micro-batch waits for before it begins: the embeddings of its tokens."""
    return _boundary_bytes(shape, setting) if "embeddings" in setting.offload else 0


def slice_rows(vocabulary: int, width: int, value_bytes: int) -> int:
    """Rows of a slice of a head on the host: whole 64s, which products like, but for the last one."""
    return min(vocabulary, max(64, SLICE_BYTES // (width * value_bytes) // 64 * 64))


def sliced_bytes(shape: ModelShape, setting: Setting, head_tokens: float | None = None) -> int:
    """What a micro-batch waits for at its loss: the head, twice for each block of learned tokens."""
    tokens = setting.supervised_tokens if head_tokens is None else head_tokens
    if "head" not in setting.offload:
        return 0
    return 2 * math.ceil(tokens / BLOCK_TOKENS) * shape.embedding_weights * setting.compute_bytes


def _boundary_bytes(shape: ModelShape, setting: Setting) -> int:
    """What goes into a layer: so much of each token."""
    return setting.tokens * shape.width * setting.compute_bytes


def _power_of_two(size_bytes: int) -> int:
    return 1 << (size_bytes - 1).bit_length()


def _boundary_parts_bytes(shape: ModelShape, setting: Setting) -> int:
    """Inputs of recomputed layers, in parts that are powers of two (`engine/boundaries.py`)."""
    if "boundaries" not in setting.offload or setting.device == "cpu":
        return 0
    return setting.recomputed_layers(shape.layers) * -(-_boundary_bytes(shape, setting) // MIB) * MIB


def _slices_bytes(shape: ModelShape, setting: Setting) -> int:
    if "head" not in setting.offload:
        return 0
    row = shape.width * setting.compute_bytes
    rows = slice_rows(shape.vocabulary, shape.width, setting.compute_bytes)
    whole, rest = divmod(shape.vocabulary, rows)
    return whole * _power_of_two(rows * row) + (_power_of_two(rest * row) if rest else 0)
