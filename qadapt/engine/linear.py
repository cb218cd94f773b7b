"""A frozen linear layer with a low-rank update as one operation (QLoRA, arXiv:2305.14314).

Written as single operations, the step keeps what each of them wants: casts of the input, dropped copies, the
update's output and its scaled copy. Here the product's result takes the update in place, and only the input,
which neighbours share, and the R values between the factors stay for the backward pass, which dequantizes
the weight once more: a few per cent of a product's time. With dropout a mask of one byte per value stays.

Products run in the type of the input, gradients have the type of the factors. The weight is looked up when it
is needed, so it may be moved meanwhile. Knows nothing of PEFT (see `adapters/fused.py`).

Legend: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

INT8_STEPS = 127
"""Of a row's largest magnitude, in bitsandbytes' 8-bit rows."""
LEAST_LENGTH = 2.0**-63
"""What DoRA takes for the length of a row of zeros: what has no direction stays zero, and is not NaN."""


def dense_weight(layer: nn.Linear, dtype: torch.dtype) -> Tensor:
    """(O, I) the weight of a frozen layer, dequantized into a type; not a copy where it has that type."""
    if isinstance(layer, Linear4bit):
        dense: Tensor = dequantize_4bit(layer.weight, layer.weight.quant_state)
        return dense.to(dtype)
    if isinstance(layer, Linear8bitLt):
        largest: Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB  # (O,)
        return dense_int8(layer.weight.detach(), largest, dtype)
    return layer.weight.to(dtype)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a layer holds its weight in 4 or 8 bits."""
    return isinstance(layer, Linear4bit | Linear8bitLt)


def dense_int8(steps: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """(O, I) a weight of 8-bit steps (O, I) and each row's largest magnitude (O,), in a type."""
    return steps.to(dtype).mul_(largest.unsqueeze(1) / INT8_STEPS)


def use_dense_products(model: nn.Module) -> None:
    """Makes frozen 8-bit layers multiply with their dequantized weight, as they do with an adapter.

    Their own product keeps its input, past all recomputation, and on CUDA rounds it to 8 bits, too.
    """
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.forward = partial(_frozen_linear, layer=module)


def _frozen_linear(inputs: Tensor, *, layer: nn.Linear) -> Tensor:
    result: Tensor = _FrozenLinear.apply(inputs, layer)  # type: ignore[no-untyped-call]
    return result


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, layer: nn.Linear) -> Tensor:
        context.layer = layer
        bias: Tensor | None = layer.bias
        typed = None if bias is None else bias.to(inputs.dtype)
        return nn.functional.linear(inputs, dense_weight(layer, inputs.dtype), typed)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ dense_weight(context.layer, gradient.dtype), None


def adapted_linear(
    inputs: Tensor, layer: nn.Linear, factors: tuple[Tensor, Tensor], *, scale: float, dropout: float = 0.0
) -> Tensor:
    """What a frozen layer with a low-rank update gives: inputs @ (W + scale B A)ᵀ + bias.

    Args:
        inputs: (..., I) in the type of the products.
        layer: The frozen layer: `torch.nn.Linear`, or of bitsandbytes in 4 or 8 bits.
        factors: A of (R, I) and B of (O, R), of any floating type.
        scale: Of the update.
        dropout: Share of the inputs that the update does not see.

    Returns:
        (..., O) in the type of the inputs.
    """
    down, up = factors
    scale /= 1 - dropout  # where dropout's own factor comes in is all the same
    made: tuple[Tensor, Tensor] = _AdaptedLinear.apply(inputs, down, up, layer, scale, dropout)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        _multiply(inputs, layer, (made[1], up), scale=scale, result=made[0].detach())
    return made[0]


def _multiply(
    inputs: Tensor, layer: nn.Linear, update: tuple[Tensor, Tensor], *, scale: float, result: Tensor
) -> None:
    """Puts the product with the frozen weight and the update into the result, (..., O)."""
    (between, up), rows = update, result.view(-1, result.shape[-1])
    put_product(inputs.reshape(-1, inputs.shape[-1]), layer, result=result)
    rows.addmm_(between, up.to(inputs.dtype).t(), alpha=scale)  # (N, R) by (R, O)


def put_product(flat: Tensor, layer: nn.Linear, *, result: Tensor) -> None:
    """Puts what a frozen layer gives of (N, I) inputs into a result, (..., O)."""
    rows, weight = result.view(-1, result.shape[-1]), dense_weight(layer, flat.dtype)
    bias: Tensor | None = layer.bias
    if bias is None:
        torch.mm(flat, weight.t(), out=rows)
    else:
        torch.addmm(bias.to(flat.dtype), flat, weight.t(), out=rows)


@torch.no_grad()
def row_lengths(
    layer: nn.Linear, factors: tuple[Tensor, Tensor], *, scale: float, dtype: torch.dtype
) -> Tensor:
    """(O,) the lengths of the rows of W + scale B A, in fp32; W dequantized into a type.

    DoRA (arXiv:2402.09353, 4.3) takes them for constants in the backward pass. They come from the square's
    three terms, so that no second matrix of W's size is made. A row of zeros has `LEAST_LENGTH`.
    """
    down, up = (factor.float() for factor in factors)  # (R, I), (O, R)
    weight = dense_weight(layer, dtype)  # (O, I)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square_()
    both = (weight @ down.to(dtype).t()).float().mul_(up).sum(1)
    update = (up @ (down @ down.t())).mul_(up).sum(1)
    squares: Tensor = own.add_(both, alpha=2 * scale).add_(update, alpha=scale**2)
    return squares.clamp_min_(LEAST_LENGTH**2).sqrt_()


class _AdaptedLinear(torch.autograd.Function):
    """Hands over what is kept, and an empty result, which is filled afterwards.

    A layer that is computed again stops where the last value to be kept is handed over. That is here, so the
    frozen product of a layer's last projection, a quarter of a layer's weights, is not made again.
    """

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, down: Tensor, up: Tensor, layer: nn.Linear, scale: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        flat = inputs.reshape(-1, inputs.shape[-1])  # (N, I)
        dropped = _drawn(flat, dropout) if dropout else None  # (N, I)
        between = (flat if dropped is None else flat.masked_fill(dropped, 0)) @ down.to(flat.dtype).t()
        context.save_for_backward(inputs, between, down, up, dropped)
        context.layer, context.scale = layer, scale
        context.mark_non_differentiable(between)
        return inputs.new_empty(*inputs.shape[:-1], len(up)), between

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        inputs, between, down, up, dropped = context.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, O)
        flat = inputs.reshape(-1, inputs.shape[-1])  # (N, I)
        through = (gradient @ up.to(gradient.dtype)).mul_(context.scale)  # (N, R)
        up_gradient = (gradient.t() @ between).mul_(context.scale).to(up.dtype)
        seen = flat if dropped is None else flat.masked_fill(dropped, 0)
        down_gradient = (through.t() @ seen).to(down.dtype)
        del seen
        if not context.needs_input_grad[0]:
            return None, down_gradient, up_gradient, None, None, None
        result = gradient @ dense_weight(context.layer, gradient.dtype)  # (N, I)
        if dropped is None:
            result.addmm_(through, down.to(gradient.dtype))
        else:
            result += (through @ down.to(gradient.dtype)).masked_fill_(dropped, 0)
        return result.view(inputs.shape), down_gradient, up_gradient, None, None, None


def projected_linear(
    inputs: Tensor, layer: nn.Linear, scales: tuple[Tensor, Tensor], *, projections: tuple[Tensor, Tensor]
) -> Tensor:
    """What a frozen layer with VeRA's update (arXiv:2310.11454) gives, of whose four factors two are frozen.

    That is inputs @ (W + diag(outer) up diag(inner) down)ᵀ + bias, of which nothing is kept but R values per
    token: not even the inputs, as no gradient needs them.

    Args:
        inputs: (..., I) in the type of the products.
        layer: The frozen layer, as in `adapted_linear`.
        scales: inner (R,) and outer (O,), which are trained, of any floating type.
        projections: down (R, I) and up (O, R), frozen.

    Returns:
        (..., O) in the type of the inputs.
    """
    (inner, outer), (down, up) = scales, projections
    made: tuple[Tensor, Tensor] = _ProjectedLinear.apply(inputs, inner, outer, layer, down, up)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        update = made[1] * inner.to(inputs.dtype), _scaled_up(up, outer, inputs.dtype)
        _multiply(inputs, layer, update, scale=1.0, result=made[0].detach())
    return made[0]


def _scaled_up(up: Tensor, outer: Tensor, dtype: torch.dtype) -> Tensor:
    return up.to(dtype) * outer.to(dtype).unsqueeze(1)  # (O, R)


class _ProjectedLinear(torch.autograd.Function):
    """As `_AdaptedLinear`: an empty result, filled afterwards."""

    @staticmethod
    def forward(
        context: Any, inputs: Tensor, inner: Tensor, outer: Tensor, layer: nn.Linear, down: Tensor, up: Tensor
    ) -> tuple[Tensor, Tensor]:
        between = inputs.reshape(-1, inputs.shape[-1]) @ down.to(inputs.dtype).t()  # (N, R)
        context.save_for_backward(between, inner, outer)
        context.layer, context.projections = layer, (down, up)
        context.mark_non_differentiable(between)
        return inputs.new_empty(*inputs.shape[:-1], len(up)), between

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (between, inner, outer), (down, up) = context.saved_tensors, context.projections
        shape, dtype = gradient.shape, gradient.dtype
        gradient, typed = gradient.reshape(-1, shape[-1]), inner.to(dtype)  # (N, O), (R,)
        outer_gradient = ((gradient.t() @ (between * typed)) * up.to(dtype)).sum(1).to(outer.dtype)
        through = gradient @ _scaled_up(up, outer, dtype)  # (N, R)
        inner_gradient = (through * between).sum(0).to(inner.dtype)
        if not context.needs_input_grad[0]:
            return None, inner_gradient, outer_gradient, None, None, None
        result = gradient @ dense_weight(context.layer, dtype)  # (N, I)
        result.addmm_(through.mul_(typed), down.to(dtype))
        return result.view(*shape[:-1], down.shape[1]), inner_gradient, outer_gradient, None, None, None


def _drawn(inputs: Tensor, share: float) -> Tensor:
    """Which values are dropped, from the draws that `torch.nn.Dropout` on a CPU takes for which are kept."""
    return torch.empty_like(inputs, dtype=torch.bool).bernoulli_(1 - share).logical_not_()
