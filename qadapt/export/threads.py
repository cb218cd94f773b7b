"""Threads of a merge: a chunk is computed on one, and as many chunks at a time as torch may use threads.

An operation on a chunk ends before a second thread is awake. Measured on 2 busy cores, 1 Mi values,
`torch.mm` with an inner width of 16 and NF4 quantization: one thread 0.6 ms and 33 ms, two threads 0.7 ms and
53 ms at best, and in the median 9 ms and 95 ms. So the threads take whole chunks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch

MOST_THREADS = 8
"""Chunks in work at once: each takes some tens of MiB."""
_Result = TypeVar("_Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the block, torch's operations run on the calling thread alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(tasks: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """The results of tasks in their order, while the next ones are at work.

    As many run at once as torch has threads here, each on a thread of its own; a few results wait to be
    asked for. What a task raises is raised where its result would be.

    Args:
        tasks: Operations of torch that share nothing they change.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    return _on_threads(iter(tasks), threads) if threads > 1 else _here(tasks)


def _here(tasks: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    for task in tasks:
        with one_thread():
            result = task()
        yield result


def _on_threads(tasks: Iterator[Callable[[], _Result]], threads: int) -> Iterator[_Result]:
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, "merging", initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = deque(pool.submit(task) for task in islice(tasks, 2 * threads))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(task) for task in islice(tasks, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # a thread to come begins with the number that was set last
