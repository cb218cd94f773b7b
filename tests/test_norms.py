"""RMSNorm in pieces on a CPU beside the library's own and fp64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from torch import Tensor, nn

from qadapt.engine import norms as engine
from qadapt.engine.norms import Norm, set_norms
from qadapt.engine.tiles import Tiled, set_tiles
from qadapt.model.load import load_base
from qadapt.shape import FAMILIES

SHAPE = 2, 11, 3
"""Rows before the width: 66, which pieces of seven do not divide."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "loss_piece", lambda width: 7)


def loaded(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    return load_base(folder, quantization="none", double_quant=False, dtype=dtype, device=torch.device("cpu"))


def norms_of(model: nn.Module) -> Iterator[nn.Module]:
    """One of each kind and width, its scale away from what it begins as."""
    found = {
        (type(module), len(module.weight)): module
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm")
    }
    for module in found.values():
        module.weight.detach().uniform_(-1.5, 1.5)
        yield module


def passed(forward: Any, values: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What comes out, and the gradient of what goes in."""
    values = values.detach().requires_grad_()
    result = forward(values)
    return result, *torch.autograd.grad(result, values, gradient.to(result.dtype))


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_result_is_the_librarys_to_the_bit_and_the_gradient_no_less_exact(
    family: str, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = loaded(tiny_model(family), dtype=dtype)
    set_norms(model)
    modules = list(norms_of(model))
    assert modules
    for module in modules:
        assert isinstance(module.forward, Norm)
        library = type(module).forward.__get__(module)
        torch.manual_seed(3)
        values, gradient = (torch.randn(*SHAPE, len(module.weight)).mul(4).to(dtype) for _ in "ab")
        for given in (gradient, gradient.transpose(0, 1).contiguous().transpose(0, 1)):  # laid out otherwise
            result, slope = passed(module.forward, values, given)
            again, usual = passed(library, values, given)
            assert torch.equal(result, again)
            exact = passed(library_in_fp64(module), values.double(), given.double())[1]
            assert off(slope, exact) <= 1.05 * off(usual, exact) < 0.01


def library_in_fp64(module: nn.Module) -> Any:
    scale: Tensor = module.weight.detach().double()
    scale = scale + type(module).__name__.startswith("Gemma")
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    return lambda values: values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon) * scale


def test_of_what_enters_nothing_is_kept_but_itself_and_a_number_a_row(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"), dtype=torch.bfloat16)
    set_norms(model)
    norm = model.model.norm.requires_grad_(requires_grad=False)
    values = torch.randn(*SHAPE, len(norm.weight), dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        norm(values)
    input_kept, inverses, scale = kept
    assert input_kept.data_ptr() == values.data_ptr() and scale.data_ptr() == norm.weight.data_ptr()
    assert inverses.shape == (66, 1) and inverses.dtype == torch.float32


def test_a_scale_that_is_trained_gets_its_gradient_from_the_library(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    set_norms(model)
    norm = model.model.norm.requires_grad_()
    norm(torch.randn(2, len(norm.weight), requires_grad=True)).sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.abs().sum() > 0


def test_where_parts_are_computed_in_pieces_these_come_first(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    set_norms(model)
    set_tiles(model, 2)
    set_norms(model)
    forwards = [vars(module).get("forward") for module in model.modules()]
    assert any(isinstance(each, Tiled) for each in forwards)
    assert not any(isinstance(each, Norm) for each in forwards)


def test_an_architecture_that_is_not_known_keeps_the_librarys(tiny_model: TinyModel) -> None:
    model = loaded(tiny_model("llama"))
    model.config.model_type = "olmo2"
    set_norms(model)
    assert not any("forward" in vars(module) for module in model.modules())
