"""What the rows of a run come to, in numbers: how long, how much is learned, what says the same twice.

Pure functions over arrays and row sets; the report of `qadapt data check` is made of what they give. Knows no
file, no template, no screen. Numbers about steps are of a sample of them (`step_sample.py`), and the report
says how many it looked at.

Legend: N rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qadapt.data.pieces import Gap, Piece
from qadapt.data.tokens import Tokens

if TYPE_CHECKING:
    from qadapt.data.step_sample import StepSample

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
    """How the rows of an average step lie in memory, filled up and packed.

    Attributes:
        steps: So many steps of the first pass were looked at.
        micro_batch: Rows of one forward pass where rows are filled up.
        padding_share: Of what is computed there: what fills up the rows of each micro-batch.
        padded_passes: Forward passes of a step there.
        capacity_tokens: The most tokens of one forward pass where rows are packed.
        packed_passes: Forward passes of a step there.
        packed_share: Of that capacity that holds tokens.
    """

    steps: int
    micro_batch: int
    padding_share: float
    padded_passes: float
    capacity_tokens: int
    packed_passes: float
    packed_share: float


def step_layout(sample: StepSample, *, micro_batch: int, longest: int) -> Layout:
    """How the rows of some steps lie in memory: micro-batches by length, and bins by best-fit decreasing.

    Args:
        sample: Of the run's steps.
        micro_batch: Rows of one forward pass; packed, so many times `longest` tokens.
        longest: The longest row of the run.
    """
    capacity = micro_batch * longest
    padded, packed = sample.filled_up(micro_batch), sample.packed(capacity)
    return Layout(
        steps=sample.steps,
        micro_batch=micro_batch,
        padding_share=1 - packed.tokens / padded.tokens,
        padded_passes=padded.count,
        capacity_tokens=capacity,
        packed_passes=packed.count,
        packed_share=packed.tokens / (packed.count * capacity),
    )


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
    """All that `qadapt data check` says.

    `tokens` and `supervised_tokens` count each training row once; `pass_rows` and `pass_tokens` as often as a
    pass takes it, by the weights of the sources (where those have a fraction, `pass_tokens` is what is to be
    expected).
    """

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
    pass_tokens: int
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
    def read_rows(self) -> int:
        """Rows that were read and could be: a long document is one, though it is trained on in pieces."""
        return sum(self.formats.values())

    @property
    def supervised_share(self) -> float:
        """Learned tokens among all."""
        return self.supervised_tokens / self.tokens

    def without_examples(self) -> DataReport:
        """The same without rows to look at."""
        return replace(self, examples=())
