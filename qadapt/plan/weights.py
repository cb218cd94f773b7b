"""Bytes of the frozen base: exact, tensor by tensor, as bitsandbytes 0.50 lays them out.

Knows nothing of activations. Source: `bitsandbytes.functional.quantize_4bit` and `QuantState`; checked to the
byte against really built layers in `tests/test_estimate.py`, and against the published split of resident
bytes ("absmax = exactly 12.5 % of packed bytes" without double quantization).
"""

from __future__ import annotations

import math

from qadapt.plan.setting import Setting
from qadapt.shape import Linear, ModelShape

BLOCK = 64
"""Weights that share one absmax."""
NESTED_BLOCK = 256
"""Absmax values that share one fp32 scale, with double quantization."""
CODE_VALUES = 16
"""Of the NF4 code book, fp32, one copy per layer."""
NESTED_CODE_VALUES = 256
"""Of the absmax values' 8-bit code book, fp32, one copy per layer."""


STREAMED = 2
"""Layers whose weights are on the card at once, where layers are streamed."""


def base_weight_bytes(shape: ModelShape, setting: Setting) -> int:
    """The linear layers' weights: two per byte in 4-bit, one in 8-bit, else in the compute type.

    Of streamed layers only two are there, each with its constants (`engine/streaming.py`).
    """
    if "layers" in setting.offload:
        return min(STREAMED, shape.layers) * layer_bytes(shape, setting)
    return shape.layers * sum(_weight_bytes(linear, setting) for linear in shape.linears)


def layer_bytes(shape: ModelShape, setting: Setting) -> int:
    """What one layer's linear layers take, their constants included."""
    constants = (
        0 if setting.quantization == "none" else sum(constant_bytes(each, setting) for each in shape.linears)
    )
    return constants + sum(_weight_bytes(linear, setting) for linear in shape.linears)


def _weight_bytes(linear: Linear, setting: Setting) -> int:
    each = {"nf4": 0.5, "int8": 1, "none": setting.compute_bytes}[setting.quantization]
    return setting.tensor_bytes(linear.weights, each)


def constant_bytes(linear: Linear, setting: Setting) -> int:
    """The constants of one 4-bit layer: absmax values, their own scales and offset, code books.

    Of an 8-bit one an fp32 scale for every row.
    """
    if setting.quantization == "int8":
        return setting.tensor_bytes(linear.outputs, 4)
    blocks = math.ceil(linear.weights / BLOCK)
    code = setting.tensor_bytes(CODE_VALUES, 4)
    if not setting.double_quant:
        return setting.tensor_bytes(blocks, 4) + code
    nested = setting.tensor_bytes(math.ceil(blocks / NESTED_BLOCK), 4)
    offset = setting.tensor_bytes(1, 4)
    nested_code = setting.tensor_bytes(NESTED_CODE_VALUES, 4)
    return setting.tensor_bytes(blocks, 1) + nested + nested_code + offset + code


def quantization_constant_bytes(shape: ModelShape, setting: Setting) -> int:
    """All quantization constants of the base; those of streamed layers lie with their weights."""
    if setting.quantization == "none" or "layers" in setting.offload:
        return 0
    return shape.layers * sum(constant_bytes(linear, setting) for linear in shape.linears)


def unquantized_bytes(shape: ModelShape, setting: Setting) -> int:
    """Embeddings, head (if untied), norms, biases in the compute type; the rotary tables in fp32."""
    each = setting.compute_bytes
    away = len({"embeddings", "head"} & set(setting.offload))
    tables = (0 if away else 1) if shape.tied else 2 - away
    embeddings = tables * setting.tensor_bytes(shape.embedding_weights, each)
    biases = sum(setting.tensor_bytes(linear.outputs, each) for linear in shape.linears if linear.bias)
    head_norms = 2 * setting.tensor_bytes(shape.head_width, each) if shape.family == "qwen3" else 0
    wide_norms = (4 if shape.family == "gemma2" else 2) * setting.tensor_bytes(shape.width, each)
    final_norm = setting.tensor_bytes(shape.width, each)
    rotary = 2 * setting.tensor_bytes(shape.head_width // 2, 4)
    if shape.family == "gemma2":
        rotary += setting.tensor_bytes(1, each)  # the scale of its embeddings is a tensor
    angles = setting.rank * (setting.rank - 1) // 2 if setting.method == "oft" else 0  # their places, twice
    places = 2 * setting.tensor_bytes(angles, 8)
    return embeddings + shape.layers * (biases + head_norms + wide_norms) + final_norm + rotary + places


def dequantized_bytes(linear: Linear, setting: Setting, *, is_forward: bool = False) -> int:
    """What one product takes besides its operands: the weight in the compute type, and its fp32 absmax.

    Going forward on CUDA a layer without an adapter has the absmax before and after its offset is added.
    """
    if setting.quantization == "none":
        return 0
    is_nested = setting.quantization == "nf4" and setting.double_quant
    absmax = setting.tensor_bytes(math.ceil(linear.weights / BLOCK), 4) if is_nested else 0
    copies = 2 if is_forward and setting.device == "cuda" and not setting.adapts(linear) else 1
    return setting.tensor_bytes(linear.weights, setting.compute_bytes) + copies * absmax
