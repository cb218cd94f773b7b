"""Bytes of bottleneck adapters (`adapters/bottleneck.py`), which stand beside a layer's two parts. No torch.

Each place has a projection down (R, D) and up (D, R) with their biases; for the backward pass it keeps what
enters, the R values before and after their nonlinearity, and where it is trained in another type than is
computed in, the cast projections. Legend: D width of the model, R width of the bottleneck.
"""

from __future__ import annotations

from typing import Literal

from qadapt.methods import METHODS
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape

Half = Literal["attention", "mlp"]
FP32 = 4


def stands_beside(setting: Setting) -> bool:
    """Whether the adapters of a setting stand beside the parts of a layer, not on its linear layers."""
    return METHODS[setting.method].usual_activation is not None


def bottleneck_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor of one layer."""
    inner, width = setting.rank, shape.width
    return (inner * width, inner, width * inner, width) * (2 if setting.method == "houlsby" else 1)


def bottleneck_bytes(shape: ModelShape, setting: Setting, half: Half) -> int:
    """What the adapter beside one half of a layer keeps; 0 if there is none."""
    if not stands_beside(setting) or (half == "attention" and setting.method != "houlsby"):
        return 0
    c = setting.compute_bytes
    cast = 0 if setting.adapter_value_bytes == c and not _is_other_half(setting) else 2 * shape.width * c
    each = (shape.width + 2 * setting.rank) * c
    kept = each * setting.tokens + cast * setting.rank + mask_bytes(shape, setting)
    return kept - shared_stream_bytes(shape, setting)


def mask_bytes(shape: ModelShape, setting: Setting) -> int:
    """What dropout keeps of what it dropped: a byte for each value, on a CPU a whole value."""
    each = 1 if setting.device == "cuda" else setting.compute_bytes
    return shape.width * each * setting.tokens if setting.dropout > 0 else 0


def shared_stream_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a parallel adapter need not keep itself: the stream that enters, which a norm keeps in fp32."""
    is_shared = setting.method == "parallel" and setting.compute_bytes == FP32 and setting.dropout == 0
    return shape.width * FP32 * setting.tokens if is_shared else 0


def _is_other_half(setting: Setting) -> bool:
    """Whether adapters in bf16 are computed in fp16."""
    return setting.adapter_dtype == "bf16" and setting.compute_dtype == "fp16"
