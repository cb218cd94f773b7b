"""Which adapters a fusion attends to in each layer: the mean of its weights over the tokens of some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel

from qadapt.adapters.fusion import watching_weights
from qadapt.adapters.side_car import SideCar
from qadapt.data.tokens import Tokens
from qadapt.engine.host import device_of

MOST_ROWS = 32
"""Rows that are looked at, one at a time: enough for a mean, few for any evaluation."""


@dataclass(frozen=True)
class Attended:
    """A place of a fusion.

    Attributes:
        layer: Its number, from 0.
        place: `attention` or `feed_forward`.
        weights: Name of each adapter → the mean of its weight; they sum to 1.
    """

    layer: int
    place: str
    weights: Mapping[str, float]


def attended(model: PeftModel, rows: Sequence[Tokens]) -> tuple[Attended, ...]:
    """What a fusion attends to in the first rows; nothing for other adapters.

    Args:
        model: The adapted model.
        rows: Any number.
    """
    if not isinstance(model, SideCar) or "adapters" not in model.settings:
        return ()
    names = [each["name"] for each in model.settings["adapters"]]
    sums: dict[str, torch.Tensor] = {}
    count, device = 0, device_of(model)
    model.eval()
    for row in (rows[number] for number in range(min(MOST_ROWS, len(rows)))):
        ids = torch.tensor([list(row.ids)], device=device)
        with torch.no_grad(), watching_weights(model.parts) as seen:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)  # all of them would be the most there is
        for place, passes in seen.items():
            summed = torch.cat(passes, 1).double().sum((0, 1)).cpu()  # (N,)
            sums[place] = sums.get(place, 0) + summed
        count += ids.shape[1]
    return tuple(
        Attended(
            int(place.split(".")[1]),
            place.split(".")[2],
            dict(zip(names, (summed / count).tolist(), strict=True)),
        )
        for place, summed in sums.items()
    )
