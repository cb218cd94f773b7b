"""Bytes of what is trained: the adapter, its gradient, its optimizer state. Exact, tensor by tensor.

Knows nothing of activations. A LoRA pair on a layer (outputs O, inputs I) is A (R, I) and B (O, R),
arXiv:2106.09685, with a magnitude (O,) in DoRA; IA3 has (O,) or (I,) alone, VeRA (O,) and (R,), OFT
S(S-1)/2 angles for each S inputs, AdaLoRA a pair of the rank it starts with and (R,). N new tokens have rows
(N, D) in embedding and head, D the width. Checked to the byte against PEFT's in `tests/test_estimate.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qadapt.methods import SCALED_INPUTS
from qadapt.plan.bottleneck import bottleneck_tensors, shared_tensors, stands_beside
from qadapt.plan.fusion import frozen_tensors, shared_frozen_tensors
from qadapt.plan.prefix import flat_values, has_prefix, network_tensors, prefix_tensors
from qadapt.plan.prompt import front_tensors
from qadapt.plan.ranks import trained_rank
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape

EIGHT_BIT_MINIMUM = 4096
"""bitsandbytes keeps the states of smaller tensors in fp32 (`min_8bit_size`)."""
EIGHT_BIT_BLOCK = 256
"""State values that share one fp32 absmax."""


def adapter_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor of one decoder layer."""
    adapted = [linear for linear in shape.linears if setting.adapts(linear)]
    if stands_beside(setting):
        return bottleneck_tensors(shape, setting)
    if has_prefix(setting):
        return prefix_tensors(shape, setting)
    if setting.method == "ia3":
        return tuple(each.inputs if each.name in SCALED_INPUTS else each.outputs for each in adapted)
    if setting.method == "oft":
        return tuple(each.inputs * (setting.rank - 1) // 2 for each in adapted)
    if setting.method == "vera":
        return tuple(count for each in adapted for count in (each.outputs, setting.rank))
    rank = trained_rank(setting.method, setting.rank)
    pairs = [rank * side for linear in adapted for side in (linear.inputs, linear.outputs)]
    magnitudes = [linear.outputs for linear in adapted] if setting.method == "dora" else []
    values = [rank for _ in adapted] if setting.method == "adalora" else []
    return (*pairs, *magnitudes, *values)


def layers_with_adapter(shape: ModelShape, setting: Setting) -> int:
    """How many decoder layers have one."""
    return shape.layers - setting.dropped_layers


def token_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each table's rows of new tokens; a tied head shares the embedding's."""
    rows = setting.new_tokens * shape.width
    return (rows,) * (1 if shape.tied else 2) if rows else ()


def once_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor that no layer has for itself."""
    return (
        *token_tensors(shape, setting),
        *front_tensors(shape, setting),
        *network_tensors(shape, setting),
        *shared_tensors(setting),
    )


def trainable(shape: ModelShape, setting: Setting) -> int:
    """The number of trained values."""
    return layers_with_adapter(shape, setting) * sum(adapter_tensors(shape, setting)) + sum(
        once_tensors(shape, setting)
    )


def largest_tensor(shape: ModelShape, setting: Setting) -> int:
    """The number of values of the largest trained tensor."""
    return max((*adapter_tensors(shape, setting), *once_tensors(shape, setting)), default=0)


def adapter_bytes(shape: ModelShape, setting: Setting) -> int:
    """The adapter's values; its gradient takes the same again, in the same type."""
    each = setting.adapter_value_bytes
    layer = sum(setting.tensor_bytes(count, each) for count in adapter_tensors(shape, setting))
    return layers_with_adapter(shape, setting) * layer + sum(
        setting.tensor_bytes(n, each) for n in once_tensors(shape, setting)
    )


def start_bytes(shape: ModelShape, setting: Setting) -> int:
    """What of the adapter is frozen and takes no gradient.

    PiSSA's start, as large as what it trains; VeRA's two projections, once for all layers, as wide as the
    widest needs; the adapters that are attended over, or the one that another stands on.
    """
    each = setting.adapter_value_bytes
    if setting.fused:
        layer = sum(setting.tensor_bytes(count, each) for count in frozen_tensors(shape, setting))
        once = sum(setting.tensor_bytes(count, each) for count in shared_frozen_tensors(setting))
        return (shape.layers - setting.fused[0].first_layer) * layer + once
    if setting.method == "vera":
        adapted = [linear for linear in shape.linears if setting.adapts(linear)]
        widest = max(linear.inputs for linear in adapted), max(linear.outputs for linear in adapted)
        return sum(setting.tensor_bytes(setting.rank * side, each) for side in widest)
    if setting.method != "pissa":
        return 0
    return shape.layers * sum(setting.tensor_bytes(count, each) for count in adapter_tensors(shape, setting))


def saved_bytes(shape: ModelShape, setting: Setting) -> int:
    """What stands on disk of the adapter when it is trained: prefix and virtual tokens are flat there.

    Of AdaLoRA it is the most, nothing given up: what is, is left out, but the best checkpoint may be an early
    one.
    """
    if setting.virtual_tokens:
        return setting.adapter_value_bytes * setting.virtual_tokens * shape.width
    if has_prefix(setting):
        return setting.adapter_value_bytes * flat_values(shape, setting)
    on_disk = replace(setting, device="cpu")  # where no size is rounded up
    return adapter_bytes(shape, on_disk) + start_bytes(shape, on_disk)


def optimizer_bytes(shape: ModelShape, setting: Setting) -> int:
    """AdamW's two moments, and the compensation that bf16 adapters carry (Kahan, 2 bytes per value).

    fp32 moments take 8 bytes per value. 8-bit ones take 2, plus one fp32 absmax per 256 values and moment, in
    tensors of at least 4,096 values. Two 8-bit code books of 1 KiB are shared by all tensors. States that are
    paged count as if they lay on the GPU: paging moves them only under pressure.
    """
    per_layer = sum(_state_bytes(count, setting) for count in adapter_tensors(shape, setting))
    once = sum(_state_bytes(count, setting) for count in once_tensors(shape, setting))
    shared = 2 * setting.tensor_bytes(256, 4) if _has_8bit_state(shape, setting) else 0
    states = layers_with_adapter(shape, setting) * per_layer + once + shared
    return states + (_importance_bytes(shape, setting) if setting.method == "adalora" else 0)


def _importance_bytes(shape: ModelShape, setting: Setting) -> int:
    """AdaLoRA's two averages of each value, and which triplets are given up, a byte each."""
    averages = 2 * adapter_bytes(shape, setting)
    adapted = [linear for linear in shape.linears if setting.adapts(linear)]
    triplets = shape.layers * len(adapted) * trained_rank(setting.method, setting.rank)
    return averages + setting.tensor_bytes(triplets, 1)


def _state_bytes(count: int, setting: Setting) -> int:
    compensation = setting.tensor_bytes(count, 2) if setting.adapter_dtype == "bf16" else 0
    if setting.optimizer == "adamw" or count < EIGHT_BIT_MINIMUM:
        is_torch = setting.optimizer == "adamw" and setting.adapter_dtype == "fp32"
        step = setting.tensor_bytes(1, 4) if is_torch else 0  # torch counts steps per tensor, in a tensor
        return compensation + 2 * setting.tensor_bytes(count, 4) + step
    absmax = setting.tensor_bytes(math.ceil(count / EIGHT_BIT_BLOCK), 4)
    return compensation + 2 * (setting.tensor_bytes(count, 1) + absmax)


def _has_8bit_state(shape: ModelShape, setting: Setting) -> bool:
    return setting.optimizer == "adamw-8bit" and largest_tensor(shape, setting) >= EIGHT_BIT_MINIMUM
