"""`ModelConfig` and `ModelShape`: what a `config.json` alone says of a decoder. No torch, no weights.

A `ModelConfig` is of any decoder-only text model: the exact dry run builds it. A `ModelShape` is of the few
architectures whose closed form has been shown to agree with that dry run.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from qadapt.architecture import check_decoder, check_fields, size
from qadapt.errors import BadModel, NoClosedForm

Part = Literal["embeddings", "head", "boundaries", "layers"]
"""What can stay in the memory of the host: the table of the input embeddings, the frozen head, the inputs of
recomputed layers, the frozen weights of the decoder layers. On a CPU those inputs go to a temporary file
and the others stay where they are."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures whose closed form and training are tested, by `model_type`."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh")
"""Those of feed-forward parts that keep for the backward pass what enters them, and nothing else."""

_OWN_HEAD_WIDTH = ("qwen3", "gemma2")
"""Where transformers does not take the width divided by the heads for a missing head_dim."""
_OWN_KEY_VALUE_HEADS = ("mistral", "qwen2", "qwen3", "gemma2")
"""Where transformers does not take the heads for missing num_key_value_heads."""


@dataclass(frozen=True)
class ModelConfig:
    """The checked values of a decoder-only text model's `config.json`.

    Attributes:
        name: The hub id of a known model, or the folder's name.
        values: The fields of the file.
    """

    name: str
    values: Mapping[str, Any] = field(hash=False)

    @property
    def family(self) -> str:
        """The architecture, by `model_type`."""
        return str(self.values["model_type"])

    def with_room(self, tokens: int) -> ModelConfig:
        """With rows for so many new tokens; spare ones are not used, as only the tokenizer knows of them."""
        rows = size(self.values, "vocab_size")
        if not tokens or rows is None:
            return self
        return replace(self, values={**self.values, "vocab_size": table_rows(rows, rows + tokens)})


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

    @cached_property
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


def table_rows(rows: int, needed: int) -> int:
    """Rows of an embedding table of `rows` rows that must have `needed`: spare ones are used.

    Where it grows, to a multiple of 8: products of odd widths are slow on cards.
    """
    return rows if needed <= rows else math.ceil(needed / 8) * 8


def shape_from_config(config: Mapping[str, Any], *, name: str) -> ModelShape:
    """Reads a shape from the values of a `config.json`.

    A field may be missing where transformers derives it from others; where it would put in a number of its
    own, the field is needed.

    Args:
        config: The values of the file.
        name: What to call the model in messages.

    Raises:
        BadModel: A field is missing, is no size, or contradicts another.
        Unsupported: No decoder-only text model.
        NoClosedForm: A decoder whose closed form has not been shown to be right.
    """
    check_decoder(config, name=name)
    family = str(config["model_type"])
    if family in FAMILIES:
        for size in _needed(family):
            _whole(config, size, name)
    check_fields(config, name=name)
    variant = _unproven(config, family)
    if variant is not None:
        raise NoClosedForm(
            f"{name} has the architecture {variant}, whose closed form has not been shown to be right.",
            cure="Ask for the exact dry run with `--exact`; it needs transformers and takes seconds. "
            f"Closed forms: {', '.join(FAMILIES)}.",
        )
    heads = _whole(config, "num_attention_heads", name)
    width = _whole(config, "hidden_size", name)
    return ModelShape(
        name=name,
        family=family,
        layers=_whole(config, "num_hidden_layers", name),
        width=width,
        heads=heads,
        kv_heads=_whole(config, "num_key_value_heads", name, default=heads),
        head_width=_whole(config, "head_dim", name, default=width // heads),
        mlp_width=_whole(config, "intermediate_size", name),
        vocabulary=_whole(config, "vocab_size", name),
        context=_whole(config, "max_position_embeddings", name),
        tied=bool(config.get("tie_word_embeddings", family == "gemma2")),
        attention_bias=family == "qwen2" or (family == "llama" and bool(config.get("attention_bias"))),
        sliding_window=config.get("sliding_window") if config.get("use_sliding_window", True) else None,
        final_softcap=config.get("final_logit_softcapping"),
        attention_softcap=config.get("attn_logit_softcapping"),
    )


def _needed(family: str) -> tuple[str, ...]:
    return (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"),
        "max_position_embeddings",
        *(("num_key_value_heads",) if family in _OWN_KEY_VALUE_HEADS else ()),
        *(("head_dim",) if family in _OWN_HEAD_WIDTH else ()),
    )


def _unproven(config: Mapping[str, Any], family: str) -> str | None:
    """What in an architecture has no closed form here; None if it has one."""
    if family not in FAMILIES:
        return repr(family)
    if family == "llama" and config.get("mlp_bias"):
        return "'llama' with biases in its feed-forward part (mlp_bias)"
    if family in ("qwen3", "gemma2") and config.get("attention_bias"):
        return f"{family!r} with biases in its attention (attention_bias)"
    activation = activation_name(config)
    if activation not in (None, *ACTIVATIONS):
        return f"{family!r} with the activation {activation!r} (hidden_act)"
    return None


def activation_name(config: Mapping[str, Any]) -> object:
    """What a configuration calls the activation of its feed-forward parts; None: the architecture's own."""
    return config.get("hidden_activation") or config.get("hidden_act")


def _whole(config: Mapping[str, Any], field: str, name: str, *, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
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


@cache
def known_shapes() -> tuple[ModelShape, ...]:
    """The shapes of the known models that have a closed form."""
    return tuple(
        shape_from_config(values, name=name)
        for name, values in known_models().items()
        if _unproven(values, str(values["model_type"])) is None
    )


def find_config(model: str) -> ModelConfig:
    """The configuration of a model given as a folder with a `config.json`, or by a known name.

    A known name is a hub id (`meta-llama/Llama-3.1-8B`), its last part, or an alias such as `smollm2-135m`;
    case does not matter.

    Raises:
        BadModel: The name is not known; or the `config.json` is damaged, or its fields cannot all be true.
        Unsupported: No decoder-only text model.
    """
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        found = ModelConfig(folder.resolve().name or model, _read(folder / "config.json"))
    else:
        known = _known_name(model)
        found = ModelConfig(known, known_models()[known])
    check_decoder(found.values, name=found.name)
    check_fields(found.values, name=found.name)
    return found


def find_shape(model: str) -> ModelShape:
    """The shape of a model given as for `find_config`.

    Raises:
        BadModel: See `find_config`; or a field is missing.
        Unsupported: No decoder-only text model.
        NoClosedForm: A decoder that only the exact dry run can estimate.
    """
    found = find_config(model)
    return shape_from_config(found.values, name=found.name)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadModel(f"{path} cannot be read: {error}.", cure="Get the file again.") from None
    if not isinstance(values, dict):
        raise BadModel(f"{path} is no JSON object.", cure="Get the file again.")
    return values


def _known_name(model: str) -> str:
    names = {alias.lower(): known for known in known_models() for alias in (known.rpartition("/")[2], known)}
    known = names.get(model.lower())
    if known is not None:
        return known
    close = difflib.get_close_matches(model.lower(), names, n=1, cutoff=0.5)
    hint = f"Did you mean `{names[close[0]]}`? " if close else ""
    raise BadModel(
        f"{model!r} is neither a folder with a config.json nor a model known without a network.",
        cure=f"{hint}`qadapt estimate --models` lists the known ones; or give the model's folder.",
    )
