"""What a program asks of an allocator, in the order of time: the seam between ledger and allocator.

A trace says what was asked for, not what an allocator makes of it: sizes are not rounded, and nothing here
knows pools, segments or devices. The ledger writes traces on any device; `qadapt.plan.allocator` replays
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class TraceEvent(NamedTuple):
    """One allocation or one release of a block.

    Args:
        key: The block's number; it may be used again once the block is released.
        size_bytes: The bytes the program asked for; 0 releases the block.
        category: What the bytes are for, a word of `qadapt.plan.categories`.
        phase: Where in the step it happened: "load", "forward", "backward", ...
    """

    key: int
    size_bytes: int
    category: str
    phase: str

    @property
    def is_release(self) -> bool:
        """Whether the event gives a block back."""
        return self.size_bytes == 0


class TracePeak(NamedTuple):
    """The most bytes asked for and not yet released, and when that was first so.

    Args:
        bytes: Sum of the sizes as asked for, without any rounding.
        position: Index of the event that reached it; -1 for a trace that allocates nothing.
    """

    bytes: int
    position: int


def peak_of(trace: Sequence[TraceEvent]) -> TracePeak:
    """The peak of live bytes over a trace, as a ledger counts them.

    Raises:
        KeyError: An event releases a block that is not live.
    """
    live: dict[int, int] = {}
    live_bytes, peak = 0, TracePeak(0, -1)
    for index, event in enumerate(trace):
        if event.is_release:
            live_bytes -= live.pop(event.key)
        else:
            live[event.key] = event.size_bytes
            live_bytes += event.size_bytes
            if live_bytes > peak.bytes:
                peak = TracePeak(live_bytes, index)
    return peak
