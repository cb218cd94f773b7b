"""What a GGUF file says of a model's architecture, from its configuration: what llama.cpp reads.

llama.cpp has one graph for each architecture, with choices built in that a `config.json` leaves open: the
activation, the pattern of windows, the scale of attention. A configuration that chooses otherwise is refused,
because the file would load and answer worse. A window that llama.cpp does not have is said: it changes
nothing before the window's length. Source of the keys and of the built-in choices:
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py, src/llama-model.cpp there, and the
description of the format, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoConfig, PretrainedConfig

from qadapt.errors import BadModel, Unsupported
from qadapt.events import Warned
from qadapt.export.gguf_front import Value
from qadapt.model.gguf_config import GEMMA2_27B_LAYERS, llama3_divisors
from qadapt.model.gguf_layout import ARCHITECTURES, GgufLayout

_GEMMA3_27B_LAYERS = 62
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
_NO_ROPE_EVERY = 4
_YARN = {
    "factor": "factor", "original_max_position_embeddings": "original_context_length",
    "extrapolation_factor": "yarn_ext_factor", "attention_factor": "yarn_attn_factor",
    "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow",
}  # fmt: skip
_CURE = "Export with --form merged-fp16 and serve it with transformers or vLLM."


@dataclass(frozen=True)
class Architecture:
    """A model's architecture in GGUF's words.

    Attributes:
        name: Such as `llama`.
        layout: Where its tensors lie.
        is_tied: The head is the embedding: the file has no head.
        values: The metadata.
        tensors: Tensors that no model folder has: divisors of the rotary frequencies.
        warnings: What llama.cpp will do otherwise.
    """

    name: str
    layout: GgufLayout
    is_tied: bool
    values: Mapping[str, Value]
    tensors: Mapping[str, npt.NDArray[np.float32]]
    warnings: tuple[Warned, ...]


def read_architecture(folder: Path) -> Architecture:
    """The architecture of a model folder.

    Raises:
        BadModel: Its config.json cannot be read.
        Unsupported: llama.cpp does not know the architecture, or knows it otherwise.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise BadModel(
            f"The config.json in {folder} cannot be read: {reason}", cure="Get it again."
        ) from None
    if config.model_type not in ARCHITECTURES:
        raise Unsupported(
            f"A GGUF file of the architecture {config.model_type!r} is not written here.",
            cure=f"Written are: {', '.join(ARCHITECTURES)}. {_CURE}",
        )
    name = ARCHITECTURES[config.model_type]
    _check_built_in(config, name)
    rope, tensors = _rope(config, name)
    values = _widths(config) | rope | _attention(config, name)
    return Architecture(
        name=name,
        layout=GgufLayout(
            name,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
        ),
        is_tied=bool(config.tie_word_embeddings),
        values={f"{name}.{key}": value for key, value in values.items()},
        tensors=tensors,
        warnings=_warnings(config, name),
    )


def _head_width(config: PretrainedConfig) -> int:
    width = config.to_dict().get("head_dim")
    return int(width or config.hidden_size // config.num_attention_heads)


def _widths(config: PretrainedConfig) -> dict[str, Value]:
    width = _head_width(config)
    return {
        "vocab_size": int(config.vocab_size),
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": int(config.num_attention_heads),
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }


def _attention(config: PretrainedConfig, name: str) -> dict[str, Value]:
    values: dict[str, Value] = {}
    if name == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if name in ("gemma2", "gemma3", "phi3"):
        values["attention.sliding_window"] = int(config.sliding_window or 0)
    return values


def _rope(config: PretrainedConfig, name: str) -> tuple[dict[str, Value], dict[str, npt.NDArray[np.float32]]]:
    """Metadata of the rotary positions, and the tensors they need."""
    parameters: dict[str, Any] = dict(config.rope_parameters)
    values: dict[str, Value] = {}
    if "full_attention" in parameters:
        values["rope.freq_base_swa"] = float(parameters["sliding_attention"]["rope_theta"])
        parameters = dict(parameters["full_attention"])
    theta, kind = float(parameters["rope_theta"]), str(parameters.get("rope_type", "default"))
    rotated = int(_head_width(config) * parameters.get("partial_rotary_factor", 1.0))
    values |= {"rope.freq_base": theta, "rope.dimension_count": rotated}
    if kind == "linear":
        return values | {
            "rope.scaling.type": "linear",
            "rope.scaling.factor": float(parameters["factor"]),
        }, {}
    if kind == "llama3" and name in ("llama", "smollm3"):
        return values, {"rope_freqs.weight": _llama3_freqs(parameters, theta=theta, width=rotated)}
    if kind == "longrope" and name == "phi3":
        more, tensors = _longrope(config, parameters)
        return values | more, tensors
    if kind == "yarn":
        return values | _yarn(parameters), {}
    if kind != "default":
        raise Unsupported(
            f"The model scales its rotary positions by {kind!r}, which llama.cpp does not do for {name}.",
            cure=_CURE,
        )
    return values, {}


def _llama3_freqs(parameters: Mapping[str, Any], *, theta: float, width: int) -> npt.NDArray[np.float32]:
    divisors = llama3_divisors(
        width,
        theta=theta,
        factor=float(parameters["factor"]),
        low=float(parameters["low_freq_factor"]),
        high=float(parameters["high_freq_factor"]),
        context=int(parameters["original_max_position_embeddings"]),
    )
    return np.asarray(divisors, dtype=np.float32)


def _longrope(
    config: PretrainedConfig, parameters: Mapping[str, Any]
) -> tuple[dict[str, Value], dict[str, npt.NDArray[np.float32]]]:
    known = config.to_dict() | dict(parameters)
    context = int(known["original_max_position_embeddings"])
    stretch = config.max_position_embeddings / context
    factor = known.get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(stretch) / math.log(context)) if stretch > 1 else 1.0
    values: dict[str, Value] = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": context,
        "rope.scaling.attn_factor": float(factor),
    }
    return values, {
        f"rope_factors_{length}.weight": np.asarray(parameters[f"{length}_factor"], dtype=np.float32)
        for length in ("long", "short")
    }


def _yarn(parameters: Mapping[str, Any]) -> dict[str, Value]:
    known = {*_YARN, "rope_type", "type", "rope_theta", "partial_rotary_factor"}
    odd = sorted(field for field, value in parameters.items() if value is not None and field not in known)
    if odd:
        raise Unsupported(
            f"The model's YaRN positions have {odd[0]}, which a GGUF does not keep.", cure=_CURE
        )
    values: dict[str, Value] = {"rope.scaling.type": "yarn"}
    for field, key in _YARN.items():
        if parameters.get(field) is not None:
            number = parameters[field]
            values[f"rope.scaling.{key}"] = int(number) if key.endswith("length") else float(number)
    return values


def _check_built_in(config: PretrainedConfig, name: str) -> None:
    """Refuses what llama.cpp's graph of the architecture does otherwise.

    Raises:
        Unsupported: With the field, its value, and the one that is built in.
    """
    known = config.to_dict()
    wanted: dict[str, tuple[object, ...]] = {}
    width = _head_width(config)
    if name in ("gemma2", "gemma3"):
        largest = GEMMA2_27B_LAYERS if name == "gemma2" else _GEMMA3_27B_LAYERS
        is_largest = config.num_hidden_layers == largest
        scale = config.hidden_size // config.num_attention_heads if is_largest else width
        wanted["query_pre_attn_scalar"] = (scale,)
        wanted["hidden_activation"] = ("gelu_pytorch_tanh",)
        wanted["use_bidirectional_attention"] = (None, False)
        wanted["layer_types"] = (None, _windows(config.num_hidden_layers, full_every=_FULL_EVERY[name]))
    else:
        wanted["hidden_act"] = ("silu",)
    if name == "gemma3":
        wanted |= {"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)}
    if name == "smollm3":
        wanted["no_rope_layers"] = (
            [int((n + 1) % _NO_ROPE_EVERY != 0) for n in range(config.num_hidden_layers)],
        )
    for field, values in wanted.items():
        if known.get(field) not in values:
            raise Unsupported(
                f"The model has {field} = {known.get(field)!r}; llama.cpp's {name} has {values[-1]!r}.",
                cure=_CURE,
            )
    if name == "gemma2" and not (known["attn_logit_softcapping"] and known["final_logit_softcapping"]):
        raise Unsupported("The model has no soft caps; llama.cpp's gemma2 always has.", cure=_CURE)


def _windows(layers: int, *, full_every: int) -> list[str]:
    return ["sliding_attention" if (n + 1) % full_every else "full_attention" for n in range(layers)]


def _warnings(config: PretrainedConfig, name: str) -> tuple[Warned, ...]:
    return (*_window_warnings(config, name), *_longrope_warnings(config))


def _longrope_warnings(config: PretrainedConfig) -> Iterator[Warned]:
    parameters = config.rope_parameters
    if parameters.get("rope_type") == "longrope":
        context = (config.to_dict() | dict(parameters))["original_max_position_embeddings"]
        yield Warned(
            message=f"The model turns positions otherwise in prompts beyond {context:,} tokens; llama.cpp "
            "does so in every prompt once it is opened with a longer context.",
            cure=f"Open it with at most {context:,} tokens (`-c`, `num_ctx`) unless prompts are longer.",
        )


def _window_warnings(config: PretrainedConfig, name: str) -> tuple[Warned, ...]:
    known = config.to_dict()
    window = known.get("sliding_window") if known.get("use_sliding_window", True) else None
    if name in _FULL_EVERY or not window or window >= config.max_position_embeddings:
        return ()
    message = (
        f"The model looks back {window:,} tokens; llama.cpp's {name} looks back to the start, so it answers "
        f"otherwise after {window:,} tokens."
    )
    return (Warned(message=message, cure="Keep prompt and answer shorter than that there."),)


def general_values(*, title: str, base: str, licence: str | None) -> dict[str, Value]:
    """What a file says of itself, whatever its architecture.

    Args:
        title: Its name.
        base: The model it was made from, a hub id or a name; may be empty.
        licence: Of the base, if it is known.
    """
    values: dict[str, Value] = {"general.name": title}
    if licence:
        values["general.license"] = licence
    if base:
        owner, _, short = base.rpartition("/")
        values |= {"general.base_model.count": 1, "general.base_model.0.name": short}
        if owner and "/" not in owner:
            values["general.base_model.0.organization"] = owner
    return values
