"""Bytes that come and go within an operation: what the step keeps is in `activations`.

CUDA figures are from sources, not measured here: cuBLAS workspaces from PyTorch's `CUDABlas`
(`:4096:2:16:8`; 32 MiB on compute capability 9, 10, 12), FlashAttention-2's backward from its fp32
accumulator for dq and its expanded dk, dv under grouped queries. No GPU has confirmed them for this step.
Not counted: before compute capability 8.0 there is no FlashAttention, and fused attention with grouped
queries may fall back to one that makes T x T scores.
"""

from __future__ import annotations

from qadapt.plan.activations import adapter_input_bytes
from qadapt.plan.setting import Setting
from qadapt.plan.weights import dequantized_bytes
from qadapt.shape import Linear, ModelShape
from qadapt.units import MIB

FP32 = 4


def library_bytes(setting: Setting, *, compute_capability: float | None) -> int:
    """The workspace of cuBLAS, taken from the caching allocator at the first product and kept."""
    if setting.device == "cpu":
        return 0
    is_wide = compute_capability is not None and compute_capability >= 9
    return 32 * MIB if is_wide else 8_519_680


def mlp_passing_bytes(shape: ModelShape, setting: Setting) -> int:
    """What comes on top of the kept bytes of a layer at the widest moment of its feed-forward half.

    Moments, all with the layer's output gradient: the down projection's gradient through the adapter; the
    same through the base, with the dequantized weight; their sum, or the products' two gradients; and,
    before all of them, the recomputed up projection with its adapter's output in two copies.
    """
    down, up = _linear(shape, "down_proj"), _up(shape)
    c, a, tokens = setting.compute_bytes, setting.adapter_value_bytes, setting.tokens
    wide, gradient = shape.mlp_width * tokens, shape.width * c * tokens
    product = adapter_input_bytes([down], setting) * tokens
    moments = [3 * wide * c - product, 2 * wide * c + dequantized_bytes(down, setting) - product]
    if setting.adapts(down):
        moments.append(wide * a)
    if setting.adapts(up):
        fused = up.outputs // shape.mlp_width - 1  # 1 if gate and up are one layer: no activated gate yet
        cast = 0 if a == c else (c + FP32) * shape.width * tokens
        again = 2 * up.outputs * a * tokens - fused * wide * c - product
        residual = gradient * (2 if fused and c < FP32 else 1)
        moments.append(again + residual + cast)
    if setting.dropout > 0:  # the recomputed product, beside the dropped one
        moments.append(wide * c + 4 * gradient)
    if shape.family == "gemma2":  # the norm after the feed-forward part, in fp32
        moments.append(5 * shape.width * FP32 * tokens)
    return gradient + max(moments)


def attention_passing_bytes(shape: ModelShape, setting: Setting) -> int:
    """What comes on top of the attention half's kept bytes while fused attention goes backward.

    Eager attention with a soft cap: the fp32 gradients before and after the softmax, its cast let go.
    """
    query, key_value = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    c = setting.compute_bytes
    if shape.attention_softcap is not None:
        per_score = 2 * FP32 - (c if c < FP32 else 0)
        scores = setting.rows * shape.heads * setting.length**2 * per_score
        let_go = query * c + shape.width * FP32  # output and values, less one gradient; the norm after them
        return (shape.width * c - let_go) * setting.tokens + scores
    gradients = (shape.width + 2 * query + 2 * key_value) * c
    if setting.device == "cuda":
        gradients += query * FP32
        if shape.kv_heads < shape.heads:
            gradients += 2 * query * c
    return gradients * setting.tokens


def logit_bytes(shape: ModelShape, setting: Setting) -> tuple[int, int]:
    """The supervised tokens' logits at the loss's highest moment, and while the layers go backward.

    Backward through `F.cross_entropy` on fp32 logits: the log-softmax it kept, the gradient of the chosen
    ones and the gradient of all, 12 bytes per value, plus the logits themselves if the caller holds them (14
    in bf16, 16 in fp32: the figures found in published measurements). Forward: the logits in the compute
    type, their fp32 copy, the log-softmax. A soft cap keeps its tanh as well.
    """
    values = setting.supervised_tokens * shape.vocabulary
    held = values * setting.compute_bytes * setting.holds_logits
    capped = values * setting.compute_bytes if shape.final_softcap is not None else 0
    copy = 0 if setting.compute_bytes == FP32 else FP32
    forward = values * (setting.compute_bytes + copy + FP32)
    backward = values * 3 * FP32 + held
    return capped + max(forward, backward), held


def update_bytes(setting: Setting, *, adapter_values: int) -> int:
    """What the optimizer's step takes on top: bf16 adapters get their updates as bf16 values of their own."""
    return adapter_values * 2 if setting.adapter_dtype == "bf16" else 0


def _linear(shape: ModelShape, name: str) -> Linear:
    return next(linear for linear in shape.linears if linear.name == name)


def _up(shape: ModelShape) -> Linear:
    return _linear(shape, "gate_up_proj" if shape.family == "phi3" else "up_proj")
