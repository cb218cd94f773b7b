"""Which rows a step takes: a pure function of the step, so there is no position to save.

Resuming at any step, any count of loader processes and any count of training processes see the same rows in
the same order. Knows how long rows are, no tokens. The draws come from numpy's `RandomState`, whose numbers
numpy promises never to change (NEP 19), seeded by a hash; `RandomState.permutation` is avoided because its
integers are as wide as the system's.

Legend: N rows, P rows of one pass (a row may count several times in it, or not at all), R rows of a step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

OrderKind = Literal["shuffled", "by-length", "given"]
Lengths = NDArray[np.int32]
Indices = NDArray[np.uint32]

WINDOW_STEPS = 50
"""By length: the rows of so many steps are sorted together, which leaves the order random on the whole."""
WINDOW_ROWS = 1024
"""Sorted together are at least so many rows."""


class Order:
    """The order of a run's rows.

    A pass takes each row of a source as often as the source's weight says; of a weight's fraction it takes a
    drawn part of the rows, and the next pass goes on with those that were not drawn yet.

    In memory are 4 bytes for each row of a pass; 8 where a step takes rows of two passes.

    Args:
        lengths: Tokens of each row, (N,).
        sources: How many rows each source has, in their order, and its weight; None: one of weight 1.
        rows_per_step: R.
        seed: Of every draw.
        kind: `shuffled`; `by-length`, shuffled so that a step's rows are of like length; or `given`, as the
            files have them.
    """

    def __init__(
        self,
        lengths: Lengths,
        *,
        rows_per_step: int,
        seed: int = 0,
        kind: OrderKind = "shuffled",
        sources: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        self._lengths = lengths
        self._sources = tuple(sources) if sources is not None else ((len(lengths), 1.0),)
        assert sum(count for count, _ in self._sources) == len(lengths)
        self.rows_per_step = rows_per_step
        self._seed = seed
        self._kind = kind
        self._passes: dict[int, Indices] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_passes": {}}  # a loader process draws its own

    @property
    def pass_rows(self) -> int:
        """P: rows of one pass, repeated ones counted as often."""
        return sum(
            _repeats(count, weight)[0] * count + _drawn(count, weight) for count, weight in self._sources
        )

    def step_count(self, passes: float) -> int:
        """Steps of so many passes; the last one takes what it lacks from the pass after."""
        return max(1, math.ceil(round(passes * self.pass_rows / self.rows_per_step, 9)))

    def rows_of_step(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """Indices of the rows that step `step` (from 0) takes.

        Args:
            step: Which one.
            rank: Which process asks; each takes other rows of the step.
            world_size: How many processes share a step.
        """
        first = step * self.rows_per_step
        taken = range(first + rank, first + self.rows_per_step, world_size)
        size = self.pass_rows
        rows = [int(self._order(position // size)[position % size]) for position in taken]
        if first // size == (first + self.rows_per_step - 1) // size:
            self._keep_only(first // size)
        return rows

    def longest_step(self, steps: int) -> int:
        """The step (from 0) of the first `steps`, as far as the first pass goes, that has the longest row."""
        taken = self._order(0)[: steps * self.rows_per_step]
        return int(self._lengths[taken].argmax()) // self.rows_per_step

    def _keep_only(self, number: int) -> None:
        for other in [each for each in self._passes if each != number]:
            del self._passes[other]

    def _order(self, number: int) -> Indices:
        """The rows of pass `number`, (P,)."""
        if number not in self._passes:
            self._keep_only(number - 1)
            self._passes[number] = self._made(number)
        return self._passes[number]

    def _made(self, number: int) -> Indices:
        order = self._taken(number)
        if self._kind != "given":
            random = _random(f"order/{self._seed}/{number}")
            random.shuffle(order)
            if self._kind == "by-length":
                self._sort_windows(order, random, first_step_rows=-number * len(order) % self.rows_per_step)
        return order

    def _taken(self, number: int) -> Indices:
        """The rows of pass `number` as the files have them."""
        order = np.empty(self.pass_rows, np.uint32)
        first = filled = 0
        for source, (count, weight) in enumerate(self._sources):
            for _ in range(_repeats(count, weight)[0]):
                order[filled : filled + count] = np.arange(first, first + count, dtype=np.uint32)
                filled += count
            if drawn := _drawn(count, weight):
                part = order[filled : filled + drawn]
                part[:] = self._draw(source, count, start=number * drawn)[:drawn]
                part.sort()
                part += np.uint32(first)
                filled += drawn
            first += count
        return order

    def _draw(self, source: int, count: int, *, start: int) -> Indices:
        """The rows of a source in the order in which passes draw them, from `start` on, around."""
        rows = np.arange(count, dtype=np.uint32)
        _random(f"draw/{self._seed}/{source}").shuffle(rows)
        return np.roll(rows, -(start % count))

    def _sort_windows(self, order: Indices, random: np.random.RandomState, *, first_step_rows: int) -> None:
        """Deals the rows of each window to its steps by length, in place.

        Args:
            order: A shuffled pass.
            random: For the order of the steps within a window.
            first_step_rows: So many rows at the start belong to a step that the pass before began.
        """
        per_step = self.rows_per_step
        window = max(WINDOW_STEPS, -(-WINDOW_ROWS // per_step)) * per_step
        begun, start = min(first_step_rows, len(order)), 0
        while start < len(order):
            rows = order[start : start + begun + window]
            rows[:] = rows[self._lengths[rows].argsort(kind="stable")]
            whole = (len(rows) - begun) // per_step * per_step
            steps = rows[begun : begun + whole].reshape(-1, per_step)
            shuffled = np.arange(len(steps), dtype=np.uint32)
            random.shuffle(shuffled)
            steps[:] = steps[shuffled]
            start, begun = start + len(rows), 0


def _repeats(count: int, weight: float) -> tuple[int, float]:
    whole = int(weight)
    return whole, weight - whole


def _drawn(count: int, weight: float) -> int:
    """Rows that stand for a weight's fraction; at least one where the weight is all fraction."""
    whole, fraction = _repeats(count, weight)
    return max(round(fraction * count), 1 if not whole and count else 0)


def _random(purpose: str) -> np.random.RandomState:
    return np.random.RandomState(np.frombuffer(hashlib.sha256(purpose.encode()).digest(), "<u4"))
