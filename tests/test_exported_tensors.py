"""Tensors of exports in 4 bits and in GGUF, as a model that runs sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qadapt.errors import BadModel
from qadapt.events import Event
from qadapt.export.exported_tensors import exported_tensors, open_written
from qadapt.export.quantized import STATE
from qadapt.export.streamed_model import StreamedModel

if TYPE_CHECKING:
    from conftest import TinyModel


def saved_in_4_bits(source: Path, folder: Path) -> torch.nn.Module:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model


def test_a_checkpoint_in_4_bits_is_what_bitsandbytes_makes_of_it(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    model = saved_in_4_bits(tiny_model("llama"), tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    ids = torch.arange(20)[None] * 7 % 300
    with exported_tensors(tmp_path, "bnb-4bit", model_folder=tiny_model("llama")) as (config, tensors):
        seen = 0
        for name, module in model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = False  # it would compute in bf16
                exact = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
                assert torch.equal(tensors.read(f"{name}.weight", 0, len(exact)).float(), exact)
                assert torch.equal(tensors.read(f"{name}.weight", 3, 5).float(), exact[3:5])
                seen += 1
        assert seen == 14
        streamed = StreamedModel(config, tensors, device=torch.device("cpu"))
        hidden: list[torch.Tensor] = []

        def whole() -> Iterator[Event]:
            hidden.extend((yield from streamed.hidden_states([ids])))

        list(whole())
        logits = streamed.logits(hidden[0][0])
    with torch.no_grad():
        wanted = model(input_ids=ids).logits[0]
    assert torch.allclose(logits, wanted, atol=1e-4)


@pytest.mark.parametrize("said", [b"{", b"[]", b"{}", b"\xff"])
def test_damaged_constants_of_4_bits_are_named(tmp_path: Path, tiny_model: TinyModel, said: bytes) -> None:
    saved_in_4_bits(tiny_model("llama"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    name = f"{weight}.{STATE}"
    tensors[name] = torch.frombuffer(bytearray(said.ljust(len(tensors[name]))), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(BadModel, match=f"4 bits of {weight} is damaged"),
        open_written(tmp_path, "bnb-4bit", model_folder=tiny_model("llama")),
    ):
        pytest.fail("it was read")
