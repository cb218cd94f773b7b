"""Values times factors of about one, rounded once: what IA3 and DoRA train (arXiv:2205.05638, 2402.09353).

Between one and two bf16 knows every 128th: cast to it, a factor of 1.01 is 1.0078 for all tokens alike. So
they are multiplied in fp32, whatever type the values have, and the product is rounded: right on the mean, but
for changes below a 256th, which values that were rounded before hide. Kept are the values. On CUDA nothing
wider than they are should be made (read in TensorIterator's sources, measured nowhere); a CPU's kernel casts
within.

Legend: O values of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scaled(values: Tensor, factors: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """Values times a factor each, but for a part of them that stays.

    Args:
        values: (..., O).
        factors: (O,), of any floating type.
        bias: (O,) the part that stays; it gets no gradient.

    Returns:
        (..., O) in the type of the values.
    """
    made: Tensor = _Scaled.apply(values, factors, bias)  # type: ignore[no-untyped-call]
    return made


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, factors: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(values, factors)
        context.bias = bias
        wide, made = factors.float(), torch.empty_like(values)
        if bias is None:
            return torch.mul(values, wide, out=made)
        return torch.addcmul(bias.float() * (1 - wide), values, wide, out=made)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, factors = context.saved_tensors
        to_values = to_factors = None
        if context.needs_input_grad[0]:
            to_values = torch.mul(gradient, factors.float(), out=torch.empty_like(gradient))
        if context.needs_input_grad[1]:
            to_factors = _summed(gradient * values)
            if context.bias is not None:
                to_factors -= context.bias.float() * _summed(gradient)
            to_factors = to_factors.to(factors.dtype)
        return to_values, to_factors, None


def _summed(values: Tensor) -> Tensor:
    """(O,) the sum over all tokens, in fp32."""
    return values.flatten(0, -2).sum(0, dtype=torch.float32)
