"""The merged numbers against PEFT's own merge, bit by bit of the 4-bit round trip, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from hypothesis import given, settings
from hypothesis import strategies as some
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.errors import BadExport, BadRecipe, BadRun, Unsupported
from qadapt.events import Exported, StageAdvanced, StageStarted
from qadapt.export.merge import FORMS, merge
from qadapt.export.nf4 import dequantized_rows, row_grid
from qadapt.export.writing import Writing
from qadapt.model.load import load_base

CPU = torch.device("cpu")
UGLY = Writing(shard_bytes=150_000, chunk_bytes=12_000)
"""Several shards; chunks that divide no tensor evenly."""


def facts(load_dtype: str = "fp32", *, quantization: str = "nf4", double_quant: bool = True) -> AdapterFacts:
    return AdapterFacts("tiny", None, "f" * 64, quantization, double_quant, load_dtype, "p" * 64)


def make_adapter(model: PreTrainedModel, folder: Path, *, seed: int = 1, **options: Any) -> PeftModel:
    """A LoRA with both factors random, saved as PEFT saves it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    write_facts(facts(), folder)
    return adapted.eval()


def merged(model_folder: Path, adapter_folder: Path, target: Path, **options: Any) -> list[Any]:
    return list(merge(model_folder=model_folder, adapter_folder=adapter_folder, target=target, **options))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(40).view(2, 20) * 7 % 300
    with torch.no_grad():
        return model(input_ids=tokens).logits.float()


def assert_one_rounding(written: torch.Tensor, exact: torch.Tensor, name: str) -> None:
    """The reference rounded once; a near tie may fall the other way where fp32 sums differ in a last bit."""
    rounded = exact.to(written.dtype)
    unequal = written != rounded
    assert unequal.float().mean() <= 1e-3, name
    epsilon = torch.finfo(written.dtype).eps
    assert torch.allclose(written.double(), exact.double(), rtol=epsilon * 0.51, atol=1e-7), name


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            make_tiny_model(root / family, family)
        return root / family

    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_on_the_original_base_is_the_reference_rounded_once(tiny, tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32)
    adapted = make_adapter(model, tmp_path / "adapter")
    live = logits(adapted)
    reference = adapted.merge_and_unload().state_dict()
    merged(tiny(family), tmp_path / "adapter", tmp_path / "out", base="original", writing=UGLY)
    written, source = tensors_of(tmp_path / "out"), tensors_of(tiny(family))
    assert list(written) == list(source) and len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, value in written.items():
        assert value.dtype is torch.float16
        assert_one_rounding(value, reference[name], name)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype is torch.float16
    assert torch.allclose(logits(loaded.float()), live, atol=0.02)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_merge_on_the_dequantized_base_is_the_live_model(tiny, tmp_path, family, double_quant):
    base = load_base(
        tiny(family), quantization="nf4", double_quant=double_quant, dtype=torch.float32, device=CPU
    )
    adapted = make_adapter(base, tmp_path / "adapter")
    write_facts(facts(double_quant=double_quant), tmp_path / "adapter")
    live = logits(adapted)
    merged(tiny(family), tmp_path / "adapter", tmp_path / "out", form="merged-fp32", writing=UGLY)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded), live, atol=2e-5)


def test_merge_on_the_dequantized_base_in_fp16_gives_nearly_the_live_logits(tiny, tmp_path):
    base = load_base(tiny("llama"), quantization="nf4", double_quant=True, dtype=torch.float32, device=CPU)
    adapted = make_adapter(base, tmp_path / "adapter")
    merged(tiny("llama"), tmp_path / "adapter", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(adapted), atol=5e-3)


@pytest.mark.parametrize("load_dtype", ["bf16", "fp16"])
def test_base_is_taken_in_the_type_it_was_loaded_in(tiny, tmp_path, load_dtype):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[load_dtype]
    base = load_base(tiny("llama"), quantization="nf4", double_quant=True, dtype=dtype, device=CPU)
    adapted = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_facts(facts(load_dtype), tmp_path / "adapter")
    merged(tiny("llama"), tmp_path / "adapter", tmp_path / "out", form="merged-fp32", writing=UGLY)
    written = tensors_of(tmp_path / "out")
    for name, module in adapted.get_base_model().model.named_modules():
        if isinstance(module, torch.nn.Linear) and "k_proj" in name:
            held = bnb.dequantize_4bit(module.weight, module.weight.quant_state)
            assert torch.equal(written[f"model.{name}.weight"], held.float())
    head = adapted.get_base_model().lm_head.weight
    assert torch.equal(written["lm_head.weight"], head.float())


def test_base_that_was_not_quantized_is_merged_as_it_is(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen2"), dtype=torch.float32)
    adapted = make_adapter(model, tmp_path / "adapter")
    write_facts(facts(quantization="none"), tmp_path / "adapter")
    reference = adapted.merge_and_unload().state_dict()
    merged(tiny("qwen2"), tmp_path / "adapter", tmp_path / "out", form="merged-bf16")
    for name, value in tensors_of(tmp_path / "out").items():
        assert value.dtype is torch.bfloat16
        assert_one_rounding(value, reference[name], name)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\.down_proj": 3}, "alpha_pattern": {"v_proj": 33}},
        {"target_modules": ["q_proj", "lm_head"], "lora_alpha": 0.7},
    ],
    ids=["rslora", "patterns", "head"],
)
def test_every_kind_of_lora_is_the_reference(tiny, tmp_path, options):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    adapted = make_adapter(model, tmp_path / "adapter", **options)
    reference = adapted.merge_and_unload().state_dict()
    merged(tiny("llama"), tmp_path / "adapter", tmp_path / "out", form="merged-fp32", base="original")
    for name, value in tensors_of(tmp_path / "out").items():
        assert torch.allclose(value, reference[name], rtol=1e-6, atol=1e-7), name


@settings(max_examples=40, deadline=None)
@given(
    rows=some.integers(1, 90),
    columns=some.sampled_from([64, 128, 192, 576, 5, 33, 123]),
    dtype=some.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    double_quant=some.booleans(),
    grids=some.integers(1, 3),
    seed=some.integers(0, 9),
)
def test_round_trip_in_chunks_is_bitsandbytes_bit_for_bit(rows, columns, dtype, double_quant, grids, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    packed, state = bnb.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
    if columns % 2:  # an odd width makes bitsandbytes compile; one long row is the same values
        count = weight.numel() + weight.numel() % 2
        state.shape = torch.Size((1, count))
    reference = bnb.dequantize_4bit(packed, state).reshape(-1)[: weight.numel()].view(rows, columns)
    assert torch.equal(round_trip(weight, double_quant, chunk_rows=grids * row_grid(columns)), reference)


def test_round_trip_is_right_where_bitsandbytes_on_a_cpu_may_not_be():
    weight = torch.randn(130, 48, generator=torch.Generator().manual_seed(0))
    levels = bnb.get_4bit_type("nf4", device="cpu")
    padded = torch.nn.functional.pad(weight.view(-1), (0, -weight.numel() % 64)).view(-1, 64)
    scales = padded.abs().amax(1, keepdim=True)
    nearest = (padded / scales).unsqueeze(-1).sub(levels).abs().argmin(-1)
    reference = (levels[nearest] * scales).view(-1)[: weight.numel()].view(130, 48)
    assert torch.allclose(round_trip(weight, False, chunk_rows=row_grid(48)), reference)


def round_trip(weight: torch.Tensor, double_quant: bool, *, chunk_rows: int) -> torch.Tensor:
    rows, columns = weight.shape
    stored = dequantized_rows(
        lambda first, last: weight[first:last],
        shape=(rows, columns), dtype=weight.dtype, double_quant=double_quant, chunk_rows=chunk_rows,
    )  # fmt: skip
    return torch.cat([stored(first, min(first + chunk_rows, rows)) for first in range(0, rows, chunk_rows)])


def test_progress_counts_every_byte_once(tiny, tmp_path):
    make_adapter(AutoModelForCausalLM.from_pretrained(tiny("phi3")), tmp_path / "adapter")
    first, *middle, last = merged(tiny("phi3"), tmp_path / "adapter", tmp_path / "out")
    assert isinstance(first, StageStarted) and isinstance(last, Exported)
    assert all(isinstance(event, StageAdvanced) for event in middle)
    assert [event.done for event in middle] == sorted({event.done for event in middle})
    assert middle[-1].done == middle[-1].total == sum(t.nbytes for t in tensors_of(tmp_path / "out").values())
    assert last.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert (last.form, last.base, last.folder) == ("merged-fp16", "dequantized", str(tmp_path / "out"))


def test_merge_leaves_the_number_of_threads_as_it_was(tiny, tmp_path, llama_adapter):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for _ in merge(model_folder=tiny("llama"), adapter_folder=llama_adapter, target=tmp_path / "out"):
        assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.fixture
def llama_adapter(tiny, tmp_path) -> Path:
    make_adapter(AutoModelForCausalLM.from_pretrained(tiny("llama")), tmp_path / "adapter")
    return tmp_path / "adapter"


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")


def change_config(adapter: Path, **values: Any) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | values), encoding="utf-8")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
REFUSED_TENSORS = {
    "unknown name": (
        lambda t: t.update({"base_model.model.model.layers.9.x_proj.lora_A.weight": torch.zeros(4, 64),
                            "base_model.model.model.layers.9.x_proj.lora_B.weight": torch.zeros(64, 4)}),
        BadExport, "model.layers.9.x_proj.weight, which the base",
    ),
    "another width": (
        lambda t: t.update({Q + "A.weight": torch.zeros(4, 65)}),
        BadExport, r"\(64, 65\) in the adapter and \(64, 64\)",
    ),
    "NaN": (lambda t: t[Q + "B.weight"].view(-1)[3:4].fill_(float("nan")), BadExport, f"NaN .*{Q}B.weight"),
    "half a pair": (lambda t: t.pop(Q + "B.weight"), BadExport, "only one of the two matrices of model"),
    "another rank": (lambda t: t.update({Q + "A.weight": torch.zeros(5, 64)}), BadExport, "says rank 4"),
    "more than pairs": (
        lambda t: t.update({Q + "magnitude_vector": torch.zeros(64)}),
        BadExport, r"has a magnitude of .*q_proj; .* use_dora = False",
    ),
    "nothing": (lambda t: t.clear(), BadExport, "is empty"),
    "overflow": (lambda t: t[Q + "A.weight"].fill_(1e7), BadExport, r"q_proj.weight reaches .*F16 ends"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_adapter_that_would_merge_wrong_is_refused_by_name(tiny, tmp_path, llama_adapter, case):
    change, error, message = REFUSED_TENSORS[case]
    change_tensors(llama_adapter, change)
    with pytest.raises(error, match=message):
        merged(tiny("llama"), llama_adapter, tmp_path / "exports" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_qalora": True}, "use_qalora = True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = "),
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ],
)
def test_adapter_of_another_kind_is_refused_by_name(tiny, tmp_path, llama_adapter, values, message):
    change_config(llama_adapter, **values)
    with pytest.raises(Unsupported, match=message):
        merged(tiny("llama"), llama_adapter, tmp_path / "out")


def test_overflow_in_fp16_is_cured_by_bf16(tiny, tmp_path, llama_adapter):
    change_tensors(llama_adapter, REFUSED_TENSORS["overflow"][0])
    with pytest.raises(BadExport) as refused:
        merged(tiny("llama"), llama_adapter, tmp_path / "out")
    assert "merged-bf16" in refused.value.cure
    merged(tiny("llama"), llama_adapter, tmp_path / "out", form="merged-bf16")
    assert set(FORMS) == {"merged-fp16", "merged-bf16", "merged-fp32"}


def test_base_with_a_nan_is_refused(tmp_path, llama_adapter):
    model = make_tiny_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][5] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadExport, match=r"model\.norm\.weight has a number that is NaN"):
        merged(model, llama_adapter, tmp_path / "out", base="original")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", None), ("r", 0), ("r", "4"), ("lora_alpha", None), ("lora_alpha", "six"), ("rank_pattern", [1]),
        ("lora_alpha", float("inf")), ("lora_alpha", float("nan")), ("alpha_pattern", {"q_proj": 1e999}),
        ("rank_pattern", {"q_proj(": 4}), ("alpha_pattern", {"q_proj": "6"}), ("modules_to_save", "lm_head"),
        ("bias", 1), ("trainable_token_indices", [3, -1]), ("trainable_token_indices", {"lm_head": [2, 2]}),
        ("peft_type", []),
    ],
)  # fmt: skip
def test_damaged_configuration_of_an_adapter_is_refused_by_its_field(
    tiny, tmp_path, llama_adapter, field, value
):
    change_config(llama_adapter, **{field: value})
    with pytest.raises(BadRun, match=f"no configuration of an adapter: {field} is"):
        merged(tiny("llama"), llama_adapter, tmp_path / "out", base="original")
    (llama_adapter / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BadRun, match="it is no JSON object"):
        merged(tiny("llama"), llama_adapter, tmp_path / "out", base="original")


def test_weight_of_a_type_that_is_not_merged_is_not_left_as_it_was(tmp_path, llama_adapter):
    model = make_tiny_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].double()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Unsupported, match=r"q_proj\.weight, which is of the type F64"):
        merged(model, llama_adapter, tmp_path / "out", base="original")


def test_dequantized_base_needs_to_know_how_the_base_was_held(tiny, tmp_path, llama_adapter):
    (llama_adapter / "qadapt.json").unlink()
    with pytest.raises(BadRun, match=r"qadapt\.json"):
        merged(tiny("llama"), llama_adapter, tmp_path / "out")
    merged(tiny("llama"), llama_adapter, tmp_path / "out", base="original")


@pytest.mark.parametrize(("option", "value"), [("form", "merged-fp8"), ("base", "auto")])
def test_unknown_form_or_base_lists_the_known_ones(tiny, tmp_path, llama_adapter, option, value):
    with pytest.raises(BadRecipe, match=f"{option} '{value}'") as refused:
        merged(tiny("llama"), llama_adapter, tmp_path / "out", **{option: value})
    assert "Choose from: " in refused.value.cure


def test_folder_without_an_adapter_is_refused(tiny, tmp_path):
    with pytest.raises(BadRun, match="holds no adapter"):
        merged(tiny("llama"), tmp_path, tmp_path / "out")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}', encoding="utf-8")
    with pytest.raises(BadRun, match=r"has no adapter_model\.safetensors"):
        merged(tiny("llama"), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_on_a_base_in_8_bits_is_the_live_model(tiny, tmp_path, family):
    base = load_base(tiny(family), quantization="int8", double_quant=True, dtype=torch.float32, device=CPU)
    adapted = make_adapter(base, tmp_path / "adapter")
    write_facts(facts(quantization="int8"), tmp_path / "adapter")
    live = logits(adapted)
    merged(tiny(family), tmp_path / "adapter", tmp_path / "out", form="merged-fp32", writing=UGLY)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(loaded), live, atol=2e-5)


@pytest.mark.parametrize("load_dtype", ["bf16", "fp16", "fp32"])
def test_the_8_bit_round_trip_is_bit_for_bit_what_the_run_held(tiny, tmp_path, load_dtype):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[load_dtype]
    base = load_base(tiny("llama"), quantization="int8", double_quant=True, dtype=dtype, device=CPU)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    write_facts(facts(load_dtype, quantization="int8"), tmp_path / "adapter")
    merged(tiny("llama"), tmp_path / "adapter", tmp_path / "out", form="merged-fp32", writing=UGLY)
    written, compared = tensors_of(tmp_path / "out"), 0
    for name, module in base.model.named_modules():
        if isinstance(module, Linear8bitLt) and "q_proj" not in name:
            steps, largest = module.weight.data, module.weight.SCB
            held = (steps.float() * (largest / 127).unsqueeze(1)).to(dtype).float()
            compared += torch.equal(written[f"model.{name}.weight"], held)
    assert compared == 2 * 6, "every projection of both layers but the adapted one"
