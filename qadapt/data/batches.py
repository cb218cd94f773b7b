"""Rows to micro-batches. Which rows a step takes says `order.py`.

Legend: B rows, T tokens, K positions that predict a learned token in any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from qadapt.data.order import Order
from qadapt.data.tokens import Tokens

IGNORED = -100  # the label that F.cross_entropy leaves out


@dataclass(frozen=True)
class MicroBatch:
    """Some rows, filled up at the end to the longest.

    There is no attention mask: attention is causal and padding stands at the end, so no token sees any.
    """

    input_ids: Tensor  # (B, T)
    positions: Tensor  # (K,) whose prediction is learned in at least one row
    targets: Tensor  # (B, K) the next token, or IGNORED
    tokens: int  # without padding
    supervised_tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        return MicroBatch(
            self.input_ids.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.tokens,
            self.supervised_tokens,
        )


def widest_share(rows: Sequence[Tokens], *, steps: int, order: Order) -> float:
    """The largest share of the longest row's positions that reaches the head in the first `steps` steps.

    A position reaches the head if any row of the micro-batch learns its next token, so splitting a step into
    smaller micro-batches never sends more.
    """
    longest = max(len(row.ids) for row in rows)
    widest = 0
    for step in range(steps):
        learned = [rows[index].supervised[1:] for index in order.rows_of_step(step)]
        widest = max(widest, sum(map(any, zip_longest(*learned))))
    return widest / longest


def micro_batches(rows: Sequence[Tokens], *, size: int, pad_id: int) -> list[MicroBatch]:
    """Rows in micro-batches of at most `size`, those of like length together, so that little is padding.

    The order within a step does not matter: its gradient is the sum over all learned tokens.
    """
    by_length = sorted(rows, key=lambda row: len(row.ids), reverse=True)
    return [
        collate(by_length[first : first + size], pad_id=pad_id) for first in range(0, len(by_length), size)
    ]


def collate(rows: Sequence[Tokens], *, pad_id: int) -> MicroBatch:
    """One micro-batch of the rows."""
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        ids = torch.as_tensor(row.ids, dtype=torch.int64)
        input_ids[index, : len(ids)] = ids
        labels[index, : len(ids)] = torch.where(torch.as_tensor(row.supervised), ids, IGNORED)
    following = labels[:, 1:]
    positions = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    return MicroBatch(
        input_ids=input_ids,
        positions=positions,
        targets=following[:, positions].contiguous(),
        tokens=sum(len(row.ids) for row in rows),
        supervised_tokens=sum(row.supervised_count for row in rows),
    )
