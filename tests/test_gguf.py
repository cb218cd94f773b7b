"""GGUF files become model folders with the weights, the configuration and the tokenizer they describe."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import TinyModel
from gguf_files import rotary_pairs, write_gguf
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

from qadapt.errors import BadModel, QadaptError, Unsupported
from qadapt.model import gguf_source
from qadapt.model.gguf_config import llama3_divisors
from qadapt.model.gguf_layout import row_order
from qadapt.model.source import find_model


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    logging.disable_progress_bar()


def halved(model: Path) -> dict[str, torch.Tensor]:
    """The folder's weights, as float16 numbers in float32: what a file of F16 can hold exactly."""
    return {
        name: tensor.to(torch.float16).float()
        for name, tensor in load_file(model / "model.safetensors").items()
    }


def converted(path: Path, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path]:
    folder = find_model(str(path), cache=tmp_path / "cache").folder
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return load_file(folder / "model.safetensors"), config, folder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm2"])
def test_converted_weights_are_the_original_ones(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model(family)
    original = halved(model)
    path = write_gguf(model, tmp_path / "tiny.gguf", weights=original)
    weights, config, _ = converted(path, tmp_path)
    assert weights.keys() == original.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float16
        # float16 round trip of gemma's norm + 1, which is stored in float32
        tolerance = 1e-6 if family == "gemma2" and "norm" in name else 0
        torch.testing.assert_close(tensor.float(), original[name], rtol=0, atol=tolerance, msg=name)
    assert config["dtype"] == "float16"
    wanted = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for field in ("hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "tie_word_embeddings"):
        assert config[field] == wanted[field]
    assert config["rope_parameters"]["rope_theta"] == wanted["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_converted_model_is_what_transformers_reads(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = write_gguf(tiny_model(family, width=128), tmp_path / "tiny.gguf", quantization="Q4_1")
    weights, _, folder = converted(path, tmp_path)
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    )
    for name, tensor in weights.items():
        assert torch.equal(tensor, read.state_dict()[name]), name
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float16


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm2"])
def test_tokenizer_and_chat_template_are_the_original_ones(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model(family)
    _, _, folder = converted(write_gguf(model, tmp_path / "tiny.gguf"), tmp_path)
    ours, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(model)
    text = "Two apples, for Ann!\n  日本"
    assert ours.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
    if Version(transformers.__version__) >= Version("5.23"):  # 5.20 (Python 3.10) reads no BOS flag from GGUF
        assert ours.encode(text) == original.encode(text)
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]
    assert ours.apply_chat_template(turns)["input_ids"] == original.apply_chat_template(turns)["input_ids"]
    assert ours.eos_token == original.eos_token


def test_slices_of_rows_give_the_same_file(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", quantization="Q8_0")
    whole = find_model(str(path), cache=tmp_path / "whole")
    monkeypatch.setattr(gguf_source, "_SLICE_VALUES", 1000)
    monkeypatch.setattr(gguf_source, "_SHARD_BYTES", 100_000)
    sliced = find_model(str(path), cache=tmp_path / "sliced")
    shards = sorted(sliced.folder.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    original = load_file(whole.folder / "model.safetensors")
    joined = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert joined.keys() == original.keys()
    assert all(torch.equal(joined[name], original[name]) for name in joined)
    assert AutoModelForCausalLM.from_pretrained(sliced.folder).dtype == torch.float16


@pytest.mark.parametrize(("heads", "rows"), [(1, 2), (3, 18), (4, 40)])
def test_row_order_undoes_the_rotary_pairs(heads: int, rows: int) -> None:
    weight = np.arange(rows * 3).reshape(rows, 3)
    assert np.array_equal(rotary_pairs(weight, heads)[row_order(rows, heads)], weight)


def test_second_call_converts_nothing(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    first = find_model(str(path), cache=tmp_path / "cache")
    monkeypatch.delattr(gguf_source, "_convert")
    assert find_model(str(path), cache=tmp_path / "cache") == first


def test_changed_file_is_converted_anew(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(tiny_model("llama"), path)
    first = find_model(str(path), cache=tmp_path / "cache")
    write_gguf(tiny_model("llama", seed=1), path)
    second = find_model(str(path), cache=tmp_path / "cache")
    assert first.folder != second.folder
    assert first.fingerprint != second.fingerprint


def test_damaged_conversion_is_mended(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    first = find_model(str(path), cache=tmp_path / "cache")
    weights = first.folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert find_model(str(path), cache=tmp_path / "cache") == first


def test_value_beyond_float16_makes_the_model_bfloat16(tiny_model: TinyModel, tmp_path: Path) -> None:
    weights = halved(tiny_model("llama"))
    weights["model.norm.weight"] = torch.full((64,), 1e5)
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", weights=weights)
    found, config, _ = converted(path, tmp_path)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert config["dtype"] == "bfloat16"
    assert found["model.norm.weight"][0] == torch.tensor(1e5, dtype=torch.bfloat16)


def test_bfloat16_file_stays_bfloat16_exactly(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = write_gguf(model, tmp_path / "tiny.gguf", quantization="BF16")
    weights, config, _ = converted(path, tmp_path)
    original = load_file(model / "model.safetensors")
    assert config["dtype"] == "bfloat16"
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_scaling_of_llama_3_is_recognized(
    factor: float, tiny_model: TinyModel, tmp_path: Path
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": factor, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=16, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(
        plain / scaled, torch.tensor(llama3_divisors(16, theta=10000.0, factor=factor)), rtol=1e-5, atol=0
    )

    weights = halved(tiny_model("llama"))
    path = write_gguf(
        tiny_model("llama"), tmp_path / "t.gguf", weights=weights, divisors=(plain / scaled).numpy()
    )
    _, found, _ = converted(path, tmp_path)
    assert found["rope_parameters"] | {"factor": 0} == rope | {"factor": 0}
    assert found["rope_parameters"]["factor"] == pytest.approx(factor, rel=1e-5)


def refused(path: Path, tmp_path: Path) -> QadaptError:
    cache = tmp_path / "cache"
    with pytest.raises(QadaptError) as caught:
        find_model(str(path), cache=cache)
    assert not list((cache / "models").glob("*")) if cache.exists() else True
    assert caught.value.cure
    return caught.value


def test_rotary_scaling_of_another_kind_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    odd = write_gguf(
        model, tmp_path / "odd.gguf", divisors=np.array([1, 2, 1, 3, 1, 1, 1, 5], dtype=np.float32)
    )
    assert "none of Llama 3's" in refused(odd, tmp_path).problem
    yarn = write_gguf(model, tmp_path / "yarn.gguf", metadata={"llama.rope.scaling.type": "yarn"})
    error = refused(yarn, tmp_path)
    assert isinstance(error, Unsupported)
    assert "yarn" in error.problem


@pytest.mark.parametrize("length", [0, 3, 30, 5_000, -1])
def test_cut_off_file_is_refused(length: int, tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:length])
    error = refused(path, tmp_path)
    assert isinstance(error, BadModel)
    assert "is no whole GGUF file" in error.problem


def test_missing_tensor_is_named(tiny_model: TinyModel, tmp_path: Path) -> None:
    weights = halved(tiny_model("llama"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", weights=weights)
    assert "blk.1.ffn_up.weight is missing" in refused(path, tmp_path).problem


def test_tensor_that_the_model_does_not_have_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    weights = halved(tiny_model("qwen3")) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    path = write_gguf(tiny_model("qwen3"), tmp_path / "tiny.gguf", weights=weights)
    assert "a qwen3 model does not have: blk.0.attn_q.bias" in refused(path, tmp_path).problem


def test_values_that_are_not_finite_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    weights = halved(tiny_model("llama"))
    weights["model.norm.weight"][3] = float("nan")
    path = write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", weights=weights)
    assert "output_norm.weight holds values that are not finite" in refused(path, tmp_path).problem


def test_architecture_that_is_not_proven_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), dtype=np.float32))
    _write(writer)
    assert "'mamba', which is not proven" in refused(tmp_path / "mamba.gguf", tmp_path).problem


def test_tensor_types_that_are_not_read_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "odd.gguf", "llama")
    kind = gguf.GGMLQuantizationType.TQ1_0
    writer.add_tensor(
        "token_embd.weight", gguf.quants.quantize(np.ones((2, 256), dtype=np.float32), kind), raw_dtype=kind
    )
    _write(writer)
    assert "type TQ1_0, which is not read" in refused(tmp_path / "odd.gguf", tmp_path).problem


def test_one_part_of_several_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_gguf(tiny_model("llama"), tmp_path / "part.gguf", metadata={"split.count": 3})
    error = refused(path, tmp_path)
    assert "is one part of 3" in error.problem
    assert "--merge" in error.cure


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.model
def test_quick_start_model_is_what_transformers_reads() -> None:
    found = find_model("smollm2-135m")
    weights = load_file(found.folder / "model.safetensors")
    file = next((found.folder.parent.parent / "files").rglob("SmolLM2-135M-Instruct.Q4_1.gguf"))
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    ).state_dict()
    assert weights.keys() == read.keys() - {"lm_head.weight"}
    assert all(torch.equal(tensor, read[name]) for name, tensor in weights.items())
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    turns = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode("<|im_start|>user\nHi")[0] == 1
