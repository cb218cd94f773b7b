"""A made adapter as PEFT has it on disk: its tensors by their names, and its adapter_config.json.

Knows how a PEFT folder is named and nothing of how its numbers came about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qadapt.adapters.compose import Pair
from qadapt.export.adapter_config import read_adapter_config
from qadapt.export.adapter_names import EMBEDDING

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLACES = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
"""Settings that say which modules have an adapter."""
_OF_ADALORA = (
    "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
)  # fmt: skip
"""Settings of AdaLoRA's; what is made of it is LoRA."""


@dataclass(frozen=True)
class Scaled:
    """What is added to one weight: scale · b · a."""

    pair: Pair
    scale: float


def narrowest(pair: Pair) -> Pair:
    """The pair with its numbers rounded once to fp32, as they are written."""
    return Pair(pair.a.float().double(), pair.b.float().double())


def tensors_of(pairs: Mapping[str, Scaled]) -> tuple[dict[str, Tensor], str]:
    """Tensors of an adapter by PEFT's names, in the smallest type that holds every number, and that type."""
    tensors: dict[str, Tensor] = {}
    for weight, scaled in pairs.items():
        module = _PREFIX + weight.removesuffix(".weight")
        a, b = scaled.pair.a.float(), scaled.pair.b.float()
        if weight == EMBEDDING:  # PEFT looks rows of a table up, so it has both the other way round
            tensors[f"{module}.lora_embedding_A"] = b.T.contiguous()
            tensors[f"{module}.lora_embedding_B"] = a.T.contiguous()
        else:
            tensors[f"{module}.lora_A.weight"] = a.contiguous()
            tensors[f"{module}.lora_B.weight"] = b.contiguous()
    return smallest(tensors)


def smallest(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Tensors in fp32 in the smallest type that holds every number of them, and its name."""
    for dtype in (torch.bfloat16, torch.float16):
        small = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        if all(torch.equal(small[name].float(), tensor) for name, tensor in tensors.items()):
            return small, str(dtype).removeprefix("torch.")
    return dict(tensors), "float32"


def combined_config(pairs: Mapping[str, Scaled], folders: Sequence[Path]) -> dict[str, Any]:
    """The adapter_config.json of an adapter made of others.

    Args:
        pairs: What it adds, by weight.
        folders: What it was made of; what is the same for all is taken from the first.
    """
    configs = [read_adapter_config(folder) for folder in folders]
    modules = {weight.removesuffix(".weight"): scaled for weight, scaled in pairs.items()}
    places: dict[str, Any] = {field: configs[0].get(field) for field in _PLACES}
    is_adaptive = any(config["peft_type"] == "ADALORA" for config in configs)  # layers may have nothing left
    if is_adaptive or any(_places(config) != _places(configs[0]) for config in configs):
        places = {**dict.fromkeys(_PLACES), "target_modules": sorted(modules)}
    ranks = {module: scaled.pair.rank for module, scaled in modules.items()}
    alphas = {module: scaled.scale * scaled.pair.rank for module, scaled in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        **{field: value for field, value in configs[0].items() if field not in _OF_ADALORA},
        **places,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _places(config: Mapping[str, Any]) -> list[Any]:
    values = [config.get(field) for field in _PLACES]
    return [sorted(value) if isinstance(value, list) else value for value in values]
