"""Factors near one: not rounded to the type of what they multiply; gradients are those of plain products."""

from __future__ import annotations

import pytest
import torch
from test_linear import BASES, adapted, inputs_of
from test_methods import scaled as ia3
from torch import Tensor
from torch.nn import functional

from qadapt.adapters.lora import trainable
from qadapt.engine.linear import dense_weight
from qadapt.engine.scaling import scaled

BF16, FP32 = torch.bfloat16, torch.float32


def drawn(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def test_a_product_in_bf16_is_the_exact_one_rounded_once() -> None:
    values, factors = drawn(3, 5, 123, seed=1).to(BF16), 1 + 0.002 * drawn(123, seed=2)
    assert torch.equal(scaled(values, factors), (values.float() * factors).to(BF16))
    assert not torch.equal(scaled(values, factors), values * factors.to(BF16)), "a control"


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_outputs_and_gradients_are_those_of_a_plain_product(dtype: torch.dtype, has_bias: bool) -> None:
    bias = drawn(123, seed=4).to(dtype) if has_bias else None
    ours = drawn(3, 5, 123, seed=1).to(dtype).requires_grad_(), (1 + drawn(123, seed=2)).requires_grad_()
    plain = tuple(each.detach().double().requires_grad_() for each in ours)
    stays = 0 if bias is None else bias.double()
    found, wanted = scaled(*ours, bias=bias), (plain[0] - stays) * plain[1] + stays
    slope = drawn(3, 5, 123, seed=3)
    found.backward(slope.to(dtype))
    wanted.backward(slope.to(dtype).double())
    within = {FP32: 1e-6, BF16: 8e-3, torch.float16: 1e-3}[dtype]  # of the largest value
    pairs = [(found, wanted), *((a.grad, b.grad) for a, b in zip(ours, plain, strict=True))]
    for mine, exact in pairs:
        assert mine is not None and exact is not None
        assert (mine.double() - exact).abs().max() <= within * exact.abs().max()
    assert [each.grad.dtype for each in ours if each.grad is not None] == [dtype, FP32]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", ["dora", "ia3 of inputs", "ia3 of outputs"])
def test_a_change_of_a_hundredth_is_seen_in_bf16_as_such(method: str, base: str) -> None:
    if method == "dora":
        model = adapted(base, (BF16, FP32), fused=True, use_dora=True)
        layer = model.base_model.model.projection
        for name, parameter in trainable(model).items():
            lengths = dense_weight(layer.get_base_layer(), FP32).norm(dim=1)
            parameter.data = 1.01 * lengths if "magnitude" in name else torch.zeros_like(parameter)
    else:
        model = ia3(base, BF16, is_input="inputs" in method, bias=False, typed=True)
        layer = model.base_model.model.projection
        for parameter in trainable(model).values():
            parameter.data = torch.full_like(parameter, 1.01)
    inputs = inputs_of(BF16)
    with torch.no_grad():
        plain = functional.linear(inputs.float(), dense_weight(layer.get_base_layer(), FP32))
        found = model(inputs).float()
    ratio = float((found * plain).sum() / plain.square().sum())
    assert abs(ratio - 1.01) < 6e-4, ratio  # cast to bf16 it is 1.0078
