"""AdapterFusion: trained bottleneck adapters, frozen, each token its own mixture of them (arXiv:2005.00247).

Where the adapters f_1 ... f_N see x (`beside.py`), each token's x asks and what they give answers:

    a = softmax over i of (Q x + b) · K f_i(x),    m = sum over i of a_i f_i(x),    added is  m + W m

The values' matrix is I + W: what differs from the identity is trained, so weight decay draws it there, as
that paper's penalty does. As it is linear it is applied once, to the mixture; and instead of K on each f_i
its transpose once on the query: three products of D by D however many adapters there are. A bias of the keys
would add the same to each score and change nothing; there is none. Q, b and W start at zero and K at random:
the first forward pass is that of the adapters' mean.

The numbers are those of the library `adapters` 1.3 (`tools/bench/parity_adapters.py`), which draws Q at
random. On disk everything lies in one folder, the frozen adapters, too.

Legend: B rows, T tokens, D width of the model, N adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qadapt.adapters.beside import Beside, Place, effects_beside, find_places
from qadapt.adapters.bottleneck import (
    SHARED,
    Bottleneck,
    BottleneckPart,
    Kind,
    Projection,
    bottleneck_of,
    bottleneck_shapes,
    check_same_base,
    layers_with_one,
    of_base,
    places_of,
    read_bottleneck,
    shared_of,
)
from qadapt.adapters.effect import Effect, connect
from qadapt.adapters.facts import SIDE_CAR_FILES
from qadapt.adapters.side_car import Part, SideCar
from qadapt.adapters.side_car_files import read_settings, read_tensors
from qadapt.adapters.versions import sha256_of
from qadapt.engine.host import device_of
from qadapt.errors import BadAdapter
from qadapt.methods import METHODS, Fused, check_fused

FUSION = "fusion"
KEY_SPREAD = 0.02
"""Standard deviation of the keys' matrix at the start, as in BERT and that library."""
_OWN = ("query.weight", "query.bias", "key", "value")


@dataclass(frozen=True)
class Member:
    """A trained adapter that is attended over.

    Attributes:
        name: Of its run, or in the store.
        bottleneck: What it is.
        sha256: Of its tensors' file.
        tensors: By their names on disk; none where only sizes matter.
    """

    name: str
    bottleneck: Bottleneck
    sha256: str = ""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def facts(self) -> Fused:
        """What its places are told by."""
        mine = self.bottleneck
        return Fused(self.name, mine.kind, mine.width, mine.activation, mine.norm, mine.first_layer)

    @staticmethod
    def of(fused: Fused) -> Member:
        """One without tensors."""
        kind, first = cast(Kind, fused.method), fused.first_layer
        return Member(
            fused.name, Bottleneck(kind, fused.width, fused.activation, norm=fused.norm, first_layer=first)
        )


def read_member(model: PreTrainedModel, folder: Path, name: str) -> Member:
    """The adapter of a folder.

    Raises:
        BadAdapter: Its files are damaged, or are of adapters for another base.
    """
    bottleneck, tensors = read_bottleneck(model, folder)
    return Member(name, bottleneck, sha256_of(folder / SIDE_CAR_FILES[0]), tensors)


class FusionPart(Beside):
    """The attention at one place of one layer.

    Attributes:
        on_weights: Told of each pass's a, (B, T, N), if there is one.

    Args:
        width: D.
        adapters: f_1 ... f_N, which are frozen.
    """

    on_weights: Callable[[Tensor], None] | None = None

    def __init__(self, width: int, adapters: Sequence[BottleneckPart]) -> None:
        super().__init__(adapters[0].sees)
        self.adapters = nn.ModuleList(adapters).requires_grad_(False)
        self.query = Projection(width, width)
        self.key = nn.Parameter(torch.zeros(width, width))
        self.value = nn.Parameter(torch.zeros(width, width))

    def start(self, draw: torch.Generator) -> None:
        """Draws the keys' matrix."""
        nn.init.normal_(self.key, std=KEY_SPREAD, generator=draw)

    def stored(self) -> dict[str, Tensor]:
        """Its own numbers and those of its adapters, none that these share."""
        own: dict[str, Tensor] = {name: each for name, each in self.named_parameters() if name in _OWN}
        for place, adapter in enumerate(cast(Iterable[BottleneckPart], self.adapters)):
            own |= {f"adapters.{place}.{name}": each for name, each in adapter.stored().items()}
        return own

    def forward(self, values: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """What is added, m + W m, in the type of its input."""
        dtype = values.dtype
        given = [adapter(values) for adapter in self.adapters]
        asked = self.query(values) @ self.key.to(dtype)  # (B, T, D)
        scores = torch.stack([(asked * each).sum(-1) for each in given], -1)
        weights = scores.float().softmax(-1)  # (B, T, N)
        if self.on_weights is not None:
            self.on_weights(weights.detach())
        shares = weights.to(dtype).unsqueeze(-1).unbind(-2)
        mixed = shares[0] * given[0]
        for share, each in zip(shares[1:], given[1:], strict=True):
            mixed = torch.addcmul(mixed, share, each)
        added: Tensor = mixed + functional.linear(mixed, self.value.to(dtype))
        return added


def attach_fusion(
    model: PreTrainedModel, members: Sequence[Member], *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SideCar:
    """The base with trained adapters and a new attention over them, which alone is trainable.

    Args:
        model: The base; its parameters are frozen.
        members: The adapters.
        dtype: Type of what is trained, and of the adapters.
        seed: Of what starts at random.

    Raises:
        Unsupported: It is not known where this architecture adds to its stream.
        BadRecipe: The adapters have one name, or are at different places.
    """
    check_fused([each.facts for each in members])
    fused = _made(model, members)
    device, draw = device_of(model), torch.Generator().manual_seed(seed)
    tensors = {
        _name(place, name): tensor
        for place, member in enumerate(members)
        for name, tensor in member.tensors.items()
    }
    for name, part in fused.items():
        if isinstance(part, FusionPart) and device.type != "meta":
            part.start(draw)
        part.to(device, dtype)
        for key, parameter in part.stored().items():
            if (found := tensors.get(f"{name}.{key}")) is not None:
                parameter.data = found.to(device, dtype, copy=True)
    return _attached(model, members, fused)


def load_fusion(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar:
    """The base with the attention and the adapters of a folder, in the type they were saved in.

    Raises:
        BadAdapter: The folder's files are damaged, or are of adapters for another base.
    """
    members, fused = _read(model, folder)
    if is_trainable:
        for part in fused.values():
            for name, parameter in part.named_parameters():
                parameter.requires_grad_(name in _OWN)
    return _attached(model, members, fused)


def fusion_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What a folder's attention does at the layers of a base, without being attached to it: for `swap.py`.

    Raises:
        BadAdapter: As `load_fusion`.
        Unsupported: It is not known where this architecture adds to its stream.
    """
    members, fused = _read(model, folder)
    return [effect for _, _, _, effects in _placed(model, members, fused) for effect in effects]


def fusion_shapes(settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that a folder with these settings has → its shape.

    Raises:
        BadAdapter: The settings describe no attention over adapters.
    """
    members = _members(settings, folder)
    base = {name: settings.get(name) for name in ("layers", "model_width")}
    shapes: dict[str, tuple[int, ...]] = {}
    for place, member in enumerate(members):
        own = bottleneck_shapes({**asdict(member.bottleneck), **base}, folder)
        shapes |= {_name(place, name): shape for name, shape in own.items()}
    first, width = members[0].bottleneck, settings["model_width"]
    for number in range(first.first_layer, settings["layers"]):
        for where in places_of(first.kind):
            for name in _OWN:
                shape = (width,) if name.endswith("bias") else (width, width)
                shapes[f"layers.{number}.{where}.{name}"] = shape
    return shapes


def attended_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of all adapters that are attended over, by name."""
    parts = [module for module in model.modules() if isinstance(module, FusionPart)]
    frozen = {id(parameter) for part in parts for parameter in part.adapters.parameters()}
    return {name: each for name, each in model.named_parameters() if id(each) in frozen}


@contextmanager
def watching_weights(parts: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """While open, keeps the weights of every pass: name of a place → (B, T, N) of each pass.

    Args:
        parts: Of a side-car, by name; those that attend to nothing are passed over.
    """
    seen: dict[str, list[Tensor]] = {}
    watched = {name: part for name, part in parts.items() if isinstance(part, FusionPart)}
    for name, part in watched.items():
        part.on_weights = seen.setdefault(name, []).append
    try:
        yield seen
    finally:
        for part in watched.values():
            part.on_weights = None


def _made(model: PreTrainedModel, members: Sequence[Member]) -> dict[str, Part]:
    """New modules by their names on disk."""
    width, first = int(model.config.hidden_size), members[0].bottleneck
    shared = [shared_of(member.bottleneck.kind) for member in members]
    made: dict[str, Part] = {
        f"{SHARED}.{place}": each for place, each in enumerate(shared) if each is not None
    }
    for number, _ in layers_with_one(model, first):
        for where in places_of(first.kind):
            adapters = [
                BottleneckPart(replace(member.bottleneck, dropout=0.0), width, each)
                for member, each in zip(members, shared, strict=True)
            ]
            made[f"layers.{number}.{where}"] = FusionPart(width, adapters)
    return made


def _placed(
    model: PreTrainedModel, members: Sequence[Member], fused: Mapping[str, Part]
) -> Iterator[tuple[nn.Module, Place, Part, list[Effect]]]:
    """Each layer's modules: the layer, the place, the module and what it does there."""
    places, first = find_places(model), members[0].bottleneck
    for number, layer in layers_with_one(model, first):
        for where in places_of(first.kind):
            part = fused[f"layers.{number}.{where}"]
            assert isinstance(part, FusionPart)
            yield layer, where, part, effects_beside(layer, part, places, place=where)


def _attached(model: PreTrainedModel, members: Sequence[Member], fused: Mapping[str, Part]) -> SideCar:
    model.requires_grad_(False)
    mine: dict[nn.Module, nn.ModuleDict] = {}
    for layer, where, part, effects in _placed(model, members, fused):
        for effect in effects:
            connect(effect)
        mine.setdefault(layer, nn.ModuleDict())[where] = part
    for layer, parts in mine.items():
        layer.add_module(FUSION, parts)
    settings = {
        "kind": FUSION,
        "adapters": [
            {"name": each.name, "sha256": each.sha256, **asdict(each.bottleneck)} for each in members
        ],
        **of_base(model),
    }
    return SideCar(model, fused, settings=settings)


def _read(model: PreTrainedModel, folder: Path) -> tuple[list[Member], dict[str, Part]]:
    """The adapters of a folder, if they are this base's, and all its modules, frozen."""
    settings = read_settings(folder)
    check_same_base(model, settings, folder)
    tensors = read_tensors(folder, fusion_shapes(settings, folder))
    members, device = _members(settings, folder), device_of(model)
    fused = _made(model, members)
    for name, part in fused.items():
        for key, parameter in part.requires_grad_(False).to(device).stored().items():
            parameter.data = tensors[f"{name}.{key}"].to(device, copy=True)
    return members, fused


def _members(settings: Mapping[str, Any], folder: Path) -> list[Member]:
    """The adapters that settings describe, without their tensors."""
    listed = settings.get("adapters")
    described = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    members = [
        Member(each["name"], bottleneck_of(each, folder), each["sha256"])
        for each in described
        if isinstance(each.get("name"), str) and isinstance(each.get("sha256"), str)
    ]
    places = {
        (METHODS[mine.kind].sees, places_of(mine.kind), mine.first_layer)
        for mine in (each.bottleneck for each in members)
    }
    if settings.get("kind") != FUSION or len(members) < 2 or listed is None or len(places) != 1:
        raise _no_fusion(folder, listed)
    if len(members) != len(listed):
        raise _no_fusion(folder, listed)
    return members


def _no_fusion(folder: Path, listed: object) -> BadAdapter:
    return BadAdapter(
        f"The settings of the adapter in {folder} describe no attention over adapters: {listed!r}.",
        cure="Take the adapter's files from where they were made.",
    )


def _name(place: int, name: str) -> str:
    """What a tensor of an adapter is called beside those of others, by its name on its own disk."""
    if name.startswith(f"{SHARED}."):
        return name.replace(SHARED, f"{SHARED}.{place}", 1)
    layers, number, where, rest = name.split(".", 3)
    return f"{layers}.{number}.{where}.adapters.{place}.{rest}"
