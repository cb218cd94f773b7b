"""Micro-batches of one step after another, made ahead by other processes if asked to; the same for any count.

Which rows a step takes is a function of the step (`order.py`), so a loader begins anywhere, and its processes
need to agree on nothing. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from qadapt.data.batches import MicroBatch
from qadapt.data.order import Order
from qadapt.data.tokens import Tokens


@dataclass(frozen=True)
class StepBatches(Dataset[list[MicroBatch]]):
    """The micro-batches of any step.

    Attributes:
        rows: The training rows.
        order: Which of them each step takes.
        divide: Makes micro-batches of a step's rows; a function that can be handed to another process.
        rank: Which training process asks.
        world_size: How many share a step.
    """

    rows: Sequence[Tokens]
    order: Order
    divide: Callable[[Sequence[Tokens]], list[MicroBatch]]
    rank: int = 0
    world_size: int = 1

    def __getitem__(self, step: int) -> list[MicroBatch]:
        taken = self.order.rows_of_step(step, rank=self.rank, world_size=self.world_size)
        return self.divide([self.rows[index] for index in taken])


def step_loader(
    batches: StepBatches, steps: range, *, workers: int = 0
) -> Iterator[tuple[int, list[MicroBatch]]]:
    """The steps in order, each with its micro-batches.

    Args:
        batches: Of any step.
        steps: Which ones; a resumed run begins where it stands.
        workers: So many processes make them ahead; 0: this one does, when they are asked for.
    """
    if not workers:
        for step in steps:
            yield step, batches[step]
        return
    # its own generator: that of torch, which dropout draws from, must not depend on the count of workers
    loader = DataLoader(
        batches, batch_size=None, sampler=steps, num_workers=workers, generator=torch.Generator()
    )
    yield from zip(steps, loader, strict=True)
