"""Bottleneck adapters on a frozen decoder: down to a few values, a nonlinearity, up again, added.

* `houlsby`: after attention and after the feed-forward part (arXiv:1902.00751): o + f(o);
* `pfeiffer`: after the feed-forward part, of the sum it goes into (arXiv:2005.00247): o + f(h + o);
* `parallel`: beside the feed-forward part, of what goes into its norm (arXiv:2110.04366): o + f(h);
* `compacter`, `compacterplus` (Compacter++): as the first and the second, but that both projections are sums
  of Kronecker products, of very few numbers (arXiv:2106.04647, `hypercomplex.py`).

o is what a part adds to the residual stream (after Gemma's second norm), h the stream it is added to, f the
bottleneck times alpha / width, of what enters or of a layer norm of it. The places are those of the library
`adapters` 1.3 on Llama, and the numbers, too (`tools/bench/parity_adapters.py`). The projection up starts at
zero: the first forward pass is the base's to the bit. Every token is treated by itself, so packed rows and a
KV cache change nothing.

Legend: B rows, T tokens, D width of the model, R width of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qadapt.adapters.beside import Beside, Place, effects_beside, find_places
from qadapt.adapters.effect import Effect, connect
from qadapt.adapters.hypercomplex import HypercomplexProjection, SharedFactors
from qadapt.adapters.side_car import Part, SideCar
from qadapt.adapters.side_car_files import check_base, read_settings, read_tensors
from qadapt.engine.host import device_of
from qadapt.engine.recompute import decoder_layers
from qadapt.errors import BadAdapter, BadRecipe
from qadapt.methods import METHODS, SUMMANDS, Activation, check_dropped, check_step

Kind = Literal["houlsby", "pfeiffer", "parallel", "compacter", "compacterplus"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SHARED = "shared"
"""Name on disk of what all adapters of a model share."""

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Bottleneck:
    """The adapters.

    Attributes:
        kind: Where they are, and what they see.
        width: R.
        activation: The nonlinearity.
        scale: What its output is multiplied by.
        norm: A layer norm on what enters.
        dropout: On what enters, after the norm.
        first_layer: The lowest one that has an adapter (AdapterDrop, arXiv:2010.11918).
    """

    kind: Kind
    width: int
    activation: Activation
    scale: float = 1.0
    norm: bool = False
    dropout: float = 0.0
    first_layer: int = 0


class BottleneckPart(Beside):
    """One adapter of one layer.

    Args:
        bottleneck: What it is.
        width: D.
        shared: What those of its model share, if they share anything.
    """

    def __init__(self, bottleneck: Bottleneck, width: int, shared: SharedFactors | None = None) -> None:
        super().__init__(METHODS[bottleneck.kind].sees)
        self.bottleneck = bottleneck
        self.down = _projection(width, bottleneck.width, shared)
        self.up = _projection(bottleneck.width, width, shared)
        self.norm = nn.LayerNorm(width) if bottleneck.norm else None
        self.dropout = nn.Dropout(bottleneck.dropout)
        self.activation = _FUNCTIONS[bottleneck.activation]

    def start(self, draw: torch.Generator) -> None:
        """Draws the projection down, and of the one up what leaves it zero."""
        self.down.start(draw)
        if isinstance(self.up, HypercomplexProjection):
            self.up.start(draw, at_zero=True)

    def stored(self) -> dict[str, Tensor]:
        """Its own numbers, and none that it shares."""
        return {name: each for name, each in self.named_parameters() if SHARED not in name.split(".")}

    def forward(self, values: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """f, in the type of its input."""
        if self.norm is not None:
            dtype = values.dtype
            weight, bias = self.norm.weight.to(dtype), self.norm.bias.to(dtype)
            values = functional.layer_norm(values, self.norm.normalized_shape, weight, bias, self.norm.eps)
        inner = self.activation(self.down(self.dropout(values)))  # (B, T, R)
        return cast(Tensor, self.up(inner, scale=self.bottleneck.scale))


class Projection(nn.Module):
    """A linear map that computes in the type of its input, whatever type it is trained in."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def start(self, draw: torch.Generator) -> None:
        """Draws the weight as nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=draw)

    def forward(self, values: Tensor, *, scale: float | None = None) -> Tensor:
        """(..., inputs) -> (..., outputs), times a scale, which the inputs are given as they are fewer."""
        weight, bias = self.weight.to(values.dtype), self.bias.to(values.dtype)
        if scale is not None:
            values, bias = values * scale, bias * scale
        return functional.linear(values, weight, bias)


def attach_bottleneck(
    model: PreTrainedModel,
    bottleneck: Bottleneck,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    child: str = "bottleneck",
) -> SideCar:
    """The base with new adapters, which alone are trainable.

    Args:
        model: The base; its parameters are frozen.
        bottleneck: The adapters.
        dtype: Type of what is trained.
        seed: Of what starts at random.
        child: What they are called in their layers.

    Raises:
        Unsupported: It is not known where this architecture adds to its stream.
        BadRecipe: The bottleneck is as wide as the model, a width is none that it can have, or no layer would
            have an adapter.
    """
    places, width = find_places(model), int(model.config.hidden_size)
    if bottleneck.width >= width:
        raise BadRecipe(
            f"adapter.rank is {bottleneck.width}; a bottleneck is narrower than the model, {width} here.",
            cure=f"Set adapter.rank to less than {width}; {max(1, width // 16)}, a reduction factor of 16, "
            "is usual.",
        )
    check_step(bottleneck.kind, bottleneck.width, width=width)
    check_dropped(bottleneck.first_layer, len(decoder_layers(model)))
    model.requires_grad_(False)
    device, draw = device_of(model), torch.Generator().manual_seed(seed)
    parts: dict[str, Part] = {}
    if (shared := shared_of(bottleneck.kind)) is not None:
        shared.start(draw)
        parts[SHARED] = shared
    for number, layer in layers_with_one(model, bottleneck):
        mine = nn.ModuleDict()
        for place in places_of(bottleneck.kind):
            part = BottleneckPart(bottleneck, width, shared)
            part.start(draw)
            for effect in effects_beside(layer, part.to(device, dtype), places, place=place):
                connect(effect)
            mine[place] = parts[f"layers.{number}.{place}"] = part
        layer.add_module(child, mine)
    return SideCar(model, parts, settings={**asdict(bottleneck), **of_base(model)})


def load_bottleneck(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar:
    """The base with the adapters of a folder, in the type they were saved in.

    Raises:
        BadAdapter: The folder's files are damaged, or are of adapters for another base.
    """
    bottleneck, tensors = read_bottleneck(model, folder)
    adapted = attach_bottleneck(model, bottleneck)
    fill(adapted, tensors, is_trainable=is_trainable)
    return adapted


def fill(adapted: SideCar, tensors: Mapping[str, Tensor], *, is_trainable: bool) -> None:
    """Gives adapters tensors by their names on disk, in the type that these have."""
    for name, part in adapted.parts.items():
        for key, parameter in part.stored().items():
            parameter.data = tensors[f"{name}.{key}"].to(parameter.device)
            parameter.requires_grad_(is_trainable)


def bottleneck_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What the adapters of a folder do at the layers of a base, without being attached to it: for `swap.py`.

    Raises:
        BadAdapter: The folder's files are damaged, or are of adapters for another base.
        Unsupported: It is not known where this architecture adds to its stream.
    """
    return effects_with(model, *read_bottleneck(model, folder))


def effects_with(
    model: PreTrainedModel, bottleneck: Bottleneck, tensors: Mapping[str, Tensor]
) -> list[Effect]:
    """The same of adapters with tensors by their names on disk.

    Raises:
        Unsupported: As `bottleneck_effects`.
    """
    places, device, effects = find_places(model), device_of(model), []
    if (shared := shared_of(bottleneck.kind)) is not None:
        shared.factors.data = tensors[f"{SHARED}.factors"].to(device, copy=True)
    for number, layer in layers_with_one(model, bottleneck):
        for place in places_of(bottleneck.kind):
            part = BottleneckPart(replace(bottleneck, dropout=0.0), int(model.config.hidden_size), shared)
            for key, parameter in part.requires_grad_(False).stored().items():
                parameter.data = tensors[f"layers.{number}.{place}.{key}"].to(device, copy=True)
            effects += effects_beside(layer, part, places, place=place)
    return effects


def read_bottleneck(model: PreTrainedModel, folder: Path) -> tuple[Bottleneck, dict[str, Tensor]]:
    """What the adapters of a folder are, if they are this base's, and their tensors by their names on disk.

    Raises:
        BadAdapter: The files are damaged, or are of adapters for another base.
    """
    settings = read_settings(folder)
    bottleneck = bottleneck_of(settings, folder)
    check_same_base(model, settings, folder)
    return bottleneck, read_tensors(folder, bottleneck_shapes(settings, folder))


def check_same_base(model: PreTrainedModel, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuses what a folder's settings say is for a base of another kind or other sizes.

    Raises:
        BadAdapter: It is.
    """
    check_base(settings, of_base(model), folder)


def of_base(model: PreTrainedModel) -> dict[str, Any]:
    """What a base must have for bottleneck adapters to be its own."""
    return {
        "layers": len(decoder_layers(model)),
        "model_width": int(model.config.hidden_size),
        "model_type": model.config.model_type,
    }


def bottleneck_of(settings: Mapping[str, Any], folder: Path) -> Bottleneck:
    """The adapters that a folder's settings describe.

    Raises:
        BadAdapter: They describe none.
    """
    known = {"first_layer": 0, **settings}  # that of files without it
    values: dict[str, Any] = {field.name: known.get(field.name) for field in fields(Bottleneck)}
    kinds = {"width": int, "scale": float, "norm": bool, "dropout": float, "first_layer": int}
    is_known = values["kind"] in KINDS and values["activation"] in tuple(_FUNCTIONS)
    is_known = is_known and all(type(values[name]) is kind for name, kind in kinds.items())
    if not (
        is_known
        and values["width"] > 0
        and values["first_layer"] >= 0
        and values["width"] % METHODS[values["kind"]].size_step == 0
        and math.isfinite(values["scale"])
        and 0 <= values["dropout"] < 1
    ):
        raise BadAdapter(
            f"The settings of the adapter in {folder} describe no bottleneck: {values}.",
            cure="Take the adapter's files from where they were made.",
        )
    return Bottleneck(**values)


def bottleneck_shapes(settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that adapters with a folder's settings have → its shape.

    Raises:
        BadAdapter: The settings describe no bottleneck adapters.
    """
    bottleneck, (layers, outer) = bottleneck_of(settings, folder), _sizes(settings, folder)
    if bottleneck.first_layer >= layers:
        raise BadAdapter(
            f"The adapter in {folder} begins with layer {bottleneck.first_layer}, and its base has {layers}.",
            cure="Take the adapter's files from where they were made.",
        )
    shapes: dict[str, tuple[int, ...]] = {}
    if METHODS[bottleneck.kind].is_hypercomplex:
        shapes[f"{SHARED}.factors"] = (SUMMANDS, SUMMANDS, SUMMANDS)
    each = _projection_shapes("down", outer, bottleneck) | _projection_shapes("up", outer, bottleneck)
    if bottleneck.norm:
        each |= {"norm.weight": (outer,), "norm.bias": (outer,)}
    for number in range(bottleneck.first_layer, layers):
        for place in places_of(bottleneck.kind):
            shapes |= {f"layers.{number}.{place}.{name}": shape for name, shape in each.items()}
    return shapes


def _projection_shapes(
    name: Literal["down", "up"], outer: int, bottleneck: Bottleneck
) -> dict[str, tuple[int, ...]]:
    sides = (outer, bottleneck.width) if name == "down" else (bottleneck.width, outer)
    bias = {f"{name}.bias": sides[1:]}
    if METHODS[bottleneck.kind].is_hypercomplex:
        left, right = ((SUMMANDS, side // SUMMANDS) for side in sides)
        return {f"{name}.left": left, f"{name}.right": right, **bias}
    return {f"{name}.weight": sides[::-1], **bias}


def _sizes(settings: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Layers and width of the base."""
    layers, width = settings.get("layers"), settings.get("model_width")
    if type(layers) is not int or type(width) is not int or not 0 < layers < 10_000 or width < 1:
        raise BadAdapter(
            f"The settings of the adapter in {folder} name no base: {layers} layers, width {width}.",
            cure="Take the adapter's files from where they were made.",
        )
    return layers, width


def places_of(kind: Kind) -> tuple[Place, ...]:
    """Where a layer has an adapter of a kind."""
    return ("attention", "feed_forward") if METHODS[kind].after_attention else ("feed_forward",)


def layers_with_one(model: PreTrainedModel, bottleneck: Bottleneck) -> list[tuple[int, nn.Module]]:
    """The layers that have an adapter, with their numbers."""
    layers: list[nn.Module] = [*decoder_layers(model)]
    return list(enumerate(layers))[bottleneck.first_layer :]


def shared_of(kind: Kind) -> SharedFactors | None:
    """What the adapters of a model share, if they share anything."""
    return SharedFactors() if METHODS[kind].is_hypercomplex else None


def _projection(
    inputs: int, outputs: int, shared: SharedFactors | None
) -> Projection | HypercomplexProjection:
    if shared is None:
        return Projection(inputs, outputs)
    return HypercomplexProjection(inputs, outputs, shared)
