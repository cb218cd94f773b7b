"""Two trained adapters for a fusion to attend over, as they lie on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.bottleneck import Bottleneck, Kind, attach_bottleneck
from qadapt.adapters.fusion import Member
from qadapt.adapters.side_car import SideCar
from qadapt.methods import METHODS, Fused, Method
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import train

PAIRS: dict[str, tuple[Kind, Kind]] = {
    "sum": ("pfeiffer", "compacterplus"),
    "output": ("houlsby", "compacter"),
    "stream": ("parallel", "parallel"),
}
"""By what enters them."""


def fused_pair(kinds: Sequence[Kind] = PAIRS["sum"], *, first_layer: int = 0) -> tuple[Fused, ...]:
    """Adapters of other widths and other nonlinearities."""
    widths = [8 if METHODS[kind].is_hypercomplex else 5 for kind in kinds]
    return (
        Fused("one", kinds[0], widths[0], "relu", first_layer=first_layer),
        Fused("two", kinds[1], 2 * widths[1], "silu", norm=True, first_layer=first_layer),
    )


def redrawn(model: nn.Module, *, seed: int, spread: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = 0.5 if name.endswith(("factors", "left", "right")) else spread  # of products of three
            parameter.data.copy_(factor * torch.randn(parameter.shape, generator=draw))


def trained_adapter(base: PreTrainedModel, fused: Fused, *, seed: int) -> SideCar:
    """One that does something."""
    made = Member.of(fused).bottleneck
    settings = {**vars(made), "scale": 1.5}
    model = attach_bottleneck(base, Bottleneck(**settings))
    redrawn(model, seed=seed, spread=0.2)
    return model


def members_of(bases: Sequence[PreTrainedModel], fused: Sequence[Fused] | None = None) -> list[Member]:
    """Each with its tensors, made on a base of its own."""
    members = []
    for number, (base, each) in enumerate(zip(bases, fused or fused_pair(), strict=True)):
        model = trained_adapter(base, each, seed=number)
        tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.stored().items()}
        bottleneck = Bottleneck(**{**vars(Member.of(each).bottleneck), "scale": 1.5})
        members.append(Member(each.name, bottleneck, "0" * 64, tensors))
    return members


def first_stages(recipe: Recipe, *names: Method) -> tuple[str, ...]:
    """Trains an adapter of each method on a recipe's rows, as runs of these names; the default are two."""
    chosen: tuple[Method, ...] = names or PAIRS["sum"]
    for name in chosen:
        values = recipe.model_dump()
        values["adapter"] = {"method": name, "rank": 4, "alpha": 8}
        values["run"] |= {"name": name}
        list(train(check_recipe(values, origin="the test")))
    return chosen
