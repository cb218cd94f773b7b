"""Known models against what is published: each distinct configuration is built on `meta` and counted.

Where the figures come from: the hub's count of the numbers in a repository's safetensors files, or the model
card (StableLM, Pythia), as printed there. A stored copy of a tied head is taken off (Falcon and the small
Qwen3 have one), as are the rotary buffers that the first Llama 2 files hold: neither is a parameter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qadapt.errors import Unsupported
from qadapt.experts import Experts, routed_experts
from qadapt.model.folder import check_config
from qadapt.shape import FAMILIES, find_config, find_shape, known_models, known_shapes

PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-13b": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "codellama/CodeLlama-7b-hf": 6_738_546_688,
    "codellama/CodeLlama-13b-hf": 13_016_028_160,
    "codellama/CodeLlama-34b-hf": 33_743_970_304,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "Qwen/Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen/Qwen2-0.5B": 494_032_768,
    "Qwen/Qwen2-1.5B": 1_543_714_304,
    "Qwen/Qwen2-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "microsoft/phi-1_5": 1_418_270_720,
    "microsoft/phi-2": 2_779_683_840,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-3-mini-128k-instruct": 3_821_079_552,
    "microsoft/phi-4": 14_659_507_200,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "01-ai/Yi-6B": 6_061_035_520,
    "01-ai/Yi-9B": 8_829_407_232,
    "01-ai/Yi-34B": 34_388_917_248,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": 14_770_033_664,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": 8_030_261_248,
    "deepseek-ai/deepseek-coder-1.3b-instruct": 1_346_471_936,
    "tiiuae/Falcon3-1B-Base": 1_669_408_768,
    "tiiuae/Falcon3-3B-Base": 3_227_655_168,
    "tiiuae/falcon-7b": 7_217_189_760 - 65_024 * 4_544,
    "tiiuae/falcon-40b": 41_835_970_560 - 65_024 * 8_192,
    "stabilityai/stablelm-2-1_6b": 1_644_515_328,
    "stabilityai/stablelm-3b-4e1t": 2_795_443_200,
    "allenai/OLMo-1B-hf": 1_176_764_416,
    "allenai/OLMo-7B-hf": 6_888_095_744,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "openai-community/gpt2": 124_439_808,
}

PUBLISHED_IN_BILLIONS = {
    "bigcode/gpt_bigcode-santacoder": 1.1,
    "ibm-granite/granite-3.1-2b-instruct": 2.5,
    "ibm-granite/granite-3.1-8b-instruct": 8.2,
    "ibm/PowerLM-3b": 3.5,
    "stabilityai/stablelm-base-alpha-3b": 3.6,
    "tiiuae/Falcon3-7B-Base": 7.5,
    "tiiuae/Falcon3-10B-Base": 10.3,
}
"""Rounded figures, where no exact one was found. PowerLM: arXiv 2408.13359, table 4, its other sizes too."""

AT_HOME = (
    *("Llama-2", "Meta-Llama-3-8B", "Llama-3.1", "Llama-3.2", "CodeLlama", "TinyLlama", "SmolLM2", "SmolLM3"),
    *("Mistral-7B", "Mixtral", "Qwen1.5-MoE", "Qwen2-", "Qwen2.5-", "Qwen3-8B", "Qwen3-30B-A3B", "Yi-6B"),
    *("gemma-2b", "gemma-2-", "gemma-3-", "phi-2", "Phi-3-", "Phi-3.5", "phi-4", "falcon-7b", "Falcon3"),
    *("stablelm", "OLMo-1B", "OLMo-2", "DeepSeek-R1-Distill", "Yi-1.5"),
)
"""Parts of names of what people fine-tune on a card at home."""


@dataclasses.dataclass(frozen=True)
class Built:
    """What transformers makes of one configuration: weights and biases, a tied head once."""

    parameters: int
    expert_weights: int


@pytest.fixture(scope="module")
def built() -> dict[str, Built]:
    """Every known name → its model as transformers builds it; equal configurations are built once."""
    counted: dict[int, Built] = {}
    for values in known_models().values():
        if id(values) not in counted:
            counted[id(values)] = count(values)
    return {name: counted[id(values)] for name, values in known_models().items()}


def count(values: dict[str, Any]) -> Built:
    fields = {name: value for name, value in values.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values["model_type"], **fields))
    experts = [each for each in model.parameters() if each.ndim == 3]
    return Built(model.num_parameters(), sum(each.numel() for each in experts))


def test_known_models_have_their_published_parameters(built: dict[str, Built]) -> None:
    assert len(PUBLISHED) >= 25
    assert {name: built[name].parameters for name in PUBLISHED} == PUBLISHED


def test_every_known_model_is_compared_with_a_published_figure(built: dict[str, Built]) -> None:
    for name, billions in PUBLISHED_IN_BILLIONS.items():
        assert round(built[name].parameters / 1e9, 1) == billions, name
    compared = {*PUBLISHED.values(), *(built[name].parameters for name in PUBLISHED_IN_BILLIONS)}
    assert not [name for name in built if built[name].parameters not in compared]


def test_a_closed_form_has_as_many_parameters_as_the_model_that_is_built(built: dict[str, Built]) -> None:
    closed = known_shapes()
    assert len(closed) >= 100
    assert {shape.family for shape in closed} == set(FAMILIES)
    found = {shape.name: shape.parameters for shape in closed}
    assert found == {name: built[name].parameters for name in found}
    assert {name for name in built if find_config(name).family in FAMILIES} == set(found)


def test_routed_experts_are_the_tensors_that_are_no_linear_layers(built: dict[str, Built]) -> None:
    found = {name: routed_experts(values) for name, values in known_models().items()}
    with_experts = {name: each.weights for name, each in found.items() if each is not None}
    assert with_experts == {name: each.expert_weights for name, each in built.items() if each.expert_weights}
    assert found["mistralai/Mixtral-8x7B-v0.1"] == Experts(8, 2, 45_097_156_608)
    assert found["Qwen/Qwen3-30B-A3B"] == Experts(128, 8, 28_991_029_248)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mixtral", {"num_local_experts": 5}),
        ("olmoe", {"num_experts": 5}),
        ("qwen2_moe", {"num_experts": 5, "moe_intermediate_size": 24, "decoder_sparse_step": 2}),
        ("qwen3_moe", {"num_experts": 5, "moe_intermediate_size": 24, "mlp_only_layers": [0]}),
    ],
)
def test_routed_experts_are_counted_layer_by_layer(family: str, fields: dict[str, Any]) -> None:
    common = {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 72, "vocab_size": 101, "num_experts_per_tok": 2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    values = {"model_type": family, **common, **fields}
    found = routed_experts(values)
    assert found is not None
    assert (found.count, found.per_token, found.weights) == (5, 2, count(values).expert_weights)


def test_experts_of_an_unknown_layout_have_no_weights_instead_of_guessed_ones() -> None:
    found = routed_experts({"model_type": "deepseek_v3", "n_routed_experts": 256, "hidden_size": 7168})
    assert found == Experts(256, None, None)
    assert found.weights is None
    assert "(256 per layer) stay in 16 bits: they are 3-D tensors" in found.not_covered
    assert routed_experts({"model_type": "granitemoehybrid", "num_local_experts": 0}) is None
    assert routed_experts(known_models()["Qwen/Qwen3-8B"]) is None


def test_a_mixture_of_experts_is_known_but_not_trained() -> None:
    config = find_config("Mixtral-8x7B-Instruct-v0.1")
    with pytest.raises(Unsupported) as caught:
        check_config(config.values, name=config.name)
    assert caught.value.problem == (
        "mistralai/Mixtral-8x7B-Instruct-v0.1 is a mixture of experts, which is not trained here. "
        "The routed experts (8 per layer, 2 per token) stay in 16 bits (84.00 GiB): they are 3-D tensors, "
        "and bitsandbytes quantizes linear layers only."
    )
    assert caught.value.cure.startswith("Choose a dense model; proven are: llama")


def test_what_people_tune_at_home_is_known() -> None:
    assert not [part for part in AT_HOME if not any(part in name for name in known_models())]
    assert len(known_models()) >= 170


def test_every_known_name_is_found_in_any_case_and_by_its_last_part() -> None:
    for name in known_models():
        assert find_config(name.upper()).name == name
        assert find_config(name.rpartition("/")[2]).values == known_models()[name]
    assert find_shape("llama-3.1-8b-INSTRUCT").context == 131_072
    assert find_shape("smollm2-135m").width == 576
