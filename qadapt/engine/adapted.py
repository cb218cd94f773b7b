"""What every model with an adapter can do, be it PEFT's or a side-car of ours: give its base, and be it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Adapted(Protocol):
    """A base with an adapter."""

    def get_base_model(self) -> nn.Module:
        """The base, the adapter within it."""

    def disable_adapter(self) -> AbstractContextManager[None]:
        """While open, the model is its base."""
