"""Bytes of a card's step that lie in the memory of the host beside it, and what crosses the bus for them.

torch gives pinned memory in powers of two (`CachingHostAllocator.h`). Knows no speed (`speed.py`) and nothing
of what the process takes besides. Legend: V vocabulary, D width.
"""

from __future__ import annotations

from qadapt.plan.setting import Setting
from qadapt.plan.weights import STREAMED, layer_bytes
from qadapt.shape import ModelShape
from qadapt.units import MIB


def table_bytes(shape: ModelShape, setting: Setting) -> int:
    """The (V, D) table of the input embeddings, where it stays on the host: not pinned."""
    return shape.embedding_weights * setting.compute_bytes if "embeddings" in setting.offload else 0


def pinned_bytes(shape: ModelShape, setting: Setting) -> int:
    """Pinned memory, for streamed layers and for boundaries."""
    layers = shape.layers * _power_of_two(layer_bytes(shape, setting)) if "layers" in setting.offload else 0
    return layers + _boundary_parts_bytes(shape, setting)


def streamed_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a micro-batch brings to the card beside computing: each layer's weights for each of two passes.

    The layers that a pass ends with are there when the next one turns round.
    """
    if "layers" not in setting.offload:
        return 0
    return 2 * max(0, shape.layers - STREAMED) * layer_bytes(shape, setting)


def carried_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a micro-batch brings out and in again beside computing: inputs of recomputed layers."""
    if "boundaries" not in setting.offload or setting.device == "cpu":
        return 0
    each = setting.tokens * shape.width * setting.compute_bytes
    return 2 * setting.recomputed_layers(shape.layers) * each


def looked_up_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a micro-batch waits for before it begins: the embeddings of its tokens."""
    return setting.tokens * shape.width * setting.compute_bytes if "embeddings" in setting.offload else 0


def _power_of_two(size_bytes: int) -> int:
    return 1 << (size_bytes - 1).bit_length()


def _boundary_parts_bytes(shape: ModelShape, setting: Setting) -> int:
    """Inputs of recomputed layers, in parts that are powers of two (`engine/boundaries.py`)."""
    if "boundaries" not in setting.offload or setting.device == "cpu":
        return 0
    each = setting.tokens * shape.width * setting.compute_bytes
    return setting.recomputed_layers(shape.layers) * -(-each // MIB) * MIB
