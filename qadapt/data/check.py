"""What the rows of a run come to, in numbers: how long, how much is learned, what says the same twice.

Pure functions over arrays and row sets; the report of `qadapt data check` is made of what they give. Knows no
file, no template, no screen. Numbers about steps are taken from the run's own order of rows; of long runs the
first steps are looked at (`looked_at`), and the report says so.

Legend: N rows, S steps, R rows of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from qadapt.data.packing import pack
from qadapt.data.pieces import Gap, Piece
from qadapt.data.tokens import Tokens

MOST_STEPS, MOST_STEP_ROWS = 2000, 100_000
MOST_BINS = 12
Lengths = NDArray[np.integer]


@dataclass(frozen=True)
class Finding:
    """Something to know about, and what to do about it."""

    message: str
    cure: str


@dataclass(frozen=True)
class Histogram:
    """How many rows are how long: bin i counts lengths from `i * width + 1` to `(i + 1) * width`."""

    width: int
    counts: tuple[int, ...]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The shortest and the longest length of each bin, in tokens."""
        return [(place * self.width + 1, (place + 1) * self.width) for place in range(len(self.counts))]


def histogram(lengths: Lengths, *, most_bins: int = MOST_BINS) -> Histogram:
    """The lengths in at most `most_bins` bins whose width is a power of two."""
    longest = int(lengths.max(initial=1))
    width = 1
    while -(-longest // width) > most_bins:
        width *= 2
    counts = np.bincount((np.maximum(lengths, 1) - 1) // width, minlength=-(-longest // width))
    return Histogram(width, tuple(counts.tolist()))


@dataclass(frozen=True)
class LengthFacts:
    """Lengths of rows in tokens: the ends, the middle, and where 95 % are shorter."""

    shortest: int
    median: int
    mean: float
    ninety_fifth: int
    longest: int


def length_facts(lengths: Lengths) -> LengthFacts:
    """The facts of at least one length."""
    median, high = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return LengthFacts(
        shortest=int(lengths.min()),
        median=int(median),
        mean=float(lengths.mean()),
        ninety_fifth=int(high),
        longest=int(lengths.max()),
    )


def occurrences(rows: Iterable[Tokens], ids: Sequence[int]) -> dict[int, int]:
    """How often each of some tokens occurs in the rows; goes through all of them."""
    counted = np.asarray(ids, np.int32)
    found = np.zeros(len(ids), np.int64)
    for row in rows:
        found += np.count_nonzero(row.ids[:, None] == counted, axis=0)
    return dict(zip(ids, found.tolist(), strict=True))


@dataclass(frozen=True)
class Layout:
    """How the rows of the steps lie in memory, filled up and packed.

    Attributes:
        steps: So many first steps were looked at.
        micro_batch: Rows of one forward pass where rows are filled up.
        padding_share: Of what is computed there: tokens up to the longest of each micro-batch.
        padded_passes: Forward passes of a step there.
        capacity_tokens: The most tokens of one forward pass where rows are packed.
        packed_passes: Forward passes of a step there, on average.
        packed_share: Of that capacity that holds tokens, on average.
    """

    steps: int
    micro_batch: int
    padding_share: float
    padded_passes: int
    capacity_tokens: int
    packed_passes: float
    packed_share: float


def step_layout(lengths: Lengths, *, micro_batch: int, longest: int) -> Layout:
    """How the rows of some steps lie in memory: micro-batches by length, and bins by best-fit decreasing.

    Args:
        lengths: Of the rows of each step, (S, R).
        micro_batch: Rows of one forward pass; packed, so many times `longest` tokens.
        longest: The longest row of the run.
    """
    steps, rows = lengths.shape
    passes = -(-rows // micro_batch)
    by_length = -np.sort(-lengths.astype(np.int64), axis=1)
    sizes = np.full(passes, micro_batch)
    sizes[-1] = rows - (passes - 1) * micro_batch
    filled_up = int((by_length[:, ::micro_batch] * sizes).sum())
    tokens = int(by_length.sum())
    capacity = micro_batch * longest
    bins = sum(len(pack(step, capacity)) for step in by_length.tolist())
    return Layout(
        steps=steps,
        micro_batch=micro_batch,
        padding_share=1 - tokens / filled_up,
        padded_passes=passes,
        capacity_tokens=capacity,
        packed_passes=bins / steps,
        packed_share=tokens / (bins * capacity),
    )


def looked_at(steps: int, *, rows_per_step: int) -> int:
    """How many of a run's steps are looked at: enough for shares to a percent, few enough for a second."""
    return max(1, min(steps, MOST_STEPS, MOST_STEP_ROWS // rows_per_step))


@dataclass(frozen=True)
class Forecast:
    """What the run will take on this machine, where that can be told without weights.

    `problem` says in a sentence why nothing, or not the time, can be told; `cure` what to do where the run
    could not begin.
    """

    device: str = ""
    peak_bytes: int | None = None
    budget_bytes: int | None = None
    seconds_per_step: float | None = None
    problem: str = ""
    cure: str = ""


@dataclass(frozen=True)
class ShownRow:
    """One row to be looked at; `note` says how it was cut, or why it is left out."""

    number: int
    place: str
    tokens: int
    supervised_tokens: int
    pieces: tuple[Piece | Gap, ...]
    note: str = ""


@dataclass(frozen=True)
class DataReport:
    """All that `qadapt data check` says; token counts are of one pass unless a name says otherwise."""

    name: str
    model: str
    length: int
    rows: int
    held_out_rows: int
    tokens: int
    supervised_tokens: int
    lengths: LengthFacts
    histogram: Histogram
    layout: Layout
    pass_rows: int
    rows_per_step: int
    steps: int
    forecast: Forecast
    is_packed: bool = False
    duplicates: int = 0
    formats: Mapping[str, int] = field(default_factory=dict)
    skipped_rows: int = 0
    cut: Mapping[str, int] = field(default_factory=dict)
    """How rows were cut (`turns`, `inside`, `pieces`) → how many."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Why rows are not trained on → how many."""
    prompt: tuple[tuple[str, str], ...] = ()
    """Facts of the prompt contract, each a name and words."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """What the template leaves out of rows, or finds in their contents → in how many."""
    new_tokens: Mapping[str, int] = field(default_factory=dict)
    """Token of `data.new_tokens` → how often it occurs in the training rows."""
    findings: tuple[Finding, ...] = ()
    examples: tuple[ShownRow, ...] = ()

    @property
    def supervised_share(self) -> float:
        """Learned tokens among all."""
        return self.supervised_tokens / self.tokens

    def without_examples(self) -> DataReport:
        """The same without rows to look at."""
        return replace(self, examples=())
