"""Updates: equal to torch's AdamW, and not lost in bf16 (the naive way is the failing control)."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from test_methods import attached
from torch import Tensor

from qadapt.adapters.lora import trainable
from qadapt.adapters.rates import rate_ratios
from qadapt.methods import Method
from qadapt.recipe_file import check_recipe
from qadapt.running.model import optimizer_of
from qadapt.train.optimizer import AdapterOptimizer, CompensatedAdamW, held_tensors, make_optimizer
from qadapt.train.schedule import learning_rate

if TYPE_CHECKING:
    from conftest import TinyModel

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


# --- rates of their own ------------------------------------------------------------------------------------

RATIO = 16.0


def pair(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two parameters, the faster one named first."""
    return {
        name: torch.nn.Parameter(start(dtype)[rows])
        for name, rows in zip("ba", (slice(9, 67), slice(9)), strict=True)
    }


def stepped(optimizer: AdapterOptimizer, values: dict[str, Tensor], steps: range) -> None:
    for gradient in gradients(next(iter(values.values())).dtype)[steps.start : steps.stop]:
        values["b"].grad, values["a"].grad = gradient[9:].clone(), gradient[:9].clone()
        optimizer.step(RATE)


def of_pair(values: dict[str, Tensor], kind: str) -> AdapterOptimizer:
    return make_optimizer(values, kind=kind, betas=BETAS, weight_decay=0.1, ratios={"b": RATIO})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_a_parameter_with_its_own_rate_is_updated_as_if_alone_at_it(dtype: torch.dtype, kind: str) -> None:
    together = pair(dtype)
    stepped(of_pair(together, kind), together, range(20))
    for name, rate in (("a", RATE), ("b", RATIO * RATE)):
        alone = pair(dtype)[name]
        optimizer = make_optimizer({name: alone}, kind=kind, betas=BETAS, weight_decay=0.1)
        for gradient in gradients(dtype)[:20]:
            alone.grad = gradient[9:].clone() if name == "b" else gradient[:9].clone()
            optimizer.step(rate)
        assert torch.equal(together[name], alone), name
        assert not torch.equal(alone, pair(dtype)[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_what_weight_decay_spares_is_updated_as_without_it(dtype: torch.dtype, kind: str) -> None:
    together, huge = pair(dtype), 10.0
    optimizer = make_optimizer(together, kind=kind, betas=BETAS, weight_decay=huge, undecayed=["a"])
    stepped(optimizer, together, range(20))
    for name, decay in (("a", 0.0), ("b", huge)):
        alone = pair(dtype)[name]
        optimizer = make_optimizer({name: alone}, kind=kind, betas=BETAS, weight_decay=decay)
        for gradient in gradients(dtype)[:20]:
            alone.grad = gradient[9:].clone() if name == "b" else gradient[:9].clone()
            optimizer.step(RATE)
        assert torch.equal(together[name], alone), name


@pytest.mark.parametrize(
    ("method", "spared"),
    [
        ("ia3", {"default"}),
        ("dora", {"lora_magnitude_vector.default.weight"}),
        ("houlsby", {"down.bias", "up.bias"}),
        ("compacter", {"down.bias", "up.bias"}),
        ("ptuning", {"inner.bias", "outer.bias"}),
        ("prefix", {"bias"}),
        *((method, set()) for method in ("lora", "loraplus", "vera", "oft", "prompt", "prefix-flat")),
    ],
)
def test_a_run_spares_factors_and_biases(method: Method, spared: set[str], tiny_model: TinyModel) -> None:
    model = attached(method, tiny_model("llama"))
    least = {"model": "m", "data": {"sources": [{"path": "p"}]}, "run": {"name": "n"}}
    values = {**least, "adapter": {"method": method}, "train": {"weight_decay": 0.3}}
    recipe = check_recipe(values, origin="the test")
    optimizer = optimizer_of(recipe, cast(Any, SimpleNamespace(optimizer="adamw")), model)
    decays = {
        id(each): group["weight_decay"] for group in optimizer.inner.param_groups for each in group["params"]
    }
    for name, parameter in trainable(model).items():
        is_spared = any(name.endswith(f".{end}") for end in spared)
        assert decays[id(parameter)] == (0.0 if is_spared else 0.3), name
    assert (0.0 in decays.values()) == bool(spared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_a_saved_optimizer_with_two_rates_goes_on_bit_for_bit(dtype: torch.dtype, kind: str) -> None:
    straight, broken = pair(dtype), pair(dtype)
    stepped(of_pair(straight, kind), straight, range(20))
    first = of_pair(broken, kind)
    stepped(first, broken, range(9))
    second = of_pair(broken, kind)
    second.load({name: value.clone() for name, value in first.tensors().items()})
    stepped(second, broken, range(9, 20))
    assert all(torch.equal(straight[name], broken[name]) for name in straight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_step_of_two_rates_that_memory_ran_out_in_is_ended_by_the_next(
    dtype: torch.dtype, kind: str, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, halted = pair(dtype), pair(dtype)
    stepped(of_pair(straight, kind), straight, range(2))
    optimizer = of_pair(halted, kind)
    stepped(optimizer, halted, range(1))
    calls, step = [0], optimizer.inner.step

    def failing() -> None:
        calls[0] += 1
        if calls[0] == fails_at:
            raise torch.OutOfMemoryError("no room before this group")
        step()

    monkeypatch.setattr(optimizer.inner, "step", failing)
    with pytest.raises(torch.OutOfMemoryError):
        stepped(optimizer, halted, range(1, 2))
    assert len(optimizer.inner.param_groups) == 2
    optimizer.step(RATE)
    assert all(torch.equal(straight[name], halted[name]) for name in straight)
    assert all(
        torch.equal(value, optimizer.tensors()[name]) for name, value in of_state(straight, kind).items()
    )


def of_state(values: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    again = pair(next(iter(values.values())).dtype)
    optimizer = of_pair(again, kind)
    stepped(optimizer, again, range(2))
    return optimizer.tensors()


def test_lora_plus_is_pefts() -> None:
    torch.manual_seed(1)
    models = [
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, 9)), LoraConfig(r=3, target_modules=["0"]))
        for _ in "ab"
    ]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (trainable(model) for model in models)
    optimizer = make_optimizer(
        ours, kind="adamw", betas=BETAS, weight_decay=0.1, ratios=rate_ratios("loraplus", ours)
    )
    reference = create_loraplus_optimizer(
        models[1], torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, betas=BETAS
    )
    for _ in range(5):
        for name, parameter in ours.items():
            theirs[name].grad = torch.randn(parameter.shape)
            parameter.grad = theirs[name].grad.clone()
        optimizer.step(1e-2)
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-6, atol=1e-7)
    assert set(rate_ratios("lora", ours).values()) == set()
