"""Updates: equal to torch's AdamW, and not lost in bf16 (the naive way is the failing control)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qadapt.train.optimizer import CompensatedAdamW, held_tensors, make_optimizer
from qadapt.train.schedule import learning_rate

BETAS = (0.9, 0.999)
STEPS = 120
RATE = 1e-5


def gradients(dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(67, 61, generator=draw) * 0.01).to(dtype) for _ in range(STEPS)]


def start(dtype: torch.dtype) -> Tensor:
    return torch.randn(67, 61, generator=torch.Generator().manual_seed(3)).to(dtype)


def reference(dtype: torch.dtype, *, weight_decay: float = 0.1) -> Tensor:
    weight = torch.nn.Parameter(start(dtype).float().clone())
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS, weight_decay=weight_decay)
    for gradient in gradients(dtype):
        weight.grad = gradient.float()
        optimizer.step()
    return weight.detach()


def relative_error(total: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    moved = expected - start(dtype).float()
    return ((total.float() - expected).norm() / moved.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"),
    [
        (torch.float32, "adamw", 1e-5),
        (torch.float32, "adamw-8bit", 0.05),
        (torch.bfloat16, "adamw", 0.05),
        (torch.bfloat16, "adamw-8bit", 0.05),
    ],
)
def test_many_small_updates_add_up_to_torchs(dtype: torch.dtype, kind: str, tolerance: float) -> None:
    weight = torch.nn.Parameter(start(dtype))
    optimizer = make_optimizer({"w": weight}, kind=kind, betas=BETAS, weight_decay=0.1)
    for gradient in gradients(dtype):
        weight.grad = gradient
        optimizer.step(RATE)
    total = weight.detach().float()
    if isinstance(optimizer, CompensatedAdamW):
        total = total + optimizer.lost["w"].float()
    assert relative_error(total, reference(dtype), dtype) < tolerance


def test_a_plain_bf16_update_is_lost() -> None:
    weight = torch.nn.Parameter(start(torch.bfloat16))
    optimizer = torch.optim.AdamW([weight], lr=RATE, betas=BETAS, weight_decay=0.1)
    for gradient in gradients(torch.bfloat16):
        weight.grad = gradient
        optimizer.step()
    error = relative_error(weight.detach(), reference(torch.bfloat16), torch.bfloat16)
    assert error > 0.5, "if this holds no more, compensation is no longer needed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_a_saved_optimizer_goes_on_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    def trained(break_at: int | None) -> Tensor:
        weight = torch.nn.Parameter(start(dtype))
        optimizer = make_optimizer({"w": weight}, kind=kind, betas=BETAS, weight_decay=0.1)
        for step, gradient in enumerate(gradients(dtype)[:20]):
            if step == break_at:
                saved = {name: value.clone() for name, value in optimizer.tensors().items()}
                weight = torch.nn.Parameter(weight.detach().clone())
                optimizer = make_optimizer({"w": weight}, kind=kind, betas=BETAS, weight_decay=0.1)
                optimizer.load(saved)
            weight.grad = gradient
            optimizer.step(RATE)
        return weight.detach()

    assert torch.equal(trained(None), trained(9))


@pytest.mark.parametrize(
    ("dtype", "kind", "expected_bytes"),
    [(torch.float32, "adamw", 8), (torch.bfloat16, "adamw", 10), (torch.bfloat16, "adamw-8bit", 4)],
)
def test_states_take_the_bytes_that_the_module_says(
    dtype: torch.dtype, kind: str, expected_bytes: int
) -> None:
    weight = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    optimizer = make_optimizer({"w": weight}, kind=kind, betas=BETAS, weight_decay=0.0)
    held_bytes = sum(tensor.nbytes for tensor in held_tensors(optimizer))
    assert held_bytes / weight.numel() == pytest.approx(expected_bytes, rel=0.02)


def rate(step: int, schedule: str) -> float:
    return learning_rate(step, steps=101, highest=1.0, schedule=schedule, warmup_steps=10, final_share=0.1)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_learning_rate_rises_and_falls_to_its_final_share(schedule: str) -> None:
    rates = [rate(step, schedule) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.55, abs=1e-6), "half-way, both are half-way"
    assert all(later <= earlier for earlier, later in pairwise(rates[10:]))


def test_a_constant_learning_rate_stays() -> None:
    assert {rate(step, "constant") for step in range(9, 101)} == {1.0}


def test_a_schedule_of_one_step_has_a_rate() -> None:
    alone = learning_rate(0, steps=1, highest=1.0, schedule="cosine", warmup_steps=0, final_share=0.1)
    assert alone == 1.0
