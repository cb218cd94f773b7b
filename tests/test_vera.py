"""VeRA: against plain PEFT, what it keeps and holds, what it writes, and files that do not go together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from own_layers import (
    BF16,
    FP32,
    adapted_block,
    assert_near_fp32_in_bf16,
    assert_plain_pefts,
    assert_would_be_seen,
    kept_for_backward,
)
from peft import PeftModel, VeraConfig
from safetensors.torch import load_file, save_file
from test_estimate import CPU, build, folders, shape_of
from test_linear import BASES, INPUTS, RANK, inputs_of
from test_methods import attached, base_of
from torch import Tensor

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.frozen import projections_of
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import Adapter, attach
from qadapt.adapters.vera import ProjectedLinear, use_projected_layers
from qadapt.errors import BadExport, QadaptError, Unsupported
from qadapt.export.combine import combine
from qadapt.export.merge import merge
from qadapt.plan.adapters import adapter_bytes, start_bytes
from qadapt.plan.adapters import trainable as planned
from qadapt.plan.inverse import most
from qadapt.plan.room import Room
from qadapt.plan.setting import check_setting
from qadapt.train.memory import base_tensors

if TYPE_CHECKING:
    from conftest import TinyModel

__all__ = ["folders"]  # a fixture


def adapted(base: str, dtype: torch.dtype, *, bias: bool = False, ours: bool = True) -> PeftModel:
    """A block with VeRA, with layers as here or of stock PEFT, its vectors random."""
    config = VeraConfig(r=RANK, target_modules=["projection"], projection_prng_key=5)
    made = adapted_block(config, base, dtype, bias=bias)
    torch.manual_seed(2)
    for parameter in trainable(made).values():
        parameter.data = torch.randn(parameter.shape)
    if ours:
        use_projected_layers(made)
    return made.train()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_in_fp32_output_and_gradients_are_those_of_plain_peft(base: str, bias: bool) -> None:
    assert_plain_pefts(adapted, base, ProjectedLinear, bias=bias)


@pytest.mark.parametrize("base", BASES)
def test_in_bf16_it_is_near_fp32_and_stays_in_bf16(base: str) -> None:
    assert_near_fp32_in_bf16(adapted, base)


def test_a_wrong_vector_would_be_seen() -> None:
    assert_would_be_seen(adapted, "vera_lambda_d.default")


@pytest.mark.parametrize("base", BASES)
def test_of_a_layer_nothing_is_kept_but_the_values_between_the_projections(base: str) -> None:
    model, inputs = adapted(base, BF16), inputs_of(BF16)
    kept = kept_for_backward(model, inputs)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    more = [each for each in kept if each.untyped_storage().data_ptr() not in own]
    assert [tuple(each.shape) for each in more] == [(33, RANK)]
    assert inputs.shape[-1] == INPUTS


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_layers_share_the_projections_and_the_plan_counts_them_once(
    dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    setting = dataclasses.replace(CPU, method="vera", rank=7, adapter_dtype=dtype)
    shape, model = shape_of("llama"), build(folders["llama"], setting)
    held = projections_of(model)
    assert [tuple(each.shape) for each in held.values()] == [(7, 448), (448, 7)]
    assert sum(each.nbytes for each in held.values()) == start_bytes(shape, setting)
    trained = trainable(model)
    assert sum(each.nbytes for each in trained.values()) == adapter_bytes(shape, setting)
    assert sum(each.numel() for each in trained.values()) == planned(shape, setting)
    own = {id(each) for each in held.values()}
    of_base = base_tensors(model.get_base_model()).values()
    assert not any(id(each) in own for found in of_base for each in found)
    written = saved(model, folders["llama"], tmp_path / "adapter")
    in_all = adapter_bytes(shape, setting) + start_bytes(shape, setting)
    assert sum(each.nbytes for each in written.values()) == in_all


def test_the_rank_may_be_larger_than_a_layer_is_wide(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, wide = tiny_model("llama"), dataclasses.replace(CPU, method="vera", rank=80)
    model = attach(base_of(folder), Adapter("vera", 80, 1.0), dtype=FP32, seed=0)  # keys are 32 wide
    for parameter in trainable(model).values():
        parameter.data = torch.randn(parameter.shape)
    saved(model, folder, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(base_of(folder), tmp_path / "adapter")
    ids = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(model(input_ids=ids).logits, stock(input_ids=ids).logits, rtol=0, atol=2e-4)
    shape = shape_of("llama")
    check_setting(shape, wide)
    widest = max(max(each.inputs, each.outputs) for each in shape.linears)
    assert most(shape, wide, what="rank", room=Room(1 << 40)).value == widest > 80


def saved(model: PeftModel, base: Path, folder: Path) -> dict[str, Tensor]:
    facts = AdapterFacts(str(base), None, "", "nf4", True, "fp32", "")
    save_adapter(model, folder, facts=facts, tokenizer=None)  # type: ignore[arg-type]
    return load_file(folder / "adapter_model.safetensors")


def test_the_projections_are_drawn_by_the_seed_and_saved(tiny_model: TinyModel, tmp_path: Path) -> None:
    first, again = (projections_of(attached("vera", tiny_model("llama"))) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    written = saved(attached("vera", tiny_model("llama")), tiny_model("llama"), tmp_path / "adapter")
    assert torch.equal(written["base_model.vera_A"], first["vera_A.default"])
    assert torch.equal(written["base_model.vera_B"], first["vera_B.default"])


Q = "base_model.model.model.layers.0.self_attn.q_proj."
Damage = Callable[[dict[str, Tensor]], Any]
DAMAGES: dict[str, tuple[Damage, dict[str, Any], type[QadaptError], str]] = {
    "no projection": (lambda t: t.pop("base_model.vera_A"), {}, BadExport, "lacks a projection of VeRA's"),
    "a vector alone": (lambda t: t.pop(Q + "vera_lambda_d"), {}, BadExport, "only one of the two"),
    "another rank": (lambda t: None, {"r": 8}, BadExport, "adapter_config.json says rank 8"),
    "a short projection": (
        lambda t: t.update({"base_model.vera_B": torch.ones(5, 4)}), {}, BadExport, "projection has 5 rows"
    ),
    "a narrow projection": (
        lambda t: t.update({"base_model.vera_A": torch.ones(4, 63)}), {}, BadExport, r"is \(64, 63\) in"
    ),
    "no number": (lambda t: t[Q + "vera_lambda_b"].fill_(float("nan")), {}, BadExport, "NaN .*vera_lambda_b"),
    "projections to be drawn": (
        lambda t: None, {"save_projection": False}, Unsupported, "save_projection = False"
    ),
    "another method": (lambda t: None, {"peft_type": "IA3"}, BadExport, "says peft_type = 'IA3'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_parts_that_do_not_go_together_are_refused_by_name(
    case: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    change, values, error, message = DAMAGES[case]
    folder, adapter = tiny_model("llama"), tmp_path / "adapter"
    tensors = saved(attached("vera", folder), folder, adapter)
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text(encoding="utf-8")) | values
    config.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(error, match=message):
        list(merge(model_folder=folder, adapter_folder=adapter, target=tmp_path / "out", base="original"))


def test_a_sum_of_veras_is_no_vera_which_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, adapter = tiny_model("llama"), tmp_path / "adapter"
    saved(attached("vera", folder), folder, adapter)
    with pytest.raises(Unsupported, match="of VeRA, whose sums are no VeRA"):
        list(combine([(adapter, 0.5), (adapter, 0.5)], tmp_path / "sum"))
