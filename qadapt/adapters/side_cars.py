"""The kinds of side-cars, by the `kind` in their settings: how each is loaded, and what its file holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel

from qadapt.adapters.bottleneck import KINDS, bottleneck_effects, bottleneck_shapes, load_bottleneck
from qadapt.adapters.effect import Effect
from qadapt.adapters.facts import BELOW
from qadapt.adapters.fusion import FUSION, fusion_effects, fusion_shapes, load_fusion
from qadapt.adapters.prefix import PREFIX_KINDS, load_prefix, prefix_effects, prefix_shapes
from qadapt.adapters.prompt import PROMPT_KINDS, load_prompt, prompt_effects, prompt_shapes
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import read_settings
from qadapt.adapters.stack import load_stack, stack_effects, stack_shapes
from qadapt.errors import BadAdapter


class _Load(Protocol):
    def __call__(self, model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar: ...


class _Shapes(Protocol):
    def __call__(self, settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]: ...


@dataclass(frozen=True)
class _Family:
    """The code behind some kinds."""

    load: _Load
    shapes: _Shapes
    effects: Callable[[PreTrainedModel, Path], list[Effect]]


_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(KINDS, _Family(load_bottleneck, bottleneck_shapes, bottleneck_effects)),
    FUSION: _Family(load_fusion, fusion_shapes, fusion_effects),
    **dict.fromkeys(PREFIX_KINDS, _Family(load_prefix, prefix_shapes, prefix_effects)),
    **dict.fromkeys(PROMPT_KINDS, _Family(load_prompt, prompt_shapes, prompt_effects)),
}

_STACK = _Family(load_stack, stack_shapes, stack_effects)
"""Of bottlenecks that stand on another adapter, whose kind is their own."""


def load_side_car(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar:
    """The base with the modules of a folder, in the type they were saved in.

    Raises:
        BadAdapter: The folder's files are damaged, of no known kind, or of adapters for another base.
        Unsupported: The kind is none for this architecture.
    """
    return _family(read_settings(folder), folder).load(model, folder, is_trainable=is_trainable)


def side_car_shapes(settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that a side-car with a folder's settings has → its shape.

    Raises:
        BadAdapter: The settings describe no side-car that is known.
    """
    return _family(settings, folder).shapes(settings, folder)


def side_car_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What the modules of a folder do at the layers of a base, without being attached to it: for `swap.py`.

    Raises:
        BadAdapter: As `load_side_car`.
        Unsupported: As `load_side_car`.
    """
    return _family(read_settings(folder), folder).effects(model, folder)


def _family(settings: Mapping[str, Any], folder: Path) -> _Family:
    kind = settings.get("kind")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise BadAdapter(
            f"The adapter in {folder} is of the kind {kind!r}; known are {', '.join(_FAMILIES)}.",
            cure="Take the adapter's files from where they were made, or a newer qadapt.",
        )
    return _STACK if BELOW in settings and kind in KINDS else _FAMILIES[kind]
