"""Tiny model folders for tests: real headers, no torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qadapt.model.shards import TensorEntry, write_shards

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "dtype": "float16",
}

ENTRIES = [
    TensorEntry("model.embed_tokens.weight", "F16", (32, 8)),
    TensorEntry("model.norm.weight", "F16", (8,)),
    TensorEntry("lm_head.weight", "F16", (32, 8)),
]


def write_folder(
    folder: Path,
    *,
    config: Mapping[str, Any] = CONFIG,
    entries: Sequence[TensorEntry] = ENTRIES,
    shard_bytes: int = 2**31,
    fill: int = 7,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text('{"model": {}}', encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    list(
        write_shards(
            folder,
            entries,
            values=lambda entry: [memoryview(bytes([fill]) * entry.size_bytes)],
            shard_bytes=shard_bytes,
        )
    )
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
