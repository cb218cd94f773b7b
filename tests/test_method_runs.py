"""Every method that PEFT has, as a run: trained, resumed, reloaded, packed, answering, exported, proven."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_methods import FP32, FREE, HELD, NAMES, OTHERS, attached, base_of
from test_packing import assert_close, loss_and_gradient, one_at_a_time, rows
from test_train import make_recipe, only
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from qadapt.adapters.facts import AdapterFacts
from qadapt.adapters.lora import save_adapter, trainable
from qadapt.adapters.method import load_adapter
from qadapt.data.batches import packed_batches
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadAdapter
from qadapt.events import AdapterAttached, CheckpointSaved, Exported, RunFinished, StepDone
from qadapt.exporting.export import export
from qadapt.methods import METHODS, Method
from qadapt.model.generate import generate
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import evaluate, load, resume, train

if TYPE_CHECKING:
    from conftest import TinyModel


def drawn(method: Method, folder: Path, *, quantization: str = "nf4") -> PeftModel:
    """A model whose adapter is not as it started."""
    model = attached(method, folder, quantization=quantization)
    torch.manual_seed(6)
    size = 0.5 if method in ("vera", "adalora") else 0.05  # three factors do less with the same numbers
    for parameter in trainable(model).values():
        parameter.data += size * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize(("method", "quantization"), HELD)
def test_packed_and_recomputed_gradients_are_those_of_one_document_at_a_time(
    method: Method, quantization: str, tiny_model: TinyModel
) -> None:
    model, chosen = drawn(method, tiny_model("qwen2"), quantization=quantization), rows()
    expected = one_at_a_time(model, chosen)
    set_recompute(model.get_base_model(), "all")
    assert_close(loss_and_gradient(model, packed_batches(chosen, capacity=120)), expected)


@pytest.mark.parametrize(("method", "quantization"), HELD)
def test_prompts_answered_together_are_answered_as_alone(
    method: Method, quantization: str, tiny_model: TinyModel
) -> None:
    model = drawn(method, tiny_model("qwen2"), quantization=quantization).eval()
    prompts = [list(range(5, 5 + length)) for length in (3, 17, 9)]
    how: dict[str, Any] = {"max_new_tokens": 8, "end_ids": frozenset({2}), "pad_id": 0}
    alone = [generate(model, [prompt], **how)[0] for prompt in prompts]
    assert generate(model, prompts, **how) == alone
    with model.disable_adapter():
        assert generate(model, prompts, **how) != alone, "a control: the adapter changes the answers"
    ids = torch.tensor([prompts[1] + alone[1]])
    with torch.no_grad():
        whole = model(input_ids=ids).logits[0, len(prompts[1]) - 1 : -1].argmax(-1)
    assert whole.tolist() == alone[1], "with the cache of keys and values it is another model"


def recipe_of(method: Method, folder: Path, model: Path, **fields: Any) -> Recipe:
    fields |= {"steps": 9} if METHODS[method].starts_wider else {}
    values = make_recipe(folder, model, **fields).model_dump(mode="json")
    values["adapter"] = {"method": method} | ({"rank": 4} if METHODS[method].has_rank else {})
    return check_recipe(values, origin="the test")


@pytest.mark.parametrize("method", OTHERS)
def test_a_method_trains_resumes_reloads_and_exports_proven(
    method: Method, tmp_path: Path, tiny_model: TinyModel
) -> None:
    runs = str(tmp_path / "runs")
    straight = list(train(recipe_of(method, tmp_path, tiny_model("qwen2"))))
    assert isinstance(straight[-1], RunFinished)
    assert only(AdapterAttached, straight)[0].adapted_layers == 2 * 7
    saved = load_file(tmp_path / "runs/first/adapter/adapter_model.safetensors")
    stored = sum(each.nbytes for each in saved.values())
    most = only(AdapterAttached, straight)[0].stored_bytes
    assert most == stored or (METHODS[method].starts_wider and most > stored), "less what was given up"
    whole = (tmp_path / "runs/first/adapter/adapter_model.safetensors").read_bytes()
    (tmp_path / "runs/first").rename(tmp_path / "straight")

    events = train(recipe_of(method, tmp_path, tiny_model("qwen2")))
    next(event for event in events if isinstance(event, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    assert isinstance(list(resume("first", folder=runs))[-1], RunFinished)
    assert (tmp_path / "runs/first/adapter/adapter_model.safetensors").read_bytes() == whole

    found = evaluate("first", folder=runs)
    assert found.loss < found.base_loss
    *_, exported = export("first", folder=runs, form="merged-fp32", to=tmp_path / "out")
    assert isinstance(exported, Exported)
    assert json.loads((tmp_path / "out/proof.json").read_text(encoding="utf-8"))["holds"] is True
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    live = logits(load("first", folder=runs, device="cpu").model)
    assert (merged - live).abs().max() < 1e-4 * live.abs().max()
    assert torch.equal(live, logits_elsewhere(runs, tmp_path / "logits.pt"))


@pytest.mark.parametrize("method", NAMES)
def test_what_is_saved_is_the_live_model(method: Method, tmp_path: Path, tiny_model: TinyModel) -> None:
    folder = tiny_model("qwen2")
    live = drawn(method, folder)
    found = logits(live)
    with live.disable_adapter():
        assert not torch.allclose(found, logits(live), atol=1e-2)
    facts = AdapterFacts(str(folder), None, "", "nf4", True, "fp32", "")
    save_adapter(live, tmp_path / "adapter", facts=facts, tokenizer=AutoTokenizer.from_pretrained(folder))
    again = load_adapter(base_of(folder), tmp_path / "adapter")
    assert not trainable(again)
    assert torch.equal(found, logits(again))


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lose": "layers.1.mlp.up_proj.lora_B.weight"}, r"there is no .*layers.1.mlp.up_proj.lora_B.weight"),
        (
            {"add": "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"},
            "layers.7.* has no place there",
        ),
        ({"config": {"r": 8}}, "size mismatch for .*lora_A"),
        ({"config": {"target_modules": ["q_proj"]}}, "lora_A.weight has no place there"),
        ({"config": {"target_modules": ["qkv_proj"]}}, "[Tt]arget"),
        ({"config": {"trainable_token_indices": {"embed_tokens": [440]}}}, "there is no .*embed_tokens"),
        ({"file": b"nothing"}, ""),
        ({"file": None}, "there is no adapter_model.safetensors"),
    ],
)
def test_an_adapter_whose_files_do_not_fit_its_base_is_refused(
    change: dict[str, Any], problem: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder, place = tiny_model("qwen2"), tmp_path / "adapter"
    facts = AdapterFacts(str(folder), None, "", "nf4", True, "fp32", "")
    save_adapter(drawn("lora", folder), place, facts=facts, tokenizer=AutoTokenizer.from_pretrained(folder))
    weights, config = place / "adapter_model.safetensors", place / "adapter_config.json"
    tensors = {k: v for k, v in load_file(weights).items() if not k.endswith(change.get("lose", "nothing"))}
    tensors |= {change["add"]: torch.zeros(4, 64)} if "add" in change else {}
    save_file(tensors, weights, {"format": "pt"})
    values = json.loads(config.read_text(encoding="utf-8")) | change.get("config", {})
    config.write_text(json.dumps(values), encoding="utf-8")
    if "file" in change:
        weights.rename(place / "adapter_model.bin")
    if change.get("file") is not None:
        weights.write_bytes(change["file"])
    with pytest.raises(BadAdapter, match=rf"The adapter in .* does not fit its base: .*{problem}"):
        load_adapter(base_of(folder), place)


def test_a_resumed_pissa_goes_on_from_the_start_it_had(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs/first/adapter/adapter_model.safetensors"
    list(train(recipe_of("pissa", tmp_path, tiny_model("llama"))))
    whole = file.read_bytes()
    (tmp_path / "runs/first").rename(tmp_path / "straight")
    events = train(recipe_of("pissa", tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, CheckpointSaved))
    events.close()  # type: ignore[attr-defined]
    monkeypatch.setattr("qadapt.adapters.pissa._ROUNDS", 0)  # as on another machine: it finds another one
    list(resume("first", folder=str(tmp_path / "runs")))
    assert file.read_bytes() == whole


def test_dora_on_rows_of_zeros_trains_and_exports_proven(tmp_path: Path, tiny_model: TinyModel) -> None:
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    [file] = base.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_proj.weight"][3:5] = 0
    save_file(tensors, file, {"format": "pt"})
    values = recipe_of("dora", tmp_path, base).model_dump(mode="json")
    values["model"]["quantization"] = "none"
    events = list(train(check_recipe(values, origin="the test")))
    assert all(math.isfinite(event.loss) for event in only(StepDone, events))
    list(export("first", folder=str(tmp_path / "runs"), form="merged-fp32", to=tmp_path / "out"))
    assert json.loads((tmp_path / "out/proof.json").read_text(encoding="utf-8"))["holds"] is True


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=torch.arange(3, 43).view(2, 20)).logits
    return found.float()


def logits_elsewhere(runs: str, file: Path) -> Tensor:
    """The logits that another process finds."""
    program = (
        "import sys, torch; from safetensors.torch import save_file; from qadapt.run import load\n"
        "torch.set_num_threads(1); model = load('first', folder=sys.argv[1], device='cpu').model.eval()\n"
        "with torch.no_grad(): found = model(input_ids=torch.arange(3, 43).view(2, 20)).logits\n"
        "save_file({'logits': found.float()}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", program, runs, str(file)], check=True, capture_output=True)
    return load_file(file)["logits"]


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", FREE)
def test_stock_peft_loads_what_a_run_saved(method: Method, tmp_path: Path, tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    values = recipe_of(method, tmp_path, model, steps=2).model_dump(mode="json")
    values["model"]["quantization"] = "none"
    list(train(check_recipe(values, origin="the test")))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=FP32)
    stock = logits(PeftModel.from_pretrained(base, tmp_path / "runs/first/adapter"))
    ours = logits(load("first", folder=str(tmp_path / "runs"), device="cpu").model)
    assert (stock - ours).abs().max() < 1e-5 * ours.abs().max()
