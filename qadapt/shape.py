"""`ModelShape`: the widths of a decoder, read from a `config.json` alone. No torch, no weights.

Legend: D width, H heads, K key-value heads, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qadapt.errors import BadModel, Unsupported

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures whose closed form and training are tested, by `model_type`."""


@dataclass(frozen=True)
class Linear:
    """One linear layer: weight (outputs, inputs)."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Number of weights, the bias not counted."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The widths of a decoder-only language model."""

    name: str
    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    context: int
    tied: bool
    attention_bias: bool = False
    sliding_window: int | None = None
    final_softcap: float | None = None
    attention_softcap: float | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The linear layers of one decoder layer, in the order they run."""
        query, key_value = self.heads * self.head_width, self.kv_heads * self.head_width
        if self.family == "phi3":
            return (
                Linear("qkv_proj", self.width, query + 2 * key_value),
                Linear("o_proj", query, self.width),
                Linear("gate_up_proj", self.width, 2 * self.mlp_width),
                Linear("down_proj", self.mlp_width, self.width),
            )
        return (
            Linear("q_proj", self.width, query, self.attention_bias),
            Linear("k_proj", self.width, key_value, self.attention_bias),
            Linear("v_proj", self.width, key_value, self.attention_bias),
            Linear("o_proj", query, self.width, self.attention_bias and self.family == "llama"),
            Linear("gate_proj", self.width, self.mlp_width),
            Linear("up_proj", self.width, self.mlp_width),
            Linear("down_proj", self.mlp_width, self.width),
        )

    @property
    def norm_weights(self) -> int:
        """Weights of all normalization layers."""
        per_layer = (4 if self.family == "gemma2" else 2) * self.width
        if self.family == "qwen3":
            per_layer += 2 * self.head_width
        return self.layers * per_layer + self.width

    @property
    def embedding_weights(self) -> int:
        """Weights of the input embedding; the head has as many more unless it is tied."""
        return self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All weights and biases of the model."""
        linear = sum(layer.weights + layer.bias * layer.outputs for layer in self.linears)
        embeddings = self.embedding_weights * (1 if self.tied else 2)
        return self.layers * linear + self.norm_weights + embeddings


def shape_from_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Reads a shape from the values of a `config.json`.

    Args:
        config: The values of the file.
        name: What to call the model in messages.

    Raises:
        BadModel: A field is missing or contradicts another.
        Unsupported: No decoder-only text model, or an architecture that is not proven here.
    """
    family = str(config.get("model_type", "missing"))
    if config.get("is_encoder_decoder") or "vision_config" in config:
        raise Unsupported(f"{name} is no decoder-only text model.", cure="Choose a causal language model.")
    if family not in FAMILIES:
        raise Unsupported(
            f"{name} has the architecture {family!r}, which is not proven here.",
            cure=f"Proven are: {', '.join(FAMILIES)}.",
        )
    heads = _whole(config, "num_attention_heads", name)
    width = _whole(config, "hidden_size", name)
    kv_heads = _whole(config, "num_key_value_heads", name, default=heads)
    if heads % kv_heads:
        raise BadModel(
            f"{name}: {heads} attention heads cannot share {kv_heads} key-value heads.",
            cure="The config.json contradicts itself; get it again from where the model is published.",
        )
    uses_window = config.get("use_sliding_window", True)
    return ModelShape(
        name=name,
        family=family,
        layers=_whole(config, "num_hidden_layers", name),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_width=_whole(config, "head_dim", name, default=width // heads),
        mlp_width=_whole(config, "intermediate_size", name),
        vocabulary=_whole(config, "vocab_size", name),
        context=_whole(config, "max_position_embeddings", name),
        tied=bool(config.get("tie_word_embeddings", family == "gemma2")),
        attention_bias=bool(config.get("attention_bias", family == "qwen2")),
        sliding_window=config.get("sliding_window") if uses_window else None,
        final_softcap=config.get("final_logit_softcapping"),
        attention_softcap=config.get("attn_logit_softcapping"),
    )


def _whole(config: Mapping[str, Any], field: str, name: str, *, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or value <= 0:
        raise BadModel(
            f"{name}: config.json has {field} = {value!r}; a positive whole number is needed.",
            cure="Get the config.json again from where the model is published.",
        )
    return value


@cache
def known_models() -> dict[str, dict[str, Any]]:
    """Hub id → `config.json` values of the models whose shape is known without a network.

    An entry `{"same_as": hub_id}` in the file has the values of another (an instruct form of a model).
    """
    text = (Path(__file__).parent / "known_models.json").read_text(encoding="utf-8")
    models: dict[str, dict[str, Any]] = json.loads(text)
    return {
        name: models[values["same_as"]] if "same_as" in values else values for name, values in models.items()
    }


def find_shape(model: str) -> ModelShape:
    """The shape of a model given as a folder with a `config.json`, or by a known name.

    A known name is a hub id (`meta-llama/Llama-3.1-8B`), its last part, or an alias such as `smollm2-135m`;
    case does not matter.

    Raises:
        BadModel: The name is not known, or the `config.json` is damaged.
        Unsupported: See `shape_from_config`.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadModel(
                f"{folder / 'config.json'} cannot be read: {error}", cure="Get the file again."
            ) from None
        return shape_from_config(config, name=folder.name or model)
    names = {alias.lower(): known for known in known_models() for alias in (known, known.rpartition("/")[2])}
    known = names.get(model.lower())
    if known is None:
        close = difflib.get_close_matches(model.lower(), names, n=1, cutoff=0.5)
        hint = f"Did you mean `{names[close[0]]}`? " if close else ""
        raise BadModel(
            f"{model!r} is neither a folder with a config.json nor a model known without a network.",
            cure=f"{hint}`qadapt estimate --models` lists the known ones; or give the model's folder.",
        )
    return shape_from_config(known_models()[known], name=known)
