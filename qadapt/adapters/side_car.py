"""A base whose layers call small modules of ours: what the methods have in common that PEFT does not know.

The modules lie inside the base's layers, so recomputation, devices and modes reach them; they can be switched
off. On disk it is a side-car: one file of tensors and one of configuration (`side_car_files.py`). Knows no
method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.adapted_base import AdaptedBase


class Part(nn.Module):
    """A module beside a layer that can be switched off."""

    is_on = True
    is_shared = False
    """Whether it is no adapter of its own, but what several have in common."""
    is_below = False
    """Whether it is of the trained adapter on which the model's own stands."""
    virtual_tokens = 0
    """How many virtual tokens it wants in front of every row (`engine/front.py`)."""

    def stored(self) -> dict[str, Tensor]:
        """What stands on disk of it, by name; with what remains after training, if that is something else."""
        return dict(self.named_parameters())


class SideCar(AdaptedBase):
    """A frozen base with trained modules beside its layers, which call them.

    Attributes:
        parts: Name of each module on disk → the module; they belong to the base's layers.
        settings: What must be known to make them again, as plain JSON values.
    """

    def __init__(
        self, base: PreTrainedModel, parts: Mapping[str, Part], *, settings: Mapping[str, Any]
    ) -> None:
        super().__init__(base)
        self.settings = dict(settings)
        self._parts = dict(parts)  # a plain mapping: the base's layers own them

    @property
    def parts(self) -> dict[str, Part]:
        """Name of each module on disk → the module."""
        return dict(self._parts)

    def stored(self) -> dict[str, Tensor]:
        """What stands on disk of it, by name."""
        return {
            f"{name}.{key}": each for name, part in self._parts.items() for key, each in part.stored().items()
        }

    @property
    def virtual_tokens(self) -> int:
        """How many virtual tokens stand in front of every row; none where they are switched off."""
        return sum(part.virtual_tokens for part in self._parts.values() if part.is_on)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While open, the model is its base, to the bit."""
        with _off(self._parts.values()):
            yield

    @contextmanager
    def only_below(self) -> Iterator[None]:
        """While open, the model is its base with the trained adapter on which its own stands."""
        with _off(part for part in self._parts.values() if not part.is_below):
            yield


@contextmanager
def _off(parts: Iterable[Part]) -> Iterator[None]:
    """While open, the parts are switched off."""
    before = {part: part.is_on for part in parts}
    try:
        for part in before:
            part.is_on = False
        yield
    finally:
        for part, was_on in before.items():
            part.is_on = was_on
