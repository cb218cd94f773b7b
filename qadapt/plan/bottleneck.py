"""Bytes of bottleneck adapters (`adapters/bottleneck.py`), which stand beside a layer's two parts. No torch.

Each place has a projection down (R, D) and up (D, R) with their biases; for the backward pass it keeps what
enters, the R values before and after their nonlinearity, and where it is trained in another type than is
computed in, the cast projections. A projection of Compacter has a number for each input and each output, a
bias, and N³ that all of a model share; it keeps N² values of each token, and N² for each input, made of its
own. A layer norm has two numbers for each of D, and keeps what enters it, too.

Legend: D width of the model, R width of the bottleneck, N `SUMMANDS`.
"""

from __future__ import annotations

import dataclasses

from qadapt.methods import METHODS, SUMMANDS, activation_of, has_norm
from qadapt.plan.fusion import attends, fusion_bytes, fusion_tensors, is_cast, layer_norm_bytes
from qadapt.plan.norms import norm_copies
from qadapt.plan.setting import Setting
from qadapt.plan.stack import Half, below_bytes
from qadapt.shape import ModelShape

_KNOWN_FROM_RESULT = ("relu", "tanh")
"""Nonlinearities whose slopes are known from what comes out of them."""


def stands_beside(setting: Setting) -> bool:
    """Whether the adapters of a setting stand beside the parts of a layer, not on its linear layers."""
    return METHODS[setting.method].usual_activation is not None or attends(setting)


def bottleneck_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor of one layer."""
    if attends(setting):
        return fusion_tensors(shape, setting)
    inner, width, facts = setting.rank, shape.width, METHODS[setting.method]
    each = (width, inner, inner, inner, width, width) if facts.is_hypercomplex else _dense(inner, width)
    norm = (width, width) if has_norm(setting.nonlinearity) else ()
    return (*each, *norm) * (2 if facts.after_attention else 1)


def reached(shape: ModelShape, setting: Setting) -> tuple[ModelShape, Setting]:
    """The layers that something goes back to, as a model and a step of their own: all but dropped ones.

    Those keep nothing for the backward pass, whether they are said to recompute or not.
    """
    if not (dropped := setting.dropped_layers):
        return shape, setting
    recompute = setting.recompute
    if isinstance(recompute, int):
        recompute = max(0, recompute - dropped) or "none"
    layers = dataclasses.replace(shape, layers=shape.layers - dropped)
    fused = tuple(
        dataclasses.replace(each, first_layer=max(0, each.first_layer - dropped)) for each in setting.fused
    )
    targets = setting.targets if attends(setting) else "all-linear"
    return layers, dataclasses.replace(setting, recompute=recompute, targets=targets, fused=fused)


def shared_tensors(setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor that the adapters of all layers share."""
    return (SUMMANDS**3,) if METHODS[setting.method].is_hypercomplex else ()


def bottleneck_bytes(shape: ModelShape, setting: Setting, half: Half) -> int:
    """What the adapter beside one half of a layer keeps, with the one it stands on; 0 if there is none."""
    return below_bytes(shape, setting, half) + _own_bytes(shape, setting, half)


def _own_bytes(shape: ModelShape, setting: Setting, half: Half) -> int:
    facts = METHODS[setting.method]
    if not stands_beside(setting) or (half == "attention" and not is_after_attention(setting)):
        return 0
    if attends(setting):
        return fusion_bytes(shape, setting) - shared_stream_bytes(shape, setting)
    c, width, inner = setting.compute_bytes, shape.width, setting.rank
    weights, values = is_cast(setting) * 2 * width * inner, width + 2 * inner
    if facts.is_hypercomplex:
        weights = (SUMMANDS**2 + is_cast(setting)) * (width + inner)
        values += 2 * SUMMANDS**2
        if activation_of(setting.method, setting.nonlinearity) in _KNOWN_FROM_RESULT:
            values -= inner  # elsewhere it is scaled before it goes on, and kept twice
    kept = values * c * setting.tokens + weights * c + mask_bytes(shape, setting)
    if has_norm(setting.nonlinearity):
        kept += width * c * setting.tokens + layer_norm_bytes(shape, setting)
    return kept - shared_stream_bytes(shape, setting)


def bottleneck_passing_bytes(shape: ModelShape, setting: Setting) -> int:
    """What comes on top of what is kept while an adapter goes backward, after what its layer gave it.

    Two gradients; with a layer norm what came out of it is gone by then.
    """
    one = shape.width * setting.compute_bytes * setting.tokens
    return one if has_norm(setting.nonlinearity) else 2 * one


def is_after_attention(setting: Setting) -> bool:
    """Whether a layer has something after its attention, too."""
    return METHODS[setting.fused[0].method if attends(setting) else setting.method].after_attention


def mask_bytes(shape: ModelShape, setting: Setting) -> int:
    """What dropout keeps of what it dropped: a byte for each value, on a CPU a whole value."""
    each = 1 if setting.device == "cuda" else setting.compute_bytes
    return shape.width * each * setting.tokens if setting.dropout > 0 else 0


def shared_stream_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a parallel adapter need not keep itself: the stream that enters, if a norm keeps it as it is."""
    first = setting.fused[0].method if attends(setting) else setting.method
    is_kept_as_it_is = setting.dropout == 0 or has_norm(setting.nonlinearity)
    is_shared = first == "parallel" and not norm_copies(setting) and is_kept_as_it_is
    return shape.width * setting.compute_bytes * setting.tokens if is_shared else 0


def _dense(inner: int, width: int) -> tuple[int, ...]:
    return inner * width, inner, width * inner, width
