"""Prefix tuning (arXiv:2101.00190) on a frozen decoder: trained keys and values in front of every document.

* `prefix`: a small network makes the keys and values of all layers out of one table, as in the paper;
* `prefix-flat`: they are trained themselves, and start as what the base makes of drawn tokens in front of the
  text (the paper starts from real words, too, where there are few rows): its first pass is the base's, those
  tokens read before.

Both are flat on disk, and when they are used: keys and values of each layer, which carry no position. How
attention sees them is `engine/prefix.py`'s: packed rows, caches and recomputation need nothing of their own.
On `meta` nothing is read, and the start is empty.

Legend: L layers, K key-value heads, D head width, P length of the prefix, W width of the model, M width of
the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from qadapt.adapters.effect import Effect
from qadapt.adapters.side_car import Part, SideCar
from qadapt.adapters.side_car_files import check_base, read_settings, read_tensors
from qadapt.engine.host import device_of
from qadapt.engine.prefix import CHILD, see_prefixes
from qadapt.engine.recompute import decoder_layers
from qadapt.errors import BadAdapter, Unsupported
from qadapt.methods import ENCODER_WIDTH

PrefixKind = Literal["prefix", "prefix-flat"]
PREFIX_KINDS: tuple[PrefixKind, ...] = get_args(PrefixKind)


class FlatPrefix(Part):
    """Keys and values of one layer, (K, P, D) each."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def in_front(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in a type."""
        return self.keys.to(dtype), self.values.to(dtype)


class PrefixNetwork(nn.Module):
    """What all layers share: a table (P, W) through the network's first layer; (P, M)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, width))
        self.weight = nn.Parameter(torch.empty(ENCODER_WIDTH, width))
        self.bias = nn.Parameter(torch.empty(ENCODER_WIDTH))

    def forward(self) -> Tensor:
        """(P, M)."""
        return torch.tanh(functional.linear(self.table, self.weight, self.bias))


class MadePrefix(Part):
    """Keys and values of one layer as a network makes them, in the type that it is trained in.

    Args:
        network: What all layers share.
        heads: K.
        width: D.
    """

    def __init__(self, network: PrefixNetwork, heads: int, width: int) -> None:
        super().__init__()
        self.network = network
        self.weight = nn.Parameter(torch.empty(2 * heads * width, ENCODER_WIDTH))
        self.bias = nn.Parameter(torch.empty(2 * heads * width))
        self.sizes = heads, width

    def in_front(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values in a type."""
        both = functional.linear(self.network(), self.weight, self.bias)  # (P, 2 K D)
        keys, values = both.view(-1, 2, *self.sizes).permute(1, 2, 0, 3).to(dtype)
        return keys, values

    def stored(self) -> dict[str, Tensor]:
        """Flat."""
        with torch.no_grad():
            keys, values = self.in_front(self.weight.dtype)
        return {"keys": keys, "values": values}


def attach_prefix(
    model: PreTrainedModel,
    kind: PrefixKind,
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> SideCar:
    """The base with a new prefix, which alone is trainable.

    Args:
        model: The base; its parameters are frozen.
        kind: How it is trained.
        length: P.
        dtype: Type of what is trained.
        seed: Of the network, or of the tokens that a flat prefix starts from.

    Raises:
        Unsupported: This architecture's attention cannot be given a prefix.
    """
    _attentions(model)  # it refuses what cannot be given a prefix
    heads, width = _sizes(model)
    draw = torch.Generator().manual_seed(seed)
    if kind == "prefix":
        network = PrefixNetwork(length, int(model.config.hidden_size))
        parts: list[Part] = [MadePrefix(network, heads, width) for _ in decoder_layers(model)]
        _draw(network, parts, draw)
    else:
        parts = [FlatPrefix(*pair) for pair in _read(model, length, draw)]
    return _attached(model, kind, length, parts, dtype=dtype)


def load_prefix(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar:
    """The base with the flat prefix of a folder, in the type it was saved in.

    Raises:
        BadAdapter: The folder's files are damaged, or are of a prefix for another base.
        Unsupported: This architecture's attention cannot be given a prefix.
    """
    parts, settings = read_prefix(model, folder), read_settings(folder)
    adapted = _attached(model, settings["kind"], settings["length"], parts, dtype=parts[0].keys.dtype)
    for part in adapted.parts.values():
        part.requires_grad_(is_trainable)
    return adapted


def prefix_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """Where the prefix of a folder stands in the attention of a base, not attached: for `swap.py`.

    Raises:
        BadAdapter: As `load_prefix`.
        Unsupported: As `load_prefix`.
    """
    parts, device = read_prefix(model, folder), device_of(model)
    return [
        Effect(attention, "alone", part.requires_grad_(False).to(device))
        for attention, part in zip(_attentions(model), parts, strict=True)
    ]


def read_prefix(model: PreTrainedModel, folder: Path) -> list[FlatPrefix]:
    """The prefix of a folder, layer by layer; the base is only looked at.

    Raises:
        BadAdapter: The folder's files are damaged, or are of a prefix for another base.
    """
    settings = read_settings(folder)
    shapes = prefix_shapes(settings, folder)
    check_base(settings, _of_base(model), folder)
    tensors = read_tensors(folder, shapes)
    names = [(f"layers.{number}.keys", f"layers.{number}.values") for number in range(settings["layers"])]
    return [FlatPrefix(tensors[keys], tensors[values]) for keys, values in names]


def prefix_shapes(settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of every tensor that a prefix with a folder's settings has → its shape.

    Raises:
        BadAdapter: The settings describe no prefix.
    """
    names = "layers", "key_heads", "length", "head_width"
    sizes = [settings.get(name) for name in names]
    is_known = settings.get("kind") in PREFIX_KINDS and all(type(size) is int for size in sizes)
    if not (is_known and all(0 < cast(int, size) < 1_000_000 for size in sizes)):
        raise BadAdapter(
            f"The settings of the adapter in {folder} describe no prefix: {dict(settings)}.",
            cure="Take the adapter's files from where they were made.",
        )
    layers, *shape = cast(list[int], sizes)
    return {
        f"layers.{number}.{name}": tuple(shape) for number in range(layers) for name in ("keys", "values")
    }


def _attached(
    model: PreTrainedModel, kind: PrefixKind, length: int, parts: Sequence[Part], *, dtype: torch.dtype
) -> SideCar:
    model.requires_grad_(False)
    device = device_of(model)
    for attention, part in zip(_attentions(model), parts, strict=True):
        attention.add_module(CHILD, part.to(device, dtype))
    named = {f"layers.{number}": part for number, part in enumerate(parts)}
    return SideCar(model, named, settings={"kind": kind, "length": length, **_of_base(model)})


def _draw(network: PrefixNetwork, parts: Sequence[Part], draw: torch.Generator) -> None:
    """As nn.Embedding and nn.Linear start."""
    nn.init.normal_(network.table, generator=draw)
    for each in (network, *parts):
        assert isinstance(each, PrefixNetwork | MadePrefix)
        nn.init.kaiming_uniform_(each.weight, a=math.sqrt(5), generator=draw)
        bound = 1 / math.sqrt(each.weight.shape[1])
        nn.init.uniform_(each.bias, -bound, bound, generator=draw)


@torch.no_grad()
def _read(model: PreTrainedModel, length: int, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of drawn tokens at the positions before the first."""
    if model.device.type == "meta":
        heads, width = _sizes(model)
        empty = torch.empty(len(decoder_layers(model)), 2, heads, length, width, device="meta")
        return [(keys.clone(), values.clone()) for keys, values in empty]
    ids = torch.randint(int(model.config.vocab_size), (1, length), generator=draw)
    places = torch.arange(-length, 0)[None]
    cache, was_training, device = DynamicCache(), model.training, device_of(model)
    model.eval()
    try:
        model.get_decoder()(
            input_ids=ids.to(device), position_ids=places.to(device), past_key_values=cache, use_cache=True
        )
    finally:
        model.train(was_training)
    layers = cast(Any, cache).layers
    return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in layers]


def _sizes(model: PreTrainedModel) -> tuple[int, int]:
    """K and D."""
    values = model.config.to_dict()
    heads = int(values.get("num_attention_heads") or 1)
    width = values.get("head_dim") or int(values.get("hidden_size") or 0) // heads
    return int(values.get("num_key_value_heads") or heads), int(width)


def _of_base(model: PreTrainedModel) -> dict[str, Any]:
    """What a base must have for a prefix to be its own."""
    heads, width = _sizes(model)
    return {
        "layers": len(decoder_layers(model)),
        "key_heads": heads,
        "head_width": width,
        "model_type": model.config.model_type,
    }


def _attentions(model: PreTrainedModel) -> list[nn.Module]:
    """What attends in each layer; from now on it looks for prefixes."""
    try:
        found = [layer.get_submodule("self_attn") for layer in decoder_layers(model)]
    except AttributeError:
        raise Unsupported(
            f"Prefix tuning on {model.config.model_type}: where its layers attend is not known.",
            cure="Set adapter.method=lora, which suits every decoder.",
        ) from None
    see_prefixes(model)
    return found
