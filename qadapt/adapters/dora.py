"""DoRA (arXiv:2402.09353): LoRA, and a trained length for each row of the weight; a variant of PEFT's.

PEFT's own finds the lengths to start from in a copy of each layer, in the type of its weight, which in bf16
is off by 0.2 %; here `start_magnitudes` finds them once the layers are in place.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from qadapt.engine.linear import row_lengths


class Dora(DoraLinearVariant):  # type: ignore[misc]
    """PEFT's DoRA, its magnitudes not found yet."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Gives a layer its magnitudes, empty."""
        magnitudes = DoraLinearLayer(fan_in_fan_out=False)
        down = module.lora_A[adapter_name].weight
        magnitudes.weight = nn.Parameter(down.new_zeros(module.out_features))
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        module.lora_magnitude_vector[adapter_name] = magnitudes


def start_magnitudes(model: nn.Module, *, dtype: torch.dtype) -> None:
    """Gives the magnitudes the lengths that the rows have, so that the first pass equals the base's.

    Args:
        model: The base with its adapter, whose update is zero.
        dtype: Of the products.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, magnitude in layer.lora_magnitude_vector.items():
            base, pair = layer.get_base_layer(), (layer.lora_A[name].weight, layer.lora_B[name].weight)
            factors = pair[0].to(base.weight.device), pair[1].to(base.weight.device)  # which may be the host
            lengths = row_lengths(base, factors, scale=layer.scaling[name], dtype=dtype)
            magnitude.weight.data = lengths.to(magnitude.weight)
