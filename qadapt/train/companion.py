"""AdaLoRA's part in each step besides training its parameters, and that of all other methods: none.

    gradients of all micro-batches ─► add_gradients ─► clipping ─► begin_update ─► update ─► end_update

`RankBudget` says what each call does. What it keeps from step to step is saved, resumed, rehearsed and
counted with the optimizer's states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from qadapt.adapters.rank_budget import RankBudget, budget_of


class Alone:
    """No companion: what most methods have, so that a step is one sequence of calls for all."""

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


Companion = RankBudget | Alone
"""A method's own part in each step."""


def companion_of(model: nn.Module) -> Companion:
    """That of the method whose adapter a model has."""
    return budget_of(model) or Alone()
