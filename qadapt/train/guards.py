"""Looks whether the run should stand aside: heat, another program on the card, hours, disk, battery.

Each rule is a small object that is asked for its reason; where its numbers come from is an argument, so that
a test can feed it. A rule that holds is let go of a little later than it took hold (hysteresis), so that a
run does not pause and go on every minute. Knows no loop: `loop.py` saves, waits and leaves.

The two rules about the card have been tried with fed numbers; no GPU has confirmed them yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from datetime import time as time_of_day
from pathlib import Path
from typing import Protocol

import psutil
import pynvml
import torch

from qadapt.cache import free_bytes
from qadapt.events import Warned
from qadapt.pause_rules import PauseRules
from qadapt.train.spill import CardMemory, card_memory
from qadapt.units import MIB, format_bytes

LOOK_SECONDS = 5.0
"""Steps that follow each other faster are not all looked at."""
COOLER_CELSIUS = 5
MORE_ROOM = 1.05
GROWTH_BYTES = 512 * MIB
"""What a run's own kernels may take on the card outside of torch's count; another program takes more."""


class Rule(Protocol):
    """One reason to stand aside; `leaves` if the run is to leave for it and not only to wait."""

    name: str
    leaves: bool

    def reason(self, now: datetime) -> str | None:
        """Why the run should stand aside now, in local time, or None."""

    def problem(self) -> str | None:
        """Why this rule can never hold here, or None."""


@dataclass
class Heat:
    """The card is too hot, until it is some degrees below the limit."""

    limit_celsius: float
    celsius: Callable[[], float | None]
    is_holding: bool = False
    name = "temperature"
    leaves = False

    def reason(self, now: datetime) -> str | None:
        """See `Rule`."""
        limit = self.limit_celsius - (COOLER_CELSIUS if self.is_holding else 0)
        measured = self.celsius()
        self.is_holding = measured is not None and measured >= limit
        if not self.is_holding:
            return None
        return f"the card has {measured:g} °C; it is to stay below {self.limit_celsius:g}"

    def problem(self) -> str | None:
        """See `Rule`."""
        return "no temperature of the card can be read" if self.celsius() is None else None


@dataclass
class OtherProgram:
    """Another program took memory on the card, and less than the limit is free: it gets all of it."""

    limit_bytes: int
    look: Callable[[], CardMemory | None]
    least_others_bytes: int | None = None
    name = "vram"
    leaves = True

    def reason(self, now: datetime) -> str | None:
        """See `Rule`."""
        use = self.look()
        if use is None:
            return None
        before = use.others_bytes if self.least_others_bytes is None else self.least_others_bytes
        self.least_others_bytes = min(before, use.others_bytes)
        grown = use.others_bytes - self.least_others_bytes
        if grown < GROWTH_BYTES or use.free_bytes >= self.limit_bytes:
            return None
        return (
            f"another program took {format_bytes(grown)} on the card, where {format_bytes(use.free_bytes)} "
            f"are free; {format_bytes(self.limit_bytes)} are to stay free"
        )

    def problem(self) -> str | None:
        """See `Rule`."""
        return "the run is on no CUDA card" if self.look() is None else None


@dataclass
class Hours:
    """It is between two times of the day, in local time; the first may be the later one."""

    first: time_of_day
    last: time_of_day
    name = "hours"
    leaves = False

    def reason(self, now: datetime) -> str | None:
        """See `Rule`."""
        moment = now.time()
        if self.first < self.last:
            is_within = self.first <= moment < self.last
        else:
            is_within = moment >= self.first or moment < self.last
        return f"it is between {self.first:%H:%M} and {self.last:%H:%M}" if is_within else None

    def problem(self) -> str | None:
        """See `Rule`."""
        return None


@dataclass
class FreeDisk:
    """Less than the limit is free on the run's disk, until there is a little more than that."""

    limit_bytes: int
    free: Callable[[], int]
    is_holding: bool = False
    name = "free_disk"
    leaves = False

    def reason(self, now: datetime) -> str | None:
        """See `Rule`."""
        free = self.free()
        self.is_holding = free < self.limit_bytes * (MORE_ROOM if self.is_holding else 1)
        if not self.is_holding:
            return None
        return f"the run's disk has {format_bytes(free)} free; it is to keep {format_bytes(self.limit_bytes)}"

    def problem(self) -> str | None:
        """See `Rule`."""
        return None


@dataclass
class OnBattery:
    """The machine runs on its battery."""

    is_plugged: Callable[[], bool | None]
    name = "battery"
    leaves = False

    def reason(self, now: datetime) -> str | None:
        """See `Rule`."""
        return "the machine is on battery" if self.is_plugged() is False else None

    def problem(self) -> str | None:
        """See `Rule`."""
        return "no battery is known to the system" if self.is_plugged() is None else None


@dataclass(frozen=True)
class Reason:
    """Why a run stands aside; `leaves` if it is to leave."""

    text: str
    leaves: bool


class Guards:
    """All rules of a run, looked at every few seconds at most.

    Args:
        rules: In the order in which they are asked; the first that holds is the reason.
        clock: Seconds that never go back.
        now: The local time.
    """

    def __init__(
        self,
        rules: Sequence[Rule] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._now = now
        self._next_look = -float("inf")

    def reason(self) -> Reason | None:
        """Why the run should stand aside; None while nothing holds, or was looked at a moment ago."""
        if not self._rules or self._clock() < self._next_look:
            return None
        self._next_look = self._clock() + LOOK_SECONDS
        return self.reason_now()

    def reason_now(self) -> Reason | None:
        """Why the run should stand aside, looked at now."""
        now = self._now()
        reasons = [(rule, rule.reason(now)) for rule in self._rules]  # each keeps its own hysteresis
        held = (Reason(text, rule.leaves) for rule, text in reasons if text is not None)
        return max(held, key=lambda reason: reason.leaves, default=None)

    def warnings(self) -> Iterator[Warned]:
        """A warning for each rule that can never hold on this machine."""
        for rule in self._rules:
            if (problem := rule.problem()) is not None:
                yield Warned(
                    message=f"run.pause_when.{rule.name} cannot be watched: {problem}.",
                    cure="The run goes on without it; its other rules hold.",
                )


def guards_of(rules: PauseRules, *, device: torch.device, run_folder: Path) -> Guards:
    """What is watched of this machine for a recipe's rules."""
    found: list[Rule] = []
    if rules.vram_bytes is not None:
        found.append(
            OtherProgram(rules.vram_bytes, lambda: card_memory(device) if device.type == "cuda" else None)
        )
    if rules.temperature_celsius is not None:
        found.append(Heat(rules.temperature_celsius, lambda: _celsius(device)))
    if rules.hours is not None:
        found.append(Hours(*rules.hours))
    if rules.free_disk_bytes is not None:
        found.append(FreeDisk(rules.free_disk_bytes, lambda: free_bytes(run_folder)))
    if rules.battery:
        found.append(OnBattery(_is_plugged))
    return Guards(found)


def _celsius(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.temperature(device)
    except (pynvml.NVMLError, RuntimeError):  # a virtual GPU has no sensor, and NVML may be missing
        return None


def _is_plugged() -> bool | None:
    battery = psutil.sensors_battery()
    return None if battery is None else battery.power_plugged
