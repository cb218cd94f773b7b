"""Keeps a run out of memory that is none: the card's that has to be fetched from the host, or the disk's.

Where the memory of a card is full, the driver of Windows moves some of it into the host's instead of saying
no (NVIDIA: "CUDA - Sysmem Fallback Policy"): everything goes on, many times slower. So torch's allocator is
given only what is free, and says no itself, which the out-of-memory ladder understands. What happens all the
same, by programs that start later, shows in the time of the steps: it is compared with this machine's own
steps, not with a prediction. No CUDA machine under Windows has confirmed the cap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import psutil
import torch

from qadapt.events import Continued, Event, StepDone, Warned
from qadapt.stage import passing
from qadapt.units import MIB, format_bytes

Result = TypeVar("Result")

OUTSIDE_BYTES = 128 * MIB
"""Left free for what torch's allocator does not give out: kernels loaded late, libraries' own workspaces."""
WINDOW, ENOUGH = 64, 8
"""Steps whose pace is kept, and how many of them are enough to compare with."""
SLOW_TIMES, SLOW_STEPS = 3.0, 5
"""Paging costs a factor of 5 and more on every step; heat or other programs seldom 3 on five in a row."""
SLOW_SECONDS = 0.5
"""A step that lost less than this is no case: a busy system delays any program so much."""


@dataclass(frozen=True)
class CardMemory:
    """A card's memory as the driver counts it, and what torch's allocator of this process has of it."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int

    @property
    def others_bytes(self) -> int:
        """What is neither free nor counted by this process's allocator."""
        return self.total_bytes - self.free_bytes - self.reserved_bytes

    @property
    def usable_share(self) -> float:
        """The share of the card that the allocator may have: what it has, and what is really free."""
        usable_bytes = self.reserved_bytes + max(0, self.free_bytes - OUTSIDE_BYTES)
        return min(1.0, usable_bytes / self.total_bytes)


@contextmanager
def within_free_memory(device: torch.device) -> Iterator[None]:
    """While open, torch's allocator takes only what is free on a card now; on a CPU nothing is changed."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(card_memory(device).usable_share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def renew_cap(device: torch.device) -> bool:
    """Gives a capped allocator what is free on its card now; whether that is clearly more than it had.

    What another program let go of comes in, what it took goes out, before the driver would have to move it.
    """
    if device.type != "cuda":
        return False
    before = torch.cuda.get_per_process_memory_fraction(device)
    if before >= 1.0:  # nothing was capped
        return False
    card = card_memory(device)
    torch.cuda.set_per_process_memory_fraction(card.usable_share, device)
    return (card.usable_share - before) * card.total_bytes >= OUTSIDE_BYTES


def renewing_cap(
    device: torch.device, events: Generator[Event, None, Result]
) -> Generator[Event, None, Result]:
    """Passes events on, and renews the cap after each wait among them; the result is theirs."""

    def look(event: Event) -> bool:
        if isinstance(event, Continued):
            renew_cap(device)
        return True

    return passing(events, look)


def card_memory(device: torch.device) -> CardMemory:
    """Asks the driver and the allocator."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return CardMemory(total_bytes, free_bytes, torch.cuda.memory_reserved(device))


def swapped_in_bytes() -> int:
    """Bytes that the system has fetched from the disk since it started; 0 where it does not say (Windows)."""
    return psutil.swap_memory().sin


class Pace:
    """Seconds per token of the steps, against those before them on this machine.

    It begins anew in every process, on purpose: what it says is about the machine, not about the run.

    Args:
        is_cuda: Whether the steps are on a card.
        swapped_in: Says how much the system has fetched from the disk so far.
    """

    def __init__(self, *, is_cuda: bool, swapped_in: Callable[[], int] = swapped_in_bytes) -> None:
        self._is_cuda = is_cuda
        self._swapped_in = swapped_in
        self._paces: deque[float] = deque(maxlen=WINDOW)
        self._slow_steps = 0
        self._swapped_before = 0

    def after_step(self, done: StepDone) -> Iterator[Event]:
        """A warning at the fifth slow step in a row; slow ones are not compared with later."""
        pace = done.seconds / done.tokens
        usual = median(self._paces) if len(self._paces) >= ENOUGH else pace
        if pace <= SLOW_TIMES * usual or done.seconds - usual * done.tokens < SLOW_SECONDS:
            self._paces.append(pace)
            self._slow_steps = 0
            return
        self._slow_steps += 1
        if self._slow_steps == 1:
            self._swapped_before = self._swapped_in()
        elif self._slow_steps == SLOW_STEPS:
            yield self._warned(done, pace / usual)

    def _warned(self, done: StepDone, times: float) -> Warned:
        fetched_bytes = self._swapped_in() - self._swapped_before
        slow = f"The last {SLOW_STEPS} steps took about {times:.0f} times as long per token as those before"
        if fetched_bytes > 0:
            why = f"the system fetched {format_bytes(fetched_bytes)} of memory back from the disk meanwhile"
            cure = "Close programs that take memory, or lower memory.budget; `qadapt pause` frees it for now."
        elif self._is_cuda:
            why = "memory of the card that the driver moved to the host looks like this"
            cure = (
                "Close what uses the card (games, browsers), or lower memory.budget. On "
                "Windows set 'CUDA - Sysmem Fallback Policy' to 'Prefer No Sysmem Fallback'."
            )
        else:
            why = "nothing was fetched from the disk, so other programs or heat take the time"
            cure = "Close what uses the processor; `qadapt pause` lets it have the machine."
        return Warned(message=f"{slow}: {why}.", cure=cure, step=done.step)
