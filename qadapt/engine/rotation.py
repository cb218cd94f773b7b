"""A frozen linear layer whose inputs are rotated first, in blocks (OFT, arXiv:2306.07280 and 2506.19847).

A block's rotation is Cayley's (I + Q)(I - Q)⁻¹ of a skew-symmetric Q, by the first terms of Neumann's series,
as PEFT has it: I + 2Q + 2Q² + 2Q³ + Q⁴. In a plane where Q is θ it turns by 2 arctan θ, as Cayley's, and
makes lengths 1 - θ⁴ of what they were: 0.8 % shorter at 33 degrees. What it adds is computed in
fp32 and added to the inputs, so that near the start nothing is rounded to the size of 1. Only the inputs,
which neighbours share, are kept; the rotations are made again in the backward pass.

Legend: N tokens, I inputs, O outputs, K blocks, S width of a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qadapt.engine.linear import dense_weight, put_product


def rotated_linear(inputs: Tensor, layer: nn.Linear, angles: Tensor, *, block: int) -> Tensor:
    """What a frozen layer gives of rotated inputs.

    Args:
        inputs: (..., I) in the type of the products.
        layer: The frozen layer, as in `engine.linear.adapted_linear`.
        angles: (K, S(S-1)/2), what is above the diagonal of each block's Q, of any floating type.
        block: S; I is K times S.

    Returns:
        (..., O) in the type of the inputs.
    """
    made: Tensor = _RotatedLinear.apply(inputs, angles, layer, block)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        flat = turned(inputs.reshape(-1, inputs.shape[-1]), beyond_identity(angles, block=block))
        put_product(flat, layer, result=made.detach())
    return made


def beyond_identity(angles: Tensor, *, block: int) -> Tensor:
    """(K, S, S) what rotations add to the identity, in fp32, or in fp64 if the angles are."""
    exact = angles if angles.dtype == torch.float64 else angles.float()
    rows, columns = torch.triu_indices(block, block, 1, device=angles.device)
    skew = exact.new_zeros(len(exact), block, block)
    skew[:, rows, columns] = exact
    skew = skew - skew.transpose(1, 2)
    square = skew @ skew
    cube = square @ skew
    return 2 * (skew + square + cube) + cube @ skew


def turned(flat: Tensor, beyond: Tensor) -> Tensor:
    """(N, I) -> (N, I), each block of columns times its rotation."""
    blocks = _in_blocks(flat, len(beyond))  # (K, N, S)
    added = (blocks @ beyond.to(flat.dtype)).transpose(0, 1)  # (N, K, S)
    return added.reshape(flat.shape).add_(flat)


def _in_blocks(flat: Tensor, count: int) -> Tensor:
    return flat.view(len(flat), count, -1).transpose(0, 1)  # (K, N, S)


class _RotatedLinear(torch.autograd.Function):
    """As the others in `engine/linear.py`: an empty result, filled afterwards."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, angles: Tensor, layer: nn.Linear, block: int) -> Tensor:
        context.save_for_backward(inputs, angles)
        context.layer, context.block = layer, block
        return inputs.new_empty(*inputs.shape[:-1], layer.out_features)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, angles = context.saved_tensors
        flat = inputs.reshape(-1, inputs.shape[-1])
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, O)
        through = gradient @ dense_weight(context.layer, gradient.dtype)  # (N, I)
        with torch.enable_grad():
            own = angles.detach().requires_grad_()
            beyond = beyond_identity(own, block=context.block)  # (K, S, S)
        count = len(beyond)
        wanted = _in_blocks(flat, count).transpose(1, 2) @ _in_blocks(through, count)  # (K, S, S)
        (angles_gradient,) = torch.autograd.grad(beyond, own, wanted.to(beyond.dtype))
        if not context.needs_input_grad[0]:
            return None, angles_gradient, None, None
        result = turned(through, beyond.detach().transpose(1, 2))
        return result.view(inputs.shape), angles_gradient, None, None


def block_of(angles: int) -> int:
    """S, of the number of angles of a block."""
    return (1 + math.isqrt(1 + 8 * angles)) // 2
