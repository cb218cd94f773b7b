"""Configuration and tokenizer of a GGUF file: read by transformers, completed where its reader leaves gaps.

Checked against transformers 5.23: it does not read rope scaling, qwen3's head width, gemma2's soft caps and
query scale, phi3's sliding window and partial rotation, nor attention biases; each is taken from the file
here, or the file is refused, because a wrong value gives a model that loads and answers worse.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapt.errors import BadModel, Unsupported
from qadapt.quiet import quiet_libraries

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

GGUF_FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures in GGUF's words; mistral models are `llama` there."""

_LLAMA3_ORIGINAL_CONTEXT = 8192
GEMMA2_27B_LAYERS = 46
"""By which llama.cpp tells the largest gemma2, whose attention is scaled otherwise."""
_PROBE = "The 3 kä\n  cats: \u4f60\u597d, don't!"
_CURE = "Get a GGUF file with its tokenizer, or give the model's safetensors folder."


def scalars(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The metadata of a GGUF file by key; arrays (the vocabulary) left out."""
    import gguf

    return {
        key: field.contents()
        for key, field in reader.fields.items()
        if field.types and field.types[0] != gguf.GGUFValueType.ARRAY
    }


def read_gguf_config(
    reader: gguf.GGUFReader, path: Path
) -> tuple[PretrainedConfig, dict[str, tuple[int, ...]]]:
    """The transformers configuration of a GGUF file, and the name and shape of every tensor its model has.

    A tied head is left out of the tensors: it is the embedding.

    Raises:
        BadModel: The metadata lacks what the architecture needs.
        Unsupported: A rope scaling or another part that cannot be told from the file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        _complete(config, reader, path)
    except (KeyError, ValueError, TypeError) as error:
        raise BadModel(
            f"{path.name}: the metadata does not describe a model: {error}.", cure="Get another GGUF file."
        ) from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    config.architectures = [type(model).__name__]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return config, shapes


def _complete(config: PretrainedConfig, reader: gguf.GGUFReader, path: Path) -> None:
    known = scalars(reader)
    family = known["general.architecture"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" in tensors:
        config.vocab_size = int(tensors["token_embd.weight"].shape[-1])
    config.rms_norm_eps = _shortest(config.rms_norm_eps)
    _set_rope(config, reader, path)
    if family == "llama":
        config.attention_bias = "blk.0.attn_q.bias" in tensors
        config.mlp_bias = "blk.0.ffn_up.bias" in tensors
    elif family == "qwen3":
        config.head_dim = known.get("qwen3.attention.key_length", config.head_dim)
    elif family == "gemma2":
        config.attn_logit_softcapping = known["gemma2.attn_logit_softcapping"]
        config.final_logit_softcapping = known["gemma2.final_logit_softcapping"]
        is_largest = config.num_hidden_layers == GEMMA2_27B_LAYERS  # as llama.cpp tells it: the file does not
        scale = config.hidden_size // config.num_attention_heads if is_largest else config.head_dim
        config.query_pre_attn_scalar = scale
    elif family == "phi3":
        window = known.get("phi3.attention.sliding_window", 0)
        config.sliding_window = window or None


def _shortest(value: float) -> float:
    """A float32 as the decimal number it was written from: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _set_rope(config: PretrainedConfig, reader: gguf.GGUFReader, path: Path) -> None:
    known, tensors = scalars(reader), {tensor.name: tensor for tensor in reader.tensors}
    family = known["general.architecture"]
    kind = known.get(f"{family}.rope.scaling.type", "none")
    if kind != "none" or "rope_factors_long.weight" in tensors:
        raise Unsupported(
            f"{path.name} scales its rotary positions ({kind if kind != 'none' else 'longrope'}), "
            "which is not read from GGUF here.",
            cure="Give the model's 16-bit safetensors folder.",
        )
    rotated = known.get(f"{family}.rope.dimension_count")
    width = config.hidden_size // config.num_attention_heads
    if family == "phi3" and rotated is not None and rotated != width:
        config.rope_parameters["partial_rotary_factor"] = rotated / width
    if "rope_freqs.weight" in tensors:
        stored = [float(value) for value in tensors["rope_freqs.weight"].data]
        config.rope_parameters = _llama3_rope(stored, theta=config.rope_parameters["rope_theta"], path=path)


def _llama3_rope(stored: list[float], *, theta: float, path: Path) -> dict[str, Any]:
    """Llama 3's rope parameters from the divisors of each frequency, which is all that a GGUF keeps of them.

    The stretch is the largest divisor; the other three numbers are those of every Llama 3.1 to 3.3, and
    the divisors computed from them must be the stored ones, otherwise the file is refused.
    """
    factor = max(stored)
    computed = llama3_divisors(2 * len(stored), theta=theta, factor=factor)
    if any(not math.isclose(have, want, rel_tol=1e-3) for have, want in zip(stored, computed, strict=True)):
        raise Unsupported(
            f"{path.name} scales its rotary frequencies in a way that is none of Llama 3's.",
            cure="Give the model's 16-bit safetensors folder.",
        )
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
    }  # fmt: skip


def llama3_divisors(
    head_width: int,
    *,
    theta: float,
    factor: float,
    low: float = 1.0,
    high: float = 4.0,
    context: int = _LLAMA3_ORIGINAL_CONTEXT,
) -> list[float]:
    """What each rotary frequency of a Llama 3.1 model is divided by (transformers' `llama3` rope).

    Args:
        head_width: Values of a head that are rotated.
        theta: Base of the frequencies.
        factor: Divisor of the lowest frequencies.
        low: Turns in the original context below which a frequency is divided by all of `factor`.
        high: Turns from which it is not divided.
        context: Tokens of the original context.
    """
    divisors = []
    for index in range(head_width // 2):
        turns = context / (2 * math.pi * theta ** (2 * index / head_width))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors


def write_config(config: PretrainedConfig, folder: Path, *, dtype: str) -> None:
    """Writes config.json and generation_config.json.

    Args:
        config: The configuration.
        folder: Where to.
        dtype: The type the weights are written in, `float16` or `bfloat16`.
    """
    from transformers import GenerationConfig

    config.dtype = dtype
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("_model_name_or_path", None)  # a title from the file, not a place
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def write_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer and chat template that a GGUF file describes, and reads them back.

    Raises:
        BadModel: The file describes none that transformers can build, or that comes back the same.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (KeyError, ValueError, TypeError) as error:
        raise BadModel(f"{path.name} holds no tokenizer that can be read: {error}.", cure=_CURE) from None
    tokenizer.save_pretrained(folder)
    saved = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    is_same = tokenizer.encode(_PROBE) == saved.encode(_PROBE) != []
    if not is_same or tokenizer.chat_template != saved.chat_template:
        raise BadModel(f"{path.name}: its tokenizer comes back changed after it is saved.", cure=_CURE)
