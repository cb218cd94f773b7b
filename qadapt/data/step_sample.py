"""How the rows of a run's steps lie in micro-batches, filled up or packed: looked at, not guessed.

Some steps of the first pass are looked at, evenly spread: all their lengths, and of a few the tokens, as only
they say which positions several rows learn at once. What the plan compares is `plan/packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from qadapt.data.batches import filled_length
from qadapt.data.order import Order
from qadapt.data.packing import pack
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens
from qadapt.plan.packing import Passes

MOST_STEPS = 2000
MOST_ROWS = 20_000
READ_STEPS = 32
READ_ROWS = 2048
"""So many steps and rows are looked at, at most (one step always is), and of so many the tokens are read."""


class StepSample:
    """Some steps of a run.

    Args:
        rows: The training rows.
        order: Which of them a step takes.
        steps: Steps of the run.
        held_out: Rows that are evaluated on.
        length_step: The number of tokens of which the lengths of filled-up rows are multiples.

    Attributes:
        most_learned: Learned tokens of the row that has the most, of all training and held-out rows.
    """

    def __init__(
        self,
        rows: RowSet,
        order: Order,
        *,
        steps: int,
        held_out: RowSet | None = None,
        length_step: int = 1,
    ) -> None:
        parts = [each for each in (rows, held_out) if each is not None]
        self.most_learned = max(int(each.supervised_counts.max(initial=0)) for each in parts)
        most = max(int(each.lengths.max(initial=0)) for each in parts)
        self._filled = partial(filled_length, step=length_step, most=most)
        whole_pass = -(-order.pass_rows // order.rows_per_step)
        count = min(steps, whole_pass)
        looked_at = max(1, min(count, MOST_STEPS, MOST_ROWS // order.rows_per_step))
        numbers = [step * count // looked_at for step in range(looked_at)]
        chosen = [np.asarray(order.rows_of_step(number)) for number in numbers]
        self._lengths = [rows.lengths[each].tolist() for each in chosen]
        self._learned = [rows.supervised_counts[each] for each in chosen]
        read = max(1, min(looked_at, READ_STEPS, READ_ROWS // order.rows_per_step))
        taken = chosen[:: -(-looked_at // read)]
        self._read = [[rows[int(index)] for index in each] for each in taken]
        self._packed: dict[int, Passes] = {}

    @property
    def most_tokens(self) -> int:
        """Tokens of the step that has the most, without padding."""
        return max(map(sum, self._lengths))

    @property
    def steps(self) -> int:
        """How many were looked at."""
        return len(self._lengths)

    def packed(self, capacity: int) -> Passes:
        """Packed into micro-batches of at most `capacity` tokens."""
        if capacity not in self._packed:
            self._packed[capacity] = self._made(capacity)
        return self._packed[capacity]

    def _made(self, capacity: int) -> Passes:
        bins = [pack(lengths, capacity) for lengths in self._lengths]
        head = [
            int(learned[members].sum())
            for learned, step in zip(self._learned, bins, strict=True)
            for members in step
        ]
        steps = self.steps
        return Passes(
            count=len(head) / steps,
            tokens=sum(map(sum, self._lengths)) / steps,
            pairs=sum(length * length for lengths in self._lengths for length in lengths) / steps,
            head_tokens=sum(head) / steps,
            most_head_tokens=max(head),
            most_documents=max(len(members) for step in bins for members in step),
        )

    def filled_up(self, size: int) -> Passes:
        """Filled up in micro-batches of at most `size` rows, as `data/batches.py` does it."""
        tokens = pairs = count = 0
        for lengths in self._lengths:
            for rows, longest in _parts(sorted(lengths, reverse=True), size):
                length = self._filled(longest)
                count += 1
                tokens += rows * length
                pairs += rows * length**2
        steps = self.steps
        return Passes(count / steps, tokens / steps, pairs / steps, self._head_share(size) * tokens / steps)

    def _head_share(self, size: int) -> float:
        """The share of the filled-up tokens that reaches the head, in the steps that were read."""
        head = tokens = 0
        for step in self._read:
            by_length = sorted(step, key=len, reverse=True)
            for first in range(0, len(by_length), size):
                part = by_length[first : first + size]
                head += len(part) * _head_positions(part)
                tokens += len(part) * self._filled(len(part[0]))
        return head / tokens


def _parts(lengths: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """Rows and the longest length of each micro-batch, the longest row first."""
    for first in range(0, len(lengths), size):
        yield min(size, len(lengths) - first), lengths[first]


def _head_positions(rows: Sequence[Tokens]) -> int:
    """Positions whose next token any of the rows learns, the longest row first."""
    learned = np.zeros(len(rows[0]), np.bool_)
    for row in rows:
        learned[: len(row)] |= row.supervised
    return int(np.count_nonzero(learned[1:]))
