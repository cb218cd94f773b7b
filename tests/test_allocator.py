"""The caching allocator replayed: worked examples of its source's rules, and what holds for any trace."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.plan.allocator import Replay, least_capacity_bytes, replay, reserved_range
from qadapt.plan.segments import Block, CachingAllocator, rounded_bytes, segment_bytes
from qadapt.plan.trace import TraceEvent, TracePeak, peak_of
from qadapt.units import GIB, MIB

Trace = list[TraceEvent]


def trace_of(*steps: tuple[int, int]) -> Trace:
    """A trace from pairs of key and size; size 0 releases."""
    return [TraceEvent(key, size, "temporary", "forward") for key, size in steps]


def allocations(*sizes: int) -> Trace:
    return trace_of(*enumerate(sizes))


def run_through(allocator: CachingAllocator, trace: Trace) -> Iterator[dict[int, tuple[TraceEvent, Block]]]:
    """The live blocks after each event, until memory is out; the cache is given back now and then."""
    live: dict[int, tuple[TraceEvent, Block]] = {}
    for index, event in enumerate(trace):
        if index % 12 == 11:
            allocator.release_cached()
        if event.is_release:
            allocator.free(live.pop(event.key)[1])
        elif (block := allocator.allocate(event.size_bytes)) is not None:
            live[event.key] = (event, block)
        else:
            return
        yield live


def chains_of(allocator: CachingAllocator, live: Iterable[Block]) -> list[list[Block]]:
    """All blocks of all segments, in the order of their addresses."""
    firsts = {}
    for block in (*live, *(block for pool in allocator.pools for block in pool.free_blocks())):
        first = block
        while first.before is not None:
            first = first.before
        firsts[id(first)] = first
    chains = []
    for first in firsts.values():
        chain = [first]
        while (after := chain[-1].after) is not None:
            assert after.before is chain[-1]
            chain.append(after)
        chains.append(chain)
    return chains


# Worked examples, by hand from c10/cuda/CUDACachingAllocator.cpp


@pytest.mark.parametrize(
    ("asked", "rounded"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_to_512_bytes(asked: int, rounded: int) -> None:
    assert rounded_bytes(asked) == rounded


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (5 * MIB, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (100 * MIB + 1, 102 * MIB),
    ],
)
def test_one_tensor_reserves_one_segment(asked: int, segment: int) -> None:
    assert segment_bytes(rounded_bytes(asked)) == segment
    assert replay(allocations(asked)).peak_reserved_bytes == segment


def test_the_first_product_on_a_4090_reserves_what_was_published() -> None:
    run = replay(allocations(8_519_680))  # the workspace of cuBLAS, observed with these two figures
    assert (run.peak_allocated_bytes, run.peak_reserved_bytes) == (8_519_680, 20_971_520)


@pytest.mark.parametrize(
    ("size", "segments", "reserved"),
    [
        (512, 1, 2 * MIB),
        (MIB, 2, 4 * MIB),
        (MIB + 512, 1, 20 * MIB),
        (10 * MIB - 512, 2, 40 * MIB),
        (10 * MIB + 512, 3, 36 * MIB),
    ],
)
def test_pytorchs_own_test_of_its_statistics_comes_out_the_same(
    size: int, segments: int, reserved: int
) -> None:
    """test_cuda.py, `test_graph_memory_stats_and_use_result_after_destroy_graph`, which runs on real cards.

    There `b = a.clone()`, then five times `b = b.clone() + 1`: three blocks at most, one at the end.
    """
    steps = [(0, size)]
    for turn in range(5):
        copy, total = 2 * turn + 1, 2 * turn + 2
        steps += [(copy, size), (total, size), (copy, 0), (total - 2, 0)]
    allocator, live = CachingAllocator(), {}
    for key, asked in steps:
        if asked == 0:
            allocator.free(live.pop(key))
        else:
            live[key] = allocator.allocate(asked)
    assert len(chains_of(allocator, live.values())) == segments
    assert allocator.reserved_bytes == reserved
    assert allocator.allocated_bytes == size
    allocator.release_cached()
    assert allocator.reserved_bytes == segment_bytes(size)


def test_a_large_block_is_split_only_if_more_than_a_mebibyte_is_left() -> None:
    whole = replay(allocations(11 * MIB))  # a segment of 12 MiB, 1 MiB left: not split, and counted as in use
    assert whole.peak_allocated_bytes == 12 * MIB
    split = replay(allocations(11 * MIB - 512))
    assert split.peak_allocated_bytes == 11 * MIB - 512


def test_a_small_block_is_split_down_to_512_bytes() -> None:
    run = replay(allocations(MIB, MIB - 512, 512, 512))
    assert run.peak_allocated_bytes == 2 * MIB + 512
    assert run.peak_reserved_bytes == 4 * MIB


def test_small_and_large_requests_share_no_segment() -> None:
    assert replay(allocations(2 * MIB, 512)).peak_reserved_bytes == 22 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    steps = [(1, 40 * MIB), (2, 30 * MIB), (1, 0), (2, 0), (3, 29 * MIB), (4, 40 * MIB)]
    assert replay(trace_of(*steps)).peak_reserved_bytes == 70 * MIB


def test_freed_neighbours_become_one_block_again() -> None:
    steps = [(1, 6 * MIB), (2, 6 * MIB), (3, 8 * MIB), (1, 0), (2, 0), (4, 12 * MIB)]
    run = replay(trace_of(*steps))
    assert run.peak_reserved_bytes == 20 * MIB


def test_blocks_between_used_ones_do_not_join_and_fragment() -> None:
    steps = [(1, 6 * MIB), (2, 6 * MIB), (3, 8 * MIB), (1, 0), (3, 0), (4, 10 * MIB)]
    run = replay(trace_of(*steps))
    assert run.peak_reserved_bytes == 30 * MIB
    assert (run.peak_allocated_bytes, run.peak_allocated_at, run.peak_reserved_at) == (20 * MIB, 2, 5)
    assert run.fragmentation == 0
    assert replay(trace_of(*steps[:4], (4, 7 * MIB))).fragmentation == pytest.approx(1 - 21 / 40)


def test_a_full_card_gets_its_cached_segments_back_and_the_allocation_succeeds() -> None:
    steps = [(1, 30 * MIB), (2, 30 * MIB), (1, 0), (3, 50 * MIB)]
    assert replay(trace_of(*steps)).peak_reserved_bytes == 110 * MIB
    within = replay(trace_of(*steps), capacity_bytes=80 * MIB)
    assert within.fits
    assert within.retries == 1
    assert within.peak_reserved_bytes == 80 * MIB


def test_a_segment_with_one_block_in_use_cannot_be_given_back() -> None:
    steps = [(1, 60 * MIB), (1, 0), (2, 2 * MIB), (3, 70 * MIB)]
    run = replay(trace_of(*steps), capacity_bytes=100 * MIB)
    assert not run.fits
    assert run.out_of_memory_at == 3
    assert run.retries == 1
    assert run.peak_reserved_bytes == 60 * MIB
    assert replay(trace_of(*steps), capacity_bytes=100 * MIB, expandable=True).fits


def test_growing_segments_are_mapped_in_pages_of_2_and_20_mib() -> None:
    assert replay(allocations(512), expandable=True).peak_reserved_bytes == 2 * MIB
    assert replay(allocations(11 * MIB), expandable=True).peak_reserved_bytes == 20 * MIB
    run = replay(allocations(11 * MIB, 11 * MIB), expandable=True)  # the second continues in the first page
    assert (run.peak_allocated_bytes, run.peak_reserved_bytes) == (22 * MIB, 40 * MIB)


def test_a_growing_segment_adds_pages_to_the_free_block_at_its_end() -> None:
    steps = [(1, 40 * MIB), (2, 40 * MIB), (2, 0), (3, 60 * MIB)]
    assert replay(trace_of(*steps)).peak_reserved_bytes == 140 * MIB
    assert replay(trace_of(*steps), expandable=True).peak_reserved_bytes == 100 * MIB


def test_under_pressure_whole_pages_inside_free_blocks_are_unmapped_and_filled_again() -> None:
    # 100 MiB in five pages; the freed middle (50 MiB at 25 MiB) has one and a half pages whole: 40 to 60 MiB.
    steps = [(1, 25 * MIB), (2, 50 * MIB), (3, 25 * MIB), (2, 0), (4, 60 * MIB)]
    run = replay(trace_of(*steps), capacity_bytes=140 * MIB, expandable=True)
    assert run.fits
    assert (run.retries, run.peak_reserved_bytes) == (1, 140 * MIB)
    again = replay(trace_of(*steps, (4, 0), (5, 50 * MIB)), capacity_bytes=140 * MIB, expandable=True)
    assert again.fits


def test_the_growing_end_of_a_segment_is_spared_for_what_fits_nowhere_else() -> None:
    # Free: 50 MiB at the start, 5 MiB at the end that could grow. 4 MiB go to the start; then 50 MiB need 45
    # more at the end: three pages.
    steps = [(1, 50 * MIB), (2, 45 * MIB), (1, 0), (3, 4 * MIB), (4, 50 * MIB)]
    assert replay(trace_of(*steps), expandable=True).peak_reserved_bytes == 160 * MIB


def test_unmapped_pages_are_filled_before_a_segment_grows() -> None:
    allocator = CachingAllocator(expandable=True)
    _, middle, _ = (allocator.allocate(size * MIB) for size in (40, 60, 40))
    assert middle is not None
    address = middle.address
    allocator.free(middle)
    allocator.release_cached()
    assert allocator.reserved_bytes == 80 * MIB
    again = allocator.allocate(60 * MIB)
    assert again is not None
    assert again.address == address
    assert allocator.reserved_bytes == 140 * MIB


def test_peaks_can_be_counted_from_a_later_event() -> None:
    steps = trace_of((1, 100 * MIB), (1, 0), (2, 40 * MIB))
    run = replay(steps, count_from=2)
    assert run.peak_allocated_bytes == 40 * MIB
    assert run.peak_reserved_bytes == 100 * MIB  # the cache outlives the reset


def test_a_second_step_can_reserve_more_than_the_first() -> None:
    # The 10 MiB that outlive the first step lie where the 12 MiB were; the second step's 12 MiB then take the
    # block that was for 30 MiB.
    step = [(1, 12 * MIB), (2, 30 * MIB), (1, 0), (3, 10 * MIB), (2, 0)]
    later = [(4, 12 * MIB), (5, 30 * MIB)]
    one, two = replay(trace_of(*step)), replay(trace_of(*step, *later))
    assert (one.peak_reserved_bytes, two.peak_reserved_bytes) == (42 * MIB, 72 * MIB)


def test_an_empty_trace_takes_nothing() -> None:
    assert replay([]) == Replay(0, -1, 0, -1, 0, 0, 0, None)
    assert replay([]).fragmentation == 0
    assert reserved_range([]).holds(0)


def test_a_release_of_what_is_not_live_and_a_second_allocation_are_refused() -> None:
    with pytest.raises(KeyError):
        replay(trace_of((1, 0)))
    with pytest.raises(ValueError, match="event 1 allocates block 7, which is live"):
        replay(trace_of((7, 1), (7, 1)))


def test_the_peak_of_a_trace_is_not_rounded() -> None:
    steps = trace_of((1, 100), (2, 11), (1, 0), (3, 50), (1, 50))
    assert peak_of(steps) == TracePeak(111, 1)
    assert peak_of([]) == TracePeak(0, -1)
    with pytest.raises(KeyError):
        peak_of(trace_of((1, 0)))


# What must hold for any trace

sizes = st.one_of(
    st.integers(1, 4096),
    st.integers(1, 3 * MIB),
    st.integers(MIB, 50 * MIB),
    st.sampled_from([512, MIB, MIB + 1, 10 * MIB, 10 * MIB - 1, 11 * MIB, 20 * MIB, 19 * MIB, 30 * MIB]),
)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Allocations, and releases of any live block."""
    live: list[int] = []
    trace = []
    for size, choice in draw(st.lists(st.tuples(sizes, st.integers(0, 1_000_000)), max_size=60)):
        if live and choice % 5 < 2:
            trace.append(TraceEvent(live.pop(choice % len(live)), 0, "temporary", "forward"))
        else:
            live.append(len(trace))
            trace.append(TraceEvent(len(trace), size, "temporary", "forward"))
    return trace


settings_of_allocators = st.fixed_dictionaries(
    {
        "expandable": st.booleans(),
        "is_rising": st.booleans(),
        "capacity_bytes": st.one_of(st.none(), st.integers(MIB, 400 * MIB)),
    }
)


@given(traces(), settings_of_allocators)
def test_blocks_in_use_never_overlap_and_lie_in_reserved_memory(
    trace: Trace, options: dict[str, int]
) -> None:
    allocator = CachingAllocator(**options)  # type: ignore[arg-type]
    for live in run_through(allocator, trace):
        blocks = sorted((block for _, block in live.values()), key=lambda block: block.address)
        assert all(block.is_mapped and not block.is_free for block in blocks)
        assert all(one.end <= other.address for one, other in pairwise(blocks))


@given(traces(), settings_of_allocators)
def test_allocated_is_what_was_handed_out_and_reserved_is_more(trace: Trace, options: dict[str, int]) -> None:
    allocator = CachingAllocator(**options)  # type: ignore[arg-type]
    for live in run_through(allocator, trace):
        assert allocator.allocated_bytes == sum(block.size_bytes for _, block in live.values())
        assert allocator.reserved_bytes >= allocator.allocated_bytes
        for event, block in live.values():
            extra = block.size_bytes - rounded_bytes(event.size_bytes)
            assert 0 <= extra <= (0 if block.pool.is_small or allocator.expandable else MIB)


@given(traces(), settings_of_allocators)
def test_segments_are_covered_without_gaps_and_free_neighbours_are_joined(
    trace: Trace, options: dict[str, int]
) -> None:
    allocator = CachingAllocator(**options)  # type: ignore[arg-type]
    for live in run_through(allocator, trace):
        chains = chains_of(allocator, (block for _, block in live.values()))
        for chain in chains:
            for one, other in pairwise(chain):
                assert one.end == other.address
                assert not (one.is_free and other.is_free and one.is_mapped == other.is_mapped)
        mapped = sum(block.size_bytes for chain in chains for block in chain if block.is_mapped)
        assert mapped == allocator.reserved_bytes


@given(traces(), settings_of_allocators)
def test_the_capacity_is_never_exceeded(trace: Trace, options: dict[str, int]) -> None:
    run = replay(trace, **options)  # type: ignore[arg-type]
    capacity = options["capacity_bytes"]
    assert capacity is None or run.peak_reserved_bytes <= capacity
    assert run == replay(trace, **options)  # type: ignore[arg-type]


@given(traces(), settings_of_allocators)
def test_when_all_is_released_and_the_cache_given_back_nothing_is_reserved(
    trace: Trace, options: dict[str, int]
) -> None:
    allocator = CachingAllocator(**options)  # type: ignore[arg-type]
    live: dict[int, tuple[TraceEvent, Block]] = {}
    for after in run_through(allocator, trace):
        live = after
    for _, block in live.values():
        allocator.free(block)
    allocator.release_cached()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


@given(traces())
def test_the_least_capacity_runs_and_the_range_holds_runs_within_any_capacity(trace: Trace) -> None:
    least = least_capacity_bytes(trace)
    assert replay(trace, capacity_bytes=least).fits
    assert peak_of(trace).bytes <= least
    whole = reserved_range(trace)
    assert peak_of(trace).bytes <= whole.low_bytes <= whole.high_bytes
    assert whole.holds(replay(trace).peak_reserved_bytes)
    assert whole.holds(replay(trace, capacity_bytes=least).peak_reserved_bytes)
    within = reserved_range(trace, capacity_bytes=least)
    assert within.high_bytes <= max(least, whole.high_bytes)


class Reference:
    """The rules without growing segments, the slow way: a segment is a list of (size, key or None)."""

    def __init__(self, capacity_bytes: int | None) -> None:
        self.capacity_bytes = capacity_bytes
        self.segments: list[tuple[bool, list[tuple[int, int | None]]]] = []

    @property
    def reserved_bytes(self) -> int:
        return sum(size for _, blocks in self.segments for size, _ in blocks)

    @property
    def allocated_bytes(self) -> int:
        return sum(size for _, blocks in self.segments for size, key in blocks if key is not None)

    def allocate(self, key: int, asked: int) -> bool:
        size = (asked + 511) // 512 * 512
        is_small = size <= MIB
        if not self._place(key, size, is_small):
            new = 2 * MIB if is_small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self._is_full(new):
                self.segments = [one for one in self.segments if len(one[1]) > 1 or one[1][0][1] is not None]
            if self._is_full(new):
                return False
            self.segments.append((is_small, [(new, None)]))
            assert self._place(key, size, is_small)
        return True

    def free(self, key: int) -> None:
        for _, blocks in self.segments:
            for at, (size, owner) in enumerate(blocks):
                if owner == key:
                    blocks[at] = (size, None)
            at = 1
            while at < len(blocks):
                if blocks[at - 1][1] is None and blocks[at][1] is None:
                    blocks[at - 1 : at + 1] = [(blocks[at - 1][0] + blocks[at][0], None)]
                else:
                    at += 1

    def _is_full(self, new: int) -> bool:
        return self.capacity_bytes is not None and self.reserved_bytes + new > self.capacity_bytes

    def _place(self, key: int, size: int, is_small: bool) -> bool:
        fits = [
            (free, number, at)
            for number, (small, blocks) in enumerate(self.segments)
            if small == is_small
            for at, (free, owner) in enumerate(blocks)
            if owner is None and free >= size
        ]
        if not fits:
            return False
        free, number, at = min(fits)
        left = free - size
        is_split = left >= 512 if is_small else left > MIB
        self.segments[number][1][at : at + 1] = [(size, key), (left, None)] if is_split else [(free, key)]
        return True


@given(traces(), st.one_of(st.none(), st.integers(MIB, 400 * MIB)))
def test_every_event_agrees_with_the_rules_written_the_slow_way(trace: Trace, capacity: int | None) -> None:
    allocator, reference, live = CachingAllocator(capacity_bytes=capacity), Reference(capacity), {}
    for key, size, _, _ in trace:
        if size == 0:
            allocator.free(live.pop(key))
            reference.free(key)
        else:
            block = allocator.allocate(size)
            assert reference.allocate(key, size) == (block is not None)
            if block is None:
                return
            live[key] = block
        assert allocator.reserved_bytes == reference.reserved_bytes
        assert allocator.allocated_bytes == reference.allocated_bytes


def test_freeing_twice_is_noticed() -> None:
    allocator = CachingAllocator()
    block = allocator.allocate(5 * MIB)
    assert block is not None
    allocator.free(block)
    with pytest.raises(AssertionError, match="free already"):
        allocator.free(block)


def test_a_range_without_room_in_the_card_tells_what_it_would_need() -> None:
    steps = trace_of((1, 30 * MIB), (2, 30 * MIB), (1, 0), (3, 50 * MIB))
    assert reserved_range(steps, capacity_bytes=90 * MIB).high_bytes == 80 * MIB
    assert reserved_range(steps, capacity_bytes=40 * MIB) == reserved_range(steps)
    assert reserved_range(steps).high_bytes == 110 * MIB


def test_a_range_is_over_all_orders_that_a_program_may_have() -> None:
    # The 30 MiB that loading frees serve the step, unless the 12 MiB that stay were cut from them before.
    step = [(3, 30 * MIB), (3, 0)]
    one = trace_of((1, 12 * MIB), (2, 30 * MIB), (2, 0), *step)
    other = trace_of((2, 30 * MIB), (2, 0), (1, 12 * MIB), *step)
    assert reserved_range(one).high_bytes == 42 * MIB
    assert reserved_range(other).high_bytes == 60 * MIB
    both = reserved_range(one, others=[other])
    assert (both.low_bytes, both.high_bytes) == (42 * MIB, 60 * MIB)


@pytest.mark.parametrize("expandable", [False, True])
def test_a_long_trace_is_replayed_in_seconds(expandable: bool) -> None:
    chance, live, trace = random.Random(0), [0], trace_of((0, GIB))
    while len(trace) < 100_000:
        if len(live) > 4000 or chance.random() < 0.45:
            trace.append(TraceEvent(live.pop(chance.randrange(len(live))), 0, "temporary", "forward"))
        if chance.random() < 0.5 or not live:
            trace.append(TraceEvent(len(trace), int(2 ** chance.uniform(5, 27)), "temporary", "forward"))
            live.append(trace[-1].key)
    start = time.process_time()
    run = replay(trace, expandable=expandable)
    assert time.process_time() - start < 5  # measured: 0.2 s; a scan over blocks would take minutes
    assert run.fits
    assert 0 <= run.fragmentation < 1
