"""A base with adapters, as it looks to whoever trains, evaluates or talks to it: as PEFT's model does."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel


class AdaptedBase(nn.Module):
    """A base whose modules call more than their own.

    Attributes:
        base: The base.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base

    @property
    def config(self) -> Any:
        """The base's configuration."""
        return self.base.config

    @property
    def device(self) -> torch.device:
        """Where the base computes."""
        return self.base.device

    def get_base_model(self) -> PreTrainedModel:
        """The base, with what its modules call."""
        return self.base

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the base computes."""
        return self.base(*arguments, **named)

    def generate(self, *arguments: Any, **named: Any) -> Any:
        """What the base generates."""
        return cast(Any, self.base).generate(*arguments, **named)
