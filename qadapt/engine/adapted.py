"""What every model with an adapter can do, be it PEFT's or a side-car of ours: give its base, and be it.

One with several can be asked each prompt of another one.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@runtime_checkable
class AskedByRow(Protocol):
    """A base with several adapters that is asked some prompts, each of its own."""

    def batch_of(self, prompts: Sequence[int]) -> AbstractContextManager[None]:
        """While open, the rows of the batch are these prompts, by their places among all."""
