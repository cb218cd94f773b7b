"""GGUF files for tests, written from a model folder as llama.cpp's converter writes them.

An independent statement of what the converter does to names and values, which the code under test must undo.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from k_quants import k_quantized
from safetensors.torch import load_file

Weights = dict[str, torch.Tensor]


def rotary_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute`: the two halves of each head become neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    model: Path,
    path: Path,
    *,
    weights: Weights | None = None,
    quantization: str = "F16",
    metadata: dict[str, Any] | None = None,
    divisors: np.ndarray | None = None,
) -> Path:
    """Writes a model folder as a GGUF file.

    Args:
        model: The folder.
        path: Where to.
        weights: Instead of the folder's.
        quantization: What matrices are stored as; vectors are always F32.
        metadata: More values.
        divisors: Of the rotary frequencies, as Llama 3's are stored.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = gguf.GGUFWriter(path, family)
    values = _metadata(config, family) | (metadata or {})
    for key, value in values.items():
        if isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    _add_tokenizer(writer, model, rows=config["vocab_size"])
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for name, tensor in (load_file(model / "model.safetensors") if weights is None else weights).items():
        stem, _, suffix = name.rpartition(".")
        stored = names.get_name(stem)
        values_of = _as_stored(tensor.float().numpy(), stored, family=family, config=config)
        _add_tensor(writer, f"{stored}.{suffix}", values_of, quantization)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(config: dict[str, Any], family: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "general.name": "tiny",
        f"{family}.context_length": config["max_position_embeddings"],
        f"{family}.embedding_length": config["hidden_size"],
        f"{family}.feed_forward_length": config["intermediate_size"],
        f"{family}.block_count": config["num_hidden_layers"],
        f"{family}.attention.head_count": config["num_attention_heads"],
        f"{family}.attention.head_count_kv": config["num_key_value_heads"],
        f"{family}.attention.key_length": config["head_dim"],
        f"{family}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{family}.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        f"{family}.rope.dimension_count": config["head_dim"],
    }
    if family == "gemma2":
        values |= {
            "gemma2.attn_logit_softcapping": config["attn_logit_softcapping"],
            "gemma2.final_logit_softcapping": config["final_logit_softcapping"],
            "gemma2.attention.sliding_window": config["sliding_window"],
        }
    return values


def _as_stored(values: np.ndarray, stored: str, *, family: str, config: dict[str, Any]) -> np.ndarray:
    if family == "llama" and ".attn_q" in stored:
        return rotary_pairs(values, config["num_attention_heads"])
    if family == "llama" and ".attn_k" in stored:
        return rotary_pairs(values, config["num_key_value_heads"])
    if family == "gemma2" and stored.endswith("norm"):
        return values + 1
    return values


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, quantization: str) -> None:
    kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind.name in ("F16", "F32"):
        writer.add_tensor(name, values.astype({"F16": np.float16, "F32": np.float32}[kind.name]))
    elif kind.name.endswith("_K"):
        writer.add_tensor(name, k_quantized(values, kind.name), raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, *, rows: int) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = dict(tokenizer["model"]["vocab"])
    # 1 normal, 3 control, 4 defined by the user, 5 unused: padding up to the rows of the embedding
    kinds = {token["content"]: 3 if token["special"] else 4 for token in tokenizer["added_tokens"]}
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    padding = [f"[PAD{number}]" for number in range(len(tokens), rows)]
    kinds |= dict.fromkeys(padding, 5)
    tokens += padding
    is_sentencepiece = "<unk>" in vocabulary and "[INST]" not in vocabulary  # gemma and phi3
    writer.add_tokenizer_model("llama" if is_sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank) for rank in range(len(tokens))])
    bos = json.dumps(config.get("bos_token"))
    writer.add_add_bos_token(bos != "null" and bos in json.dumps(tokenizer["post_processor"]))
    writer.add_token_types([kinds.get(token, 1) for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(vocabulary[config["eos_token"]])
    if "<unk>" in vocabulary:
        writer.add_unk_token_id(vocabulary["<unk>"])
    if config.get("bos_token"):
        writer.add_bos_token_id(vocabulary[config["bos_token"]])
    if config.get("pad_token"):
        writer.add_pad_token_id(vocabulary[config["pad_token"]])
    writer.add_chat_template((model / "chat_template.jinja").read_text(encoding="utf-8"))
