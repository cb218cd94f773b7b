"""One device's memory as PyTorch's CUDA caching allocator keeps it: segments, blocks, two pools.

The rules are those of c10/cuda/CUDACachingAllocator.cpp, read at commit 001074d2 and in a later copy that
already has `large_segment_size` as torch 2.13 does; between the two they are the same, and the numbers are
those of torch 2.13's c10/core/AllocatorConfig.h. Default settings: one stream, no CUDA graphs, no
`max_split_size_mb`, no `roundup_power2_divisions`, no garbage collection threshold.

What is not known: the addresses the driver hands out. They decide only between free blocks of the same size
(the lower address wins), so both directions can be asked for. A growing segment's address space is taken as
endless; in PyTorch it is 9/8 of the card. Measured by tests/test_allocator.py against worked examples, the
figures of PyTorch's own tests and a slow copy of the rules; known error on real cards: see
`qadapt.plan.allocator.reserved_range`. Growing segments have not been compared with a real card.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

from qadapt.units import MIB

BLOCK_ROUND_BYTES = 512
"""kMinBlockSize: every request is rounded up to a multiple of this."""
SMALL_LIMIT_BYTES = MIB
"""kSmallSize: the largest request of the small pool; a large block is split if more than this remains."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""kSmallBuffer: a segment of the small pool, and its page when segments grow."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""large_segment_size: a segment for requests under 10 MiB, and the large pool's page when segments grow."""
OWN_SEGMENT_FROM_BYTES = 10 * MIB
"""kMinLargeAlloc: from here on a request that finds no free block gets a segment of its own size."""
SEGMENT_ROUND_BYTES = 2 * MIB
"""kRoundLarge: such a segment is rounded up to a multiple of this."""

_PAGES = 1 << 20  # address space of a growing segment: 2 TiB and 20 TiB
_SIZE_SHIFT = 50  # sorts by size, then by address: no address reaches 2**50


def rounded_bytes(size_bytes: int) -> int:
    """What a request takes of a block: the next multiple of 512 bytes, at least one."""
    return max(BLOCK_ROUND_BYTES, -(-size_bytes // BLOCK_ROUND_BYTES) * BLOCK_ROUND_BYTES)


def segment_bytes(block_bytes: int) -> int:
    """The segment that is asked of the driver for a rounded request that finds no free block."""
    if block_bytes <= SMALL_LIMIT_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < OWN_SEGMENT_FROM_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-block_bytes // SEGMENT_ROUND_BYTES) * SEGMENT_ROUND_BYTES


@dataclass(eq=False, slots=True)
class Block:
    """A piece of a segment: in use, free, or (in a growing segment) without memory behind it."""

    address: int
    size_bytes: int
    pool: Pool = field(repr=False)
    is_free: bool = True
    is_mapped: bool = True
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)

    @property
    def end(self) -> int:
        """The address behind the block."""
        return self.address + self.size_bytes

    @property
    def reach_bytes(self) -> int:
        """Its size together with the unmapped space it can grow into."""
        after = self.after
        return self.size_bytes + (after.size_bytes if after is not None and not after.is_mapped else 0)

    def cut(self, size_bytes: int) -> Block:
        """Keep the first `size_bytes` and return the rest as a neighbour of the same kind."""
        rest = Block(
            self.address + size_bytes, self.size_bytes - size_bytes, self.pool, self.is_free, self.is_mapped
        )
        rest.before, rest.after = self, self.after
        if rest.after is not None:
            rest.after.before = rest
        self.after, self.size_bytes = rest, size_bytes
        return rest


class Pool:
    """The free blocks of the small or the large pool, the best fit first.

    Best fit: the smallest block that is large enough; of those the one with the lowest address.
    """

    def __init__(self, *, is_small: bool) -> None:
        self.is_small = is_small
        self.page_bytes = SMALL_SEGMENT_BYTES if is_small else LARGE_SEGMENT_BYTES
        self._keys: list[int] = []
        self._blocks: dict[int, Block] = {}
        self._unmapped: dict[int, Block] = {}

    def add(self, block: Block) -> None:
        """Keep a free block for later requests, or the space of an unmapped one."""
        if block.is_mapped:
            key = block.size_bytes << _SIZE_SHIFT | block.address
            insort(self._keys, key)
            self._blocks[key] = block
        else:
            self._unmapped[block.address] = block

    def take(self, block: Block) -> None:
        """Take a block out: it is handed out, changed or given back."""
        if block.is_mapped:
            key = block.size_bytes << _SIZE_SHIFT | block.address
            del self._keys[bisect_left(self._keys, key)], self._blocks[key]
        else:
            del self._unmapped[block.address]

    def best_fit(self, size_bytes: int) -> Block | None:
        """The free block to serve a request with, or None.

        The block at the growing end of a segment counts with all it could grow to, so that it is kept.
        """
        at = bisect_left(self._keys, size_bytes << _SIZE_SHIFT)
        if at == len(self._keys):
            return None
        best = self._blocks[self._keys[at]]
        if self._unmapped:
            for next_at in range(at + 1, len(self._keys)):
                other = self._blocks[self._keys[next_at]]
                if other.reach_bytes >= best.reach_bytes:
                    break
                best = other
        return best

    def free_blocks(self) -> list[Block]:
        """The free blocks, smallest first."""
        return [self._blocks[key] for key in self._keys]

    def room(self, size_bytes: int) -> Block:
        """The lowest place of a growing segment where `size_bytes` fit, counting what is yet to be mapped."""
        for address in sorted(self._unmapped):
            block = self._unmapped[address]
            if block.before is not None and block.before.is_free:
                block = block.before
            if _free_run_bytes(block, size_bytes) >= size_bytes:
                return block
        # Different addresses in the two pools; both starts are multiples of the page.
        whole = Block(0 if self.is_small else LARGE_SEGMENT_BYTES * _PAGES, self.page_bytes * _PAGES, self)
        whole.is_mapped = False
        self.add(whole)
        return whole

    def join(self, block: Block) -> None:
        """Merge a free block that is in no list with its free neighbours, and add it."""
        before, after = block.before, block.after
        if before is not None and before.is_free and before.is_mapped == block.is_mapped:
            self.take(before)
            block.address, block.size_bytes = before.address, before.size_bytes + block.size_bytes
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free and after.is_mapped == block.is_mapped:
            self.take(after)
            block.size_bytes += after.size_bytes
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        self.add(block)


def _free_run_bytes(block: Block | None, enough_bytes: int) -> int:
    """Bytes of neighbouring blocks that are not in use, up to `enough_bytes` or a little more."""
    total = 0
    while block is not None and block.is_free and total < enough_bytes:
        total += block.size_bytes
        block = block.after
    return total


class CachingAllocator:
    """Hands out blocks and keeps freed ones, by PyTorch's rules.

    Args:
        capacity_bytes: What the driver can give; None: as much as is asked for.
        expandable: `expandable_segments:True`: one segment per pool that grows by pages.
        is_rising: Whether a later segment of the driver has a higher address.

    Attributes:
        pools: The small and the large pool.
        reserved_bytes: Taken from the driver and held: blocks in use and free ones.
        allocated_bytes: The blocks in use.
        retries: How often the cache was given back because the driver had no memory left.
    """

    def __init__(
        self, *, capacity_bytes: int | None = None, expandable: bool = False, is_rising: bool = True
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.expandable = expandable
        self.reserved_bytes = 0
        self.allocated_bytes = 0
        self.retries = 0
        self._is_rising = is_rising
        self._driver_address = 0 if is_rising else 1 << (_SIZE_SHIFT - 1)
        self.pools = (Pool(is_small=True), Pool(is_small=False))

    def allocate(self, size_bytes: int) -> Block | None:
        """A block for a request, or None if the driver has no memory left even after the cache is given back.

        The block may be up to 1 MiB larger than asked for, and `allocated_bytes` counts all of it, as
        `torch.cuda.memory_allocated` does.
        """
        size = rounded_bytes(size_bytes)
        pool = self.pools[size > SMALL_LIMIT_BYTES]
        block = pool.best_fit(size) or self._grown(pool, size)
        if block is None:
            self.release_cached()
            self.retries += 1
            block = self._grown(pool, size)
        if block is None:
            return None
        pool.take(block)
        left = block.size_bytes - size
        if left >= BLOCK_ROUND_BYTES if pool.is_small or self.expandable else left > SMALL_LIMIT_BYTES:
            pool.add(block.cut(size))
        block.is_free = False
        self.allocated_bytes += block.size_bytes
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool, one with its free neighbours."""
        assert not block.is_free, f"the block at {block.address} is free already"
        self.allocated_bytes -= block.size_bytes
        block.is_free = True
        block.pool.join(block)

    def release_cached(self) -> None:
        """`torch.cuda.empty_cache`: give back segments without a block in use, or the whole pages between."""
        for pool in reversed(self.pools):
            for block in pool.free_blocks():
                if self.expandable:
                    self._unmap(block)
                elif block.before is None and block.after is None:
                    pool.take(block)
                    self.reserved_bytes -= block.size_bytes

    def _grown(self, pool: Pool, size_bytes: int) -> Block | None:
        """A free block with memory of the driver, already in the pool; None if the driver has no more."""
        if self.expandable:
            return self._grown_segment(pool, size_bytes)
        size_bytes = segment_bytes(size_bytes)
        if not self._reserve(size_bytes):
            return None
        if not self._is_rising:
            self._driver_address -= size_bytes
        block = Block(self._driver_address, size_bytes, pool)
        if self._is_rising:
            self._driver_address += size_bytes
        pool.add(block)
        return block

    def _grown_segment(self, pool: Pool, size_bytes: int) -> Block | None:
        """Map pages at the lowest place where the request fits, together with free blocks around them."""
        block = pool.room(size_bytes)
        if not block.is_mapped and not self._map(block, min(size_bytes, block.size_bytes)):
            return None
        while block.size_bytes < size_bytes:
            more = block.after
            assert more is not None and not more.is_mapped, "room() promised space to grow into"
            if not self._map(more, min(size_bytes - block.size_bytes, more.size_bytes)):
                return None
            block = more  # it has swallowed the block before it
        return block

    def _map(self, block: Block, size_bytes: int) -> bool:
        """Put memory behind the first pages of an unmapped block; False if the driver has none left."""
        pool = block.pool
        mapped_bytes = -(-size_bytes // pool.page_bytes) * pool.page_bytes
        if not self._reserve(mapped_bytes):
            return False
        pool.take(block)
        if mapped_bytes < block.size_bytes:
            pool.add(block.cut(mapped_bytes))
        block.is_mapped = True
        pool.join(block)
        return True

    def _unmap(self, block: Block) -> None:
        """Give back the pages that lie wholly inside a free block."""
        pool, page = block.pool, block.pool.page_bytes
        begin, end = -(-block.address // page) * page, block.end // page * page
        if begin >= end:
            return
        pool.take(block)
        if end < block.end:
            pool.add(block.cut(end - block.address))
        if begin > block.address:
            inner = block.cut(begin - block.address)
            pool.add(block)
            block = inner
        block.is_mapped = False
        pool.join(block)
        self.reserved_bytes -= end - begin

    def _reserve(self, size_bytes: int) -> bool:
        if self.capacity_bytes is not None and self.reserved_bytes + size_bytes > self.capacity_bytes:
            return False
        self.reserved_bytes += size_bytes
        return True
