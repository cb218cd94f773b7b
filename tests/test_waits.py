"""How often a step asks its device for a number: a card that is asked is waited for.

At its end it asks for two, of which the second is there when the first is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_packing import rows
from test_train import adapted
from torch.utils._python_dispatch import TorchDispatchMode

from qadapt.adapters.lora import trainable
from qadapt.data.batches import MicroBatch, micro_batches, packed_batches
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import train_step

if TYPE_CHECKING:
    from conftest import TinyModel

ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
"""Operations whose result, or its size, only the device knows."""


class Asked(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name.startswith(ASKING):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_packed_step_asks_for_its_loss_and_its_norm(
    dtype: torch.dtype, recompute: bool, tiny_model: TinyModel
) -> None:
    batches = packed_batches(rows(), capacity=150)
    assert len(batches) > 1
    assert asked(adapted(tiny_model("llama"), recompute=recompute, dtype=dtype), batches) == {
        "_local_scalar_dense": 2
    }


def test_a_padded_step_asks_once_more_for_each_micro_batch(tiny_model: TinyModel) -> None:
    batches = micro_batches(rows(), size=2, pad_id=0)
    # the library looks whether the positions of its rows start anew (`find_packed_sequence_indices`)
    assert asked(adapted(tiny_model("llama"), recompute=True), batches) == {
        "_local_scalar_dense": 2 + len(batches)
    }


def asked(model: Any, batches: list[MicroBatch]) -> Counter[str]:
    """Of the second step: the first one makes things that last."""
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(2):
        with Asked() as counted:
            train_step(model, optimizer, batches, learning_rate=1e-4, clip_norm=1.0, scaler=None)
    return counted.counts
