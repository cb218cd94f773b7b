"""Says once where the system gave less pinned memory than inputs of recomputed layers asked for.

Host memory for them is taken in the steps, and more of it by an out-of-memory rung, so it is looked at after
each step. Knows no memory itself (`engine/boundaries.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedModel

from qadapt.engine.boundaries import lacks_pinned_memory
from qadapt.events import Warned


class PinnedWatch:
    """Looks at where a base's boundaries wait.

    Args:
        base: The base.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._is_said = False

    def after_step(self, step: int) -> Iterator[Warned]:
        """A warning the first time that ordinary memory had to do."""
        if self._is_said or not lacks_pinned_memory(self._base):
            return
        self._is_said = True
        yield Warned(
            message="The system gave too little pinned memory: inputs of recomputed layers are copied while "
            "the card waits.",
            cure="Give the machine, or WSL, more memory; the numbers are the same.",
            step=step,
        )
