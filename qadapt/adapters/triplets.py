"""AdaLoRA's layers (arXiv:2303.10512): an update P diag(λ) Q of which single triplets can be given up.

    W + scale · P diag(λ) Q        P (O, R), λ (R,), Q (R, I); in PEFT lora_B, lora_E (R, 1), lora_A

A triplet is a column of P, its λ and a row of Q; given up it has λ = 0. PEFT's layers compute in the type of
what is trained and keep each product; here a subclass does it in the type of the base, as LoRA is done
(`engine/linear.py`), with diag(λ) Q for the first factor. Names, switching off and what stands on disk are
PEFT's, which leaves the triplets out that are given up.

The scale is PEFT's: alpha over the number of triplets at the start, however many are left. PEFT holds that
number in a tensor of each layer, which on a base in bf16 rounds it and is waited for; here it is a number.

Legend: I inputs, O outputs, R triplets.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import AdaLoraConfig, PeftConfig, PeftModel
from peft.tuners.adalora import AdaLoraLayer, SVDLinear
from torch import Tensor, nn

from qadapt.engine.linear import adapted_linear
from qadapt.plan.ranks import RANK_EPSILON

PARTS = ("lora_A", "lora_E", "lora_B")
"""Q, λ and P, as PEFT names them."""
Shape = tuple[int, ...]


class TripletLinear(SVDLinear):  # type: ignore[misc]
    """AdaLoRA on a layer in 4 bits, 8 bits or 16."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = active[0]
        dropout = self.lora_dropout[name]
        share = dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0
        factors = self.lora_A[name] * self.lora_E[name], self.lora_B[name]
        scale = self.scaling[name] / (self.ranknum[name] + RANK_EPSILON)
        return adapted_linear(x, self.get_base_layer(), factors, scale=scale, dropout=share)


def use_triplet_layers(model: PeftModel) -> None:
    """Makes PEFT's layers, of which it has a class for each kind of base, one operation of one class."""
    for layer in model.modules():
        if isinstance(layer, AdaLoraLayer):
            layer.__class__, layer.fan_in_fan_out = TripletLinear, False
            ranks = {name: float(model.peft_config[name].init_r) for name in layer.lora_A}
            del layer.ranknum
            layer.ranknum = ranks


def triplets_of(model: nn.Module, name: str = "default") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Path of each layer with triplets, and by their names in PEFT its Q (R, I), λ (R, 1) and P (O, R)."""
    for path, layer in model.named_modules():
        if isinstance(layer, AdaLoraLayer):
            yield path, {part: getattr(layer, part)[name] for part in PARTS}


def leave_out_given_up(model: PeftModel) -> None:
    """Says in the configuration which triplets are left, so that PEFT saves these alone.

    A triplet with λ = 0 adds nothing, for whatever reason it is zero; the numbers say so themselves, at any
    step, and for the best checkpoint, too. Of a layer that was loaded without some of its triplets those that
    it has are left.
    """
    config = model.peft_config.get("default")
    if not isinstance(config, AdaLoraConfig):
        return
    config.rank_pattern = {
        f"{path}.lora_E.default": _left(parts["lora_E"], config.init_r)
        for path, parts in triplets_of(model.get_base_model())
    }


@contextmanager
def without_pattern_warning() -> Iterator[None]:
    """While open, PEFT does not warn that it ignores AdaLoRA's `rank_pattern`, which it takes for LoRA's.

    It does not ignore it: layers are made as long as it says (PEFT 0.21, `resize_modules_by_rank_pattern`).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="The following rank_pattern keys .*lora_E", category=RuntimeWarning
        )
        yield


def _left(values: Tensor, start: int) -> list[bool]:
    """Which of a layer's first triplets are left; of none, which PEFT takes for a damaged file, the first."""
    flags: list[bool] = (values.detach().flatten() != 0).tolist()
    if len(flags) < start:
        return [*[True] * len(flags), *[False] * (start - len(flags))]
    return flags if any(flags) else [True, *flags[1:]]


def take_rank_pattern(config: PeftConfig) -> dict[str, int]:
    """Takes what a configuration says of triplets that are left out of it: path of a layer → those left."""
    if not isinstance(config, AdaLoraConfig) or not config.rank_pattern:
        return {}
    pattern, config.rank_pattern = config.rank_pattern, None
    return {name.removesuffix(".lora_E"): sum(flags) for name, flags in pattern.items()}


def left_shapes(shapes: Mapping[str, Shape], left: Mapping[str, int]) -> dict[str, Shape]:
    """Shapes of an adapter's tensors, nothing given up, as they are with so many triplets of each layer."""
    found = dict(shapes)
    for path, count in left.items():
        q, values, p = (f"base_model.model.{path}.{part}" for part in PARTS)
        if q in found and p in found:
            found |= {q: (count, found[q][1]), values: (count, 1), p: (found[p][0], count)}
    return found


def scale_of(config: AdaLoraConfig) -> float:
    """What the update of a layer is multiplied by."""
    return float(config.lora_alpha / (config.init_r + RANK_EPSILON))
