"""What a trace makes of a card's memory: the CUDA caching allocator replayed, reserved bytes as a range.

Allocated bytes follow from the trace; reserved bytes are what the process takes from the card, and include
what the allocator keeps for later. `qadapt.plan.segments` has the rules and their source; this file runs a
trace through them. It does not know the CUDA context or other programs: `capacity_bytes` is what is left for
the allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qadapt.plan.segments import LARGE_SEGMENT_BYTES, Block, CachingAllocator
from qadapt.plan.trace import TraceEvent, peak_of


@dataclass(frozen=True)
class Replay:
    """What the allocator reports over a trace.

    Attributes:
        peak_allocated_bytes: `torch.cuda.max_memory_allocated`: the blocks in use. Each is rounded up to 512
            bytes; where the rest of a large block is not split off (1 MiB or less), that counts, too.
        peak_allocated_at: Index of the event that reached it; -1 if nothing was allocated.
        peak_reserved_bytes: `torch.cuda.max_memory_reserved`: all segments held.
        peak_reserved_at: Index of the event that reached it; -1 if nothing was allocated.
        reserved_then_bytes: Reserved at the moment of `peak_allocated_at`.
        end_reserved_bytes: Reserved after the last event: what the cache still holds.
        retries: `num_alloc_retries`: how often the cache was given back because the capacity was reached.
        out_of_memory_at: Index of the allocation that failed even so and ended the replay; None: it ran.
    """

    peak_allocated_bytes: int
    peak_allocated_at: int
    peak_reserved_bytes: int
    peak_reserved_at: int
    reserved_then_bytes: int
    end_reserved_bytes: int
    retries: int
    out_of_memory_at: int | None

    @property
    def fits(self) -> bool:
        """Whether the whole trace ran."""
        return self.out_of_memory_at is None

    @property
    def fragmentation(self) -> float:
        """The share of reserved memory that no block uses when the most is allocated; 0 to 1."""
        if self.reserved_then_bytes == 0:
            return 0.0
        return 1 - self.peak_allocated_bytes / self.reserved_then_bytes


RUN_NOISE = 0.024
"""Two published runs of one step, with different versions of torch, reserve bytes this far apart, while what
they allocate repeats to a few MiB."""


@dataclass(frozen=True)
class ReservedRange:
    """Bounds for the peak of reserved bytes that a run reports; see `reserved_range`."""

    low_bytes: int
    high_bytes: int

    def holds(self, reserved_bytes: int) -> bool:
        """Whether a measured peak lies inside."""
        return self.low_bytes <= reserved_bytes <= self.high_bytes

    def widened(self, share: float) -> ReservedRange:
        """With a share of each end added on its side."""
        return ReservedRange(round(self.low_bytes * (1 - share)), round(self.high_bytes * (1 + share)))


def replay(
    trace: Sequence[TraceEvent],
    *,
    capacity_bytes: int | None = None,
    expandable: bool = False,
    is_rising: bool = True,
    count_from: int = 0,
) -> Replay:
    """Run a trace through the caching allocator, up to its end or out of memory.

    A trace may hold loading and several steps after each other; the cache then carries over, as in a run.
    It takes about half a second per 200,000 events.

    Args:
        trace: Allocations and releases in the order of time, on one stream.
        capacity_bytes: What the driver can give to the allocator: the card less the context, desktop and
            other programs; None: without limit, so the cache is never given back.
        expandable: With `expandable_segments:True`.
        is_rising: Whether the driver's later segments have higher addresses, which decides between free
            blocks of one size. Unknown; either is possible.
        count_from: Peaks are those from this event on, as after `torch.cuda.reset_peak_memory_stats`.

    Raises:
        KeyError: An event releases a block that is not live.
        ValueError: An event allocates a block that is live.
    """
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, expandable=expandable, is_rising=is_rising)
    live: dict[int, Block] = {}
    allocated, allocated_at, reserved, reserved_at, then = 0, -1, 0, -1, 0
    out_of_memory_at = None
    for index, (key, size_bytes, _, _) in enumerate(trace):
        if size_bytes == 0:
            allocator.free(live.pop(key))
        elif key in live:
            raise ValueError(f"event {index} allocates block {key}, which is live")
        elif (block := allocator.allocate(size_bytes)) is None:
            out_of_memory_at = index
            break
        else:
            live[key] = block
        if index + 1 < count_from:
            continue
        if allocator.allocated_bytes > allocated:
            allocated, allocated_at, then = allocator.allocated_bytes, index, allocator.reserved_bytes
        if allocator.reserved_bytes > reserved:
            reserved, reserved_at = allocator.reserved_bytes, index
    return Replay(
        peak_allocated_bytes=allocated,
        peak_allocated_at=allocated_at,
        peak_reserved_bytes=reserved,
        peak_reserved_at=reserved_at,
        reserved_then_bytes=then,
        end_reserved_bytes=allocator.reserved_bytes,
        retries=allocator.retries,
        out_of_memory_at=out_of_memory_at,
    )


def least_capacity_bytes(trace: Sequence[TraceEvent], *, expandable: bool = False) -> int:
    """The least memory in which the trace still runs, at most 20 MiB (one large segment) too much.

    A trace can, rarely, run in less memory and fail in more; the search finds one such border.

    Raises:
        KeyError: An event releases a block that is not live.
        ValueError: An event allocates a block that is live.
    """
    fails, runs = peak_of(trace).bytes - 1, replay(trace, expandable=expandable).peak_reserved_bytes
    while runs - fails > LARGE_SEGMENT_BYTES:
        middle = (fails + runs) // 2
        if replay(trace, capacity_bytes=middle, expandable=expandable).fits:
            runs = middle
        else:
            fails = middle
    return runs


def reserved_range(
    trace: Sequence[TraceEvent],
    *,
    others: Sequence[Sequence[TraceEvent]] = (),
    capacity_bytes: int | None = None,
    count_from: int = 0,
) -> ReservedRange:
    """The peak of reserved bytes that a run of this trace will report, from well packed to freely cached.

    Reserved bytes are not reproducible between runs, so this is a range. Its ends are replays; nothing is
    fitted:

    * low: the least of all runs here, well packed ones among them: one within the least memory in which the
      trace still runs, so that the cache is given back again and again; one with `expandable_segments:True`.
    * high: the greatest run without memory pressure (the driver's later segments at higher, and at lower
      addresses). If that is more than `capacity_bytes`: runs within it, which give their cache back when they
      reach it. If the trace does not run within it, the capacity is left out of account: `replay` gives the
      verdict.

    A later step may reserve more than the first, and fragmentation settles after some: let the trace hold
    loading and at least two steps. What the trace lacks is not in the range: workspaces; what loading takes
    and frees before the first step. (transformers first takes and releases one block of the model's size,
    `caching_allocator_warmup`, so that all weights are cut from one segment.)

    Known error, on published T4 runs dry-run by `tools/bench/plain_stack.py`: where every event of the trace
    is known (7 runs with fp16 weights), one replay gives the reserved bytes within 0.03 %; where loading is
    only roughly known (10 runs with NF4 weights), it is off by -2 to +9 %. That is what `others` is for.

    Args:
        trace: Allocations and releases in the order of time, on one stream.
        others: The same program where its order is not known, for instance loading with and without
            reading ahead; the range is over all of them.
        capacity_bytes: What the driver can give to the allocator; None: without limit.
        count_from: The peak is that from this event of `trace` on, as after
            `torch.cuda.reset_peak_memory_stats`; in the others, from as many events before the end.

    Raises:
        KeyError: An event releases a block that is not live.
        ValueError: An event allocates a block that is live.
    """
    counted = len(trace) - count_from
    cached, packed = [], [replay(trace, capacity_bytes=least_capacity_bytes(trace), count_from=count_from)]
    for each in (trace, *others):
        start = len(each) - counted
        packed.append(replay(each, expandable=True, count_from=start))
        cached += [
            _cached_run(each, capacity_bytes, is_rising=is_rising, count_from=start)
            for is_rising in (True, False)
        ]
    highest = max(run.peak_reserved_bytes for run in cached)
    return ReservedRange(min(run.peak_reserved_bytes for run in (*cached, *packed)), highest)


def _cached_run(
    trace: Sequence[TraceEvent], capacity_bytes: int | None, *, is_rising: bool, count_from: int
) -> Replay:
    """The run within the capacity; without a limit if there is none or the trace does not run within it."""
    run = replay(trace, capacity_bytes=capacity_bytes, is_rising=is_rising, count_from=count_from)
    return run if run.fits else replay(trace, is_rising=is_rising, count_from=count_from)
