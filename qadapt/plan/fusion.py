"""Bytes of an attention over trained adapters (`adapters/fusion.py`) beside a part of a layer. No torch.

Trained are, at each place, three matrices (D, D) and a bias; frozen the adapters. For the backward pass are
kept: what enters, the query before and after the keys' matrix, what each adapter gives and their mixture, all
D wide; the weights; of each adapter the R values at its nonlinearity; and where numbers are held in another
type than is computed in, the cast matrices.

Legend: D width of the model, R width of an adapter, N adapters.
"""

from __future__ import annotations

from qadapt.methods import METHODS, SUMMANDS, Fused
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape

FP32 = 4


def attends(setting: Setting) -> bool:
    """Whether a setting trains an attention over adapters."""
    return METHODS[setting.method].attends


def fusion_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor of one layer."""
    square = shape.width**2
    return (square, shape.width, square, square) * places(setting)


def places(setting: Setting) -> int:
    """How many places of a layer have an attention."""
    return 2 if METHODS[setting.fused[0].method].after_attention else 1


def frozen_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each tensor of one layer's adapters."""
    each = [count for fused in setting.fused for count in adapter_values(shape.width, fused)]
    return tuple(each) * places(setting)


def adapter_values(width: int, fused: Fused) -> tuple[int, ...]:
    """The number of values of each tensor of an adapter at one place."""
    inner = fused.width
    norm = (width, width) if fused.norm else ()
    if METHODS[fused.method].is_hypercomplex:
        return (width, inner, inner, inner, width, width, *norm)
    return (inner * width, inner, width * inner, width, *norm)


def shared_frozen_tensors(setting: Setting) -> tuple[int, ...]:
    """The number of values of each tensor that the layers of an adapter share."""
    return tuple(SUMMANDS**3 for fused in setting.fused if METHODS[fused.method].is_hypercomplex)


def fusion_bytes(shape: ModelShape, setting: Setting) -> int:
    """What the attention at one place keeps."""
    c, count = setting.compute_bytes, len(setting.fused)
    wide = (4 + count) * shape.width * c
    weights = count * (FP32 + (c < FP32) * c)
    return (wide + weights) * setting.tokens + _inner_bytes(shape, setting) + _casts(shape, setting, 3)


def idle_bytes(shape: ModelShape, setting: Setting) -> int:
    """What of it the lowest layer that has one does not keep, as nothing goes back to what enters.

    That is the query after the keys' matrix, the weights in the type of what they multiply, and all within
    the adapters.
    """
    c, count = setting.compute_bytes, len(setting.fused)
    per_token = shape.width * c + (count * c if c < FP32 else 0)
    return per_token * setting.tokens + _inner_bytes(shape, setting) + _casts(shape, setting, 1)


def fusion_passing_bytes(shape: ModelShape, setting: Setting) -> int:
    """What comes on top of what is kept while the attention goes backward.

    The gradients of what is added, of the mixture, of what each adapter gives, and one that becomes the
    shares'; or, before those, that of a matrix, in the type of the products and in its own.
    """
    c, square = setting.compute_bytes, shape.width**2
    one = shape.width * c * setting.tokens
    cast = square * setting.adapter_value_bytes if is_cast(setting) else 0
    return max((2 + len(setting.fused)) * one, 2 * one + square * c + cast)


def _inner_bytes(shape: ModelShape, setting: Setting) -> int:
    return sum(frozen_bytes(shape, setting, fused) for fused in setting.fused)


def frozen_bytes(shape: ModelShape, setting: Setting, fused: Fused) -> int:
    """What a frozen adapter keeps at one place, besides what enters: values within it, cast weights."""
    c, width = setting.compute_bytes, shape.width
    kept = fused.width * c * setting.tokens
    if METHODS[fused.method].is_hypercomplex:  # the factors of each input, which are made anew
        kept += (SUMMANDS**2 + is_cast(setting)) * (width + fused.width) * c
    else:
        kept += is_cast(setting) * 2 * width * fused.width * c
    return kept + (layer_norm_bytes(shape, setting) if fused.norm else 0)


def layer_norm_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a layer norm keeps besides what enters it: two numbers of each token, cast weights and biases.

    Those numbers are fp32; on a CPU they have the type of what enters (`layer_norm_kernel.cpp`).
    """
    each = FP32 if setting.device == "cuda" else setting.compute_bytes
    return 2 * each * setting.tokens + is_cast(setting) * 2 * shape.width * setting.compute_bytes


def _casts(shape: ModelShape, setting: Setting, matrices: int) -> int:
    return matrices * shape.width**2 * setting.compute_bytes if is_cast(setting) else 0


def is_cast(setting: Setting) -> bool:
    """Whether numbers are held in another type than is computed in."""
    return setting.adapter_dtype != setting.compute_dtype
