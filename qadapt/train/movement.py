"""Whether every adapter tensor has moved after a few updates, told by two numbers for each, not by a copy.

After the first update a LoRA's second factor has left zero, and only then the first one gets a gradient, so
the third update is the first after which all must have moved. Only a stall is looked for: how far they moved
says nothing yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qadapt.train.gauges import Note
from qadapt.train.optimizer import AdapterOptimizer, CompensatedAdamW

UPDATES = 3
_BITS = {2: torch.int16, 4: torch.int32}
_PART_VALUES = 1 << 20
"""So many at a time take 16 MiB beside the tensor, however large its table is."""
_SHOWN = 3


def fingerprints(optimizer: AdapterOptimizer) -> Tensor:
    """A number for the content of each trained tensor, int64, on its device, without waiting for it.

    It is the sum of the squares of the bit patterns, with what rounding lost of a tensor counted in: sums of
    values would hide changes that cancel out.
    """
    lost = optimizer.lost if isinstance(optimizer, CompensatedAdamW) else {}
    sums = []
    for name, parameter in optimizer.parameters.items():
        value = _content(parameter)
        sums.append(value + 31 * _content(lost[name]) if name in lost else value)
    return torch.stack(sums)


def _content(tensor: Tensor) -> Tensor:
    parts = tensor.detach().view(_BITS[tensor.element_size()]).flatten().split(_PART_VALUES)
    return torch.stack([part.long().square().sum() for part in parts]).sum()


def find_unmoved(optimizer: AdapterOptimizer, start: Sequence[int]) -> Note | None:
    """The trained tensors that are what they were at the start, with the likely cause."""
    now = fingerprints(optimizer).tolist()
    names = list(optimizer.parameters)
    still = [name for name, before, after in zip(names, start, now, strict=True) if before == after]
    if not still:
        return None
    shown = ", ".join(name.removeprefix("base_model.model.") for name in still[:_SHOWN])
    more = f" and {len(still) - _SHOWN} more" if len(still) > _SHOWN else ""
    return Note(
        f"{len(still)} of {len(names)} adapter tensors have not moved in {UPDATES} updates: {shown}{more}.",
        _cure(optimizer, still),
    )


def _cure(optimizer: AdapterOptimizer, still: Sequence[str]) -> str:
    if any(not optimizer.parameters[name].requires_grad for name in still):
        return "They are frozen (requires_grad is off): something in this process switched it off."
    if len(still) == len(optimizer.parameters):
        return (
            "Nothing learns: raise train.learning_rate, shorten train.warmup_steps, look at what is learned."
        )
    return (
        "Their layers get no gradient. Usual causes: rows of text do not reach them (the layers of images or "
        "sound), or their gradient underflows; leave them out of adapter.targets."
    )
