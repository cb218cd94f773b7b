"""Bytes of prefix tuning (`adapters/prefix.py`): keys and values in front of every document. No torch.

To attention, every document is longer by the prefix, queries included (`engine/prefix.py`); to all else a
layer has, it is not. Legend: K key-value heads, D head width, P length of the prefix, W width of the model,
M width of the network that makes the prefix while it is trained.
"""

from __future__ import annotations

import dataclasses

from qadapt.methods import ENCODER_WIDTH, METHODS
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape


def has_prefix(setting: Setting) -> bool:
    """Whether a setting trains keys and values in front of every document."""
    return METHODS[setting.method].size == "length"


def prefix_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor of one layer."""
    each = shape.kv_heads * shape.head_width
    if setting.method == "prefix":
        return 2 * each * ENCODER_WIDTH, 2 * each
    return setting.rank * each, setting.rank * each


def network_tensors(shape: ModelShape, setting: Setting) -> tuple[int, ...]:
    """The number of values of each trained tensor that all layers share: table, weight and bias."""
    if setting.method != "prefix":
        return ()
    return setting.rank * shape.width, ENCODER_WIDTH * shape.width, ENCODER_WIDTH


def flat_values(shape: ModelShape, setting: Setting) -> int:
    """The number of values of the prefix as it stands on disk."""
    return 2 * shape.layers * setting.rank * shape.kv_heads * shape.head_width


def network_bytes(setting: Setting) -> int:
    """What a layer keeps of the network: its inner values, (P, M)."""
    kept = setting.rank * ENCODER_WIDTH if setting.method == "prefix" else 0
    return setting.tensor_bytes(kept, setting.adapter_value_bytes)


def as_attended(setting: Setting, *, documents: int) -> Setting:
    """The setting as attention has it: documents, or rows where they are filled up, with what is in front."""
    if not has_prefix(setting):
        return setting
    count = documents if setting.packed else setting.rows
    tokens = setting.tokens + count * setting.rank
    return dataclasses.replace(setting, rows=count, length=setting.length + setting.rank, step_tokens=tokens)
