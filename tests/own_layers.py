"""PEFT's layers against ours in their place: a frozen layer with an adapter, its output and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from test_linear import TOLERANCE, Block, errors, frozen, inputs_of, outcome
from torch import Tensor, nn

from qadapt.adapters.lora import trainable
from qadapt.engine.linear import dense_weight

FP32, BF16 = torch.float32, torch.bfloat16
Made = Callable[..., PeftModel]
"""`made(base, dtype, bias=..., ours=...)`: the adapter with random numbers, in PEFT's layers or ours."""


def adapted_block(config: PeftConfig, base: str, dtype: torch.dtype, *, bias: bool) -> PeftModel:
    """A frozen layer, called `projection`, with an adapter in PEFT's own layer."""
    block = Block(frozen(base, dtype, bias=bias))
    block.is_loaded_in_4bit, block.is_loaded_in_8bit = "nf4" in base, base == "int8"
    return get_peft_model(block, config)


def assert_plain_pefts(made: Made, base: str, own: type[nn.Module], *, bias: bool) -> None:
    """In fp32 output and gradients are those of plain PEFT."""
    ours, plain = (made(base, FP32, bias=bias, ours=each) for each in (True, False))
    assert any(isinstance(module, own) for module in ours.modules())
    off = errors(outcome(ours, inputs_of(FP32)), outcome(plain, inputs_of(FP32)))
    assert max(off.values()) < 2 * TOLERANCE[FP32], off


def assert_near_fp32_in_bf16(made: Made, base: str) -> None:
    """In bf16 they are near those in fp32, and stay in bf16."""
    ours, exact = made(base, BF16), made("plain", FP32)
    source, target = (each.get_submodule("base_model.model.projection") for each in (ours, exact))
    target.base_layer.weight.data = dense_weight(source.base_layer, FP32)
    found = outcome(ours, inputs_of(BF16))
    assert found["output"].dtype is BF16
    off = errors(found, outcome(exact, inputs_of(BF16).detach().float().requires_grad_()))
    assert max(off.values()) < TOLERANCE[BF16], off


def assert_would_be_seen(made: Made, name: str) -> None:
    """A trained number that is off by a thousandth shows in the output."""
    ours, plain = (made("nf4", FP32, ours=each) for each in (True, False))
    trainable(ours)[f"base_model.model.projection.{name}"].data *= 1.001
    off = errors(outcome(ours, inputs_of(FP32)), outcome(plain, inputs_of(FP32)))
    assert off["output"] > 10 * TOLERANCE[FP32]


def kept_for_backward(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What a forward pass keeps."""
    kept = list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs)
    return kept
