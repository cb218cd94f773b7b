"""GGUF files we write against an independent writer, transformers' reader, and our own reading of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import TinyModel
from gguf_files import write_gguf as reference_gguf
from peft import LoraConfig, get_peft_model
from planted_faults import finished
from safetensors.torch import load_file, save_file
from test_gguf_tokenizer import pieces
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.errors import BadExport, BadModel, NoRoom, QadaptError, Unsupported
from qadapt.events import Event, StageAdvanced, StageStarted, Warned
from qadapt.export import gguf_file
from qadapt.export.gguf import About, write_gguf
from qadapt.export.gguf_front import read_front
from qadapt.export.gguf_metadata import read_architecture
from qadapt.export.gguf_types import GGUF_FORMS, allowed_error, nearest_step_error, quantized
from qadapt.export.gguf_written import GgufWritten
from qadapt.export.merge import merge
from qadapt.export.merged_model import open_merged
from qadapt.export.reference import View, open_reference
from qadapt.export.tensor_proof import TensorProof, prove_written
from qadapt.model.shards import TensorEntry
from qadapt.model.source import find_model
from qadapt.model.tensor_files import TensorReader, open_model
from qadapt.model.tensor_values import bytes_of, tensor_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm2")
ABOUT = About("tiny-orders", base="org/tiny-1b", licence="apache-2.0")
QUANTIZED = [kind for kind in GGUF_FORMS.values() if kind.startswith("Q")]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


class Folder:
    """A model folder as the tensors of a merged model, so that files without an adapter can be tested."""

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self.entries = tuple(reader.entries.values())

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        source = self._reader.entries[entry.name]
        tensor = tensor_of(self._reader.read(entry.name), source.dtype, source.shape)
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry.dtype]
        for rows in tensor.to(kind).split(5):
            yield bytes_of(rows)


def written(model: Path, target: Path, *, kind: str = "F16", about: About = ABOUT) -> list[Event]:
    with open_model(model) as reader:
        return list(write_gguf(Folder(reader), target, described=model, kind=kind, about=about))


def make_adapter(model: Path, folder: Path, **options: Any) -> Path:
    """A LoRA with both factors random."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear"} | options)
    adapted = get_peft_model(loaded, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    write_facts(AdapterFacts("tiny", None, "f" * 64, "nf4", True, "fp32", "p" * 64), folder)
    return folder


def merged_folder(model: Path, adapter: Path, target: Path, *, form: str = "merged-fp16") -> Path:
    list(merge(model_folder=model, adapter_folder=adapter, target=target, form=form))
    return target


def proof_of(
    file: Path, model: Path, adapter: Path, *, described: Path, base: str = "dequantized"
) -> TensorProof:
    with open_reference(model, [(adapter, 1.0)], base=base) as reference:
        found = GgufWritten(file, described=described, names=reference.entries)
        return finished(prove_written(found, reference, dtype="F32"))


def streamed(model: Path, adapter: Path, target: Path, *, described: Path, **options: Any) -> list[Event]:
    """The file straight from base and adapter."""
    kind = options.pop("kind", "F16")
    with open_merged(model, adapter, base="dequantized", dtype="F32", **options) as merged:
        return list(write_gguf(merged, target, described=described, kind=kind, about=ABOUT))


def changed_config(model: Path, **values: object) -> Path:
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(config), encoding="utf-8")
    return model


def own_model(folder: Path, kind: str, tokenizer: Path, **values: object) -> Path:
    """A tiny random model of an architecture, or a width, that `tiny_model` does not have."""
    usual = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 448, "max_position_embeddings": 512,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **usual | values)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_file_from_base_and_adapter_comes_back_as_the_merged_export(family, tiny_model: TinyModel, tmp_path):
    model = tiny_model(family, vocabulary=640 if family == "gemma2" else 448)
    adapter = make_adapter(model, tmp_path / "adapter")
    merged = merged_folder(model, adapter, tmp_path / "merged")
    if family == "gemma2":
        pieces(merged, kind="gemma")  # transformers reads no other tokenizer for this architecture
    streamed(model, adapter, tmp_path / "tiny.gguf", described=merged, chunk_bytes=3000)
    back = find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache").folder
    ours, export = weights_of(back), weights_of(merged)
    assert ours.keys() == export.keys()
    for name, tensor in export.items():
        tolerance = 1e-6 if family == "gemma2" and "norm" in name else 0  # stored as 1 + weight in float32
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)
    found, wanted = (json.loads((folder / "config.json").read_text("utf-8")) for folder in (back, merged))
    for field in (
        "hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
        "max_position_embeddings", "vocab_size", "intermediate_size", "num_hidden_layers",
    ):  # fmt: skip
        assert found[field] == wanted[field], field
    model_back, model_merged = (
        AutoModelForCausalLM.from_pretrained(folder).float() for folder in (back, merged)
    )
    tokens = torch.arange(40).view(2, 20) * 7 % 300
    with torch.no_grad():
        logits = [model(input_ids=tokens).logits for model in (model_back, model_merged)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_is_that_of_an_independent_writer(family, tiny_model: TinyModel, tmp_path):
    model = tiny_model(family)
    written(model, tmp_path / "ours.gguf")
    reference_gguf(model, tmp_path / "theirs.gguf")
    ours, theirs = fields(tmp_path / "ours.gguf"), fields(tmp_path / "theirs.gguf")
    compared = 0
    for key, value in theirs.items():
        if not key.startswith(("GGUF", "general.name", "tokenizer.ggml.pre", "tokenizer.ggml.model")):
            if key == "tokenizer.ggml.scores":
                continue  # of byte-level BPE; nobody reads them
            assert ours[key] == value, key
            compared += 1
    assert compared >= 18
    assert ours["general.name"] == "tiny-orders" and ours["general.type"] == "model"
    assert ours["general.base_model.0.name"] == "tiny-1b" and ours["general.license"] == "apache-2.0"
    assert ours["general.base_model.0.organization"] == "org" and ours["general.file_type"] == 1


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_quantized_tensors_are_those_of_an_independent_writer(kind, family, tiny_model: TinyModel, tmp_path):
    model = tiny_model(family)
    adapter = make_adapter(model, tmp_path / "adapter")
    exact = merged_folder(model, adapter, tmp_path / "exact", form="merged-fp32")
    streamed(model, adapter, tmp_path / "ours.gguf", described=exact, kind=kind, chunk_bytes=3000)
    reference_gguf(exact, tmp_path / "theirs.gguf", weights=weights_of(exact), quantization=kind)
    ours, theirs = tensors_of(tmp_path / "ours.gguf"), tensors_of(tmp_path / "theirs.gguf")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(ours[name].data, tensor.data), name
    assert fields(tmp_path / "ours.gguf")["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{kind}"]


def test_bf16_file_holds_the_bf16_export_exactly(tiny_model: TinyModel, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, tmp_path / "adapter")
    merged = merged_folder(model, adapter, tmp_path / "merged", form="merged-bf16")
    streamed(model, adapter, tmp_path / "tiny.gguf", described=merged, kind="BF16")
    back = weights_of(find_model(str(tmp_path / "tiny.gguf"), cache=tmp_path / "cache").folder)
    for name, tensor in weights_of(merged).items():
        assert torch.equal(back[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_the_same_model(family, tiny_model: TinyModel, tmp_path):
    model = tiny_model(family)
    written(model, tmp_path / "tiny.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).float()
    tokens = torch.arange(40).view(2, 20) * 7 % 300
    with torch.no_grad():
        ours, theirs = (each(input_ids=tokens).logits for each in (read, original))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_progress_counts_every_byte_once(tiny_model: TinyModel, tmp_path):
    first, *middle = written(tiny_model("llama"), tmp_path / "tiny.gguf", kind="Q8_0")
    assert isinstance(first, StageStarted)
    assert all(isinstance(event, StageAdvanced) for event in middle)
    assert (
        middle[-1].done
        == middle[-1].total
        == sum(t.n_bytes for t in tensors_of(tmp_path / "tiny.gguf").values())
    )


def test_the_same_file_twice_is_the_same_bytes(tiny_model: TinyModel, tmp_path):
    for name in ("one.gguf", "two.gguf"):
        written(tiny_model("qwen3"), tmp_path / name, kind="Q5_1")
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_widths_that_make_no_blocks_stay_in_f16_and_are_named(tiny_model: TinyModel, tmp_path):
    values = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = own_model(tmp_path / "model", "llama", tiny_model("llama"), **values)
    config = AutoConfig.from_pretrained(model)
    config.intermediate_size = 80
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
    [warned] = [each for each in written(model, tmp_path / "t.gguf", kind="Q8_0") if isinstance(each, Warned)]
    assert warned.message.startswith("6 tensors stay in F16, blk.0.ffn_down.weight first: 80 columns")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(tmp_path / "t.gguf").items()}
    assert kinds["blk.5.ffn_down.weight"] == "F16" and kinds["blk.5.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["token_embd.weight"] == "Q8_0"


def test_rotary_divisors_of_llama_3_are_those_of_transformers(tiny_model: TinyModel, tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = LLAMA3 | {
        "low_freq_factor": 1.5,
        "high_freq_factor": 5.0,
        "original_max_position_embeddings": 4096,
    }
    model = own_model(tmp_path / "model", "llama", tiny_model("llama"), rope_parameters=rope)
    written(model, tmp_path / "t.gguf")
    config = AutoConfig.from_pretrained(model)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    stored = torch.from_numpy(tensors_of(tmp_path / "t.gguf")["rope_freqs.weight"].data.copy())
    torch.testing.assert_close(stored, plain / scaled, rtol=1e-5, atol=0)


def test_llama_3_comes_back_with_its_rotary_scaling(tiny_model: TinyModel, tmp_path):
    model = own_model(tmp_path / "model", "llama", tiny_model("llama"), rope_parameters=LLAMA3)
    written(model, tmp_path / "t.gguf")
    back = find_model(str(tmp_path / "t.gguf"), cache=tmp_path / "cache").folder
    assert json.loads((back / "config.json").read_text("utf-8"))["rope_parameters"] == LLAMA3


def test_phi_3_with_long_positions_has_both_tables_of_factors(tiny_model: TinyModel, tmp_path):
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8,
        "long_factor": [1.0 + n for n in range(8)], "original_max_position_embeddings": 128,
    }  # fmt: skip
    model = own_model(
        tmp_path / "model", "phi3", tiny_model("phi3"), rope_parameters=rope,
        original_max_position_embeddings=128, sliding_window=None,
    )  # fmt: skip
    [warned] = [each for each in written(model, tmp_path / "t.gguf") if isinstance(each, Warned)]
    assert "beyond 128 tokens" in warned.message and "at most 128 tokens" in warned.cure
    tensors, values = tensors_of(tmp_path / "t.gguf"), fields(tmp_path / "t.gguf")
    assert tensors["rope_factors_long.weight"].data.tolist() == rope["long_factor"]
    assert tensors["rope_factors_short.weight"].data.tolist() == rope["short_factor"]
    assert values["phi3.rope.scaling.original_context_length"] == 128
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, factor = ROPE_INIT_FUNCTIONS["longrope"](AutoConfig.from_pretrained(model), device="cpu")
    assert values["phi3.rope.scaling.attn_factor"] == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize(("kind", "architecture"), [("gemma3_text", "gemma3"), ("smollm3", "smollm3")])
def test_architectures_that_are_not_read_are_written_as_llama_cpp_names_them(
    kind, architecture, tiny_model: TinyModel, tmp_path
):
    more = {"query_pre_attn_scalar": 16, "sliding_window": 64} if kind == "gemma3_text" else {}
    model = own_model(tmp_path / "model", kind, tiny_model("llama"), **more)
    written(model, tmp_path / "t.gguf")
    values, tensors = fields(tmp_path / "t.gguf"), tensors_of(tmp_path / "t.gguf")
    assert values["general.architecture"] == architecture
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[number]}
    layer = {name.replace(".2.", ".{bid}.").removesuffix(".weight") for name in tensors if ".2." in name}
    assert layer <= known and len(layer) == (13 if kind == "gemma3_text" else 9)
    weights = weights_of(model)
    query = weights["model.layers.2.self_attn.q_proj.weight"].float().numpy()
    if kind == "smollm3":
        query = query.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    else:
        norm = weights["model.layers.2.self_attn.q_norm.weight"].float().numpy() + 1
        assert np.array_equal(tensors["blk.2.attn_q_norm.weight"].data, norm)
        assert values["gemma3.attention.sliding_window"] == 64 and values["gemma3.rope.freq_base_swa"] == 1e4
    assert np.array_equal(tensors["blk.2.attn_q.weight"].data, query.astype(np.float16))


def refused(model: Path, target: Path) -> QadaptError:
    with pytest.raises(QadaptError) as caught:
        written(model, target)
    assert caught.value.cure and not target.exists()
    return caught.value


def test_what_llama_cpp_does_otherwise_is_refused_by_its_field(tiny_model: TinyModel, tmp_path):
    own = own_model(tmp_path / "gemma", "gemma2", tiny_model("gemma2"), query_pre_attn_scalar=100)
    error = refused(own, tmp_path / "t.gguf")
    assert isinstance(error, Unsupported)
    assert "query_pre_attn_scalar = 100; llama.cpp's gemma2 has 16" in error.problem
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    own = own_model(tmp_path / "llama", "llama", tiny_model("llama"), rope_parameters=rope)
    assert "'dynamic', which llama.cpp does not do for llama" in refused(own, tmp_path / "t.gguf").problem
    own = own_model(tmp_path / "smollm3", "smollm3", tiny_model("llama"), no_rope_layer_interval=3)
    assert "no_rope_layers" in refused(own, tmp_path / "t.gguf").problem
    own = own_model(tmp_path / "olmo2", "olmo2", tiny_model("llama"))
    assert "'olmo2' is not written here" in refused(own, tmp_path / "t.gguf").problem


def test_window_that_llama_cpp_does_not_have_is_said(tiny_model: TinyModel, tmp_path):
    values = {"sliding_window": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    model = own_model(tmp_path / "model", "mistral", tiny_model("mistral"), **values)
    [warned] = [each for each in written(model, tmp_path / "t.gguf") if isinstance(each, Warned)]
    assert warned.message.startswith(
        "The model looks back 64 tokens; llama.cpp's llama looks back to the start"
    )
    assert not read_architecture(tiny_model("qwen2")).warnings


def test_number_too_large_for_f16_is_refused_by_the_tensor(tiny_model: TinyModel, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"].fill_(1e7)
    save_file(tensors, path)
    with pytest.raises(BadExport, match=r"layers\.0\.mlp\.up_proj\.weight reaches"):
        streamed(model, adapter, tmp_path / "t.gguf", described=model)
    streamed(model, adapter, tmp_path / "t.gguf", described=model, kind="BF16")


def test_disk_is_checked_before_the_first_byte(tiny_model: TinyModel, tmp_path, monkeypatch):
    monkeypatch.setattr("qadapt.cache.free_bytes", lambda folder: 1000)
    assert isinstance(refused(tiny_model("llama"), tmp_path / "t.gguf"), NoRoom)


def test_byte_that_changed_on_the_disk_is_found_by_its_tensor(tiny_model: TinyModel, tmp_path, monkeypatch):
    append = gguf_file._append

    def flipped(file: Any, tensor: gguf_file.FileTensor) -> str:
        digest = append(file, tensor)
        if tensor.name == "blk.1.ffn_up.weight":
            file.flush()
            with Path(file.name).open("r+b") as other:
                other.seek(-40, 2)
                byte = other.read(1)
                other.seek(-40, 2)
                other.write(bytes([byte[0] ^ 1]))
        return digest

    monkeypatch.setattr(gguf_file, "_append", flipped)
    with pytest.raises(BadExport, match=r"not what was written: blk\.1\.ffn_up\.weight"):
        written(tiny_model("llama"), tmp_path / "t.gguf")


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("scale", [1e-6, 0.02, 3.0, 2e3])
def test_what_a_type_loses_is_within_its_bound_and_the_bound_is_tight(kind, scale):
    rows = (np.random.default_rng(0).standard_normal((40, 96)) * scale).astype(np.float32)
    rows[3], rows[4, :32], rows[5, 7] = 0, scale, -9 * scale
    stored = quantized(rows, kind, name="w")
    lost = np.abs(gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]) - rows)
    bound = allowed_error(rows, kind)
    assert bound.shape == rows.shape and (lost <= bound).all()
    if scale > 1e-3:
        assert (lost / bound).max() > 0.85


@pytest.mark.parametrize("kind", ["Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"])
def test_where_scales_are_searched_for_the_bound_is_that_of_the_nearest_step(kind):
    type_ = gguf.GGMLQuantizationType[kind]
    values, size = gguf.GGML_QUANT_SIZES[type_]
    draw, parts = np.random.default_rng(3), {"Q6_K": (0, 192), "Q3_K": (0, 96), "IQ4_NL": (2, 18)}
    first, last = parts.get(kind, (16, size))
    block = draw.integers(0, 256, size, dtype=np.uint8)
    for place in {"Q6_K": [208], "Q3_K": [108], "IQ4_NL": [0]}.get(kind, [0, 2]):
        block[place : place + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    many = np.tile(block, (4000, 1))
    many[:, first:last] = draw.integers(0, 256, (4000, last - first), dtype=np.uint8)
    steps = np.sort(gguf.quants.dequantize(many, type_), axis=0)  # every one that a value may be on
    low, high = steps[0], steps[-1]
    for reach in (0.0, 0.5):
        exact = draw.uniform(low - reach * (high - low), high + reach * (high - low))
        off = np.abs(steps - exact).min(axis=0)
        bound = nearest_step_error(exact[None], block[None], kind)[0]
        assert bound.shape == (values,) and (off <= bound).all()
        if kind != "IQ4_NL":  # whose steps are not of one width
            assert (off / bound).max() > 0.9
    gaps = np.diff(steps, axis=0).max(axis=0)
    exact = low + 0.75 * gaps  # nearer to the second step than to the first
    wrong = (gaps > 0) & (np.abs(low - exact) <= nearest_step_error(exact[None], block[None], kind)[0])
    assert not wrong.any()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_a_k_quant_is_proven_by_the_steps_of_its_own_blocks(kind, tiny_model: TinyModel, tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
    model = own_model(tmp_path / "model", "llama", tiny_model("llama"), **wide)
    adapter = make_adapter(model, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * 0.03 if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    merged = merged_folder(model, adapter, tmp_path / "merged")
    type_ = {"general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_K_M)}

    def faults_of(weights: dict[str, torch.Tensor]) -> set[str]:
        file = tmp_path / "t.gguf"
        reference_gguf(model, file, weights=weights, quantization=kind, metadata=type_)
        proof = proof_of(file, model, adapter, described=merged)
        return {fault.place for fault in proof.faults if fault.place in weights}

    right, name = weights_of(merged), "model.layers.0.mlp.up_proj.weight"
    assert not faults_of(right)
    assert faults_of(right | {name: weights_of(model)[name].half()}) == {name}, "the adapter left out"
    assert faults_of(right | {name: torch.zeros_like(right[name])}) == {name}
    assert faults_of(right | {name: right[name] * 1.004}) == {name}


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_values_that_no_block_holds_are_refused(kind):
    rows = np.zeros((2, 32), dtype=np.float32)
    rows[1, 3] = 1e8
    with pytest.raises(BadExport, match=f"reaches 1e.08, which a block of {kind} does not hold") as refused:
        quantized(rows, kind, name="w")
    assert "gguf-bf16" in refused.value.cure


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "smollm2"])
def test_written_tensors_are_read_as_the_folder_has_them_within_the_bound(kind, family, tiny_model, tmp_path):
    model = tiny_model(family)
    written(model, tmp_path / "t.gguf", kind=kind)
    exact = weights_of(model)
    found = GgufWritten(tmp_path / "t.gguf", described=model, names=exact)
    assert found.faults == () and found.entries.keys() == exact.keys()
    for name, tensor in exact.items():
        part_shape = (len(tensor), tensor[0].numel())
        whole = tensor.float().reshape(part_shape)
        for first in range(0, len(whole), 30):
            rows = found.rows(name, first, min(first + 30, len(whole)))
            part = whole[first : first + 30]
            bound = found.bound(name, tensor.reshape(part_shape)[first : first + 30], first)
            assert (
                rows.shape == part.shape and ((rows - part).abs() <= (0 if bound is None else bound)).all()
            ), name
    names = [name for name in exact if "layers.1" not in name] + ["model.layers.7.mlp.up_proj.weight"]
    found = GgufWritten(tmp_path / "t.gguf", described=model, names=names)
    assert {fault.cause for fault in found.faults} == {"not of this model"}
    assert "model.layers.7.mlp.up_proj.weight" not in found.entries


@pytest.mark.parametrize("family", ["llama", "smollm2", "gemma2"])
def test_a_file_is_proven_and_what_old_files_hold_besides_the_weights_is_not_missed(
    family, tiny_model: TinyModel, tmp_path
):
    model = tmp_path / "model"
    shutil.copytree(tiny_model(family), model)
    weights = weights_of(model) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tiny_model(family), tmp_path / "adapter")
    merged = merged_folder(model, adapter, tmp_path / "merged")
    streamed(model, adapter, tmp_path / "t.gguf", described=merged)
    proof = proof_of(tmp_path / "t.gguf", model, adapter, described=merged)
    assert proof.holds and proof.tensors == len(weights) - 1, proof.sentence()


@pytest.mark.parametrize("kind", [*QUANTIZED, "F16", "BF16"])
def test_a_small_update_that_is_left_out_is_found_in_every_type(kind, tiny_model: TinyModel, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * 0.3 if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    with open_reference(model, [(adapter, 1.0)], base="original") as reference:
        name = "model.layers.0.mlp.up_proj.weight"
        full, bare = (reference.rows(name, 0, 8, view=View("original", each)).values for each in (1.0, 0.0))
    assert (full - bare).norm() < 0.5 * bare.norm(), "a control: it is small"
    written(model, tmp_path / "t.gguf", kind=kind)
    proof = proof_of(tmp_path / "t.gguf", model, adapter, described=model, base="original")
    assert "model.layers.0.mlp.up_proj.weight" in {fault.place for fault in proof.faults}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_llama_quantize_makes_of_a_16_bit_file_is_no_fault(kind, tiny_model: TinyModel, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, tmp_path / "adapter")
    merged = merged_folder(model, adapter, tmp_path / "merged")  # float16, as the file that it is given
    written(merged, tmp_path / "t.gguf", kind=kind)
    if kind == "Q8_0":
        assert not proof_of(tmp_path / "t.gguf", model, adapter, described=merged).holds, "a control"
    data = (tmp_path / "t.gguf").read_bytes()
    key = b"general.file_type" + (4).to_bytes(4, "little")
    own = key + int(gguf.LlamaFileType[f"MOSTLY_{kind}"]).to_bytes(4, "little")
    assert own in data
    theirs = key + int(gguf.LlamaFileType.MOSTLY_Q4_K_M).to_bytes(4, "little")
    (tmp_path / "t.gguf").write_bytes(data.replace(own, theirs))
    proof = proof_of(tmp_path / "t.gguf", model, adapter, described=merged)
    assert proof.holds, proof.sentence()


def test_metadata_and_rotary_factors_that_are_not_the_models_are_found(tiny_model: TinyModel, tmp_path):
    model = own_model(tmp_path / "model", "llama", tiny_model("llama"), rope_parameters=LLAMA3)
    written(model, tmp_path / "t.gguf")
    names = weights_of(model)
    assert GgufWritten(tmp_path / "t.gguf", described=model, names=names).faults == ()
    with (tmp_path / "t.gguf").open("r+b") as file:
        file.seek(read_front(tmp_path / "t.gguf").tensors["rope_freqs.weight"].start)
        file.write(np.float32(1.25).tobytes())
    [fault] = GgufWritten(tmp_path / "t.gguf", described=model, names=names).faults
    assert fault.place == "rope_freqs.weight" and "other rotary factors" in fault.detail
    changed_config(model, rms_norm_eps=1e-3)
    faults = GgufWritten(tmp_path / "t.gguf", described=model, names=names).faults
    assert "llama.attention.layer_norm_rms_epsilon" in [fault.place for fault in faults]


def test_metadata_that_is_read_is_that_of_the_folder_not_of_the_base(tiny_model: TinyModel, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, tmp_path / "adapter")
    merged = merged_folder(model, adapter, tmp_path / "merged")
    (merged / "chat_template.jinja").write_text("{{ bos_token }}TRAINED", encoding="utf-8")
    streamed(model, adapter, tmp_path / "t.gguf", described=merged)
    assert fields(tmp_path / "t.gguf")["tokenizer.chat_template"] == "{{ bos_token }}TRAINED"


def test_whether_texts_begin_with_bos_may_be_given(tiny_model: TinyModel, tmp_path):
    for adds in (True, False):
        written(tiny_model("llama"), tmp_path / "t.gguf", about=replace(ABOUT, adds_bos=adds))
        assert fields(tmp_path / "t.gguf")["tokenizer.ggml.add_bos_token"] is adds


def test_front_of_a_file_is_what_the_package_reads(tiny_model: TinyModel, tmp_path):
    written(tiny_model("llama"), tmp_path / "t.gguf", kind="Q5_0")
    front, theirs = read_front(tmp_path / "t.gguf"), fields(tmp_path / "t.gguf")
    assert {key: value for key, value in theirs.items() if not key.startswith("GGUF.")} == front.values
    read = tensors_of(tmp_path / "t.gguf")
    assert list(front.tensors) == list(read)
    for name, place in front.tensors.items():
        assert (place.kind, place.start) == (read[name].tensor_type.name, read[name].data_offset)
        assert place.shape == tuple(reversed(read[name].shape.tolist()))
        assert place.size_bytes == read[name].n_bytes


@pytest.mark.parametrize("length", [0, 3, 30, 5_000, -200])
def test_file_that_is_cut_off_is_no_gguf(length, tiny_model: TinyModel, tmp_path):
    written(tiny_model("llama"), tmp_path / "t.gguf")
    path = tmp_path / "t.gguf"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(BadModel, match="no whole GGUF file"):
        read_front(path)
