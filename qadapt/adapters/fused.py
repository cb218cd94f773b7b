"""PEFT's LoRA layers with one fused operation for what training does; all else is theirs.

Each is a subclass that overrides `forward` only: names, parameters, merging, switching off and what stands on
disk stay PEFT's, and stock PEFT loads what they save. They are registered through PEFT's registration of
custom modules, which is semi-public (`tests/test_semi_public.py` says what is relied on); it is not saved, so
every load registers them again.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.bnb import Linear8bitLt as PeftLinear8bit
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from qadapt.adapters.dora import Dora
from qadapt.adapters.pissa import start_of
from qadapt.engine.linear import adapted_linear, row_lengths
from qadapt.engine.scaling import scaled

_NO_OTHER_PASS = "PEFT's own pass knows nothing of what PiSSA starts from"


def use_fused_layers(config: LoraConfig) -> None:
    """Makes PEFT put fused layers on the linear layers of a base, for this configuration object."""
    config._register_custom_module(
        {
            bitsandbytes.nn.Linear4bit: FusedLinear4bit,  # subclasses of nn.Linear first
            bitsandbytes.nn.Linear8bitLt: FusedLinear8bit,
            nn.Linear: FusedLinear,
        }
    )


class FusedLinear4bit(PeftLinear4bit):  # type: ignore[misc]
    """LoRA on a layer in 4 bits."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """DoRA as here, or what else PEFT has."""
        return Dora() if config.use_dora else super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, fused where the case is the plain one.

        A single token at a time, as in generation, goes to the library's kernel for it; not with DoRA, whose
        matrices PEFT makes anew for each token, nor with PiSSA, which is ours.
        """
        is_plain = is_fusible(self, has_more=bool(args or kwargs))
        is_own = bool(self.lora_variant) or start_of(self) is not None
        is_plain = is_plain and self.get_base_layer().compute_dtype == x.dtype
        if is_plain and (is_own or self.training or x.shape[-2] > 1):
            return fused(self, x)
        assert self.disable_adapters or start_of(self) is None, _NO_OTHER_PASS
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


class FusedLinear8bit(PeftLinear8bit):  # type: ignore[misc]
    """LoRA on a layer in 8 bits."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """DoRA as here, or what else PEFT has."""
        return Dora() if config.use_dora else super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, fused where the case is the plain one."""
        if is_fusible(self, has_more=bool(args or kwargs)):
            return fused(self, x)
        assert self.disable_adapters or start_of(self) is None, _NO_OTHER_PASS
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


class FusedLinear(peft_layer.Linear):  # type: ignore[misc]
    """LoRA on a layer that is not quantized."""

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """DoRA as here, or what else PEFT has."""
        return Dora() if config.use_dora else super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, fused where the case is the plain one."""
        if is_fusible(self, has_more=bool(args or kwargs)) and self.get_base_layer().weight.dtype == x.dtype:
            return fused(self, x)
        assert self.disable_adapters or start_of(self) is None, _NO_OTHER_PASS
        result: Tensor = super().forward(x, *args, **kwargs)
        return result


def is_fusible(layer: peft_layer.LoraLayer, *, has_more: bool) -> bool:
    """Whether a layer's pass is the plain case: one adapter that is on, not merged, no autocast.

    A variant is none, but for DoRA without dropout.

    Args:
        layer: Of PEFT.
        has_more: It is given more than its inputs, such as an adapter's name for each row.
    """
    if has_more or layer.disable_adapters or layer.merged or _casts_itself():
        return False
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.lora_bias[active[0]]:
        return False
    is_dropping = isinstance(layer.lora_dropout[active[0]], nn.Dropout)
    return active[0] not in layer.lora_variant or (layer.use_dora[active[0]] and not is_dropping)


def fused(layer: peft_layer.LoraLayer, inputs: Tensor) -> Tensor:
    """The output of a layer whose pass is the plain case."""
    name = next(name for name in layer.active_adapters if name in layer.lora_A)
    dropout = layer.lora_dropout[name]
    share = dropout.p if layer.training and isinstance(dropout, nn.Dropout) else 0.0
    factors, scale = (layer.lora_A[name].weight, layer.lora_B[name].weight), layer.scaling[name]
    if (start := start_of(layer)) is not None:
        factors = start.joined(*factors)
    base = layer.get_base_layer()
    made = adapted_linear(inputs, base, factors, scale=scale, dropout=share)
    if name not in layer.lora_variant:
        return made
    lengths = row_lengths(base, factors, scale=scale, dtype=inputs.dtype)
    return scaled(made, layer.lora_magnitude_vector[name].weight / lengths, bias=base.bias)


def _casts_itself() -> bool:
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")
