"""The merged numbers against PEFT's own merge, bit by bit of the 4-bit round trip, and every refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_model import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.errors import BadExport, BadRecipe, BadRun, Unsupported
from qadapt.events import Exported, StageAdvanced, StageStarted
from qadapt.export.merge import FORMS, Writing, merge
from qadapt.export.nf4 import dequantized_rows, row_grid
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
    adapted.save_pretrained(str(folder))
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
    """Equal to the reference rounded once; a tie may fall the other way where fp32 sums differ in a last bit."""
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
