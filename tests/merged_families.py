"""Tiny models of all architectures that are merged: `tiny_model.py`'s, and two that are not trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm2", "gemma2", "gemma3_text", "smollm3")
TIED = ("smollm2", "gemma2", "gemma3_text", "smollm3")
_TOKENIZER_OF = {"gemma3_text": "gemma2", "smollm3": "smollm2"}
_SAME = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "smollm3": {"no_rope_layers": [1, 0]},
}


def make_family(folder: Path, family: str) -> Path:
    """Writes a whole folder of a random model, tied as the published ones are, its biases not zero."""
    if family not in _TOKENIZER_OF:
        make_tiny_model(folder, family)
        _fill_biases(folder / "model.safetensors")
        return folder
    make_tiny_model(folder, _TOKENIZER_OF[family])
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    same = {field: values[field] for field in _SAME if field in values}
    config = AutoConfig.for_model(family, **same, **_OWN[family])
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _fill_biases(path: Path) -> None:
    """Numbers in place of the zeros that biases start with."""
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith(".bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    save_file(tensors, path, {"format": "pt"})
