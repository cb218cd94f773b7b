"""What a config.json may say, each family against what transformers builds, and names that are not known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from qadapt.errors import BadModel, NoClosedForm, Unsupported
from qadapt.shape import (
    FAMILIES,
    ModelConfig,
    ModelShape,
    find_config,
    find_shape,
    known_models,
    shape_from_config,
)

ONE_OF_EACH_FAMILY = {
    "llama": "HuggingFaceTB/SmolLM2-135M",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen2": "Qwen/Qwen2.5-7B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gemma2": "google/gemma-2-9b",
    "phi3": "microsoft/phi-4",
}


def test_an_unknown_model_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(BadModel) as caught:
        find_shape("Lama-3.1-8B-Instruct")
    assert "'Lama-3.1-8B-Instruct' is neither a folder" in caught.value.problem
    assert "Did you mean `meta-llama/Llama-3.1-8B-Instruct`?" in caught.value.cure


CONFIG = known_models()["meta-llama/Llama-3.1-8B"]
MOE = known_models()["mistralai/Mixtral-8x7B-v0.1"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": 3}, "model_type = 3; the name of an architecture is needed"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM'; a list of names"),
        ({"hidden_size": None}, "hidden_size = None; a positive whole number is needed"),
        ({"hidden_size": 4096.0}, "hidden_size = 4096.0; a positive whole number is needed"),
        ({"hidden_size": 4100}, "4100 cannot be divided among 32 attention heads"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
        ({"num_hidden_layers": 99_999_999}, "num_hidden_layers = 99,999,999; more than 1,000"),
        ({"num_attention_heads": True}, "num_attention_heads = True"),
        ({"num_key_value_heads": 7}, "32 attention heads cannot share 7 key-value heads"),
        ({"num_key_value_heads": 64}, "32 attention heads cannot share 64 key-value heads"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"intermediate_size": "14336"}, "intermediate_size = '14336'"),
        ({"intermediate_size": [14336, 0]}, "intermediate_size = "),
        ({"vocab_size": 0}, "vocab_size = 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0"),
        ({"max_position_embeddings": None}, "max_position_embeddings = None"),
        ({"rope_theta": 0}, "rope_theta = 0; a positive number is needed"),
        ({"rope_theta": "big"}, "rope_theta = 'big'; a positive number is needed"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -2}}, "rope_scaling.factor = -2"),
        ({"rope_scaling": 4}, "rope_scaling = 4; an object is needed"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_parameters.rope_theta = 0.0"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor = 0"),
        ({"sliding_window": -1}, "sliding_window = -1"),
        ({"layer_types": ["full_attention"] * 31}, "32 layers, but layer_types lists 31"),
        ({"layer_types": "full_attention"}, "layer_types = 'full_attention'; a list is needed"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no'; true or false is needed"),
    ],
)
def test_a_field_that_cannot_be_true_is_one_clear_error(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadModel) as caught:
        shape_from_config({**CONFIG, **changes}, name="broken")
    assert caught.value.problem.startswith("broken: ")
    assert problem in caught.value.problem
    assert "Get the config.json again" in caught.value.cure


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts_per_tok": 9}, "sends a token to 9 experts, but there are 8"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0"),
        ({"num_local_experts": -8}, "num_local_experts = -8; a whole number is needed"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5"),
        ({"layer_types": ["full_attention"] * 33}, "32 layers, but layer_types lists 33"),
    ],
)
def test_a_model_without_a_closed_form_is_checked_as_well(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    write(tmp_path, json.dumps({**MOE, **changes}))
    with pytest.raises(BadModel, match=problem):
        find_config(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_is_needed_unless_transformers_derives_it(family: str) -> None:
    from transformers import AutoConfig

    values = known_models()[ONE_OF_EACH_FAMILY[family]]
    others = {name: value for name, value in values.items() if name != "model_type"}
    for field in sorted(values):
        left = {name: value for name, value in values.items() if name != field}
        try:
            found = shape_from_config(left, name="partial")
        except BadModel as error:
            assert field in error.problem
            continue
        others_left = {name: value for name, value in others.items() if name != field}
        config = AutoConfig.for_model(family, **others_left)
        heads = config.num_attention_heads
        assert (found.heads, found.kv_heads, found.tied) == (
            heads,
            config.num_key_value_heads,
            config.tie_word_embeddings,
        )
        assert found.head_width == (getattr(config, "head_dim", None) or config.hidden_size // heads)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[1, 2]", "is no JSON object"),
        (b"null", "is no JSON object"),
        (b'{"model_type": "llama", "hidden_', "cannot be read: Unterminated string"),
        (b"", "cannot be read: Expecting value"),
        ('{"model_type": "llam\u00e4"}'.encode("latin-1"), "cannot be read: 'utf-8' codec"),
    ],
)
def test_a_damaged_file_is_one_clear_error(content: bytes, problem: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(BadModel) as caught:
        find_config(str(tmp_path))
    assert problem in caught.value.problem
    assert str(tmp_path / "config.json") in caught.value.problem
    assert caught.value.cure == "Get the file again."


def test_a_folder_with_a_config_is_a_model_named_like_it(tmp_path: Path) -> None:
    write(tmp_path / "mine", json.dumps(CONFIG))
    assert find_config(str(tmp_path / "mine")) == ModelConfig("mine", CONFIG)
    assert find_shape(str(tmp_path / "mine")) == dataclasses.replace(find_shape("Llama-3.1-8B"), name="mine")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "llava", "vision_config": {}, "text_config": {}},
            "its config.json has vision_config",
        ),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "its config.json has audio_config"),
        ({"model_type": "gemma3", "text_config": {}}, "its config.json has text_config"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder"),
        ({"model_type": "new-t5", "is_encoder_decoder": True}, "new-t5 is an encoder-decoder"),
        ({"model_type": "bert", "hidden_size": 768}, "bert is an encoder"),
        ({"model_type": "xlm-roberta"}, "xlm-roberta is an encoder"),
        ({"model_type": "mamba", "state_size": 16}, "mamba is a state-space or recurrent model"),
        ({"model_type": "whisper", "is_encoder_decoder": True}, "whisper is a speech model"),
        ({"model_type": "vit"}, "vit is a vision model"),
        ({**CONFIG, "architectures": ["LlamaForSequenceClassification"]}, "weights are a LlamaForSequence"),
        (
            {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]},
            "are a Mistral3For",
        ),
    ],
)
def test_what_is_no_decoder_of_text_gets_a_clear_no(
    config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write(tmp_path / "seer", json.dumps(config))
    for find in (find_config, find_shape):
        with pytest.raises(Unsupported) as caught:
            find(str(tmp_path / "seer"))
        assert not isinstance(caught.value, NoClosedForm)
        assert caught.value.problem.startswith("seer is no decoder-only text model: ")
        assert reason in caught.value.problem
        assert caught.value.cure == "Choose a causal language model."


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (known_models()["tiiuae/falcon-7b"], "'falcon'"),
        (MOE, "'mixtral'"),
        (
            {"model_type": "gemma3n_text", "intermediate_size": [16384, 8192], "num_hidden_layers": 2},
            "'gemma3n",
        ),
        ({**CONFIG, "hidden_act": "relu"}, "'llama' with the activation 'relu'"),
        ({**CONFIG, "mlp_bias": True}, "'llama' with biases in its feed-forward part (mlp_bias)"),
        (
            {**known_models()["Qwen/Qwen3-0.6B"], "attention_bias": True},
            "'qwen3' with biases in its attention",
        ),
    ],
)
def test_a_decoder_without_a_closed_form_is_sent_to_the_dry_run(
    config: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    write(tmp_path / "bird", json.dumps(config))
    assert find_config(str(tmp_path / "bird")).values == config
    with pytest.raises(NoClosedForm) as caught:
        find_shape(str(tmp_path / "bird"))
    assert f"bird has the architecture {architecture}" in caught.value.problem
    assert "closed form has not been shown to be right" in caught.value.problem
    assert "`--exact`" in caught.value.cure


def test_a_usual_config_passes_with_what_it_leaves_open() -> None:
    odd = {
        "rope_scaling": None, "sliding_window": None, "num_experts": 0, "layer_types": None,
        "pad_token_id": -1, "architectures": ["LlamaForCausalLM"], "is_encoder_decoder": False,
    }  # fmt: skip
    assert shape_from_config({**CONFIG, **odd}, name="usual").parameters == 8_030_261_248
    unused = {"sliding_window": 0, "use_sliding_window": False}
    qwen = known_models()["Qwen/Qwen2.5-7B"]
    assert shape_from_config({**qwen, **unused, "attention_bias": False}, name="usual").attention_bias


def write(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text, encoding="utf-8")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_lists_what_transformers_builds(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name = ONE_OF_EACH_FAMILY[family]
    values = {key: value for key, value in known_models()[name].items() if key != "model_type"}
    shape = find_shape(name)
    with torch.device("meta"):
        config = AutoConfig.for_model(family, **values, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        model = AutoModelForCausalLM.from_config(config)
    layer = dict(model.get_decoder().layers[0].named_modules())
    linears = {
        path.rpartition(".")[2]: (module.in_features, module.out_features, module.bias is not None)
        for path, module in layer.items()
        if isinstance(module, torch.nn.Linear)
    }
    assert linears == {each.name: (each.inputs, each.outputs, each.bias) for each in shape.linears}
    assert model.num_parameters() == shape.parameters
    assert _norm_weights(model) == shape.norm_weights
    assert model.get_input_embeddings().weight.numel() == shape.embedding_weights
    is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert is_tied == shape.tied
    assert shape.layers == len(model.get_decoder().layers)


def _norm_weights(model: object) -> int:
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()  # type: ignore[attr-defined]
        if name.rpartition(".")[0].endswith("norm")
    )


def test_a_shape_is_frozen() -> None:
    shape = find_shape("smollm2-135m")
    assert isinstance(shape, ModelShape)
    with pytest.raises(AttributeError):
        shape.layers = 3  # type: ignore[misc]
