"""Every adapter method: against plain PEFT, and from the recipe to the proven export."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from test_closed_form import FULL, HALF, assert_near, compared
from test_dryrun import SETTING, config, counted
from test_estimate import CPU, build, folders, shape_of, values_of
from test_linear import BASES, RANK, TOLERANCE, Block, adapted, errors, frozen, inputs_of, outcome
from transformers import PreTrainedModel
from two_adapters import members_of

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.ia3 import use_typed_layers
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import Adapter, attach
from qadapt.adapters.pissa import add_starts, start_of
from qadapt.engine.linear import dense_weight
from qadapt.errors import BadRecipe, Unsupported
from qadapt.methods import METHODS, Method, said
from qadapt.model.load import load_base
from qadapt.model.original import original_weights
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.adapters import saved_bytes
from qadapt.plan.adapters import trainable as planned
from qadapt.plan.estimate import estimate_step
from qadapt.plan.inverse import most
from qadapt.plan.recipe_setting import setting_of
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.recipe import AdapterSection
from qadapt.recipe_file import check_recipe
from qadapt.shape import find_config, find_shape
from qadapt.train.dryrun import dry_run

if TYPE_CHECKING:
    from conftest import TinyModel

__all__ = ["folders"]  # a fixture
NAMES: tuple[Method, ...] = (
    "lora", "rslora", "loraplus", "dora", "pissa", "loftq", "adalora", "vera", "oft", "ia3",
)  # fmt: skip
"""Those that PEFT has."""
OTHERS = tuple(name for name in NAMES if name != "lora")
FREE = tuple(name for name in NAMES if not METHODS[name].mends_base)
"""Those that do not start from what quantizing took."""
HELD = [(name, held) for name in OTHERS for held in ("nf4", "none") if name in FREE or held != "none"]
"""Each of the others with each way in which its base may be held."""
FP32 = torch.float32


# --- what a layer computes --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_dora_in_fp32_is_plain_pefts(base: str, bias: bool) -> None:
    ours, plain = (
        adapted(base, (FP32, FP32), fused=each, bias=bias, use_dora=True, use_rslora=True)
        for each in (True, False)
    )
    for each in (ours, plain):
        magnitude = next(value for name, value in trainable(each).items() if "magnitude" in name)
        magnitude.data.abs_().add_(1)
    off = errors(outcome(ours, inputs_of(FP32)), outcome(plain, inputs_of(FP32)))
    assert max(off.values()) < 2 * TOLERANCE[FP32], off


@pytest.mark.parametrize("base", BASES)
def test_dora_in_bf16_is_near_fp32(base: str) -> None:
    ours = adapted(base, (torch.bfloat16, FP32), fused=True, use_dora=True)
    exact = adapted("plain", (FP32, FP32), fused=False, use_dora=True)
    source, target = (next(m for m in each.modules() if isinstance(m, LoraLayer)) for each in (ours, exact))
    target.get_base_layer().weight.data = dense_weight(source.get_base_layer(), FP32)
    for name, parameter in trainable(exact).items():
        mine = trainable(ours)[name]
        mine.data = mine.data.abs() + 1 if "magnitude" in name else mine.data
        parameter.data = mine.detach().clone()
    found = outcome(ours, inputs_of(torch.bfloat16))
    off = errors(found, outcome(exact, inputs_of(torch.bfloat16).detach().float().requires_grad_()))
    assert max(off.values()) < TOLERANCE[torch.bfloat16], off


def scaled(base: str, dtype: torch.dtype, *, is_input: bool, bias: bool, typed: bool) -> PeftModel:
    """A block with IA3, with layers as here or of stock PEFT, its factors random."""
    block = Block(frozen(base, dtype, bias=bias))
    block.is_loaded_in_4bit, block.is_loaded_in_8bit = "nf4" in base, base == "int8"
    names = ["projection"]
    made = get_peft_model(
        block, IA3Config(target_modules=names, feedforward_modules=names if is_input else [])
    )
    if typed:
        use_typed_layers(made)
    torch.manual_seed(2)
    for parameter in trainable(made).values():
        parameter.data = 1 + 0.2 * torch.randn(parameter.shape)
    return made.train()


@pytest.mark.parametrize("base", [each for each in BASES if each != "int8"])
@pytest.mark.parametrize(("is_input", "bias"), [(True, False), (True, True), (False, True)])
def test_ia3_in_fp32_is_plain_pefts(base: str, is_input: bool, bias: bool) -> None:
    ours, plain = (scaled(base, FP32, is_input=is_input, bias=bias, typed=each) for each in (True, False))
    off = errors(outcome(ours, inputs_of(FP32)), outcome(plain, inputs_of(FP32)))
    assert max(off.values()) < TOLERANCE[FP32], off


@pytest.mark.parametrize("base", BASES)
def test_ia3_in_bf16_is_near_fp32_and_stays_in_bf16(base: str) -> None:
    ours = scaled(base, torch.bfloat16, is_input=False, bias=False, typed=True)
    exact = scaled("plain", FP32, is_input=False, bias=False, typed=True)
    source, target = (next(m for m in each.modules() if hasattr(m, "ia3_l")) for each in (ours, exact))
    target.base_layer.weight.data = dense_weight(source.base_layer, FP32)
    found = outcome(ours, inputs_of(torch.bfloat16))
    assert found["output"].dtype is torch.bfloat16
    off = errors(found, outcome(exact, inputs_of(torch.bfloat16).detach().float().requires_grad_()))
    assert max(off.values()) < TOLERANCE[torch.bfloat16], off


@pytest.mark.parametrize("base", BASES)
def test_pissa_trains_the_principal_part_and_leaves_the_exact_residual(base: str) -> None:
    model = adapted(base, (FP32, FP32), fused=True, bias=True)
    torch.manual_seed(5)
    add_starts(model)
    layer = next(module for module in model.modules() if isinstance(module, LoraLayer))
    start, scale = start_of(layer), layer.scaling["default"]
    assert start is not None
    weight = dense_weight(layer.get_base_layer(), FP32)
    left, values, right = torch.linalg.svd(weight)
    best = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    found = scale * start.up @ start.down
    lost = torch.linalg.norm(weight - found) / torch.linalg.norm(weight - best)
    assert 1 <= lost < 1.01, "the principal part is not the largest"
    differences = {name: 0.1 * torch.randn(each.shape) for name, each in trainable(model).items()}
    for name, parameter in trainable(model).items():
        parameter.data = differences[name]
    a, b = differences.values()

    inputs = inputs_of(FP32)
    down, up = ((each.detach()).requires_grad_() for each in (start.down + a, start.up + b))
    residual = weight - found.detach()
    output = inputs @ residual.t() + scale * (inputs @ down.t()) @ up.t() + layer.get_base_layer().bias
    wanted = torch.linspace(-1, 1, output.numel()).view(output.shape)
    output.backward(wanted)
    naive = {"output": output.detach(), "inputs": inputs.grad, "a": down.grad, "b": up.grad}
    off = errors(dict(zip(naive, outcome(model, inputs_of(FP32)).values(), strict=True)), naive)
    assert max(off.values()) < 2 * TOLERANCE[FP32], off


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("method", FREE)
def test_the_first_pass_is_the_bases(
    method: Method, quantization: str, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = attached(method, tiny_model("qwen2"), quantization=quantization, dtype=dtype)
    ids = torch.arange(5, 25).unsqueeze(0)
    with torch.no_grad():
        found = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(found, model(input_ids=ids).logits)


def attached(
    method: Method, folder: Path, *, quantization: str = "nf4", dtype: torch.dtype = FP32, **options: Any
) -> PeftModel:
    base = base_of(folder, quantization=quantization, dtype=dtype)
    with original_weights(folder) as originals:
        members = members_of([base_of(folder) for _ in range(2)]) if METHODS[method].attends else ()
        adapter = Adapter(method, 4, 8, members=members)
        return attach(base, adapter, dtype=FP32, seed=0, originals=originals, **options).train()


def base_of(folder: Path, *, quantization: str = "nf4", dtype: torch.dtype = FP32) -> PreTrainedModel:
    return load_base(
        folder, quantization=quantization, double_quant=True, dtype=dtype, device=torch.device("cpu")
    )


# --- what is planned --------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "bf16", "adapter_dtype": "bf16"}])
@pytest.mark.parametrize("method", OTHERS)
def test_the_dry_run_of_a_method_is_its_step_to_the_byte(
    method: Method, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    rank = 8 if method == "oft" else SETTING.rank  # its blocks fill a layer
    setting = dataclasses.replace(SETTING, method=method, rank=rank, **changes)
    ledger, dry = counted(folders["llama"], setting), dry_run(config("llama"), setting)
    assert dry.peak == ledger.peak
    categories = estimate_step(shape_of("llama"), setting).categories
    for category in ("base_weights", "quantization_constants", "unquantized", "adapters", "optimizer"):
        assert dry.static[category] == categories[category], category


@pytest.mark.parametrize(
    ("model", "card", "changes"),
    [
        ("SmolLM2-360M", None, {"length": 300, "recompute": "none", **FULL}),
        ("Llama-3.2-1B", "T4", {"length": 3000, "recompute": 2, **HALF}),
        ("Llama-3.2-1B", "RTX 3090", {"length": 2000, "mlp_tiles": 4}),
        ("Llama-3.2-1B", "RTX 3090", {"length": 2000, "targets": ("k_proj", "v_proj", "down_proj")}),
        ("Qwen3-0.6B", "T4", {"rows": 2, "length": 512, "quantization": "none", **HALF}),
        ("gemma-2-2b", "T4", {"length": 1000, **HALF}),
        ("Phi-3-mini-4k-instruct", "RTX 3090", {"length": 512, "rank": 64}),
    ],
)
@pytest.mark.parametrize("method", ["dora", "pissa", "adalora", "vera", "oft", "ia3"])
def test_the_closed_form_of_a_method_is_its_dry_run_within_three_percent(
    method: Method, model: str, card: str | None, changes: dict[str, Any]
) -> None:
    found = compared(model, card, method=method, supervised_share=0.05, **changes)
    assert_near(found)


@pytest.mark.parametrize("method", NAMES)
def test_the_plan_counts_what_is_trained(method: Method, folders: dict[str, Path]) -> None:
    setting = dataclasses.replace(CPU, method=method, rank=4, targets=("q_proj", "down_proj"))
    model = build(folders["llama"], setting)
    assert sum(each.numel() for each in trainable(model).values()) == planned(shape_of("llama"), setting)
    assert values_of("llama")["num_hidden_layers"] == 3


def test_a_rank_16_adapter_of_a_7b_shape_is_written_in_bf16_in_as_many_bytes_as_planned(
    tmp_path: Path,
) -> None:
    name = "Mistral-7B-v0.1"
    values, bf16 = find_config(name).values, torch.bfloat16
    base = skeleton_base(values, quantization="none", double_quant=False, dtype=bf16)
    model = attach(base, Adapter("lora", 16, 32), dtype=bf16, seed=0)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factors in (layer.lora_A, layer.lora_B):
                factors.to_empty(device="cpu")
    facts = AdapterFacts(name, None, "", "nf4", True, "bf16", "")
    save_adapter(model, tmp_path / "adapter", facts=facts, tokenizer=cast(Any, None))
    file = tmp_path / "adapter/adapter_model.safetensors"
    with file.open("rb") as opened:
        header_bytes = 8 + int.from_bytes(opened.read(8), "little")
    shape = find_shape(name)
    assert file.stat().st_size - header_bytes == saved_bytes(shape, Setting()) == 83_886_080
    odd = Setting(method="houlsby", rank=50)
    assert saved_bytes(shape, odd) == 2 * planned(shape, odd), "a file is not rounded up as an allocation is"


# --- what is refused --------------------------------------------------------------------------------------


def test_a_field_that_means_nothing_to_a_method_is_refused_by_name() -> None:
    for method, field, value in (("ia3", "rank", 8), ("ia3", "alpha", 1.0), ("dora", "dropout", 0.1)):
        least = {"model": "m", "data": {"sources": [{"path": "p"}]}, "run": {"name": "n"}}
        with pytest.raises(BadRecipe, match=f"{field} = {value} means nothing to {METHODS[method].title}"):
            check_recipe({**least, "adapter": {"method": method, field: value}}, origin="the test")


def test_a_recipe_with_new_tokens_and_a_method_without_them_is_refused_before_anything_is_loaded() -> None:
    values = {"model": "m", "data": {"sources": [{"path": "p"}], "new_tokens": ["<a>"]}, "run": {"name": "n"}}
    for method, facts in METHODS.items():
        adapter = {"method": method} | ({"targets": ["one", "two"]} if facts.attends else {})
        recipe = {**values, "adapter": adapter}
        if facts.has_new_tokens:
            assert check_recipe(recipe, origin="the test").data.new_tokens == ("<a>",)
            continue
        with pytest.raises(
            BadRecipe, match=re.escape(f"with {facts.title} no rows of new tokens are trained")
        ):
            check_recipe(recipe, origin="the test")


def test_an_unknown_method_is_refused_with_the_list() -> None:
    least = {"model": "m", "data": {"sources": [{"path": "p"}]}, "run": {"name": "n"}}
    with pytest.raises(BadRecipe, match=r"adapter\.method") as refused:
        check_recipe({**least, "adapter": {"method": "lore"}}, origin="the test")
    assert all(name in str(refused.value) for name in NAMES)


def test_ia3_trains_no_new_tokens(tiny_model: TinyModel) -> None:
    with pytest.raises(Unsupported, match="with IA3 no rows of new tokens are trained") as refused:
        attached("ia3", tiny_model("llama"), new_ids=[300])
    assert "adapter.method=lora" in refused.value.cure


@pytest.mark.parametrize("method", NAMES)
def test_a_target_that_matches_nothing_is_refused_with_what_would(
    method: Method, tiny_model: TinyModel
) -> None:
    with pytest.raises(BadRecipe, match="qkv_proj matches no linear layer") as refused:
        attach(base_of(tiny_model("llama")), Adapter(method, 4, 8, targets=("qkv_proj",)), dtype=FP32, seed=0)
    assert "q_proj" in refused.value.cure


def test_every_method_has_a_title_and_a_source() -> None:
    assert set(METHODS) == set(get_args(Method)) >= set(NAMES)
    assert said("dora", 8) == "DoRA, rank 8"
    assert said("loraplus", 8) == "LoRA+, rank 8"
    assert said("ia3", 16) == "IA3"
    fields = AdapterSection.model_fields
    assert all(name in fields for facts in METHODS.values() for name in facts.unused)


def test_the_highest_rank_of_a_method_without_one_is_refused() -> None:
    question = dataclasses.replace(CPU, method="ia3")
    with pytest.raises(BadRecipe, match="IA3 has no rank") as refused:
        most(shape_of("llama"), question, what="rank", room=Room(1 << 40))
    assert "--max length" in refused.value.cure


def test_factors_near_one_are_fp32_unless_asked_otherwise() -> None:
    least = {"model": "m", "data": {"sources": [{"path": "p"}]}, "run": {"name": "n"}}
    for method, dtype, expected in (
        ("lora", "auto", "bf16"),
        ("dora", "auto", "fp32"),
        ("ia3", "auto", "fp32"),
        ("ia3", "bf16", "bf16"),
    ):
        recipe = check_recipe({**least, "adapter": {"method": method, "dtype": dtype}}, origin="the test")
        setting = setting_of(recipe, None, device="cuda", compute_dtype="bf16", adapter_dtype="bf16")
        assert setting.adapter_dtype == expected
