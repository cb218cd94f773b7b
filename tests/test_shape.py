"""Known models against their published parameter counts, and each family against what transformers builds."""

from __future__ import annotations

import pytest

from qadapt.errors import BadModel, NoClosedForm, Unsupported
from qadapt.shape import FAMILIES, ModelShape, find_shape, known_models, shape_from_config

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "01-ai/Yi-6B": 6_061_035_520,
    "01-ai/Yi-9B": 8_829_407_232,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
}
"""Parameters without the copies that some published files hold of a tied head."""

ONE_OF_EACH_FAMILY = {
    "llama": "HuggingFaceTB/SmolLM2-135M",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen2": "Qwen/Qwen2.5-7B",
    "qwen3": "Qwen/Qwen3-0.6B",
    "gemma2": "google/gemma-2-9b",
    "phi3": "microsoft/phi-4",
}


def test_known_models_have_their_published_parameters() -> None:
    found = {name: find_shape(name).parameters for name in PUBLISHED}
    assert found == PUBLISHED


def test_every_known_model_is_read_and_most_are_compared() -> None:
    shapes = [find_shape(name) for name in known_models()]
    assert len(shapes) >= 60
    assert {shape.family for shape in shapes} == set(FAMILIES)
    compared = set(PUBLISHED.values())
    assert all(shape.parameters in compared for shape in shapes)


def test_models_are_found_by_their_last_name_in_any_case() -> None:
    assert find_shape("llama-3.1-8b-INSTRUCT").context == 131_072
    assert find_shape("smollm2-135m").width == 576


def test_an_unknown_model_is_answered_with_the_nearest_known_one() -> None:
    with pytest.raises(BadModel) as caught:
        find_shape("Lama-3.1-8B-Instruct")
    assert "'Lama-3.1-8B-Instruct' is neither a folder" in caught.value.problem
    assert "Did you mean `meta-llama/Llama-3.1-8B-Instruct`?" in caught.value.cure


def test_a_config_that_contradicts_itself_is_refused() -> None:
    config = {**known_models()["meta-llama/Llama-3.1-8B"], "num_key_value_heads": 7}
    with pytest.raises(BadModel, match="32 attention heads cannot share 7 key-value heads"):
        shape_from_config(config, name="broken")
    with pytest.raises(BadModel, match="hidden_size = None"):
        shape_from_config({"model_type": "llama", "num_attention_heads": 4}, name="broken")


def test_vision_and_unproven_models_get_a_clear_no() -> None:
    with pytest.raises(Unsupported, match="no decoder-only text model"):
        shape_from_config({"model_type": "llama", "vision_config": {}}, name="seer")
    with pytest.raises(NoClosedForm, match="architecture 'falcon', whose closed form has not been shown"):
        shape_from_config({"model_type": "falcon"}, name="bird")


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
