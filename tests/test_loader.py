"""Micro-batches made ahead: the same for any count of processes, from any step on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from qadapt.data.batches import MicroBatch, micro_batches
from qadapt.data.loader import StepBatches, step_loader
from qadapt.data.order import Order
from qadapt.data.rows import RowSet
from qadapt.data.store import Store, StoreWriter
from qadapt.data.tokens import tokens_of


def stored_batches(folder: Path, *, rank: int = 0, world_size: int = 1) -> StepBatches:
    folder.mkdir(exist_ok=True)
    with StoreWriter(folder) as writer:
        for number in range(23):
            ids = range(number, 2 * number + 3)
            writer.add(tokens_of(ids, [True] * len(ids), place="row"), number=number)
        writer.finish({})
    rows = RowSet(Store(folder))
    return StepBatches(
        rows, Order(rows.lengths, rows_per_step=5), partial(micro_batches, size=2, pad_id=0), rank, world_size
    )


def texts(steps: list[tuple[int, list[MicroBatch]]]) -> list[tuple[int, list[list[list[int]]]]]:
    return [(step, [batch.input_ids.tolist() for batch in batches]) for step, batches in steps]


# Python 3.12 and later: a fork beside the threads of libraries
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", [1, 2])
def test_any_count_of_workers_gives_the_same_steps_and_draws_nothing(tmp_path: Path, workers: int) -> None:
    batches = stored_batches(tmp_path)
    alone = texts(list(step_loader(batches, range(3, 14))))
    before = torch.get_rng_state()
    helped = list(step_loader(batches, range(3, 14), workers=workers))
    assert torch.equal(torch.get_rng_state(), before), "dropout would depend on the count of workers"
    assert texts(helped) == alone
    assert [step for step, _ in helped] == list(range(3, 14))


def test_a_loader_that_begins_later_goes_on_alike(tmp_path: Path) -> None:
    batches = stored_batches(tmp_path)
    assert texts(list(step_loader(batches, range(12))))[7:] == texts(list(step_loader(batches, range(7, 12))))


def test_the_processes_of_a_step_have_its_tokens_between_them(tmp_path: Path) -> None:
    [(_, whole)] = step_loader(stored_batches(tmp_path), range(4, 5))
    parts = [batch for rank in (0, 1) for batch in stored_batches(tmp_path, rank=rank, world_size=2)[4]]
    assert sum(batch.tokens for batch in parts) == sum(batch.tokens for batch in whole)
    assert sum(len(batch.input_ids) for batch in parts) == 5
