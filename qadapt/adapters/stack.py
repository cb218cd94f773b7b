"""A bottleneck adapter on a trained, frozen one: a task above a language (MAD-X, arXiv:2005.00052).

Every pass goes through both: the upper one sees what the base gives with the lower one, as `swap.py` stacks
them and the library `adapters` 1.3 does. The upper one alone is trained; it adds nothing at the start, so the
first forward pass is that of the base with the lower one, to the bit.

On disk both lie in one folder, with the lower one's name and the hash of the file it was read from, which is
needed no more. In a stack of `swap.py` another one can take its place: another language, as in that paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.bottleneck import (
    Bottleneck,
    attach_bottleneck,
    bottleneck_of,
    bottleneck_shapes,
    check_same_base,
    effects_with,
    fill,
)
from qadapt.adapters.effect import Effect
from qadapt.adapters.facts import BELOW
from qadapt.adapters.fusion import Member
from qadapt.adapters.side_car import Part, SideCar
from qadapt.adapters.side_car_files import read_settings, read_tensors
from qadapt.errors import BadAdapter


def attach_stack(
    model: PreTrainedModel,
    bottleneck: Bottleneck,
    below: Member,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> SideCar:
    """The base with a trained adapter and new ones on it, which alone are trainable.

    Args:
        model: The base; its parameters are frozen.
        bottleneck: The new adapters.
        below: The trained one; without tensors only sizes matter.
        dtype: Type of what is trained, and of the trained one.
        seed: Of what starts at random.

    Raises:
        QadaptError: As `attach_bottleneck`.
    """
    lower = attach_bottleneck(model, _still(below), dtype=dtype, child=BELOW)
    if below.tensors:
        copied = {name: each.to(dtype, copy=True) for name, each in below.tensors.items()}
        fill(lower, copied, is_trainable=False)
    return _joined(lower, attach_bottleneck(model, bottleneck, dtype=dtype, seed=seed), below)


def load_stack(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar:
    """The base with both adapters of a folder, in the type they were saved in; the upper one may be trained.

    Raises:
        BadAdapter: The folder's files are damaged, or are of adapters for another base.
    """
    bottleneck, below, tensors = _read(model, folder)
    lower = attach_bottleneck(model, _still(below), child=BELOW)
    upper = attach_bottleneck(model, bottleneck)
    fill(lower, below.tensors, is_trainable=False)
    fill(upper, tensors, is_trainable=is_trainable)
    return _joined(lower, upper, below)


def stack_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What both adapters of a folder do at the layers of a base, without being attached to it: for `swap.py`.

    Raises:
        BadAdapter: As `load_stack`.
        Unsupported: It is not known where this architecture adds to its stream.
    """
    bottleneck, below, tensors = _read(model, folder)
    lower = effects_with(model, below.bottleneck, below.tensors)
    for effect in lower:
        assert isinstance(effect.part, Part)
        effect.part.is_below = True
    return [*lower, *effects_with(model, bottleneck, tensors)]


def stack_shapes(settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that a folder with these settings has → its shape.

    Raises:
        BadAdapter: The settings describe no bottleneck adapters.
    """
    base = {name: settings.get(name) for name in ("layers", "model_width")}
    lower = bottleneck_shapes({**asdict(_below(settings, folder).bottleneck), **base}, folder)
    return {
        **{f"{BELOW}.{name}": shape for name, shape in lower.items()},
        **bottleneck_shapes(settings, folder),
    }


def lower_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of the adapter on which a model's own stands, by name; none if it stands on none."""
    parts = [module for module in model.modules() if isinstance(module, Part) and module.is_below]
    frozen = {id(parameter) for part in parts for parameter in part.parameters()}
    return {name: each for name, each in model.named_parameters() if id(each) in frozen}


def _still(below: Member) -> Bottleneck:
    """The trained adapter as it works when it is not trained."""
    return replace(below.bottleneck, dropout=0.0)


def _joined(lower: SideCar, upper: SideCar, below: Member) -> SideCar:
    for part in lower.parts.values():
        part.is_below = True
    described = {"name": below.name, "sha256": below.sha256, **asdict(below.bottleneck)}
    parts = {f"{BELOW}.{name}": part for name, part in lower.parts.items()} | upper.parts
    return SideCar(upper.base, parts, settings={**upper.settings, BELOW: described})


def _read(model: PreTrainedModel, folder: Path) -> tuple[Bottleneck, Member, dict[str, Tensor]]:
    """The upper adapters of a folder, the lower one and the upper ones' tensors, if they are this base's."""
    settings = read_settings(folder)
    bottleneck, below = bottleneck_of(settings, folder), _below(settings, folder)
    check_same_base(model, settings, folder)
    tensors = read_tensors(folder, stack_shapes(settings, folder))
    start = f"{BELOW}."
    lower = {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
    upper = {name: each for name, each in tensors.items() if not name.startswith(start)}
    return bottleneck, replace(below, tensors=lower), upper


def _below(settings: Mapping[str, Any], folder: Path) -> Member:
    """The lower adapter that settings describe, without its tensors."""
    described = settings.get(BELOW)
    named = described if isinstance(described, dict) else {}
    name, sha256 = named.get("name"), named.get("sha256")
    if not isinstance(name, str) or not isinstance(sha256, str):
        raise BadAdapter(
            f"The settings of the adapter in {folder} do not say on which other it stands: {described!r}.",
            cure="Take the adapter's files from where they were made.",
        )
    return Member(name, bottleneck_of(named, folder), sha256)
