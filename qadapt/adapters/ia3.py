"""IA3 (arXiv:2205.05638) through PEFT: a trained factor for each output of a layer, or for each input.

PEFT's layers compute in fp32 around a 16-bit base and copy their result; each is given a subclass here whose
product has the type of the base, while its factors keep their digits (`engine/scaling.py`). Parameters,
switching off, merging and what stands on disk are PEFT's. Factors start at one, so the first forward pass
equals the base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.ia3 import layer as peft_layer
from peft.tuners.ia3.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.ia3.bnb import Linear8bitLt as PeftLinear8bit
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.lora import chosen_layers, put_beside
from qadapt.engine.scaling import scaled
from qadapt.methods import SCALED_INPUTS


def attach_ia3(model: PreTrainedModel, targets: str | Sequence[str], *, dtype: torch.dtype) -> PeftModel:
    """The base with a factor for each output of the chosen layers, and each input of `SCALED_INPUTS`.

    Args:
        model: The frozen base.
        targets: Names of layers, or `all-linear`.
        dtype: Type of the factors.

    Raises:
        BadRecipe: A target matches no linear layer.
    """
    chosen = list(chosen_layers(model, targets))
    inputs = [name for name in chosen if name in SCALED_INPUTS]
    config = IA3Config(target_modules=chosen, feedforward_modules=inputs, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    put_beside(adapted, dtype=dtype)
    use_typed_layers(adapted)
    return adapted


def use_typed_layers(model: nn.Module) -> None:
    """Makes PEFT's layers multiply in the type of their inputs."""
    for module in model.modules():
        if type(module) in _TYPED:
            module.__class__ = _TYPED[type(module)]


class Typed4bit(PeftLinear4bit):  # type: ignore[misc]
    """IA3 on a layer in 4 bits."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        return _scaled(self, x)


class Typed8bit(PeftLinear8bit):  # type: ignore[misc]
    """IA3 on a layer in 8 bits."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        return _scaled(self, x)


class TypedLinear(peft_layer.Linear):  # type: ignore[misc]
    """IA3 on a layer that is not quantized."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        return super().forward(x, *args, **kwargs) if self.merged else _scaled(self, x)


_TYPED: dict[type, Any] = {
    PeftLinear4bit: Typed4bit,
    PeftLinear8bit: Typed8bit,
    peft_layer.Linear: TypedLinear,
}


def _scaled(layer: peft_layer.IA3Layer, inputs: Tensor) -> Tensor:
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.ia3_l]
    factors = [layer.ia3_l[name].flatten() for name in active]
    if layer.is_feedforward:
        for factor in factors:
            inputs = scaled(inputs, factor)
    result: Tensor = layer.base_layer(inputs)
    for factor in [] if layer.is_feedforward else factors:
        result = scaled(result, factor)
    return result
