"""Virtual tokens as ids: places in front of a row where trained vectors stand instead of embeddings.

Rows of data and prompts carry the ids that no tokenizer has (`methods.front_ids`), so packing, positions,
left padding, caches, plans and the ledger see ordinary tokens. Which vectors stand there is not known here
(`adapters/prompt.py`).

Legend: B rows, T tokens, P virtual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from qadapt.methods import front_ids

_NAMES = "input_ids", "attention_mask", "position_ids", "past_key_values"
"""The first arguments of the library's causal models, in their order."""


@runtime_checkable
class HasVirtualTokens(Protocol):
    """A model that may want virtual tokens in front of every row."""

    @property
    def virtual_tokens(self) -> int:
        """How many it wants now: none if they are switched off."""


def front_of(model: nn.Module) -> int:
    """How many virtual tokens a model wants in front of every row."""
    return model.virtual_tokens if isinstance(model, HasVirtualTokens) else 0


def by_name(arguments: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a causal model was called with, all of it by name."""
    assert len(arguments) <= len(_NAMES), "the rest has names"
    return {**dict(zip(_NAMES, arguments, strict=False)), **named}


def in_front(model: nn.Module, prompt: Sequence[int]) -> list[int]:
    """A prompt as a model wants it: behind virtual tokens, unless it begins with some."""
    is_there = len(prompt) > 0 and prompt[0] < 0
    return [*([] if is_there else front_ids(front_of(model))), *prompt]


def inserted(values: Tensor, front: Tensor, at: Tensor) -> Tensor:
    """Rows with something more in each.

    Args:
        values: (B, T).
        front: (P,) what is put in, the same in every row.
        at: (B,) before which column.

    Returns:
        (B, T + P).
    """
    count, columns = len(front), torch.arange(values.shape[1] + len(front), device=values.device)
    place = columns - at[:, None]  # within what is put in
    source = torch.where(place >= count, columns - count, columns).clamp(max=values.shape[1] - 1)
    is_front = (place >= 0) & (place < count)
    return torch.where(is_front, front[place.clamp(0, count - 1)], values.gather(1, source))
