"""PiSSA (arXiv:2404.02948) on a frozen base, quantized or not: LoRA that starts at a weight's principal part.

PiSSA takes the principal part B₀ A₀ out of the weight, trains it as the adapter and keeps the residual W - B₀
A₀ frozen. Quantizing that residual would make a base of its own for every adapter. Here the residual is
exact: the base stays as it is, A₀ and B₀ are kept in the adapter's type, and what is trained are the
differences a and b to them, zero at first,

    W - B₀ A₀ + (B₀ + b)(A₀ + a)  =  W + b (A₀ + a) + B₀ a,

with the gradients of PiSSA, a first pass that is the base's to the bit, and in bf16 no rounding to the size
of A₀ and B₀. The right side is plain LoRA of twice the rank, [b, B₀] [A₀ + a; a], which is what stands on
disk: it loads beside the published base, swaps and merges like any other. Weight decay draws towards the
start.

Legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from qadapt.engine.linear import dense_weight

_OVERSAMPLING, _ROUNDS = 8, 4
"""Of the randomized decomposition (arXiv:0909.4061); whatever it finds, the residual is exact."""


class Start(nn.Module):
    """The frozen principal part of one layer: A₀ (R, I) and B₀ (O, R)."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)

    def joined(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """A of (2R, I) and B of (O, 2R): what the differences a (R, I) and b (O, R) amount to."""
        return torch.cat((self.down + down, down)), torch.cat((up, self.up), dim=1)


def add_starts(model: nn.Module) -> None:
    """Gives each LoRA layer its principal part, and sets what is trained to zero."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.lora_A:
                _add_start(layer, name)


@torch.no_grad()
def _add_start(layer: LoraLayer, name: str) -> None:
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    base = layer.get_base_layer()
    if base.weight.is_meta:
        parts = torch.empty_like(down), torch.empty_like(up)
    else:
        weight = dense_weight(base, torch.float32)
        parts = principal_part(weight, rank=len(down), scale=layer.scaling[name])
    layer.add_module("start", Start(*(part.to(down) for part in parts)))
    down.zero_()
    up.zero_()


def start_of(layer: LoraLayer) -> Start | None:
    """The principal part that a layer starts from; None if it is plain LoRA."""
    found = dict(layer.named_children()).get("start")
    assert found is None or isinstance(found, Start)
    return found


def starts_of(model: nn.Module) -> dict[str, Tensor]:
    """The frozen tensors of all starts by name."""
    starts = ((path, module) for path, module in model.named_modules() if isinstance(module, Start))
    return {f"{path}.{name}": value for path, start in starts for name, value in start.named_parameters()}


def principal_part(weight: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R), so that scale · B A is nearly the best approximation of a matrix of their rank.

    Args:
        weight: (O, I), fp32.
        rank: R.
        scale: Of the product.
    """
    wanted = min(rank + _OVERSAMPLING, *weight.shape)
    left, values, right = torch.svd_lowrank(weight, q=wanted, niter=_ROUNDS)
    root = (values[:rank] / scale).sqrt()
    return (right[:, :rank] * root).t().contiguous(), left[:, :rank] * root
