"""Bytes of virtual tokens (`adapters/prompt.py`), which stand in front of every row. No torch.

They are part of a row's length, so what a step keeps of them is counted with its tokens; here is what is
trained, once for the whole model. Legend: D width of the model, P virtual tokens.
"""

from __future__ import annotations

from qadapt.methods import ENCODER_WIDTH
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape


def front_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor: the vectors, or what the network that makes them has."""
    vectors = setting.virtual_tokens * shape.width
    if not vectors or setting.method == "prompt":
        return (vectors,) if vectors else ()
    return vectors, ENCODER_WIDTH * shape.width, ENCODER_WIDTH, shape.width * ENCODER_WIDTH, shape.width
