"""What kind of model a `config.json` describes, and whether its fields can be true together. No torch.

Knows the fields that decide sizes, under the names that transformers reads; every other field passes
unchecked. It does not know which architectures the installed transformers can build: that shows when one is
built.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qadapt.errors import BadModel, Unsupported

ALIASES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}
"""A size → the fields that architectures of transformers give it under."""

_SIZES = (
    *(field for name, fields in ALIASES.items() if name != "num_experts" for field in fields),
    "head_dim",
    "intermediate_size",
    "ffn_hidden_size",
    "moe_intermediate_size",
    "n_inner",
    "num_experts_per_tok",
    "sliding_window",
    "vocab_size",
)
_RATIOS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "is_encoder_decoder")
_OTHER_SENSES = ("vision_config", "audio_config", "speech_config", "text_config", "thinker_config")
_KINDS = {
    "an encoder": (
        "albert bert bert-generation big_bird camembert canine convbert data2vec-text deberta deberta-v2 "
        "distilbert electra ernie esm eurobert flaubert funnel ibert longformer luke mobilebert modernbert "
        "mpnet mra nomic_bert nystromformer rembert roberta roberta-prelayernorm roc_bert roformer "
        "squeezebert xlm xlm-roberta xlm-roberta-xl xmod yoso"
    ),
    "an encoder-decoder": (
        "bart bigbird_pegasus blenderbot blenderbot-small encoder-decoder fsmt led longt5 m2m_100 marian "
        "mbart mt5 mvp nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma umt5"
    ),
    "a state-space or recurrent model": "falcon_mamba mamba mamba2 rwkv xlstm",
    "a speech model": (
        "bark clap hubert moonshine musicgen seamless_m4t speech_to_text speecht5 unispeech vits wav2vec2 "
        "wav2vec2-bert wavlm whisper"
    ),
    "a vision model": (
        "beit blip clip convnext convnextv2 deit detr dinov2 dinov3_vit resnet sam segformer siglip swin vit "
        "vit_mae yolos"
    ),
}
_KIND_OF = {family: kind for kind, families in _KINDS.items() for family in families.split()}

_CURE = "Get the config.json again from where the model is published."


def size(config: Mapping[str, Any], name: str) -> int | None:
    """A size under any of its field names; None if no field has it, or it differs from layer to layer.

    For a checked configuration.

    Args:
        config: The values of a `config.json`.
        name: A key of `ALIASES`, or the field itself.
    """
    found = (config.get(field) for field in ALIASES.get(name, (name,)))
    return next((value for value in found if isinstance(value, int)), None)


def check_decoder(config: Mapping[str, Any], *, name: str) -> None:
    """Checks that a configuration is of a decoder-only text model.

    Raises:
        BadModel: It does not say what it is.
        Unsupported: A vision or speech model, an encoder, an encoder-decoder, a state-space model, or
            weights made for something else than writing text.
    """
    family = config.get("model_type")
    if family is None:
        raise BadModel(f"{name}: model_type is missing in config.json.", cure=_CURE)
    if not isinstance(family, str) or not family:
        raise _bad(name, f"model_type = {family!r}; the name of an architecture is needed")
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise _bad(name, f"architectures = {classes!r}; a list of names is needed")
    reason = _foreign(config, family, classes)
    if reason is not None:
        raise Unsupported(
            f"{name} is no decoder-only text model: {reason}.", cure="Choose a causal language model."
        )


def _foreign(config: Mapping[str, Any], family: str, classes: list[str]) -> str | None:
    sense = next((field for field in _OTHER_SENSES if field in config), None)
    if sense is not None:
        return f"its config.json has {sense}"
    if family in _KIND_OF:
        return f"{family} is {_KIND_OF[family]}"
    if config.get("is_encoder_decoder") is True:
        return f"{family} is an encoder-decoder"
    purposes = {each: each.rpartition("For")[2] for each in classes if "For" in each}
    if purposes and "CausalLM" not in purposes.values():
        return f"its weights are a {next(iter(purposes))}"
    return None


_MOST = {"num_hidden_layers": 1_000, "hidden_size": 100_000, "vocab_size": 10_000_000}
"""Far above every published model, and few enough to be built and counted."""


def check_fields(config: Mapping[str, Any], *, name: str) -> None:
    """Checks the fields that decide sizes, as far as they are there: each alone, then against each other.

    Raises:
        BadModel: One is no positive whole number, or two contradict each other.
    """
    for field in _SIZES:
        value = config.get(field)
        is_unused = field == "sliding_window" and config.get("use_sliding_window") is False
        every = value if isinstance(value, list) and value else [value]  # gemma3n lists a width per layer
        if value is not None and not is_unused and not all(map(_is_whole, every)):
            raise _bad(name, f"{field} = {value!r}; a positive whole number is needed")
    for name_of, most in _MOST.items():
        value = size(config, name_of)
        if value is not None and value > most:
            raise _bad(name, f"{name_of} = {value:,}; more than {most:,} is no model that exists")
    for field in ALIASES["num_experts"]:
        value = config.get(field)
        if value is not None and value != 0 and not _is_whole(value):  # a dense sibling of a MoE says 0
            raise _bad(name, f"{field} = {value!r}; a whole number is needed")
    for field in _SWITCHES:
        if not isinstance(config.get(field, False), bool | None):
            raise _bad(name, f"{field} = {config[field]!r}; true or false is needed")
    _check_rope(config, name)
    _check_heads(config, name)
    _check_layers(config, name)


def _check_rope(config: Mapping[str, Any], name: str) -> None:
    for section in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(section), dict | None):
            raise _bad(name, f"{section} = {config[section]!r}; an object is needed")
    inner = {
        f"{section}.{field}": (config.get(section) or {}).get(field)
        for section in ("rope_scaling", "rope_parameters")
        for field in ("rope_theta", "factor")
    }
    for field, value in {**{field: config.get(field) for field in _RATIOS}, **inner}.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < float("inf")):
            raise _bad(name, f"{field} = {value!r}; a positive number is needed")


def _check_heads(config: Mapping[str, Any], name: str) -> None:
    width, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if width and heads and width % heads and config.get("head_dim") is None:
        raise BadModel(
            f"{name}: config.json has hidden_size {width} and no head_dim, "
            f"but {width} cannot be divided among {heads} attention heads.",
            cure=_CURE,
        )
    shared = size(config, "num_key_value_heads")
    if heads and shared and heads % shared:
        raise BadModel(
            f"{name}: {heads} attention heads cannot share {shared} key-value heads.",
            cure=f"The config.json contradicts itself. {_CURE}",
        )
    experts, chosen = size(config, "num_experts"), size(config, "num_experts_per_tok")
    if experts and chosen and chosen > experts:
        raise BadModel(
            f"{name}: config.json sends a token to {chosen} experts, but there are {experts}.",
            cure=f"It contradicts itself. {_CURE}",
        )


def _check_layers(config: Mapping[str, Any], name: str) -> None:
    layers = size(config, "num_hidden_layers")
    for field in ("layer_types", "no_rope_layers"):
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, list):
            raise _bad(name, f"{field} = {value!r}; a list is needed")
        if layers and value and len(value) != layers:
            raise BadModel(
                f"{name}: config.json has {layers} layers, but {field} lists {len(value)}.",
                cure=f"It contradicts itself. {_CURE}",
            )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _bad(name: str, problem: str) -> BadModel:
    return BadModel(f"{name}: config.json has {problem}.", cure=_CURE)
