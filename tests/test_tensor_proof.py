"""The proof of every number of an export: it holds where a merge is right, and names what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from planted_faults import (
    HEAD,
    INDEX,
    NORM,
    PLANTED,
    Case,
    Planted,
    copied,
    edit,
    export,
    finished,
    is_named,
    make_case,
    proof_of,
)
from proof_power import MUTATIONS, outcomes
from safetensors.torch import load_file, save_file
from tiny_model import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM

from qadapt.adapters.facts import AdapterFacts, write_facts
from qadapt.errors import BadExport, BadRun, Unsupported
from qadapt.export import tensor_proof
from qadapt.export.held_base import HeldBase
from qadapt.export.merge import merge
from qadapt.export.reference import Exact, open_reference
from qadapt.export.reference_changes import layout_of
from qadapt.export.stored_tensors import ExportedFiles, StoredTensors
from qadapt.export.tensor_distance import difference
from qadapt.export.tensor_fault import CAUSES, CHANGED, LEFT_OUT, Fault, in_words
from qadapt.export.tensor_proof import prove_tensors, prove_written
from qadapt.model.load import load_base

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*tie_word_embeddings",
    "ignore:.*tied",
    "ignore:.*invalid shape",  # advice of PEFT for training
)


def facts(quantization: str = "nf4", *, dtype: str = "fp32", double_quant: bool = True) -> AdapterFacts:
    return AdapterFacts("tiny", None, "f" * 64, quantization, double_quant, dtype, "p" * 64)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A right export, not to be changed."""
    return make_case(tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_a_right_export_is_proven(tmp_path, family, base):
    case = make_case(tmp_path, family=family, base=base)
    proof = proof_of(case)
    stored = {k: v for path in case.export.glob("*.safetensors") for k, v in load_file(path).items()}
    assert proof.holds, proof.sentence()
    assert (proof.tensors, proof.elements) == (len(stored), sum(value.numel() for value in stored.values()))
    assert proof.near_ties < 1e-3 * proof.elements and proof.worst_ulps <= 1
    assert json.loads(json.dumps(proof.values()))["holds"] is True


@pytest.mark.parametrize("form", ["merged-bf16", "merged-fp32"])
def test_other_forms_are_proven(tmp_path, form):
    proof = proof_of(make_case(tmp_path, form=form))
    assert proof.holds, proof.sentence()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("quantization", "double_quant"), [("nf4", False), ("int8", True), ("none", True)])
def test_base_is_proven_as_it_was_held(tmp_path, exported, quantization, double_quant, dtype):
    case = replace(exported, adapter=tmp_path / "adapter", export=tmp_path / "export")
    shutil.copytree(exported.adapter, case.adapter)
    write_facts(facts(quantization, dtype=dtype, double_quant=double_quant), case.adapter)
    export(case)
    proof = proof_of(case)
    assert proof.holds, proof.sentence()
    assert not proof_of(replace(case, export=exported.export)).holds, "it was merged on another base"


ADAPTERS: dict[str, tuple[str, Any]] = {
    "rslora and patterns": ("llama", LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True, rank_pattern={"q_proj": 7},
        alpha_pattern={"v_proj": 33},
    )),
    "dora": ("llama", LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=True)),
    "ia3": ("qwen2", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "adalora": ("qwen2", AdaLoraConfig(
        init_r=5, target_r=3, lora_alpha=600, total_step=9, target_modules=["k_proj", "down_proj"]
    )),
    "oft": ("qwen2", OFTConfig(oft_block_size=8, target_modules=["k_proj", "down_proj"])),
    "vera": ("qwen2", VeraConfig(r=5, target_modules=["k_proj", "down_proj"], projection_prng_key=3)),
    "biases": ("qwen2", LoraConfig(r=4, target_modules=["q_proj"], bias="all", lora_bias=True)),
    "embedding and head": ("llama", LoraConfig(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "embedding alone, once tied": ("smollm2", LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "head alone, once tied": ("gemma2", LoraConfig(r=4, target_modules=["lm_head", "q_proj"])),
    "dora on a table": ("llama", LoraConfig(r=4, target_modules=["embed_tokens"], use_dora=True)),
    "whole head": ("llama", LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "whole norm": ("phi3", LoraConfig(r=4, target_modules=["o_proj"], modules_to_save=["norm"])),
    "rows of tokens": (
        "llama", LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 9]})
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_is_proven(tmp_path, kind):
    family, config = ADAPTERS[kind]
    case = Case(make_tiny_model(tmp_path / "model", family), tmp_path / "adapter", tmp_path / "export")
    save_random(case, config)
    export(case)
    proof = proof_of(case)
    assert proof.holds, proof.sentence()
    save_random(case, config, seed=2)
    assert any(fault.cause in CAUSES for fault in proof_of(case).faults), "another adapter is another model"


def save_random(case: Case, config: Any, *, seed: int = 1) -> None:
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(case.adapter), save_embedding_layers=False)
    write_facts(facts(), case.adapter)
    for path in case.model.glob("tokenizer*"):
        shutil.copy(path, case.adapter)


def test_several_adapters_with_weights_are_proven(tmp_path, exported):
    other = replace(exported, adapter=tmp_path / "other")
    save_random(other, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]), seed=5)
    adapters = [(exported.adapter, 0.75), (other.adapter, -0.5)]
    chosen = {"model_folder": exported.model, "adapter_folder": adapters, "form": "merged-bf16"}
    list(merge(target=tmp_path / "export", base="dequantized", **chosen))
    proof = finished(prove_tensors(tmp_path / "export", base="dequantized", **chosen))
    assert proof.holds, proof.sentence()
    chosen["adapter_folder"] = [(exported.adapter, 0.75), (other.adapter, -0.25)]
    assert not finished(prove_tensors(tmp_path / "export", base="dequantized", **chosen)).holds
    save_random(other, LoraConfig(r=3, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(Unsupported, match="does other than add"):
        finished(prove_tensors(tmp_path / "export", base="dequantized", **chosen))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Case]:
    """Right exports by what a fault needs, not to be changed."""
    kinds = {kind_of(each): each for each in PLANTED.values()}
    return {kind: each.right(tmp_path_factory.mktemp("right")) for kind, each in kinds.items()}


def kind_of(planted: Planted) -> tuple[Any, ...]:
    return (planted.family, planted.targets, planted.base, planted.form, planted.size)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_found_and_named(tmp_path, cases, name):
    planted = PLANTED[name]
    right = cases[kind_of(planted)]
    case = replace(copied(right, tmp_path / "export"), adapter=tmp_path / "adapter")
    shutil.copytree(right.adapter, case.adapter)
    planted.plant(case)
    proof = proof_of(case)
    assert not proof.holds
    assert is_named(proof, planted), proof.sentence()
    assert planted.cause in proof.sentence()


def test_faults_of_one_cause_are_said_together(tmp_path, cases):
    case = copied(cases[kind_of(PLANTED["adapter left out"])], tmp_path / "export")
    PLANTED["adapter left out"].plant(case)
    proof = proof_of(case)
    assert {fault.cause for fault in proof.faults} == {LEFT_OUT} and len(proof.faults) == 14
    assert proof.sentence() == f"{proof.faults[0].place} and 13 more: the adapter is left out"
    assert str(Fault("a", CHANGED, "one of 9")) == f"a: {CHANGED} (one of 9)" and in_words([]) == ""


def test_exchanged_tensors_name_each_other(tmp_path, cases):
    case = copied(cases[kind_of(PLANTED["adapter left out"])], tmp_path / "export")
    PLANTED["two tensors exchanged"].plant(case)
    (one, other) = proof_of(case).faults
    assert (one.place, one.other) == (other.other, other.place)


def test_strength_of_the_adapter_is_told(tmp_path, cases):
    case = copied(cases[kind_of(PLANTED["adapter left out"])], tmp_path / "export")
    PLANTED["alpha doubled"].plant(case)
    assert {fault.detail for fault in proof_of(case).faults} == {"2 times what it should"}


def test_nothing_beyond_a_rounding_goes_unseen(exported):
    found = list(outcomes(exported, count=MUTATIONS, seed=3))
    assert len(found) == MUTATIONS
    assert all(each.is_found for each in found if each.is_beyond)
    assert sum(each.is_found for each in found if each.relative > 0) > 100
    assert not any(each.is_found for each in found if each.relative == 0)


def test_a_number_beside_a_tie_may_be_either_neighbour_and_no_third():
    tie = 1 + 2.0**-11  # half way between two numbers of fp16
    exact = Exact(torch.full((1, 4), tie, dtype=torch.float64), relative=1e-7)
    written = torch.tensor([[1.0, 1 + 2.0**-10, 1 + 2.0**-9, 1 - 2.0**-11]], dtype=torch.float16)
    found = difference("w", written, exact)
    assert (found.near_ties, found.worst_ulps, found.wrong) == (1, 1, 2)
    assert found.spot is not None and found.spot.column == 2
    assert difference("w", written, Exact(exact.values)).wrong == 3, "without an error only the nearest even"


def test_a_tolerance_may_be_given_for_each_number():
    exact = Exact(torch.zeros(2, 3, dtype=torch.float64))
    written = torch.tensor([[0.1, -0.1, 0.0], [0.1, 0.3, float("nan")]])
    bound = torch.tensor([[0.15], [0.2]], dtype=torch.float64)
    found = difference("w", written, exact, bound=bound)
    assert (found.wrong, found.wrong_rows, found.lost) == (2, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(130, 64), (40, 192), (67, 33), (5, 123)])
def test_held_base_is_bitsandbytes_bit_for_bit(tmp_path, shape, double_quant, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    save_file({"w": weight}, tmp_path / "w.safetensors")
    packed, state = bnb.quantize_4bit(weight.to(dtype), compress_statistics=double_quant, quant_type="nf4")
    state.shape = torch.Size(
        (1, weight.numel() + weight.numel() % 2)
    )  # its own result for odd widths is wrong
    expected = bnb.dequantize_4bit(packed, state).view(-1)[: weight.numel()].view(shape)
    named = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    with StoredTensors([tmp_path / "w.safetensors"]) as stored:
        base = HeldBase(stored, facts(dtype=named, double_quant=double_quant), frozenset({"w"}))
        for first, last in ((0, shape[0]), (1, 4), (3, 5)):
            assert torch.equal(base.held("w", first, last), expected[first:last])


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_are_the_layers_the_library_quantizes(tmp_path, family):
    folder = make_tiny_model(tmp_path / "model", family)
    base = load_base(
        folder, quantization="nf4", double_quant=True, dtype=torch.float32, device=torch.device("cpu")
    )
    held = {
        f"{name}.weight" for name, module in base.named_modules() if type(module).__name__ == "Linear4bit"
    }
    assert layout_of(folder).linears == held and held


def test_a_mean_summed_on_other_threads_is_no_fault(tmp_path, exported, monkeypatch):
    computed = HeldBase._computed_scales
    monkeypatch.setattr(
        HeldBase, "_computed_scales", lambda self, name, nudge: computed(self, name, nudge + 5)
    )
    case = replace(exported, export=tmp_path / "export", form="merged-fp32")
    export(case)
    assert proof_of(case).holds, "found with the mean five steps lower"
    monkeypatch.setattr(tensor_proof, "_NUDGES", ())
    assert not proof_of(case).holds


def test_adapter_that_cannot_be_proven_is_refused(tmp_path, exported):
    shutil.copytree(exported.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    more = {name.replace("layers.1", "layers.7"): value.clone() for name, value in tensors.items()}
    save_file(tensors | more, path)
    with pytest.raises(BadExport, match=r"layers\.7\..*leaves alone"):
        proof_of(replace(exported, adapter=tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    other = {"peft_type": "LOHA", "r": 4, "alpha": 4, "target_modules": config["target_modules"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(Unsupported, match="LOHA"):
        proof_of(replace(exported, adapter=tmp_path / "adapter"))


def test_adapter_without_numbers_for_a_layer_that_it_adapts_is_refused(tmp_path, exported):
    """Merge and live model would both leave the layer as it was."""
    shutil.copytree(exported.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    kept = {name: value for name, value in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(kept, path)
    case = replace(exported, adapter=tmp_path / "adapter", export=tmp_path / "export")
    with pytest.raises(BadExport, match=r"no numbers for model\.layers\.1\.mlp\.gate_proj.*and for 2 more"):
        proof_of(case)


def test_proof_on_the_dequantized_base_needs_to_know_how_it_was_held(tmp_path, exported):
    shutil.copytree(exported.adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "qadapt.json").unlink()
    with pytest.raises(BadRun, match=r"qadapt\.json"):
        proof_of(replace(exported, adapter=tmp_path / "adapter"))


def test_written_tensors_may_come_from_anywhere(exported):
    class Rounded:
        """An export in steps of a 512th, as a quantized file holds it."""

        def __init__(self, files: ExportedFiles) -> None:
            self.files, self.entries, self.faults = files, files.entries, ()

        def rows(self, name: str, first: int, last: int) -> torch.Tensor:
            return (self.files.rows(name, first, last).float() * 512).round() / 512

        def bound(self, name: str, exact: torch.Tensor, first: int) -> torch.Tensor:
            return torch.full((1, 1), step, dtype=torch.float64)

        def moved(self, name: str, values: torch.Tensor, *, exact: torch.Tensor, first: int) -> None:
            return None

    step = 1 / 1024 + 3e-4  # half a step, and the rounding to fp16 before it
    adapters = [(exported.adapter, 1.0)]
    with (
        open_reference(exported.model, adapters, base="dequantized") as reference,
        ExportedFiles(exported.export) as files,
    ):
        assert finished(prove_written(Rounded(files), reference, dtype="F16")).holds
        step = 0.5 / 1024
        assert not finished(prove_written(Rounded(files), reference, dtype="F16")).holds


def test_export_that_says_otherwise_of_a_tie_is_found(tmp_path, exported):
    case = copied(exported, tmp_path / "export")
    path = case.export / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    assert [fault.place for fault in proof_of(case).faults] == ["config.json"]
    edit(case, HEAD, lambda head: head * 2)
    assert [fault.place for fault in proof_of(case).faults] == [HEAD, "config.json"]


def test_tensor_that_no_index_names_is_a_fault(tmp_path, exported):
    case = copied(exported, tmp_path / "export")
    index = json.loads((case.export / INDEX).read_text(encoding="utf-8"))
    del index["weight_map"][NORM]
    (case.export / INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert [fault.place for fault in proof_of(case).faults] == [NORM]


def test_folder_without_weights_or_index_is_a_fault(tmp_path, exported):
    case = copied(exported, tmp_path / "export")
    (case.export / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    assert any("no index of weights" in fault.detail for fault in proof_of(case).faults)
    for path in case.export.glob("*.safetensors"):
        path.unlink()
    assert proof_of(case).tensors == 0 and not proof_of(case).holds


def test_many_numbers_on_another_step_are_wrong_and_a_few_are_not():
    exact = Exact(torch.zeros(100, 1000, dtype=torch.float64))
    values, bound = torch.zeros(100, 1000), torch.ones(1, 1, dtype=torch.float64)
    for moved, is_wrong in ((0, False), (64, False), (65, True)):
        is_moved = (torch.arange(100_000) < moved).view(100, 1000)
        found = difference("w", values, exact, bound=bound, moved=is_moved)
        assert (found.moved, found.wrong, found.is_wrong) == (moved, 0, is_wrong)
