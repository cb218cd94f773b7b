"""The card that a run trains on, held against other runs (`hardware/claims.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from qadapt.cache import cache_folder, output_errors
from qadapt.hardware.claims import SharedCard, claiming
from qadapt.model.precision import choose_device
from qadapt.recipe import Recipe
from qadapt.run_folder import RunFolder
from qadapt.units import parse_bytes


@contextmanager
def holding_card(recipe: Recipe, run: RunFolder) -> Iterator[None]:
    """Holds the card that the recipe trains on for this run; nobody holds a CPU.

    Raises:
        BadRun: Another run trains on it.
        BadOutput: The cache, where the claims lie, cannot be written.
    """
    card = shared_card(recipe.memory.device)
    budget = recipe.memory.budget
    folder = cache_folder() / "cards"
    with ExitStack() as held:
        if card is not None:
            claim = claiming(
                folder, card, run=run.path, budget_bytes=None if budget is None else parse_bytes(budget)
            )
            with output_errors(folder):
                held.enter_context(claim)
        yield


def shared_card(device: str) -> SharedCard | None:
    """The card that a recipe's `memory.device` means on this machine; None for a CPU."""
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return None
    facts = torch.cuda.get_device_properties(chosen)
    return SharedCard(str(facts.uuid), facts.name, facts.total_memory)
