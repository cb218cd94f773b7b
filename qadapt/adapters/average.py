"""The mean of bottleneck adapters of one architecture, number by number (model soups, arXiv:2203.05482).

What a bottleneck adds is no linear function of its numbers: they have a mean, but no sum, no difference and
no multiple. They can be left out of low layers. Knows two files of each folder, and no base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadapt.adapters.bottleneck import KINDS, bottleneck_shapes
from qadapt.adapters.facts import below_of
from qadapt.adapters.fusion import FUSION
from qadapt.adapters.side_car_files import read_settings, read_tensors
from qadapt.errors import Unsupported

_FREE = ("dropout",)
"""Settings in which adapters with a mean may differ: they are for training only."""


def average(adapters: Sequence[tuple[Path, float]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings and the weighted mean of the tensors, in fp64.

    Args:
        adapters: Folders with weights of 0 or more, which sum to 1.

    Raises:
        BadAdapter: The files of a folder are damaged.
        Unsupported: One is no bottleneck adapter on the base alone, they differ in their architecture, or the
            weights make no mean.
    """
    for folder, _ in adapters:
        _check_kind(folder)
    _check_weights(adapters)
    first = adapters[0][0]
    settings = read_settings(first)
    parts: dict[str, list[Tensor]] = {}
    for folder, weight in adapters:
        own = read_settings(folder)
        for name in sorted({*settings, *own} - set(_FREE)):
            if own.get(name) != settings.get(name):
                raise Unsupported(
                    f"{first} has {name} = {settings.get(name)!r}, {folder} has {name} = {own.get(name)!r}: "
                    "bottleneck adapters of two architectures have no mean.",
                    cure="Average adapters of one recipe and one base.",
                )
        for name, tensor in read_tensors(folder, bottleneck_shapes(own, folder)).items():
            parts.setdefault(name, []).append(tensor.double() * weight)
    # sorted, so that the order of the adapters changes no bit
    return settings, {name: torch.stack(each).sort(dim=0).values.sum(0) for name, each in parts.items()}


def upper(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], share: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of the adapters of the upper layers alone (AdapterDrop, arXiv:2010.11918).

    Args:
        settings: Of all of them.
        tensors: By their names on disk.
        share: Of the layers that have one, those that keep it; one of them does at the least.
    """
    layers = settings["layers"]
    first = layers - max(1, round(share * (layers - settings.get("first_layer", 0))))
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("layers.") or int(name.split(".")[1]) >= first
    }
    return {**settings, "first_layer": first}, kept


def _check_kind(folder: Path) -> None:
    kind = read_settings(folder).get("kind")
    if kind == FUSION:
        raise Unsupported(
            f"{folder} is a fusion, which decides token by token what it takes of its adapters: it has no "
            "sum, no multiple and no mean.",
            cure="Alone with the weight 1 it is copied. For a fusion of more or other adapters train one "
            "(adapter.method=fusion, which names them in adapter.targets).",
        )
    if kind not in KINDS:
        raise Unsupported(
            f"{folder} is of the kind {kind}: only bottleneck adapters have a mean.",
            cure="Use adapters of this kind as they are.",
        )
    if on := below_of(folder):
        raise Unsupported(
            f"{folder} stands on the adapter {on.get('name')}: only what stands on the base has a mean.",
            cure="Use it as it is, or train the adapters that are averaged without `on:`.",
        )


def _check_weights(adapters: Sequence[tuple[Path, float]]) -> None:
    weights = [weight for _, weight in adapters]
    if min(weights) < 0 or not math.isclose(sum(weights), 1, abs_tol=1e-9):
        raise Unsupported(
            f"The weights {', '.join(f'{weight:g}' for weight in weights)} make no mean, and bottleneck "
            "adapters have nothing else: what they add is no linear function of their numbers.",
            cure="Give weights of 0 or more that sum to 1, such as 0.5 and 0.5.",
        )
