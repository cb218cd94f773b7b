"""New tokens: their rows alone are trained, saved as PEFT's, merged; equal to a table trained whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_train import adapter_of, assert_same, only
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapt.adapters.lora import Lora, attach_lora, load_lora, save_adapter, trainable, without_adapter
from qadapt.adapters.new_rows import new_rows_of
from qadapt.data.prompt import load_contract
from qadapt.engine.loss import loss_sum
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadRecipe
from qadapt.events import AdapterAttached, StepDone, Warned
from qadapt.model.load import load_base
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import evaluate, export, load, resume, train

if TYPE_CHECKING:
    from conftest import TinyModel

CPU = torch.device("cpu")
FEW = ("<tool>", "<|call|>", "</tool>")
"""They find room in the 16 spare rows of a tiny model's table."""
MANY = tuple(f"<mark{number}>" for number in range(19))
"""They do not: 448 rows grow to 456."""
FAMILIES = ("llama", "gemma2")  # an own head, a tied one


def base_of(folder: Path, *, dtype: torch.dtype = torch.float32, quantization: str = "nf4") -> Any:
    return load_base(folder, quantization=quantization, double_quant=True, dtype=dtype, device=CPU)


def adapted(folder: Path, tokens: tuple[str, ...], *, dtype: torch.dtype = torch.float32) -> PeftModel:
    """An adapted base with new tokens; everything trained is away from its start."""
    ids = load_contract(folder, new_tokens=tokens).new_ids
    base = base_of(folder, dtype=dtype)
    model = attach_lora(base, Lora(rank=4, alpha=8), dtype=dtype, seed=0, new_ids=ids)
    draw = torch.Generator().manual_seed(1)
    for parameter in trainable(model).values():
        parameter.data += torch.randn(parameter.shape, generator=draw).to(dtype) * 0.1
    return model


def some_ids(model: torch.nn.Module, *, seed: int = 2) -> torch.Tensor:
    """(3, 23) ids, about a third of them new ones."""
    draw = torch.Generator().manual_seed(seed)
    new = torch.tensor(next(iter(new_rows_of(model).values())).ids)
    old = torch.randint(3, 400, (3, 23), generator=draw)
    chosen = new[torch.randint(0, len(new), (3, 23), generator=draw)]
    return torch.where(torch.rand((3, 23), generator=draw) < 0.35, chosen, old)


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def whole_table_reference(model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and gradients of the new rows where embedding and head are trained whole, without hooks."""
    base, found = model.get_base_model(), new_rows_of(model)
    tables = {name: model.get_submodule(name).weight for name in found}
    for name, table in tables.items():
        rows = found[name]
        table.data[rows.ids.start : rows.ids.stop] = rows.weight.detach()
        table.requires_grad_(True)
        rows.is_on = False
    output = base(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(output.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    gradients = {"loss": loss.detach()}
    for name, table in tables.items():
        assert table.grad is not None
        gradients[name] = table.grad[found[name].ids.start : found[name].ids.stop]
    return gradients


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["spare", "grown"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_the_new_rows_is_that_of_whole_tables(
    tiny_model: TinyModel, family: str, tokens: tuple[str, ...], recompute: Any
) -> None:
    model = adapted(tiny_model(family), tokens).train()
    set_recompute(model.get_base_model(), recompute)
    ids = some_ids(model)
    loss = loss_sum(
        model, input_ids=ids, positions=torch.arange(22), targets=ids[:, 1:], ignored=-100
    )
    loss.backward()
    mine = {name: rows.weight.grad for name, rows in new_rows_of(model).items()}
    lora = {name: p.grad for name, p in trainable(model).items() if "lora_" in name}
    assert len(mine) == (1 if family == "gemma2" else 2)
    for parameter in trainable(model).values():
        parameter.grad = None
    reference = whole_table_reference(model, ids)
    assert torch.allclose(loss, reference["loss"], rtol=1e-6)
    for name, gradient in mine.items():
        assert gradient is not None and gradient.any()
        assert torch.allclose(gradient, reference[name], rtol=1e-4, atol=1e-5 * gradient.abs().max()), name
    for name, gradient in lora.items():
        now = trainable(model)[name].grad
        assert torch.allclose(gradient, now, rtol=1e-4, atol=1e-5 * now.abs().max()), name
