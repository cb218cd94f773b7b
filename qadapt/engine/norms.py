"""RMSNorm (arXiv:1910.07467) on a CPU: a few rows at a time, its input kept as it is.

The library's norm is a chain of operations, each of which passes over all tokens in fp32, and autograd keeps
the input once more, in fp32. Most of the time goes into waiting for memory, above all on the way back. Here
as many rows as the caches hold (`plan.workspace.loss_piece`) go through the same operations at once; only the
input and one number per row stay. The result is the library's to the bit, the gradient is rounded once
instead of twice. The scale is frozen; where it is trained, where no gradient is wanted and on cards the
library's own stands. Only an instance's `forward` is set, as in `tiles.py`, which goes first where it is set.

Legend: N rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from qadapt.engine.target import capability_for
from qadapt.plan.workspace import loss_piece
from qadapt.shape import FAMILIES


def set_norms(model: PreTrainedModel) -> None:
    """Has the norms of an architecture that is known compute as described, where they are on a CPU."""
    if model.config.model_type not in FAMILIES:
        return
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and "forward" not in vars(module):
            module.forward = Norm(module)


class Norm:
    """A norm's forward pass."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._is_plus_one = type(module).__name__.startswith("Gemma")

    def __call__(self, values: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """What the module makes of its input."""
        scale = cast(Tensor, self._module.weight)
        is_ours = values.requires_grad and torch.is_grad_enabled() and not scale.requires_grad
        if not is_ours or scale.dtype != values.dtype or capability_for(values) is not None:
            return cast(Tensor, type(self._module).forward(self._module, values))
        epsilon = getattr(self._module, "variance_epsilon", None) or self._module.eps
        return cast(Tensor, _Normed.apply(values, scale, epsilon, self._is_plus_one))  # type: ignore[no-untyped-call]


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, epsilon: float, is_plus_one: bool) -> Tensor:
        result = torch.empty_like(values, memory_format=torch.contiguous_format)
        inverses = values.new_empty(values.shape[:-1].numel(), 1, dtype=torch.float32)  # (N, 1)
        wide = 1 + scale.float() if is_plus_one else scale
        for rows, into, inverse in _pieces(values, result, inverses):
            exact = rows.float()
            torch.rsqrt(exact.square().mean(-1, keepdim=True).add_(epsilon), out=inverse)
            exact = exact * inverse
            into.copy_(exact.mul_(wide) if is_plus_one else exact.to(into.dtype).mul_(wide))
        ctx.save_for_backward(values, inverses, scale)
        ctx.is_plus_one = is_plus_one
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        values, inverses, scale = ctx.saved_tensors
        result = torch.empty_like(values, memory_format=torch.contiguous_format)
        wide = 1 + scale.float() if ctx.is_plus_one else scale.float()
        for rows, given, inverse, into in _pieces(values, gradient, inverses, result):
            exact, scaled = rows.float(), given * wide
            along = (scaled * exact).mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
            into.copy_(scaled.addcmul_(exact, along, value=-1).mul_(inverse))
        return result, None, None, None


def _pieces(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Some rows of each at a time."""
    count = loss_piece(tensors[0].shape[-1])
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(count) for tensor in tensors), strict=True)
