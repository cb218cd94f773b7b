"""Adapters that the library `adapters` 1.3 saved for Llama, read as ours.

It names them by the place in its own model, `model.layers.N.output_adapters.adapters.NAME.adapter_up.weight`,
beside a configuration of many switches. What a switch would make of the numbers that is not done here is
refused by its name; nothing is guessed. Only its safetensors files are read, never its pickled ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qadapt.adapters.bottleneck import SHARED, Bottleneck, Kind, bottleneck_shapes, places_of
from qadapt.adapters.side_car_files import write_side_car
from qadapt.errors import BadAdapter, Unsupported
from qadapt.methods import METHODS, SUMMANDS, Activation

CONFIG_FILE, TENSORS_FILE, PICKLED_FILE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
_PLACES = {"attention": "attention_adapters", "feed_forward": "output_adapters"}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu", "tanh": "tanh"}
_NEUTRAL: Mapping[str, object] = {
    "original_ln_after": True, "ln_after": False, "use_gating": False, "inv_adapter": None,
    "cross_adapter": False, "stochastic_depth": 0.0,
    "output_adapter": True, "adapter_residual_before_ln": False, "residual_before_ln": True,
}  # fmt: skip
"""Switches that must stand so."""
_COMPACTER: Mapping[str, object] = {
    "phm_dim": SUMMANDS, "phm_rank": 1, "phm_bias": True, "factorized_phm_W": True, "shared_W_phm": False,
    "shared_phm_rule": True, "factorized_phm_rule": False,
}  # fmt: skip
"""Switches that must stand so, besides, where `phm_layer` does."""
_COMPACT: Mapping[Kind, Kind] = {"houlsby": "compacter", "pfeiffer": "compacterplus"}
_NEEDED = (
    "is_parallel", "mh_adapter", "original_ln_before", "ln_before", "non_linearity", "scaling", "dropout",
)  # fmt: skip
_RANGES = {"hidden_size": (1, 2**31), "reduction_factor": (2**-31, 2**31), "dropout": (0, 1)}
_CURE = (
    "Imported are Houlsby, Pfeiffer, parallel and Compacter adapters on Llama, as that library makes them."
)


def is_of_library(folder: Path) -> bool:
    """Whether a folder has an adapter as that library saves it."""
    return any((folder / name).is_file() for name in (TENSORS_FILE, PICKLED_FILE))


def import_bottleneck(source: Path, target: Path) -> None:
    """Writes the adapters of a folder as a side-car of ours into a folder that is there.

    Raises:
        BadAdapter: The folder does not hold what that library saves, or its numbers do not fit its
            configuration.
        Unsupported: They are of another method or model, use a switch that is not known here, or are pickled.
    """
    config = librarys_config(source)
    bottleneck, (layers, shared) = _bottleneck(config), _tensors(source, config)
    settings = {
        "kind": bottleneck.kind,
        "width": bottleneck.width,
        "activation": bottleneck.activation,
        "scale": bottleneck.scale,
        "norm": bottleneck.norm,
        "dropout": bottleneck.dropout,
        "first_layer": bottleneck.first_layer,
        "layers": bottleneck.first_layer + len(layers),
        "model_width": int(config["hidden_size"]),
        "model_type": config["model_type"],
    }
    shapes, tensors = bottleneck_shapes(settings, source), {}
    if METHODS[bottleneck.kind].is_hypercomplex:
        tensors[f"{SHARED}.factors"] = shared.pop("phm_rule", torch.empty(0))
    for number, found in enumerate(layers, start=bottleneck.first_layer):
        for place in places_of(bottleneck.kind):
            for ours, theirs in _names(bottleneck).items():
                each = found.pop(f"{_PLACES[place]}.{theirs}", torch.empty(0))
                tensors[f"layers.{number}.{place}.{ours}"] = each.flatten(1) if each.dim() == 3 else each
    _check_shapes(source, tensors, shapes)
    rest = [*shared, *(name for found in layers for name in found)]
    if left := sorted(name for name in rest if "adapter_norm_before" not in name):
        raise Unsupported(f"{source} has tensors that are not known: {left[0]}.", cure=_CURE)
    write_side_car(target, settings=settings, tensors=tensors)


def _check_shapes(
    source: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise BadAdapter(
                f"{source}: {name} has the shape {tuple(tensor.shape)} and must have {shapes[name]}.",
                cure="Save it again with the library that trained it.",
            )


def librarys_config(source: Path) -> dict[str, Any]:
    """Switches and base of an adapter; the base's name, if it has one, as PEFT calls it.

    Raises:
        BadAdapter: There is no such configuration.
        Unsupported: It is of another kind, or on another model than Llama.
    """
    path = source / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {name: values[name] for name in ("hidden_size", "model_type", "name")}
        config = {**values["config"], **known, "base_model_name_or_path": values.get("model_name")}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise BadAdapter(f"{path} is no configuration of `adapters`: {error}.", cure=_CURE) from None
    if config["model_type"] != "llama" or "reduction_factor" not in config:
        raise Unsupported(
            f"{source} holds an adapter of {config.get('architecture', 'another kind')} on "
            f"{config['model_type']}.",
            cure=_CURE,
        )
    return config


def _bottleneck(config: Mapping[str, Any]) -> Bottleneck:
    if missing := [name for name in _NEEDED if name not in config]:
        raise BadAdapter(f"Its configuration lacks {', '.join(missing)}.", cure=_CURE)
    is_compact = bool(config.get("phm_layer"))
    for name, value in {**_NEUTRAL, **(_COMPACTER if is_compact else {})}.items():
        if config.get(name, value) != value and not (config["is_parallel"] and "residual" in name):
            raise Unsupported(f"Its {name} is {config[name]}; only {value} is known here.", cure=_CURE)
    activation = _ACTIVATIONS.get(str(config["non_linearity"]).lower())
    if activation is None or not isinstance(config["scaling"], float | int):
        raise Unsupported(
            f"Its nonlinearity is {config['non_linearity']} and its scaling {config['scaling']}; known are "
            f"{', '.join(_ACTIVATIONS)}, and numbers.",
            cure=_CURE,
        )
    if isinstance(config["reduction_factor"], dict):
        raise Unsupported("Its layers have different reduction factors.", cure=_CURE)
    for name, (least, most) in _RANGES.items():
        value = config[name]
        if type(value) not in (int, float) or not least <= value <= most:
            raise BadAdapter(
                f"Its {name} is {value!r}; it must be a number from {least:g} to {most:g}.", cure=_CURE
            )
    return Bottleneck(
        _compact(_kind(config)) if is_compact else _kind(config),
        max(1, int(config["hidden_size"] // config["reduction_factor"])),
        cast(Activation, activation),
        scale=float(config["scaling"]),
        norm=bool(config["ln_before"]),
        dropout=float(config["dropout"]),
        first_layer=_first_layer(config),
    )


def _first_layer(config: Mapping[str, Any]) -> int:
    left_out = config.get("leave_out") or []
    if left_out != list(range(len(left_out))):
        raise Unsupported(f"Its leave_out is {left_out}; only the lowest layers can be.", cure=_CURE)
    return len(left_out)


def _kind(config: Mapping[str, Any]) -> Kind:
    switches = (config["is_parallel"], config["mh_adapter"], config["original_ln_before"])
    if switches[:2] == (True, False):
        return "parallel"
    if switches == (False, True, False):
        return "houlsby"
    if switches == (False, False, True):
        return "pfeiffer"
    raise Unsupported(
        "Its places (is_parallel, mh_adapter, original_ln_before: "
        f"{', '.join(map(str, switches))}) are none that are known here.",
        cure=_CURE,
    )


def _compact(kind: Kind) -> Kind:
    if kind not in _COMPACT:
        raise Unsupported(f"It is of the kind {kind}, with phm_layer; that is none known here.", cure=_CURE)
    return _COMPACT[kind]


def _tensors(
    source: Path, config: Mapping[str, Any]
) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """For each layer, its tensors by what follows the layer's number, without the adapter's name.

    And those that all layers share, by the last word of their names.
    """
    path = source / TENSORS_FILE
    if not path.is_file() and (source / PICKLED_FILE).is_file():
        raise Unsupported(
            f"{source / PICKLED_FILE} is pickled, and loading it could run any code.",
            cure="Save it again: model.save_adapter(folder, name, use_safetensors=True).",
        )
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}.", cure=_CURE) from None
    layers: dict[int, dict[str, torch.Tensor]] = {}
    shared = {}
    for name, tensor in tensors.items():
        if f".shared_parameters.{config['name']}." in name:
            shared[name.rpartition(".")[2]] = tensor
            continue
        front, _, rest = name.partition("layers.")
        number, _, rest = rest.partition(".")
        if not number.isdecimal() or f".adapters.{config['name']}." not in rest:
            raise Unsupported(f"{path} has a tensor that is not known: {front}{rest}.", cure=_CURE)
        layers.setdefault(int(number), {})[rest.replace(f".adapters.{config['name']}", "", 1)] = tensor
    first = _first_layer(config)
    if sorted(layers) != list(range(first, first + len(layers))) or not layers:
        raise BadAdapter(f"{path} has no tensors for some layer.", cure=_CURE)
    return [layers[number] for number in sorted(layers)], shared


def _names(bottleneck: Bottleneck) -> dict[str, str]:
    """Our name of each tensor of a place → theirs."""
    down = "adapter_down.1" if bottleneck.norm else "adapter_down.0"
    each = {"weight": "weight", "bias": "bias"}
    if METHODS[bottleneck.kind].is_hypercomplex:
        each = {"left": "W_left", "right": "W_right", "bias": "b"}
    names = {f"down.{ours}": f"{down}.{theirs}" for ours, theirs in each.items()}
    names |= {f"up.{ours}": f"adapter_up.{theirs}" for ours, theirs in each.items()}
    if bottleneck.norm:
        names |= {f"norm.{each}": f"adapter_down.0.{each}" for each in ("weight", "bias")}
    return names
