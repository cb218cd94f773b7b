"""What an adapter method does in a step besides training its parameters: a seam of five calls.

    gradients of all micro-batches ─► add_gradients ─► clipping ─► begin_update ─► update ─► end_update

AdaLoRA has one (`adapters/rank_budget.py`), all others none. What it keeps from step to step is saved,
resumed, rehearsed and counted with the optimizer's states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from qadapt.adapters.rank_budget import budget_of


class Companion(Protocol):
    """A method's own part in each step."""

    @property
    def progress(self) -> int:
        """How far an update that memory ran out in has come; only for comparison."""
        ...

    def add_gradients(self) -> None:
        """Adds gradients of its own to those of the loss, once a step; changes nothing else."""
        ...

    def begin_update(self) -> None:
        """Looks at the gradients as they will be applied; where memory ran out in it, the next call goes on.

        Called again after it has ended, but before `end_update`, it does nothing.
        """
        ...

    def end_update(self) -> Iterable[tuple[str, Tensor]]:
        """Names of parameters that lose numbers now, and a mask of those; takes no memory."""
        ...

    def skip_update(self) -> None:
        """The update of a step is left out."""
        ...

    def held(self) -> list[Tensor]:
        """Every tensor that stays from step to step."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything to save, by name."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` gave."""
        ...


class Alone:
    """No companion: what most methods have."""

    progress = 0

    def add_gradients(self) -> None:
        """None."""

    def begin_update(self) -> None:
        """Nothing."""

    def end_update(self) -> Iterable[tuple[str, Tensor]]:
        """Nothing."""
        return ()

    def skip_update(self) -> None:
        """Nothing."""

    def held(self) -> list[Tensor]:
        """None."""
        return []

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing."""


def companion_of(model: nn.Module) -> Companion:
    """That of the method whose adapter a model has."""
    return budget_of(model) or Alone()
