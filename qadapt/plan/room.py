"""What there is for a step, and whether an estimate surely fits: by its error, and by what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qadapt.plan.estimate import Estimate


@dataclass(frozen=True)
class Room:
    """Free memory, a CUDA context included.

    Attributes:
        free_bytes: What there is.
        seen_error: The largest share by which runs on this machine were above their estimate; else 0.
        host_bytes: What is free in the memory of the host beside a card; None: not known. Asked of what puts
            parts of a step there.
    """

    free_bytes: int
    seen_error: float = 0.0
    host_bytes: int | None = None

    def error_bytes(self, estimate: Estimate) -> int:
        """How far its needed bytes may be off: the estimate's own word, or what this machine measured."""
        return max(estimate.error_bytes, math.ceil(estimate.peak_allocated_bytes * self.seen_error))

    def holds(self, estimate: Estimate) -> bool:
        """Whether it fits by all means."""
        is_enough = estimate.needed_bytes + self.error_bytes(estimate) <= self.free_bytes
        return is_enough and self.host_holds(estimate)

    def may_hold(self, estimate: Estimate) -> bool:
        """Whether it fits if the estimate is too high by all of its error."""
        may_be_enough = estimate.needed_bytes - self.error_bytes(estimate) <= self.free_bytes
        return may_be_enough and self.host_holds(estimate)

    def host_holds(self, estimate: Estimate) -> bool:
        """Whether the host has the memory for what is put there, or nobody knows."""
        if self.host_bytes is None or not estimate.setting.offload:
            return True
        return estimate.host_bytes <= self.host_bytes
