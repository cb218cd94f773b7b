"""Which layers recompute: exactly those asked for, and the same gradients, to the bit, whichever they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from peft import PeftModel
from transformers import GradientCheckpointingLayer, PreTrainedModel

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.engine.loss import loss_sum
from qadapt.engine.recompute import set_recompute
from qadapt.model.load import load_base
from qadapt.train.stored_plan import Ingredients, StoredPlan, read_plan

FAMILIES = ("llama", "gemma2", "phi3")


def base_of(folder: Path) -> PreTrainedModel:
    return load_base(
        folder, quantization="nf4", double_quant=True, dtype=torch.float32, device=torch.device("cpu")
    )


def gradients(base: PreTrainedModel) -> dict[str, torch.Tensor]:
    model: PeftModel = attach_lora(base, Lora(rank=4, alpha=8), dtype=torch.float32, seed=0).train()
    parameters = trainable(model)
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    ids = torch.randint(3, 90, (2, 23), generator=draw)
    loss_sum(
        model, input_ids=ids[:, :-1], positions=torch.arange(22), targets=ids[:, 1:]
    ).backward()
    return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_to_the_bit_whichever_layers_recompute(
    family: str, tiny_model: TinyModel
) -> None:
    kept = gradients(base_of(tiny_model(family, layers=4)))
    assert len(kept) > 4
    for recompute in ("none", 1, 3, "all"):
        base = base_of(tiny_model(family, layers=4))
        set_recompute(base, recompute)  # type: ignore[arg-type]
        found = gradients(base)
        assert found.keys() == kept.keys()
        assert all(torch.equal(found[name], kept[name]) for name in kept), recompute


@pytest.mark.parametrize(
    ("recompute", "flags"),
    [
        ("none", [False] * 4),
        (1, [True, False, False, False]),
        (3, [True, True, True, False]),
        ("all", [True] * 4),
    ],
)
def test_the_first_layers_recompute_and_run_twice(
    recompute: Any, flags: list[bool], tiny_model: TinyModel
) -> None:
    base = base_of(tiny_model("llama", layers=4))
    set_recompute(base, recompute)
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert [layer.gradient_checkpointing for layer in layers] == flags
    runs = [0] * len(layers)
    for place, layer in enumerate(layers):
        inner = next(module for name, module in layer.named_modules() if name == "mlp")

        def count(*_: object, place: int = place) -> None:
            runs[place] += 1

        inner.register_forward_pre_hook(count)  # before: the second run stops at the last value needed
    gradients(base)
    assert runs == [1 + recomputes for recomputes in flags]


def test_layers_are_not_renamed(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama", layers=4))
    names = [name for name, _ in base.named_modules()]
    set_recompute(base, 2)
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("recompute", ["all", "none", 2])
def test_a_stored_plan_keeps_which_layers_recompute(recompute: Any, tmp_path: Path) -> None:
    plan = StoredPlan(
        steps=1,
        device="cpu",
        micro_batch=1,
        recompute=recompute,
        compute_dtype="fp32",
        adapter_dtype="fp32",
        optimizer="adamw",
        predicted={},
        predicted_peak_bytes=0,
        budget_bytes=0,
        reasons=("because",),
        revision=None,
        ingredients=Ingredients("a", "b", "c"),
    )
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.values()), encoding="utf-8")
    assert read_plan(path) == plan
    assert plan.event().recompute == recompute
