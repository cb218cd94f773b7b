"""Which weights an adapter is merged on: both merges are measured on held-out rows, and the lower loss wins.

A QLoRA adapter was trained on the dequantized weights; the published ones are the better weights. Which of
the two merges answers better is a question for measurement, not for taste. Neither is written for it: a
streamed model asks for tensors, and the merge computes them. Whether the difference of the losses is more
than chance says a paired bootstrap over rows (B. Efron and R. Tibshirani, "An Introduction to the Bootstrap",
1993, chapter 13: percentiles); a tie goes to what was trained on. Knows no run.

Legend: R rows, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig

from qadapt.data.tokens import Tokens
from qadapt.errors import BadExport
from qadapt.events import BasesCompared, Event, StageStarted, Warned
from qadapt.export.merge import BASES
from qadapt.export.merged_model import Adapters, MergedModel, open_merged
from qadapt.export.streamed_model import StreamedModel, Tensors, row_losses
from qadapt.model.tensor_files import open_model, rows_of
from qadapt.model.tensor_values import tensor_of

AUTO = "auto"
DRAWS, SEED = 2000, 0
FEWEST_ROWS = 10
"""Below it a bootstrap's interval is far too narrow to decide anything."""
MOST_ROWS, MOST_TOKENS, FEWEST_TOKENS = 128, 8192, 512
"""Rows and tokens that are measured on; the fewest where nobody asked for it and a CPU would take minutes."""
CPU_WORK = 10**12
"""Weights times tokens that a CPU does in about half a minute."""


def choose_base(
    model_folder: Path,
    adapters: Adapters,
    *,
    asked: str,
    dtype: str,
    rows: Sequence[Tokens],
    device: torch.device,
) -> Generator[Event, None, str]:
    """The base to merge on; yields what both measure, whatever was asked, if there are rows.

    Args:
        model_folder: The base.
        adapters: As `open_merged` takes them.
        asked: One of `BASES`, or `AUTO`.
        dtype: Type of the merged weights in safetensors' words, such as `F16`.
        rows: Rows that were not trained on; some of many are taken.
        device: Where the model computes.

    Raises:
        QadaptError: The adapter cannot be merged on one of the two, as `merge` says.
    """
    most = _most_tokens(model_folder, asked=asked, device=device)
    measured = [row for row in some_of(rows, most_tokens=most) if row.supervised_count]
    if not measured:
        if asked == AUTO:
            yield Warned(
                message="There are no held-out rows to compare the two bases on: merged on the dequantized "
                "one, which is what was trained on.",
                cure="Hold out rows with data.held_out_fraction, or say --base original.",
            )
        return BASES[0] if asked == AUTO else asked
    losses = {}
    for base in BASES:
        yield StageStarted(stage=f"measuring the merge on the {base} base")
        try:
            with open_merged(model_folder, adapters, base=base, dtype=dtype) as merged:
                losses[base] = yield from _losses(merged, measured, model_folder=model_folder, device=device)
        except BadExport as error:
            if base == asked or (asked == AUTO and base == BASES[0]):
                raise
            yield Warned(message=f"Merged on the {base} base it cannot be: {error.problem}", cure=error.cure)
            return BASES[0] if asked == AUTO else asked
    found = compare(
        losses["dequantized"], losses["original"], tokens=[row.supervised_count for row in measured]
    )
    yield found.event(asked)
    return found.base if asked == AUTO else asked


def _most_tokens(model_folder: Path, *, asked: str, device: torch.device) -> int:
    if asked == AUTO or device.type != "cpu":
        return MOST_TOKENS
    with open_model(model_folder) as reader:
        weights = sum(math.prod(entry.shape) for entry in reader.entries.values())
    return min(MOST_TOKENS, max(FEWEST_TOKENS, CPU_WORK // weights))


def _losses(
    merged: MergedModel, rows: Sequence[Tokens], *, model_folder: Path, device: torch.device
) -> Generator[Event, None, list[float]]:
    config = AutoConfig.from_pretrained(model_folder, **merged.changed_config)
    model = StreamedModel(config, merged_tensors(merged), device=device)
    # what fills up a row comes after all that counts, so any token will do
    return (yield from row_losses(model, rows, pad_id=0))


@dataclass(frozen=True)
class Comparison:
    """Both mean losses per learned token (nats), and the 95 % interval of original less dequantized."""

    losses: tuple[float, float]
    interval: tuple[float, float]
    rows: int
    tokens: int

    @property
    def base(self) -> str:
        """The one with the lower loss; the dequantized one unless the other is lower by more than chance."""
        return BASES[self.rows >= FEWEST_ROWS and self.interval[1] < 0]

    def event(self, asked: str) -> BasesCompared:
        """What to tell.

        Args:
            asked: One of `BASES`, or `AUTO`.
        """
        return BasesCompared(
            losses=dict(zip(BASES, self.losses, strict=True)),
            low=self.interval[0],
            high=self.interval[1],
            rows=self.rows,
            tokens=self.tokens,
            better=self.base,
            base=self.base if asked == AUTO else asked,
        )


def compare(dequantized: Sequence[float], original: Sequence[float], *, tokens: Sequence[int]) -> Comparison:
    """What the losses of the same rows on both bases say.

    Args:
        dequantized: Each row's loss, summed over its learned tokens; (R,).
        original: The same on the other base.
        tokens: How many each row learns; (R,), one at least in sum.
    """
    sums, counts = np.array([dequantized, original], float), np.array(tokens, float)  # (2, R), (R,)
    drawn = np.random.default_rng(SEED).integers(len(counts), size=(DRAWS, len(counts)))  # (S, R)
    differences = _sum(sums[1] - sums[0], drawn) / np.maximum(_sum(counts, drawn), 1)
    low, high = np.quantile(differences, (0.025, 0.975))
    means = sums.sum(axis=1) / counts.sum()
    return Comparison(
        (float(means[0]), float(means[1])),
        (float(low), float(high)),
        rows=len(counts),
        tokens=int(counts.sum()),
    )


def some_of(rows: Sequence[Tokens], *, most_tokens: int = MOST_TOKENS) -> list[Tokens]:
    """Rows at even distances: at most `MOST_ROWS` of them, and `most_tokens` unless one alone has more."""
    count = min(len(rows), MOST_ROWS)
    while True:
        chosen = [rows[len(rows) * place // count] for place in range(count)]
        total = sum(map(len, chosen))
        if count <= 1 or total <= most_tokens:
            return chosen
        count = max(1, count * most_tokens // total)


def merged_tensors(merged: MergedModel) -> Tensors:
    """The tensors of a merge that is written nowhere, as a streamed model asks for them."""
    entries = {entry.name: entry for entry in merged.entries}
    some_rows: dict[str, Callable[[int, int], torch.Tensor]] = {}

    def read(name: str, first: int, last: int) -> torch.Tensor:
        entry = entries[name]
        if (first, last) != (0, rows_of(entry)):
            if name not in some_rows:
                some_rows[name] = merged.rows.rounded(entry)
            return some_rows[name](first, last)
        data = bytearray(entry.size_bytes)
        done = 0
        for piece in merged.values(entry):
            data[done : done + len(piece)] = piece
            done += len(piece)
        return tensor_of(data, entry.dtype, entry.shape)

    return Tensors(frozenset(entries), read)


def _sum(values: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    sums: NDArray[np.float64] = values[drawn].sum(axis=1)
    return sums
