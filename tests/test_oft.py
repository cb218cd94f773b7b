"""OFT: against plain PEFT, what it keeps, and files and blocks that do not go together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
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
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_estimate import CPU, build, folders, shape_of
from test_linear import BASES, inputs_of
from test_methods import attached, base_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import Adapter, attach, load_adapter
from qadapt.adapters.oft import RotatedLinear, use_rotated_layers
from qadapt.adapters.peft_effects import peft_effects
from qadapt.adapters.swap import Swap
from qadapt.engine.rotation import beyond_identity, block_of
from qadapt.errors import BadExport, BadRecipe, QadaptError, Unsupported
from qadapt.export.combine import combine
from qadapt.export.merge import merge
from qadapt.plan.adapters import adapter_bytes
from qadapt.plan.adapters import trainable as planned
from qadapt.plan.inverse import most
from qadapt.plan.room import Room
from qadapt.plan.setting import check_setting

if TYPE_CHECKING:
    from conftest import TinyModel

__all__ = ["folders"]  # a fixture
WIDTH = 12
IDS = torch.arange(3, 43).view(2, 20)


def adapted(base: str, dtype: torch.dtype, *, bias: bool = False, ours: bool = True) -> PeftModel:
    """A block with OFT, with layers as here or of stock PEFT, its angles random."""
    config = OFTConfig(oft_block_size=WIDTH, target_modules=["projection"])
    made = adapted_block(config, base, dtype, bias=bias)
    torch.manual_seed(2)
    for parameter in trainable(made).values():
        parameter.data = 0.05 * torch.randn(parameter.shape)
    if ours:
        use_rotated_layers(made)
    return made.train()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_in_fp32_output_and_gradients_are_those_of_plain_peft(base: str, bias: bool) -> None:
    assert_plain_pefts(adapted, base, RotatedLinear, bias=bias)


@pytest.mark.parametrize("base", BASES)
def test_in_bf16_it_is_near_fp32_and_stays_in_bf16(base: str) -> None:
    assert_near_fp32_in_bf16(adapted, base)


@pytest.mark.parametrize(
    ("way", "is_ours"),
    [
        ({"use_cayley_neumann": False}, False),
        ({"num_cayley_neumann_terms": 7}, False),
        ({"coft": True, "eps": 0.5}, False),
        ({"block_share": True}, False),
        ({"oft_block_size": 0, "r": 16}, True),
    ],
    ids=str,
)
def test_a_strangers_rotations_are_those_of_plain_peft(
    way: dict[str, Any], is_ours: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, theirs = tiny_model("llama"), tmp_path / "theirs"
    plain = partial(base_of, folder, quantization="none")
    names = ["q_proj", "v_proj"]
    config = OFTConfig(target_modules=names, task_type="CAUSAL_LM", **{"oft_block_size": 8, **way})
    stranger = get_peft_model(plain(), config)
    torch.manual_seed(2)
    for parameter in trainable(stranger).values():
        parameter.data = 0.2 * torch.randn(parameter.shape)
    stranger.save_pretrained(theirs)
    wanted = stranger(input_ids=IDS).logits
    ours = load_adapter(plain(), theirs)
    assert any(isinstance(module, RotatedLinear) for module in ours.modules()) == is_ours
    torch.testing.assert_close(ours(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)
    with ours.disable_adapter():
        assert (ours(input_ids=IDS).logits - wanted).abs().max() > 0.1, "a control"
    if not is_ours:
        with pytest.raises(Unsupported, match="its rotations are not made as here"):
            peft_effects(plain(), theirs)
        return
    swap = Swap(plain())
    swap.add("theirs", theirs)
    swap.use("theirs")
    torch.testing.assert_close(swap(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)
    told: dict[str, Any] = {"base": "original", "form": "merged-fp32"}
    list(merge(model_folder=folder, adapter_folder=theirs, target=tmp_path / "out", **told))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=0, atol=2e-5)


def test_a_wrong_angle_would_be_seen() -> None:
    assert_would_be_seen(adapted, "oft_R.default.weight")


def test_rotations_of_small_angles_keep_lengths_and_of_larger_ones_as_is_said() -> None:
    angles = 0.1 * torch.randn(3, 66, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows, columns = torch.triu_indices(12, 12, 1)
    skew = torch.zeros(3, 12, 12, dtype=torch.float64)
    skew[:, rows, columns] = angles
    theta = torch.linalg.svdvals(skew - skew.mT)
    turned = torch.eye(12, dtype=torch.float64) + beyond_identity(angles, block=12)
    torch.testing.assert_close(torch.linalg.svdvals(turned), (1 - theta**4).sort(descending=True).values)
    assert theta.max() > 0.5
    small = torch.eye(12, dtype=torch.float64) + beyond_identity(angles / 10, block=12)
    assert (small @ small.mT - torch.eye(12, dtype=torch.float64)).abs().max() < 1e-4
    assert [block_of(size * (size - 1) // 2) for size in range(2, 200)] == list(range(2, 200))


@pytest.mark.parametrize("base", BASES)
def test_of_a_layer_nothing_is_kept_but_its_inputs(base: str) -> None:
    model, inputs = adapted(base, BF16), inputs_of(BF16)
    kept = kept_for_backward(model, inputs)
    own = {parameter.untyped_storage().data_ptr() for parameter in [inputs, *model.parameters()]}
    assert kept
    assert all(each.untyped_storage().data_ptr() in own for each in kept)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_plan_counts_the_angles(dtype: str, folders: dict[str, Path]) -> None:
    setting = dataclasses.replace(CPU, method="oft", rank=16, adapter_dtype=dtype)
    trained = trainable(build(folders["llama"], setting))
    assert sum(each.nbytes for each in trained.values()) == adapter_bytes(shape_of("llama"), setting)
    assert sum(each.numel() for each in trained.values()) == planned(shape_of("llama"), setting)


def test_blocks_that_do_not_fill_a_layer_are_refused_with_those_that_would(tiny_model: TinyModel) -> None:
    base = base_of(tiny_model("llama"))
    for block, problem in ((7, "no whole number of such blocks"), (1, "nothing to turn")):
        with pytest.raises(BadRecipe, match=problem) as refused:
            attach(base, Adapter("oft", block, 8), dtype=FP32, seed=0)
        assert "to one of 2, 4, 8" in refused.value.cure
        with pytest.raises(BadRecipe, match=problem):
            check_setting(shape_of("llama"), dataclasses.replace(CPU, method="oft", rank=block))
    with pytest.raises(BadRecipe, match="OFT's blocks"):
        question = dataclasses.replace(CPU, method="oft", rank=16)
        most(shape_of("llama"), question, what="rank", room=Room(1 << 40))


Q = "base_model.model.model.layers.0.self_attn.q_proj."
Damage = Callable[[dict[str, Tensor]], Any]
DAMAGES: dict[str, tuple[Damage, dict[str, Any], type[QadaptError], str]] = {
    "another block": (lambda t: None, {"oft_block_size": 8}, BadExport, "says oft_block_size 8"),
    "too few blocks": (
        lambda t: t.update({Q + "oft_R.weight": torch.ones(15, 6)}), {}, BadExport, r"is \(64, 60\) in"
    ),
    "no number": (lambda t: t[Q + "oft_R.weight"].fill_(float("nan")), {}, BadExport, "NaN .*oft_R"),
    "exact rotations": (lambda t: None, {"use_cayley_neumann": False}, Unsupported, "neumann = False"),
    "shared blocks": (lambda t: None, {"block_share": True}, Unsupported, "block_share = True"),
    "another method": (lambda t: None, {"peft_type": "IA3", "r": 8}, BadExport, "says peft_type = 'IA3'"),
}  # fmt: skip


def saved(folder: Path, adapter: Path) -> dict[str, Tensor]:
    facts = AdapterFacts(str(folder), None, "", "nf4", True, "fp32", "")
    save_adapter(attached("oft", folder), adapter, facts=facts, tokenizer=None)  # type: ignore[arg-type]
    return load_file(adapter / "adapter_model.safetensors")


@pytest.mark.parametrize("case", DAMAGES)
def test_parts_that_do_not_go_together_are_refused_by_name(
    case: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    change, values, error, message = DAMAGES[case]
    folder, adapter = tiny_model("llama"), tmp_path / "adapter"
    tensors = saved(folder, adapter)
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = adapter / "adapter_config.json"
    written = json.loads(config.read_text(encoding="utf-8")) | values
    config.write_text(json.dumps(written), encoding="utf-8")
    with pytest.raises(error, match=message):
        list(merge(model_folder=folder, adapter_folder=adapter, target=tmp_path / "out", base="original"))


def test_rotations_have_no_sum_which_is_said(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, adapter = tiny_model("llama"), tmp_path / "adapter"
    saved(folder, adapter)
    parts = [(adapter, 0.5), (adapter, 0.5)]
    with pytest.raises(Unsupported, match=r"turns weights \(OFT\)"):
        list(combine(parts, tmp_path / "sum"))
    with pytest.raises(Unsupported, match=r"turns weights \(OFT\)"):
        list(merge(model_folder=folder, adapter_folder=parts, target=tmp_path / "out"))
