"""The learned tokens of some rows: micro-batches of like length, and what a model has at each token.

Whether a model is whole in memory or comes layer by layer, it is given the same micro-batches, and looked at
in the same places. Knows no model.

Legend: B rows, T tokens, K positions that predict a learned token in any row, D width, n learned tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qadapt.data.batches import MicroBatch, collate
from qadapt.data.tokens import Tokens
from qadapt.engine.loss import IGNORED

_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Batch:
    """A micro-batch, filled up at the end, and which of all rows its rows are."""

    rows: tuple[int, ...]
    content: MicroBatch

    @property
    def targets(self) -> Tensor:
        """The learned tokens, row by row, (n,)."""
        return self.learned_of(self.content.targets)

    @property
    def row_of_each(self) -> Tensor:
        """Which of all rows each learned token is of, (n,)."""
        numbers = torch.tensor(self.rows)[:, None].expand_as(self.content.targets)  # (B, K)
        return self.learned_of(numbers)

    def before_head(self, hidden: Tensor) -> Tensor:
        """Of hidden states (B, T, D) those that predict the learned tokens, (n, D)."""
        return self.learned_of(hidden[:, self.content.positions.to(hidden.device)])

    def learned_of(self, values: Tensor) -> Tensor:
        """Of values at all positions, (B, K, ...), those at the learned tokens, (n, ...)."""
        return values[(self.content.targets != IGNORED).to(values.device)]


def batches_of(rows: Sequence[Tokens], *, pad_id: int, tokens: int = _BATCH_TOKENS) -> list[Batch]:
    """All rows in micro-batches, the longest first.

    Args:
        rows: Any number.
        pad_id: The token that fills up.
        tokens: The most tokens of a micro-batch, filled up, unless a single row has more.
    """
    groups: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]]) <= tokens:
            groups[-1].append(number)
        else:
            groups.append([number])
    return [Batch(tuple(each), collate([rows[number] for number in each], pad_id=pad_id)) for each in groups]
