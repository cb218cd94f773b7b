"""Every form of an export from one run: what lies in its folder, what loads it, its card, every refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import huggingface_hub.constants
import pytest
import torch
from gguf_files import write_gguf
from hub_server import running_hub
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_gguf_adapters import program as llama_quantize
from tiny_model import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from qadapt import cache
from qadapt.adapters.facts import AdapterFacts, read_facts, write_facts
from qadapt.cli.main import run
from qadapt.data.prompt import CONTRACT_FILE, load_contract
from qadapt.errors import (
    BadAdapter,
    BadExport,
    BadOutput,
    BadRecipe,
    BadRun,
    NoRoom,
    QadaptError,
    Unsupported,
)
from qadapt.events import Event, Exported, StageAdvanced, StageStarted, Warned
from qadapt.export.adapter_proof import prove_copied
from qadapt.export.card import CardFacts, Made, card_text, licence_of, served_rank
from qadapt.export.exported_tensors import open_written
from qadapt.export.llama_quantize import K_FORMS
from qadapt.export.merge import merge
from qadapt.export.merged_model import open_merged
from qadapt.export.quantized import quantize
from qadapt.export.reference import open_reference
from qadapt.export.room import folder_bytes
from qadapt.export.tensor_proof import TensorProof, prove_written
from qadapt.export.writing import OTHER_FILES_BYTES, Writing
from qadapt.exporting import base as export_base
from qadapt.exporting import export as exporting
from qadapt.exporting import finish as export_finish
from qadapt.exporting import job as export_job
from qadapt.exporting.export import FORMS, UNMERGED, export
from qadapt.exporting.proving import verify_export
from qadapt.licences import is_licence
from qadapt.model.source import find_model, quantized_type_of
from qadapt.recipe import ExportSection, Form
from qadapt.recipe_file import check_recipe, dump_yaml, read_recipe
from qadapt.run import train

QUICK = {"proof": False}
"""What the tests of single forms leave out; `test_every_form_is_proven` does not."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs with one, `first`, that has finished."""
    logging.disable_progress_bar()
    root = tmp_path_factory.mktemp("forms")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("qadapt.hardware.calibration.calibration_file", lambda: root / "calibration.jsonl")
        patched.setattr("qadapt.measured.measured_file", lambda: root / "measured.json")
        patched.setattr("qadapt.data.row_cache.data_folder", lambda: root / "data")
        model = make_tiny_model(root / "model", "qwen2")
        card = "---\nlicense: apache-2.0\n---\n# Base\n"
        (model / "README.md").write_text(card, encoding="utf-8")
        (model / "LICENSE").write_text("Apache License 2.0\n", encoding="utf-8")
        turns = [{"role": role, "content": "{0} and {0}"} for role in ("user", "assistant")]
        rows = [json.dumps({"messages": turns}).replace("{0}", str(number)) for number in range(24)]
        (root / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        recipe = {
            "model": str(model),
            "adapter": {"rank": 4},
            "data": {
                "sources": [{"path": str(root / "rows.jsonl")}],
                "held_out_fraction": 0.5,
                "length": 128,
            },
            "train": {"steps": 6, "rows_per_step": 4, "learning_rate": 0.02, "rehearse": False},
            "memory": {"compute_dtype": "fp32", "device": "cpu"},
            "run": {"name": "first", "folder": str(root / "runs")},
        }
        list(train(check_recipe(recipe, origin="the test")))
    yield root / "runs"


def exported(runs: Path, to: Path, **options: Any) -> list[Event]:
    return list(export("first", folder=str(runs), to=to, **options))


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20) * 7 % 300).logits.float()


def adapter_copy(runs: Path, to: Path) -> Path:
    """A run of the same name whose adapter may be changed."""
    shutil.copytree(runs / "first", to / "first")
    return to / "first" / "adapter"


def test_every_form_of_the_recipe_is_written_and_every_other_is_refused_with_the_list(runs, tmp_path):
    assert set(get_args(Form)) == set(FORMS)
    assert ExportSection.model_fields["form"].default in FORMS
    with pytest.raises(BadRecipe, match="form 'merged-fp8'") as refused:
        exported(runs, tmp_path / "out", form="merged-fp8")
    assert all(form in refused.value.cure for form in FORMS)
    with pytest.raises(BadRecipe, match="base 'both'"):
        exported(runs, tmp_path / "out", base="both")
    for form in UNMERGED:
        with pytest.raises(BadRecipe, match=f"{form} is the adapter alone"):
            exported(runs, tmp_path / "out", form=form, base="original")
    assert list(tmp_path.iterdir()) == []


MODEL = {
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip
CONTENTS = {
    "merged-bf16": MODEL,
    "bnb-4bit": MODEL,
    "gguf-q8_0": {"first-Q8_0.gguf", "Modelfile", "config.json"},
    "gguf-lora": {"first-LORA.gguf"},
    "adapter": {"adapter_model.safetensors", "adapter_config.json", "qadapt.json"},
}  # fmt: skip


@pytest.mark.parametrize("form", CONTENTS)
def test_no_terms_of_use_are_lost_in_any_form(runs, tmp_path, form):
    adapter = adapter_copy(runs, tmp_path)
    (adapter / "LICENSE").write_text("the adapter's", encoding="utf-8")
    list(export("first", folder=str(tmp_path), to=tmp_path / "out", form=form, **QUICK))
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if is_licence(path.name))
    terms = {name: (tmp_path / "out" / name).read_text("utf-8") for name in names}
    assert terms == {"LICENSE": "Apache License 2.0\n", "LICENSE-2": "the adapter's"}
    assert "* Terms of use: `LICENSE`, `LICENSE-2`.\n" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("form", CONTENTS)
def test_every_form_is_proven_and_described(runs, tmp_path, form):
    last = exported(runs, tmp_path / "out", form=form)[-1]
    assert isinstance(last, Exported)
    assert names_in(tmp_path / "out") == CONTENTS[form] | {
        "LICENSE",
        "README.md",
        CONTRACT_FILE,
        "proof.json",
    }
    assert (last.form, last.folder) == (form, str(tmp_path / "out"))
    assert last.base == ("" if form in UNMERGED else "dequantized")
    assert last.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert last.notes
    assert all(f"* {note}" in card for note in last.notes)
    for path in (tmp_path / "out").iterdir():
        is_local = form == "adapter" and path.name in ("adapter_config.json", "qadapt.json")
        assert (str(runs.parent).encode() in path.read_bytes()) == is_local, path.name
    assert "license: apache-2.0" in card
    assert licence_of(tmp_path / "out") == "apache-2.0"
    proof = (tmp_path / "out" / "proof.json").read_text(encoding="utf-8")
    assert json.loads(proof)["holds"] is True


def test_recipe_on_a_card_names_no_folder_of_this_machine(runs):
    recipe = read_recipe(str(runs / "first" / "recipe.yaml"))
    places = ("/home/me/runs/one", "two")
    adapter = recipe.adapter.model_copy(update={"targets": places})  # as of a fusion of trained adapters
    shown = export_job._shareable(recipe.model_copy(update={"adapter": adapter}), is_hub_model=False)
    assert shown.adapter.targets == ("one", "two")
    assert str(runs.parent) not in dump_yaml(shown)


def test_without_a_proof_the_card_says_so(runs, tmp_path):
    last = exported(runs, tmp_path / "out", form="adapter", proof=False)[-1]
    assert "proof.json" not in names_in(tmp_path / "out")
    assert "None: this export was made with `--no-proof`." in (tmp_path / "out" / "README.md").read_text(
        "utf-8"
    )
    assert last.notes == ()


def test_adapter_for_others_names_no_folder_and_its_proof_is_repeated(runs, tmp_path):
    exported(runs, tmp_path / "out", form="adapter", is_shared=True)
    for path in (tmp_path / "out").iterdir():
        assert str(runs.parent).encode() not in path.read_bytes(), path.name
    assert read_facts(tmp_path / "out").base == "model"
    found = result_of(verify_export(tmp_path / "out", run="first", folder=str(runs)))
    assert found.proof is not None and not found.faults
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "model"
    for changes in ({"lora_alpha": 1}, {"base_model_name_or_path": "other"}):
        (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        [fault] = prove_copied(tmp_path / "out", runs / "first" / "adapter").faults
        assert fault.place == "adapter_config.json"
    base = runs.parent / "model"
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), runs / "first" / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert torch.equal(logits(live), logits(loaded))


def test_adapter_loads_in_plain_peft_and_is_the_runs_byte_for_byte(runs, tmp_path):
    said = exported(runs, tmp_path / "out", form="adapter", **QUICK)
    ours, theirs = runs / "first" / "adapter", tmp_path / "out"
    for name in ("adapter_model.safetensors", CONTRACT_FILE):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    base = runs.parent / "model"
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ours)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), theirs)
    assert torch.equal(logits(live), logits(loaded))
    assert any("is on no hub" in event.message for event in said if isinstance(event, Warned))


def test_adapter_of_a_hub_model_names_it_with_its_revision(runs, tmp_path):
    adapter = adapter_copy(runs, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": "owner/base", "revision": "abc123"}
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    from qadapt.export.peft_folder import copy_adapter

    list(copy_adapter(model_folder=runs.parent / "model", adapter_folder=adapter, target=tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["base_model_name_or_path"], written["revision"]) == ("owner/base", "abc123")


def test_adapter_brings_tokenizer_and_template_only_if_they_are_not_the_bases(runs, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for turn in messages %}{{ turn.content }}<|im_end|>{% endfor %}", encoding="utf-8"
    )
    adapter = adapter_copy(runs, tmp_path / "runs")
    facts = load_contract(runs.parent / "model", template=str(template)).facts()
    (adapter / CONTRACT_FILE).write_text(json.dumps(facts), encoding="utf-8")
    exported(tmp_path / "runs", tmp_path / "out", form="adapter", **QUICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert asked == "Hi<|im_end|>"


@pytest.mark.parametrize("number", ["nan", "-inf"])
def test_adapter_with_a_nan_is_refused_whatever_the_form(runs, tmp_path, number):
    adapter = adapter_copy(runs, tmp_path / "runs")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = float(number)
    save_file(tensors, adapter / "adapter_model.safetensors")
    for form in ("adapter", "merged-fp16", "bnb-4bit", "gguf-q8_0", "gguf-lora"):
        with pytest.raises(BadExport, match="NaN"):
            exported(tmp_path / "runs", tmp_path / "out", form=form, **QUICK)
    assert not (tmp_path / "out").exists()


def quantized_by_transformers(folder: Path, to: Path) -> None:
    """A merged folder, quantized and saved by the library itself."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(to)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "phi3"])
def test_4_bit_checkpoint_is_what_transformers_makes_of_the_merged_model(runs, tmp_path, family):
    model, adapter = runs.parent / "model", runs / "first" / "adapter"
    if family != "qwen2":
        model, adapter = other_parts(family, tmp_path)
    writing = Writing(shard_bytes=60_000)
    parts = {"model_folder": model, "adapter_folder": adapter, "writing": writing}
    list(merge(target=tmp_path / "merged", form="merged-bf16", base="original", **parts))
    quantized_by_transformers(tmp_path / "merged", tmp_path / "theirs")
    list(quantize(target=tmp_path / "ours", base="original", load_dtype="fp32", **parts))
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    for name, value in theirs.items():
        if "quant_state" in name:
            numbers = [json.loads(bytes(each.tolist())) for each in (ours[name], value)]
            offsets = [each.pop("nested_offset") for each in numbers]
            assert numbers[0] == numbers[1]
            assert offsets[0] == pytest.approx(offsets[1], rel=1e-6)
        else:
            assert torch.equal(ours[name], value), name
    said = json.loads((tmp_path / "ours" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    expected = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    assert said == expected["quantization_config"]
    loaded = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "theirs")]
    assert torch.equal(logits(loaded[0]), logits(loaded[1]))


def other_parts(family: str, root: Path) -> tuple[Path, Path]:
    """A base of a family with a random adapter."""
    from peft import LoraConfig, get_peft_model

    model = make_tiny_model(root / family, family)
    config = LoraConfig(r=4, target_modules="all-linear")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(root / f"{family}-adapter"))
    return model, root / f"{family}-adapter"


def test_a_4_bit_weight_that_is_not_what_was_merged_is_found(runs, tmp_path):
    exported(runs, tmp_path / "out", form="bnb-4bit", **QUICK)
    assert proof_of_4_bits(runs, tmp_path / "out").holds
    tensors = tensors_in(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][100] ^= 0x30
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    [fault] = proof_of_4_bits(runs, tmp_path / "out").faults
    assert fault.place == name


def proof_of_4_bits(runs: Path, folder: Path) -> TensorProof:
    model, adapters = runs.parent / "model", [(runs / "first" / "adapter", 1.0)]
    with (
        open_reference(model, adapters, base="dequantized") as reference,
        open_written(folder, "bnb-4bit", model_folder=model) as written,
    ):
        return result_of(prove_written(written, reference, dtype="BF16"))


Result = TypeVar("Result")


def result_of(events: Generator[Event, None, Result]) -> Result:
    def kept() -> Iterator[Event]:
        results.append((yield from events))

    results: list[Result] = []
    list(kept())
    return results[0]


def test_existing_target_is_kept_whatever_the_form(runs, tmp_path):
    (tmp_path / "out").mkdir()
    for form in FORMS:
        with pytest.raises(BadOutput, match="exists already"):
            exported(runs, tmp_path / "out", form=form)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


@pytest.mark.parametrize("form", ["merged-fp16", "bnb-4bit", "gguf-q8_0", "gguf-lora", "adapter"])
def test_full_disk_is_found_before_the_first_byte(runs, tmp_path, monkeypatch, form):
    monkeypatch.setattr(cache, "free_bytes", lambda _: 70_000_000)
    with pytest.raises(NoRoom, match="are free there"):
        exported(runs, tmp_path / "exports" / "out", form=form, **QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["merged-fp16", "bnb-4bit", "gguf-q8_0"])
def test_full_disk_is_found_before_the_bases_are_compared(runs, tmp_path, monkeypatch, form):
    def compared(*_: object, **__: object) -> Generator[Event, None, str]:
        raise AssertionError("the long work began")

    monkeypatch.setattr(export_base, "choose_base", compared)
    monkeypatch.setattr(cache, "free_bytes", lambda _: 70_000_000)
    with pytest.raises(NoRoom, match="are free there"):
        exported(runs, tmp_path / "exports" / "out", form=form, base="auto")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["merged-fp16", "merged-fp32", "bnb-4bit", "gguf-q8_0", "gguf-q4_1"])
def test_what_a_form_takes_on_the_disk_is_known_before_it_is_made(runs, tmp_path, form):
    exported(runs, tmp_path / "out", form=form, **QUICK)
    weights = [*(tmp_path / "out").glob("*.safetensors"), *(tmp_path / "out").glob("*.gguf")]
    written = sum(path.stat().st_size for path in weights)
    dtype = {"merged-fp16": "F16", "bnb-4bit": "BF16"}.get(form, "F32")
    model, adapter = runs.parent / "model", runs / "first" / "adapter"
    with open_merged(model, adapter, base="dequantized", dtype=dtype) as merged:
        known = folder_bytes(merged, form) - OTHER_FILES_BYTES
    front = 32 * 2**10  # names, shapes, the tokenizer
    assert known <= written <= known + front < 2 * known


def test_base_that_changed_since_the_training_is_refused(runs, tmp_path):
    adapter = adapter_copy(runs, tmp_path / "runs")
    model = tmp_path / "model"
    shutil.copytree(runs.parent / "model", model)
    facts = read_facts(adapter)
    write_facts(type(facts)(**{**vars(facts), "base": str(model)}), adapter)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for form in ("merged-fp16", "adapter"):
        with pytest.raises(BadRun, match="its files changed"):
            exported(tmp_path / "runs", tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def test_base_with_a_missing_shard_is_refused(runs, tmp_path):
    adapter = adapter_copy(runs, tmp_path / "runs")
    model = tmp_path / "model"
    shutil.copytree(runs.parent / "model", model)
    facts = read_facts(adapter)
    write_facts(type(facts)(**{**vars(facts), "base": str(model)}), adapter)
    (model / "model.safetensors").unlink()
    with pytest.raises(QadaptError, match="has no weights"):
        exported(tmp_path / "runs", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sharded_base_of_which_a_shard_is_missing_is_refused_by_its_name(runs, tmp_path):
    adapter, model = adapter_copy(runs, tmp_path / "runs"), tmp_path / "model"
    shutil.copytree(runs.parent / "model", model)
    (model / "model.safetensors").unlink()
    tensors = tensors_in(runs.parent / "model")
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard, half in zip(shards, halves, strict=True):
        save_file(half, model / shard, metadata={"format": "pt"})
    weight_map = {name: shards[name in halves[1]] for name in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    facts = vars(read_facts(adapter)) | {
        "base": str(model),
        "fingerprint": find_model(str(model)).fingerprint,
    }
    write_facts(AdapterFacts(**facts), adapter)
    exported(tmp_path / "runs", tmp_path / "control", **QUICK)
    (model / shards[1]).unlink()
    for form in FORMS:
        if form not in K_FORMS:
            with pytest.raises(QadaptError, match=shards[1]):
                exported(tmp_path / "runs", tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["merged-fp16", "bnb-4bit", "gguf-f16", "gguf-lora", "adapter"])
def test_adapter_with_a_tensor_of_no_known_name_is_refused(runs, tmp_path, form):
    adapter = adapter_copy(runs, tmp_path / "runs")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.{}.weight"
    extra = {name.format(9, part): tensors[name.format(0, part)].clone() for part in ("lora_A", "lora_B")}
    for more in (extra, {"surprise": torch.ones(3)}):
        save_file(tensors | more, adapter / "adapter_model.safetensors")
        with pytest.raises((BadAdapter, BadExport, Unsupported), match=r"layers\.9|surprise"):
            exported(tmp_path / "runs", tmp_path / "out", form=form, **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["merged-fp16", "bnb-4bit", "gguf-f16", "gguf-lora", "adapter"])
def test_adapter_of_another_base_is_refused(runs, tmp_path, form):
    adapter = adapter_copy(runs, tmp_path / "runs")
    tensors = load_file(adapter / "adapter_model.safetensors")
    wide = {name: value for name, value in tensors.items() if "layers.0.self_attn.q_proj.lora_A" in name}
    tensors |= {name: torch.zeros(len(value), value.shape[1] + 64) for name, value in wide.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises((BadAdapter, BadExport, Unsupported), match="q_proj"):
        exported(tmp_path / "runs", tmp_path / "out", form=form, **QUICK)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("quantization", ["Q8_0", "F16"])
def test_a_gguf_source_is_known_as_quantized_or_not(runs, tmp_path, quantization):
    path = write_gguf(runs.parent / "model", tmp_path / "base.gguf", quantization=quantization)
    assert quantized_type_of(str(path)) == (quantization if quantization == "Q8_0" else None)
    assert quantized_type_of(str(runs.parent / "model")) is None
    assert quantized_type_of("owner/model") is None
    assert quantized_type_of("smollm2-135m") == "Q4_1"


def test_quantized_source_has_no_original_to_merge_on(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export_base, "quantized_type_of", lambda _: "Q8_0")
    with pytest.raises(BadExport, match=r"is itself quantized \(Q8_0\)"):
        exported(runs, tmp_path / "out", base="original")
    assert list(tmp_path.iterdir()) == []
    *events, last = exported(runs, tmp_path / "out", base="auto", **QUICK)
    assert last.base == "dequantized"
    assert any("as it was trained on" in event.message for event in events if isinstance(event, Warned))


def test_auto_says_what_both_bases_lose_and_takes_one(runs, tmp_path):
    *_, last = exported(runs, tmp_path / "out", base="auto", form="merged-fp32", **QUICK)
    assert last.base in ("dequantized", "original")
    [note] = last.notes
    assert "on the dequantized base" in note
    assert "on the original base" in note
    assert note in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_k_quants_without_llama_quantize_are_refused_before_anything_is_done(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unsupported, match="llama-quantize"):
        next(export("first", folder=str(runs), to=tmp_path / "out", form="gguf-q4_k_m"))


ZEROES = """
import gguf
shutil.copyfile(sys.argv[1], sys.argv[2])
[tensor] = [each for each in gguf.GGUFReader(sys.argv[1]).tensors if each.name == "blk.1.ffn_up.weight"]
with open(sys.argv[2], "r+b") as file:
    file.seek(tensor.data_offset)
    file.write(bytes(int(tensor.n_bytes)))
"""


def test_k_quant_is_proven_and_the_card_says_who_made_it(runs, tmp_path, monkeypatch):
    llama_quantize(tmp_path, monkeypatch, version="version: 7000 (abc)")
    last = exported(runs, tmp_path / "out", form="gguf-q4_k_m")[-1]
    assert names_in(tmp_path / "out") >= {"first-Q4_K_M.gguf", "Modelfile"}
    assert not (tmp_path / "out" / "f16.gguf").exists()
    proof = json.loads((tmp_path / "out" / "proof.json").read_text(encoding="utf-8"))
    assert proof["tensors"]["tensors"] == len(tensors_in(runs.parent / "model"))
    assert any("tensors as written" in note for note in last.notes)
    assert "quantized by llama.cpp's llama-quantize" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_k_quant_that_is_not_the_model_is_found_and_does_not_appear(runs, tmp_path, monkeypatch):
    llama_quantize(tmp_path, monkeypatch, version="version: 7000 (abc)", work=ZEROES)
    with pytest.raises(BadExport, match=r"layers\.1\.mlp\.up_proj\.weight: numbers are not those"):
        exported(runs, tmp_path / "exports" / "out", form="gguf-q4_k_m")
    assert not (tmp_path / "exports").exists()


def test_disk_that_holds_the_16_bit_file_but_not_the_k_quant_beside_it_is_found_first(
    runs, tmp_path, monkeypatch
):
    llama_quantize(tmp_path, monkeypatch, version="version: 7000 (abc)")
    numbers = sum(tensor.numel() for tensor in tensors_in(runs.parent / "model").values())
    monkeypatch.setattr(cache, "free_bytes", lambda _: 96 * 2**20 + 3 * numbers)
    events = export("first", folder=str(runs), to=tmp_path / "exports" / "out", form="gguf-q4_k_m", **QUICK)
    with pytest.raises(NoRoom):
        for event in events:
            assert not isinstance(event, StageStarted) or "GGUF" not in event.stage
    assert not (tmp_path / "exports").exists()


def test_context_in_the_modelfile_is_not_more_than_the_model_has(runs, tmp_path):
    exported(runs, tmp_path / "out", form="gguf-f16", **QUICK)
    context = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["max_position_embeddings"]
    assert context < 4096
    assert f"PARAMETER num_ctx {context}\n" in (tmp_path / "out" / "Modelfile").read_text("utf-8")


def test_run_that_is_not_finished_is_refused(runs, tmp_path):
    adapter_copy(runs, tmp_path / "runs")
    journal = tmp_path / "runs" / "first" / "events.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if "RunFinished" not in line), encoding="utf-8")
    with pytest.raises(BadRun, match="has not finished"):
        exported(tmp_path / "runs", tmp_path / "out")


def test_export_that_its_proof_refuses_leaves_no_trace(runs, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> Iterator[Event]:
        raise BadExport("It is not the model.", cure="Export again.")
        yield

    monkeypatch.setattr(export_finish, "prove_export", refuse)
    for form in CONTENTS:
        with pytest.raises(BadExport, match="not the model"):
            exported(runs, tmp_path / "exports" / "out", form=form)
    assert list(tmp_path.iterdir()) == []


def test_command_exports_without_a_proof_and_pushes_nothing(runs, tmp_path, capsys):
    words = ["export", "first", "--folder", str(runs), "--form", "adapter", "--to", str(tmp_path / "out")]
    assert run([*words, "--no-proof", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["form"], said["base"], said["notes"], said["pushed"]) == ("adapter", None, [], None)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == 2 * 7 * 2


def test_command_pushes_the_whole_folder_after_the_export(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    words = ["export", "first", "--folder", str(runs), "--form", "adapter", "--to", str(tmp_path / "out")]
    with running_hub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.endpoint)
        assert run([*words, "--push", "me/mine", "--private"]) == 0
    pushed = hub.repositories["me/mine"]
    assert pushed.is_private
    assert pushed.files == {
        name: (tmp_path / "out" / name).read_bytes() for name in names_in(tmp_path / "out")
    }
    places = [str(place).encode() for place in (runs.parent, tmp_path)]
    assert not [name for name, content in pushed.files.items() if any(each in content for each in places)]
    said = capsys.readouterr()
    assert f"pushed: {hub.endpoint}/me/mine/commit/" in said.out
    assert "hf_secret" not in said.out + said.err


# Several runs


@pytest.fixture
def pair(runs, tmp_path) -> Path:
    """A folder of two runs, `first` and `second`, whose adapters differ."""
    for name in ("first", "second"):
        shutil.copytree(runs / "first", tmp_path / "runs" / name)
    path = tmp_path / "runs" / "second" / "adapter" / "adapter_model.safetensors"
    save_file({name: value.flip(0) for name, value in load_file(path).items()}, path)
    return tmp_path / "runs"


WEIGHTS = {"first": 0.75, "second": -0.5}


def test_runs_merge_with_weights_and_only_their_numbers_are_proven(runs, pair, tmp_path):
    options = {"form": "merged-fp32", "base": "original"}
    *_, last = export(WEIGHTS, folder=str(pair), to=tmp_path / "out", **options)
    chosen = [(pair / name / "adapter", weight) for name, weight in WEIGHTS.items()]
    list(
        merge(model_folder=runs.parent / "model", adapter_folder=chosen, target=tmp_path / "plain", **options)
    )
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "plain")
    assert set(ours) == set(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert "0.75 times that of the run first plus -0.5 times that of the run second" in last.notes[0]
    assert any(note.startswith("Not proven: its answers") for note in last.notes)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert all(f"* {note}" in card for note in last.notes)
    assert "proof.json" not in names_in(tmp_path / "out")


def test_mix_whose_numbers_are_not_those_of_its_runs_does_not_appear(pair, tmp_path, monkeypatch):
    def forgetful(*, adapter_folder: list[tuple[Path, float]], **options: Any) -> Iterator[Event]:
        yield from merge(adapter_folder=adapter_folder[:1], **options)

    monkeypatch.setattr(exporting, "merge", forgetful)
    with pytest.raises(BadExport, match="not what its adapters make together"):
        list(export(WEIGHTS, folder=str(pair), to=tmp_path / "exports" / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_mix_needs_a_form_that_merges_and_a_folder_of_its_own(pair, tmp_path):
    for form in set(FORMS) - {"merged-fp16", "merged-bf16", "merged-fp32"}:
        with pytest.raises(BadRecipe, match=f"not into {form}"):
            list(export(WEIGHTS, folder=str(pair), to=tmp_path / "out", form=form))
    with pytest.raises(BadRecipe, match="no folder of its own"):
        list(export({"first": 0.5}, folder=str(pair)))
    with pytest.raises(BadRecipe, match="no run to export"):
        list(export({}, folder=str(pair)))
    with pytest.raises(BadRecipe, match="weight of the adapter"):
        list(export({"first": float("nan")}, folder=str(pair), to=tmp_path / "out"))
    with pytest.raises(BadRun, match="no run 'third'"):
        list(export({**WEIGHTS, "third": 1}, folder=str(pair), to=tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_command_merges_runs_with_weights(pair, tmp_path, capsys):
    words = ["export", "first", "--folder", str(pair), "--to", str(tmp_path / "out"), "--no-proof"]
    for given in ("second", "second=much", "=1", "first=1"):
        assert run([*words, "--with", given]) == 2
        assert f"--with {given} names no further run" in capsys.readouterr().err
    assert run([*words, "--json", "--weight", "0.75", "--with", "second=-0.5"]) == 0
    assert "0.75 times" in json.loads(capsys.readouterr().out)["notes"][0]


# What is found before anything is written


@pytest.mark.parametrize("damaged", [f"adapter/{CONTRACT_FILE}", "plan.json"])
def test_damaged_file_of_the_run_is_found_before_the_merge(runs, tmp_path, damaged):
    adapter_copy(runs, tmp_path / "runs")
    (tmp_path / "runs" / "first" / damaged).write_text('{"source": ', encoding="utf-8")
    for form in CONTENTS:
        with pytest.raises(BadRun, match=Path(damaged).name):
            for event in export(
                "first", folder=str(tmp_path / "runs"), to=tmp_path / "out", form=form, **QUICK
            ):
                assert not isinstance(event, StageAdvanced), "it began"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_facts_that_no_run_writes_are_refused(runs, tmp_path):
    adapter = adapter_copy(runs, tmp_path / "runs")
    facts = vars(read_facts(adapter))
    for changed in ({"quantization": "fp4"}, {"load_dtype": "int3"}, {"base": 5}):
        write_facts(AdapterFacts(**(facts | changed)), adapter)
        with pytest.raises(BadRun, match="holds no adapter that qadapt trained"):
            exported(tmp_path / "runs", tmp_path / "out", **QUICK)


def test_bases_are_compared_where_the_run_computes_and_without_the_card_if_that_is_full(
    runs, tmp_path, monkeypatch
):
    asked, tried = [], []

    def choose_device(choice: str) -> torch.device:
        asked.append(choice)
        return torch.device("cuda")

    def choose_base(*_: object, device: torch.device, **__: object) -> Generator[Event, None, str]:
        tried.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError
        yield Warned(message="compared", cure="")
        return "original"

    monkeypatch.setattr(export_base, "choose_device", choose_device)
    monkeypatch.setattr(export_base, "choose_base", choose_base)
    *events, last = exported(runs, tmp_path / "out", base="auto", **QUICK)
    assert (asked, tried, last.base) == (["cpu"], ["cuda", "cpu"], "original")
    assert any("memory ran out" in event.message for event in events if isinstance(event, Warned))


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
base_model: org/base-1b
base_model_relation: finetune
license: apache-2.0
tags:
- qlora
- qadapt
---

# A fine-tuned org/base-1b

Made from `org/base-1b` at revision `abc123` by low-rank adaptation; the adapter is merged into the weights.

* Form: merged-fp16; every weight computed in fp32 and rounded once.
* Merged on the weights of the base as the adapter saw them in training, dequantized.
* Trained on `orders.jsonl`.
* The rows as tokens have the hash `dddd`.
* Loss per supervised token, held-out rows: 0.5000.
* Memory of a step on cuda: 6.50 GiB predicted, 6.48 GiB measured.
* Licence of the base: apache-2.0.

## Proof

* All 12 tensors hold.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this card lies
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

## Recipe

```yaml
train:
  steps: 3
```
"""
KNOWN = CardFacts(
    "org/base-1b",
    "abc123",
    "apache-2.0",
    "train:\n  steps: 3\n",
    data=("orders.jsonl",),
    data_hash="dddd",
    losses={"held-out rows": 0.5},
    predicted_peak_bytes=int(6.5 * 2**30),
    measured_peak_bytes=int(6.48 * 2**30),
    device="cuda",
)


def test_card_is_this_text():
    assert card_text(KNOWN, Made("merged-fp16", "dequantized", findings=["All 12 tensors hold."])) == CARD


@pytest.mark.parametrize("form", FORMS)
def test_card_of_every_form_says_how_to_use_it_and_nothing_that_is_not_known(form):
    base = "" if form in UNMERGED else "original"
    bare = card_text(CardFacts(), Made(form, base, file="x.gguf", is_proven=False))
    assert "--no-proof" in bare
    assert "## Use" in bare
    assert ("x.gguf" in bare) == form.startswith("gguf")
    for word in ("`None`", "icence", "Recipe", "base_model", "hash"):
        assert word not in bare


@pytest.mark.parametrize(("rank", "told"), [(4, 8), (16, 16), (17, 32), (300, 320), (0, None), (513, None)])
def test_card_of_an_adapter_names_vllm_only_for_what_it_serves(rank, told):
    card = card_text(KNOWN, Made("adapter", rank=rank))
    assert "PeftModel.from_pretrained(base, folder)" in card
    command = f"`vllm serve org/base-1b --enable-lora --max-lora-rank {told} --lora-modules tuned=.`"
    assert (command in card) == (told is not None)
    assert ("vllm" in card.lower()) == (told is not None)


@pytest.mark.parametrize(
    ("change", "rank"),
    [
        ({}, 12),
        ({"use_dora": True}, 0),
        ({"trainable_token_indices": {"embed_tokens": [7]}}, 0),
        ({"modules_to_save": ["lm_head"]}, 0),
        ({"peft_type": "IA3"}, 0),
    ],
)
def test_only_plain_lora_is_served(tmp_path, change, rank):
    assert served_rank(tmp_path) == 0
    config = {"peft_type": "LORA", "r": 12, "use_dora": False, "modules_to_save": None, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert served_rank(tmp_path) == rank
