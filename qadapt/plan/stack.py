"""Bytes of a frozen adapter on which the trained one stands (`adapters/stack.py`). No torch.

It is there in every layer that has one. For the backward pass it keeps something in layers that something
goes back through: the R values at its nonlinearity, with a layer norm what enters, and where it is held in
another type than is computed in, the cast projections; nothing that only its own gradient would need.

Legend: D width of the model, R width of the adapter.
"""

from __future__ import annotations

from typing import Literal

from qadapt.methods import METHODS
from qadapt.plan.fusion import frozen_bytes
from qadapt.plan.norms import norm_copies
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape

Half = Literal["attention", "mlp"]


def below_bytes(shape: ModelShape, setting: Setting, half: Half) -> int:
    """What the adapter below keeps beside one half of a layer.

    Where only the upper layers have one, as if what those keep were spread evenly.
    """
    below = setting.below
    if below is None or (half == "attention" and not METHODS[below.method].after_attention):
        return 0
    kept = frozen_bytes(shape, setting, below)
    is_shared = METHODS[below.method].sees == "stream" and not norm_copies(setting)  # a norm keeps it
    if below.norm and not is_shared:
        kept += shape.width * setting.compute_bytes * setting.tokens
    return kept * max(0, shape.layers - below.first_layer) // shape.layers


def below_idle_bytes(shape: ModelShape, setting: Setting, half: Half) -> int:
    """What of it a layer does not keep that nothing goes back through: all, if that layer has one."""
    below = setting.below
    return 0 if below is None or below.first_layer > 0 else below_bytes(shape, setting, half)
