"""What an adapter in a PEFT folder does at the layers of a base, from its files alone: for `swap.py`.

LoRA, what is LoRA on disk (rsLoRA, LoRA+, PiSSA, LoftQ), DoRA, AdaLoRA, VeRA, OFT and IA3, with or without
rows of new tokens. The numbers are those of the layers that training uses (`fused.py`, `triplets.py`,
`vera.py`, `oft.py`, `ia3.py`); nothing of PEFT is attached. DoRA's magnitudes are divided by the lengths of
the rows once, where training does it in every pass; OFT's rotations, which have twice the numbers of their
angles, are made anew.

Legend: I inputs, O outputs, R rank, N new tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.effect import Effect
from qadapt.adapters.facts import BASE_KEEPING_STARTS, PEFT_FILES, mends_base
from qadapt.adapters.new_rows import row_effects
from qadapt.adapters.peft_config import read_peft_config
from qadapt.adapters.triplets import scale_of
from qadapt.engine.host import device_of
from qadapt.engine.linear import row_lengths
from qadapt.engine.rotation import beyond_identity, block_of, turned
from qadapt.engine.scaling import scaled
from qadapt.errors import BadAdapter, Unsupported
from qadapt.methods import NEUMANN_TERMS

_FRONT = "base_model.model."
_ENDINGS = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_E": "values",
    ".ia3_l": "factors",
    ".oft_R.weight": "angles",
    ".vera_lambda_d": "inner",
    ".vera_lambda_b": "outer",
    ".token_adapter.trainable_tokens_delta": "rows",
}
"""How names of tensors end → what they are."""
_SHARED = {"base_model.vera_A": "down", "base_model.vera_B": "up"}
"""What all layers have together."""
_OTHERWISE = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "fan_in_fan_out",
    "target_parameters",
)
"""Settings of PEFT with which the same tensors mean something else."""
_ANEW = "Take the adapter's files from where they were made."
Tensors = Mapping[str, Tensor]


def peft_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What the adapter of a folder does, its tensors on the device that computes, in the type they have.

    Args:
        model: The base, nothing attached to it.
        folder: Of PEFT.

    Raises:
        BadAdapter: The files are damaged, or of an adapter for another base.
        Unsupported: The adapter is of another method, or has parts, that are not known here.
    """
    config, layers = _config(folder), dict(model.named_modules())
    found, shared = _tensors(folder, device_of(model))
    for path, layer in layers.items():  # PEFT would start anew what is missing, and only warn
        if isinstance(layer, nn.Linear) and path not in found and check_target_module_exists(config, path):
            raise _misfit(folder, f"it has nothing for {path}, which its configuration names")
    effects: list[Effect] = []
    rows: dict[str, Tensor] = {}
    for path, tensors in found.items():
        if path not in layers:
            raise _misfit(folder, f"this base has no {path}")
        if "rows" in tensors:
            if len(tensors) > 1:
                raise _unknown(folder, f"it has more at {path} than rows of new tokens")
            rows[path] = tensors["rows"]
        else:
            effects.append(_effect(model, path, {**shared, **tensors}, config=config, folder=folder))
    return [*effects, *_row_effects(model, rows, config=config, folder=folder)]


def _config(folder: Path) -> PeftConfig:
    config = read_peft_config(folder)
    if not isinstance(config, LoraConfig | IA3Config | VeraConfig | OFTConfig):
        raise _unknown(folder, f"its method is {config.peft_type}")
    values = config.to_dict()
    if (start := values.get("init_lora_weights")) not in BASE_KEEPING_STARTS:
        raise _unknown(folder, f"it starts from {start!r}, which rewrites the base")
    if other := [name for name in _OTHERWISE if values.get(name)]:
        raise _unknown(folder, f"it has {other[0]}")
    return config


def _tensors(folder: Path, device: torch.device) -> tuple[dict[str, dict[str, Tensor]], Tensors]:
    """Path of a layer → what each of its tensors is → the tensor; and what all layers have together."""
    path = folder / PEFT_FILES[0]
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}", cure=_ANEW) from None
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for name, tensor in found.items():
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if name not in _SHARED and (ending is None or not name.startswith(_FRONT)):
            raise _unknown(folder, f"it has {name}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise BadAdapter(f"{path} has a number in {name} that is none.", cure=_ANEW)
        copy = tensor.to(device, copy=True)  # what safetensors gives on a CPU is the file itself
        if ending is None:
            shared[_SHARED[name]] = copy
        else:
            layer = name.removeprefix(_FRONT).removesuffix(ending)
            layers.setdefault(layer, {})[_ENDINGS[ending]] = copy
    return layers, shared


def _effect(
    model: PreTrainedModel, path: str, tensors: Tensors, *, config: PeftConfig, folder: Path
) -> Effect:
    layer = model.get_submodule(path)
    if not isinstance(layer, nn.Linear):
        raise _misfit(folder, f"{path} is no linear layer of this base")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if isinstance(config, IA3Config):
        if shapes not in ({"factors": (1, layer.in_features)}, {"factors": (layer.out_features, 1)}):
            raise _misfit(folder, f"{path} is of other sizes than {shapes}")
        return _factors(layer, tensors["factors"], is_input=shapes["factors"][0] == 1)
    if isinstance(config, VeraConfig):
        return _projected(layer, path, tensors, folder=folder)
    if isinstance(config, AdaLoraConfig):
        return _triplets(layer, path, tensors, config=config, folder=folder)
    if isinstance(config, OFTConfig):
        return _rotated(layer, path, tensors, config=config, folder=folder)
    assert isinstance(config, LoraConfig)
    rank, _ = _sides(tensors, "down")
    wanted: dict[str, tuple[int, ...]] = {"down": (rank, layer.in_features), "up": (layer.out_features, rank)}
    if config.use_dora:
        wanted["magnitude"] = (layer.out_features,)
    if shapes != wanted or not rank:
        raise _misfit(folder, f"{path} is of other sizes than {shapes}")
    pair, scale = (tensors["down"], tensors["up"]), _scale(config, path, rank=rank)
    if not config.use_dora:
        low_rank = LowRank(*pair, scale=scale)
        return Effect(layer, "alone" if mends_base(folder) else "sum", low_rank, after=low_rank.add)
    dora = Dora(*pair, scale=scale, factors=_dora_factors(model, layer, tensors, scale=scale))
    return Effect(layer, "alone", dora, after=dora.change)


def _triplets(
    layer: nn.Linear, path: str, tensors: Tensors, *, config: AdaLoraConfig, folder: Path
) -> Effect:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    rank, _ = _sides(tensors, "down")
    if shapes != {"down": (rank, layer.in_features), "values": (rank, 1), "up": (layer.out_features, rank)}:
        raise _misfit(folder, f"{path} is of other sizes than {shapes}")
    part = LowRank(tensors["down"] * tensors["values"], tensors["up"], scale=scale_of(config))
    return Effect(layer, "sum", part, after=part.add)


def _projected(layer: nn.Linear, path: str, tensors: Tensors, *, folder: Path) -> Effect:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    (rank, inputs), (outputs, _) = (_sides(tensors, name) for name in ("down", "up"))
    wanted = {"down": (rank, inputs), "up": (outputs, rank), "inner": (rank,), "outer": (layer.out_features,)}
    if shapes != wanted or inputs < layer.in_features or outputs < layer.out_features:
        raise _misfit(folder, f"{path} is of other sizes than {shapes}")
    part = Projected(*(tensors[name] for name in wanted))
    return Effect(layer, "sum", part, after=part.add)


def _rotated(layer: nn.Linear, path: str, tensors: Tensors, *, config: OFTConfig, folder: Path) -> Effect:
    way = config.use_cayley_neumann, config.num_cayley_neumann_terms
    if config.coft or config.block_share or way != (True, NEUMANN_TERMS):
        raise _unknown(folder, "its rotations are not made as here")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # not what the configuration says, which may be how many there are
    block = block_of((shapes.get("angles") or (0,))[-1])
    if layer.in_features % block or shapes != {
        "angles": (layer.in_features // block, block * (block - 1) // 2)
    }:
        raise _misfit(folder, f"{path} is of other sizes than {shapes}")
    part = Rotated(tensors["angles"], block=block)
    return Effect(layer, "alone", part, before=part.turn_input)


def _sides(tensors: Tensors, name: str) -> tuple[int, int]:
    """Of a matrix; (0, 0) if there is none."""
    found = tensors.get(name)
    return (len(found), found.shape[1]) if found is not None and found.ndim == 2 else (0, 0)


def _scale(config: LoraConfig, path: str, *, rank: int) -> float:
    """What PEFT multiplies the update of a layer by."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _dora_factors(model: PreTrainedModel, layer: nn.Linear, tensors: Tensors, *, scale: float) -> Tensor:
    """(O,) magnitude over length of each row, in the magnitude's type."""
    place, magnitude = layer.weight.device, tensors["magnitude"]  # the weight may be on the host
    pair = tensors["down"].to(place), tensors["up"].to(place)
    lengths = row_lengths(layer, pair, scale=scale, dtype=model.dtype).to(magnitude.device)
    return (magnitude / lengths).to(torch.float32)


def _factors(layer: nn.Linear, factors: Tensor, *, is_input: bool) -> Effect:
    part = Factors(factors.flatten())
    if is_input:
        return Effect(layer, "factor", part, before=part.scale_input)
    return Effect(layer, "factor", part, after=part.scale_output)


def _row_effects(model: PreTrainedModel, rows: Tensors, *, config: PeftConfig, folder: Path) -> list[Effect]:
    if not rows:
        return []
    tables = config.to_dict().get("trainable_token_indices")
    ids = next(iter(tables.values())) if isinstance(tables, dict) and tables else tables
    if not ids or {len(each) for each in rows.values()} != {len(ids)}:
        raise _misfit(folder, "its rows of new tokens are not as many as its ids")
    return row_effects(model, rows, ids=ids)


class LowRank(nn.Module):
    """A layer's low-rank update, A (R, I) and B (O, R)."""

    def __init__(self, down: Tensor, up: Tensor, *, scale: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.scale = scale

    def add(self, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Hook: the layer's output and the update's, (..., O)."""
        entering, leaving = arguments[0], output.reshape(-1, output.shape[-1])
        between = entering.reshape(-1, entering.shape[-1]) @ self.down.to(entering.dtype).t()
        added = torch.addmm(leaving, between, self.up.to(entering.dtype).t(), alpha=self.scale)
        return added.view(output.shape)


class Dora(LowRank):
    """A low-rank update, and then a factor (O,) for each row of the weight."""

    def __init__(self, down: Tensor, up: Tensor, *, scale: float, factors: Tensor) -> None:
        super().__init__(down, up, scale=scale)
        self.factors = nn.Parameter(factors, requires_grad=False)

    def change(self, layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Hook: what the layer gives with the changed weight."""
        assert isinstance(layer, nn.Linear)
        return scaled(self.add(layer, arguments, output), self.factors, bias=layer.bias)


class Projected(nn.Module):
    """A layer's update through projections (., I) and (O, .) that all layers share, of which it takes a part.

    Args:
        down: (R, I) or wider.
        up: (O, R) or longer.
        inner: (R,).
        outer: (O,).
    """

    def __init__(self, down: Tensor, up: Tensor, inner: Tensor, outer: Tensor) -> None:
        super().__init__()
        self.register_buffer("down", down)
        self.register_buffer("up", up)
        self.inner = nn.Parameter(inner, requires_grad=False)
        self.outer = nn.Parameter(outer, requires_grad=False)

    def add(self, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Hook: the layer's output and the update's, (..., O)."""
        entering, leaving = arguments[0], output.reshape(-1, output.shape[-1])
        flat, dtype = entering.reshape(-1, entering.shape[-1]), entering.dtype
        down, up = self.get_buffer("down")[:, : flat.shape[1]], self.get_buffer("up")[: leaving.shape[1]]
        between = (flat @ down.to(dtype).t()) * self.inner.to(dtype)
        outer = up.to(dtype) * self.outer.to(dtype).unsqueeze(1)  # (O, R)
        return torch.addmm(leaving, between, outer.t()).view(output.shape)


class Rotated(nn.Module):
    """Rotations of a layer's inputs, in blocks S wide, by angles (K, S(S-1)/2)."""

    def __init__(self, angles: Tensor, *, block: int) -> None:
        super().__init__()
        self.angles = nn.Parameter(angles, requires_grad=False)
        self.block = block

    def turn_input(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hook before a layer."""
        inputs = arguments[0]
        beyond = beyond_identity(self.angles, block=self.block)
        flat = turned(inputs.reshape(-1, inputs.shape[-1]), beyond)
        return flat.view(inputs.shape), *arguments[1:]


class Factors(nn.Module):
    """A factor for each input or each output of a layer."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(values, requires_grad=False)

    def scale_input(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hook before a layer."""
        return scaled(arguments[0], self.values), *arguments[1:]

    def scale_output(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook after it."""
        return scaled(output, self.values)


def _misfit(folder: Path, what: str) -> BadAdapter:
    return BadAdapter(
        f"The adapter in {folder} does not fit its base: {what}.",
        cure="Load it on the base that it was trained on.",
    )


def _unknown(folder: Path, what: str) -> Unsupported:
    return Unsupported(
        f"The adapter in {folder} cannot stand beside others: {what}.",
        cure="Load it alone.",
    )
