"""An estimate with all that is needed to show it: whose it is, where it would run, what runs measured.

Screens and `--json` read the same `Answer`. It knows neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qadapt.hardware.calibration import Calibration
from qadapt.hardware.target import Target
from qadapt.plan.estimate import Estimate
from qadapt.plan.inverse import Most
from qadapt.plan.knobs import micro_batches
from qadapt.plan.ladder import Change
from qadapt.plan.room import Room


@dataclass(frozen=True)
class Answer:
    """What a step takes, and whether that is free.

    Attributes:
        name: The model's name.
        parameters: All of its weights and biases.
        disk: Bytes a run writes, by what for.
        estimate: What one micro-batch takes.
        target: Where.
        rows_per_step: Rows of one optimizer step; 0: one forward pass is a step.
        changes: What would make it fit, if it does not.
        calibration: What earlier runs measured, if the target is this machine.
        module: The module that ran at the peak; empty where only the phase is known.
        notes: What a reader would not expect of this model.
        reserved_range_bytes: What the allocator may hold, from a replay; None: the estimate's own range.
        gap_share: The share of reserved bytes that no block uses at the peak, from a replay; None: not known.
        routing_bytes: A mixture of experts' peak from balanced to worst routing; None for a dense model.
    """

    name: str
    parameters: int
    disk: Mapping[str, int]
    estimate: Estimate
    target: Target
    rows_per_step: int
    changes: tuple[Change, ...] = ()
    calibration: Calibration | None = None
    module: str = ""
    notes: tuple[str, ...] = ()
    reserved_range_bytes: tuple[int, int] | None = None
    gap_share: float | None = None
    routing_bytes: tuple[int, int] | None = None

    @property
    def reserved_bytes(self) -> tuple[int, int]:
        """The least and the most the allocator is likely to hold, with memory to spare."""
        own = (self.estimate.reserved_low_bytes, self.estimate.reserved_high_bytes)
        return self.reserved_range_bytes or own

    @property
    def error_bytes(self) -> int:
        """How far the needed bytes may be off."""
        return self.room.error_bytes(self.estimate)

    @property
    def room(self) -> Room:
        """What there is for the step."""
        above = self.calibration.above if self.calibration else 0.0
        return Room(self.target.free_bytes, above, self.target.host_bytes)

    @property
    def is_widened(self) -> bool:
        """Whether this machine's runs were further off than the estimate says of itself."""
        return self.error_bytes > self.estimate.error_bytes

    @property
    def verdict(self) -> Literal["fits", "close", "too much"]:
        """Whether it fits by all means, perhaps, or not even if the estimate is off in its favour."""
        if self.room.holds(self.estimate):
            return "fits"
        return "close" if self.room.may_hold(self.estimate) else "too much"

    @property
    def micro_batches_per_step(self) -> int:
        """Forward passes of one optimizer step."""
        return micro_batches(self.rows_per_step, self.estimate.setting.rows)

    @property
    def seconds_per_1000_steps(self) -> float | None:
        """None where nobody has measured the device."""
        seconds = self.estimate.seconds_per_step
        return None if seconds is None else 1000 * self.micro_batches_per_step * seconds


@dataclass(frozen=True)
class CardAnswer:
    """One card of the catalogue: the step, and the largest value of a field if one was asked for."""

    answer: Answer
    most: Most | None = None
