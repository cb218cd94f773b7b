"""Attention on cards whose fused kernels refuse grouped queries: keys and values once per query head.

Before compute capability 8.0, and in fp32, PyTorch has only its memory-efficient kernel, which takes no
grouped queries; handed on as transformers does, they end in T x T scores (`plan/attention.py`). Repeated keys
and values cost a few megabytes a layer instead. The numbers are the same. Registered by transformers' own
interfaces; it knows no card, only what it is told. Legend: B rows, H query heads, K key-value heads, T
tokens, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qadapt.engine.target import TYPES
from qadapt.errors import BadModel, Unsupported
from qadapt.plan.attention import repeats_keys
from qadapt.shape import shape_from_config

NAME = "sdpa_repeated"
_UNGROUPED = nn.Module()
"""Stands for an attention module that knows of no groups, so that the library leaves keys as they are."""


def choose_attention(model: PreTrainedModel, *, dtype: torch.dtype, capability: float | None) -> None:
    """Lets a model repeat keys and values, if only that keeps T x T scores away.

    Args:
        model: A causal language model; one that qadapt cannot train is left as it is.
        dtype: Of its products.
        capability: Compute capability of the card; None for a CPU, where nothing is changed.
    """
    try:
        shape = shape_from_config(model.config.to_dict(), name=model.config.model_type)
    except (BadModel, Unsupported):
        return
    if repeats_keys(shape, TYPES[dtype], compute_capability=capability):
        AttentionInterface.register(NAME, attend_repeated)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend_repeated(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T, D)
    value: Tensor,  # (B, K, T, D)
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, None]:
    """The library's fused attention, keys and values repeated before; (B, T, H, D)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    result: tuple[Tensor, None] = sdpa_attention_forward(
        _UNGROUPED, query, key, value, attention_mask, **named
    )
    return result
