"""LoRA adapters as GGUF files: what llama.cpp adds to the base; and K-quants through its own program."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import TinyModel
from peft import LoraConfig, get_peft_model
from planted_faults import finished
from safetensors.torch import load_file, save_file
from test_gguf_export import ABOUT, fields, make_adapter, tensors_of, weights_of, written
from transformers import AutoModelForCausalLM

from qadapt.errors import BadExport, Unsupported
from qadapt.events import StageAdvanced
from qadapt.export import llama_quantize
from qadapt.export.gguf_front import read_front
from qadapt.export.gguf_lora import write_gguf_lora
from qadapt.export.gguf_lora_written import GgufLoraWritten
from qadapt.export.llama_quantize import LEAST_BUILD, find_llama_quantize, quantize_gguf
from qadapt.export.merge import merge
from qadapt.export.reference import open_reference
from qadapt.export.tensor_fault import LEFT_OUT, OTHER_STRENGTH
from qadapt.export.tensor_proof import TensorProof, prove_written


def lora(model: Path, adapter: Path, target: Path) -> dict[str, np.ndarray]:
    list(write_gguf_lora(adapter, target, model_folder=model, about=ABOUT))
    return {name: np.array(tensor.data) for name, tensor in tensors_of(target).items()}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {"use_rslora": True}),
        ("qwen3", {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 33}}),
        ("gemma2", {}),
        ("phi3", {"lora_alpha": 0.7}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ],
)
def test_base_with_the_adapter_is_the_merged_model_as_llama_cpp_adds_them(
    family, options, tiny_model: TinyModel, tmp_path
):
    model = tiny_model(family)
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    pairs = lora(model, adapter, tmp_path / "lora.gguf")
    values = fields(tmp_path / "lora.gguf")
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora"
    target = tmp_path / "merged"
    list(
        merge(model_folder=model, adapter_folder=adapter, target=target, form="merged-fp32", base="original")
    )
    written(model, tmp_path / "base.gguf", kind="BF16")
    base, merged = weights_of_file(tmp_path / "base.gguf"), stored(target, tmp_path)
    assert values["general.architecture"] == fields(tmp_path / "base.gguf")["general.architecture"]
    names = {name.removesuffix(".lora_a") for name in pairs if name.endswith(".lora_a")}
    assert len(pairs) == 2 * len(names) and names <= set(base)
    for name in base:
        if name in names:
            a, b = pairs[f"{name}.lora_a"], pairs[f"{name}.lora_b"]
            sum_ = base[name] + values["adapter.lora.alpha"] / a.shape[0] * (b @ a)
            np.testing.assert_allclose(sum_, merged[name], rtol=0, atol=1e-5, err_msg=name)
        else:
            assert np.array_equal(base[name], merged[name]), name


def proof_of(file: Path, model: Path, adapter: Path) -> TensorProof:
    with open_reference(model, [(adapter, 1.0)], base="original") as reference:
        found = GgufLoraWritten(file, described=model, base=reference)
        return finished(prove_written(found, reference, dtype="F32"))


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"use_rslora": True}), ("gemma2", {}), ("phi3", {"lora_alpha": 0.7})],
)
def test_lora_file_is_proven_and_one_that_is_not_the_adapters_is_found(
    family, options, tiny_model: TinyModel, tmp_path
):
    model = tiny_model(family)
    adapter = make_adapter(model, tmp_path / "adapter", **options)
    list(write_gguf_lora(adapter, tmp_path / "lora.gguf", model_folder=model, about=ABOUT))
    proof = proof_of(tmp_path / "lora.gguf", model, adapter)
    assert proof.holds and proof.tensors == len(weights_of(model)), proof.sentence()
    other = make_adapter(model, tmp_path / "other", **options | {"lora_alpha": 12})
    shutil.copy(adapter / "adapter_model.safetensors", other)
    list(write_gguf_lora(other, tmp_path / "strong.gguf", model_folder=model, about=ABOUT))
    assert {fault.cause for fault in proof_of(tmp_path / "strong.gguf", model, adapter).faults} == {
        OTHER_STRENGTH
    }
    less = make_adapter(model, tmp_path / "less", **options | {"target_modules": ["o_proj"]})
    save_file(
        {
            name: tensor
            for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
            if "o_proj" in name
        },
        less / "adapter_model.safetensors",
    )
    list(write_gguf_lora(less, tmp_path / "less.gguf", model_folder=model, about=ABOUT))
    faults = proof_of(tmp_path / "less.gguf", model, adapter).faults
    assert {fault.cause for fault in faults} == {LEFT_OUT}
    assert not any("o_proj" in fault.place for fault in faults)


def test_rows_of_a_lora_file_in_the_order_of_another_program_are_found(tiny_model: TinyModel, tmp_path):
    model = tiny_model("llama")
    adapter = make_adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    list(write_gguf_lora(adapter, tmp_path / "lora.gguf", model_folder=model, about=ABOUT))
    place = read_front(tmp_path / "lora.gguf").tensors["blk.1.attn_q.weight.lora_b"]
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    with (tmp_path / "lora.gguf").open("r+b") as file:
        file.seek(place.start)
        file.write(load_file(adapter / "adapter_model.safetensors")[name].numpy().tobytes())
    [fault] = proof_of(tmp_path / "lora.gguf", model, adapter).faults
    assert fault.place == "model.layers.1.self_attn.q_proj.weight"


def weights_of_file(path: Path) -> dict[str, np.ndarray]:
    return {name: gguf.quants.dequantize(t.data, t.tensor_type) for name, t in tensors_of(path).items()}


def stored(folder: Path, tmp_path: Path) -> dict[str, np.ndarray]:
    """A model in float32 as it lies in a GGUF file, by the independent writer of the tests."""
    from gguf_files import write_gguf

    path = write_gguf(folder, tmp_path / "exact.gguf", weights=weights_of(folder), quantization="F32")
    return weights_of_file(path)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"use_dora": True}, "DoRA"),
        ("llama", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("smollm2", {"target_modules": ["lm_head"]}, "lm_head.weight, which is the embedding"),
        (
            "llama",
            {"target_modules": ["embed_tokens"]},
            "embed_tokens.weight, which llama.cpp does not adapt",
        ),
    ],
)
def test_what_a_lora_file_cannot_hold_is_refused_by_name(family, options, words, tiny_model, tmp_path):
    model = tiny_model(family)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model),
        LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | options),
    )
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(Unsupported, match=words) as refused:
        lora(model, tmp_path / "adapter", tmp_path / "lora.gguf")
    assert "gguf-q8_0" in refused.value.cure and not (tmp_path / "lora.gguf").exists()


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, *, version: str, work: str = "") -> Path:
    """A `llama-quantize` on the PATH that says a version and copies the file."""
    script = folder / "bin" / "llama-quantize"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport shutil, sys\n"
        f"if '--version' in sys.argv:\n    print({version!r}, file=sys.stderr)\n    raise SystemExit(1)\n"
        f"print('[   1/  20] token_embd.weight'); print('[  20/  20] output.weight')\n"
        f"{work or 'shutil.copyfile(sys.argv[1], sys.argv[2])'}\n",
        encoding="utf-8",
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(script.parent) + os.pathsep + os.environ["PATH"])
    return script


def test_k_quant_is_made_by_the_installed_program(tiny_model: TinyModel, tmp_path, monkeypatch):
    script = program(tmp_path, monkeypatch, version=f"version: {LEAST_BUILD} (abc1234)")
    assert find_llama_quantize() == script
    written(tiny_model("llama"), tmp_path / "f16.gguf")
    events = list(quantize_gguf(tmp_path / "f16.gguf", tmp_path / "q.gguf", kind="Q4_K_M", program=script))
    steps = [(event.done, event.total, event.unit) for event in events if isinstance(event, StageAdvanced)]
    assert steps == [(1, 20, "tensors"), (20, 20, "tensors")]
    assert (tmp_path / "q.gguf").read_bytes() == (tmp_path / "f16.gguf").read_bytes()


def test_program_that_is_missing_too_old_or_silent_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_quantize.shutil, "which", lambda name: None)
    with pytest.raises(Unsupported, match="which is not installed") as refused:
        find_llama_quantize()
    assert "brew install llama.cpp" in refused.value.cure and "gguf-q8_0" in refused.value.cure
    monkeypatch.undo()
    for number, (version, words) in enumerate(
        [
            ("main: build = 3000 (abc)", "is build 3000; at least"),
            ("usage: llama-quantize", "does not say which build"),
        ]
    ):
        (tmp_path / str(number)).mkdir()
        program(tmp_path / str(number), monkeypatch, version=version)
        with pytest.raises(Unsupported, match=words):
            find_llama_quantize()


@pytest.mark.parametrize(
    ("version", "begins"),
    [
        ("version: 11739 (0ce8cd114)", ""),
        ("version: 0.2.0-dev (build 9999, commit unknown)", ""),
        ("usage: llama-quantize [--help] model-f32.gguf type", "main: build = 7000 (abc)"),
        ("usage: llama-quantize [--help] model-f32.gguf type", "version: 0.2.0-dev (build 9999, commit abc)"),
    ],
)
def test_program_says_its_build_in_one_of_several_ways(tmp_path, monkeypatch, version, begins):
    script = program(tmp_path, monkeypatch, version=version, work=f"print({begins!r}); raise SystemExit(1)")
    assert find_llama_quantize() == script
    assert sorted(tmp_path.rglob("*.gguf")) == []


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("print('error: out of memory'); raise SystemExit(3)", "exit code 3: error: out of memory"),
        ("open(sys.argv[2], 'wb').write(b'GGUF')", "cannot be read"),
        (
            "shutil.copyfile(sys.argv[1].replace('f16', 'other'), sys.argv[2])",
            "is not the model it was given",
        ),
    ],
)
def test_program_that_fails_is_an_error_with_its_last_words(work, words, tiny_model, tmp_path, monkeypatch):
    script = program(tmp_path, monkeypatch, version="version: 7000 (abc)", work=work)
    written(tiny_model("llama"), tmp_path / "f16.gguf")
    written(tiny_model("smollm2"), tmp_path / "other.gguf")
    with pytest.raises(BadExport, match=words):
        list(quantize_gguf(tmp_path / "f16.gguf", tmp_path / "q.gguf", kind="Q4_K_M", program=script))
