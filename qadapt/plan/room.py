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
    """

    free_bytes: int
    seen_error: float = 0.0

    def error_bytes(self, estimate: Estimate) -> int:
        """How far its needed bytes may be off: the estimate's own word, or what this machine measured."""
        return max(estimate.error_bytes, math.ceil(estimate.peak_allocated_bytes * self.seen_error))

    def holds(self, estimate: Estimate) -> bool:
        """Whether it fits by all means."""
        return estimate.needed_bytes + self.error_bytes(estimate) <= self.free_bytes

    def may_hold(self, estimate: Estimate) -> bool:
        """Whether it fits if the estimate is too high by all of its error."""
        return estimate.needed_bytes - self.error_bytes(estimate) <= self.free_bytes
