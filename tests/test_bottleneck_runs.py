"""Bottleneck adapters from a recipe to an answer: trained, stopped, resumed, loaded in another process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_runs import assert_real_step, logits_elsewhere, logits_of
from conftest import TinyModel
from safetensors.torch import load_file
from test_bottleneck import drawn, of_the_library
from test_closed_form import BESIDE, FULL, HALF, assert_near, compared
from test_estimate import CPU, folders, shape_of
from test_train import assert_same, changed, make_recipe, only, train_in_two_runs

from qadapt.adapters.average import average
from qadapt.adapters.bottleneck import Bottleneck, attach_bottleneck
from qadapt.adapters.difference import Change, difference_of
from qadapt.adapters.facts import read_facts
from qadapt.adapters.method import Adapter, attach
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import read_settings, save_side_car
from qadapt.adapters.store import Store
from qadapt.cli.main import run as command
from qadapt.errors import BadAdapter, BadRecipe, Unsupported
from qadapt.events import AdapterAttached, RunFinished, StepDone
from qadapt.export.adapter_proof import prove_copied
from qadapt.export.tensor_fault import OTHER_FILE, Fault
from qadapt.exporting.export import export
from qadapt.methods import METHODS, Method, Nonlinearity
from qadapt.model.load import load_base
from qadapt.model.precision import DTYPES
from qadapt.plan.adapters import trainable as trainable_count
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.recipe import AdapterSection, Recipe
from qadapt.run import evaluate, load, train
from qadapt.serve.partner import Partner, find_partner
from qadapt.trained.adoption import Said
from qadapt.trained.keeping import add
from qadapt.trained.loading import load_partner

__all__ = ["folders"]  # a fixture
KINDS: tuple[Method, ...] = ("houlsby", "pfeiffer", "parallel", "compacter", "compacterplus")


def bottleneck_recipe(folder: Path, model: Path, method: str, **options: Any) -> Recipe:
    recipe = make_recipe(folder, model)
    adapter = type(recipe.adapter)(method=method, rank=4, alpha=4, **options)  # type: ignore[arg-type]
    return recipe.model_copy(update={"adapter": adapter})


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "side_car.safetensors")


def test_runs_train_and_a_new_process_has_the_same_logits(tmp_path: Path, tiny_model: TinyModel) -> None:
    logits = {}
    for method in KINDS:
        (tmp_path / method).mkdir()
        options = {"nonlinearity": "layernorm-gelu"} if method == "parallel" else {}
        recipe = bottleneck_recipe(tmp_path / method, tiny_model("qwen2"), method, **options)
        events = list(train(recipe))
        (attached,), (finished,) = only(AdapterAttached, events), only(RunFinished, events)
        assert attached.adapted_layers == (4 if method in ("houlsby", "compacter") else 2)
        losses = [event.loss for event in only(StepDone, events)]
        assert losses[-1] < losses[0]
        adapter = Path(finished.adapter)
        assert sum(each.numel() for each in adapter_of(adapter.parent).values()) == attached.trainable
        assert sum(each.nbytes for each in adapter_of(adapter.parent).values()) == attached.stored_bytes
        assert {path.name for path in adapter.iterdir()} == {
            "side_car.json", "side_car.safetensors", "qadapt.json", "prompt.json",
        }  # fmt: skip
        logits[method] = logits_of(Path(recipe.run.folder))
    assert_same(logits_elsewhere(tmp_path, KINDS), logits)


def test_a_nonlinearity_is_what_the_recipe_says_and_store_and_card_tell_it(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    store, versions = Store(tmp_path / "store"), []
    for nonlinearity, settings in (("auto", ("relu", False)), ("layernorm-tanh", ("tanh", True))):
        folder = tmp_path / nonlinearity
        folder.mkdir()
        recipe = bottleneck_recipe(folder, tiny_model("llama"), "pfeiffer", nonlinearity=nonlinearity)
        list(train(recipe))
        found = read_settings(folder / "runs" / "first" / "adapter")
        assert (found["activation"], found["norm"]) == settings
        versions.append(add("first", store, folder=recipe.run.folder).version.id)
        shown = nonlinearity.replace("auto", "relu")
        assert command(["adapters", "show", versions[-1], "--store", str(store.path)]) == 0
        assert f"nonlinearity   {shown}\n" in capsys.readouterr().out
        list(export("first", form="adapter", folder=recipe.run.folder))
        card = (folder / "runs" / "first" / "export" / "adapter" / "README.md").read_text("utf-8")
        assert f"by Pfeiffer adapters, width {recipe.adapter.rank}, {shown}; this is" in card
    changes = difference_of(store, *versions).changes
    assert Change("recipe.adapter.nonlinearity", "auto", "layernorm-tanh") in changes
    with pytest.raises(Unsupported, match="have no mean"):
        average([(store.folder_of(each), 0.5) for each in versions])


def test_methods_without_a_bottleneck_refuse_a_nonlinearity() -> None:
    for method in METHODS.keys() - {*KINDS}:
        with pytest.raises(ValueError, match="nonlinearity = layernorm-gelu means nothing to"):
            AdapterSection(method=method, nonlinearity="layernorm-gelu")
    with pytest.raises(ValueError, match="'relu', 'gelu', 'silu', 'tanh', 'layernorm-relu'"):
        AdapterSection(method="houlsby", nonlinearity="mish")  # type: ignore[arg-type]


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipes = []
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
        recipe = bottleneck_recipe(tmp_path / name, tiny_model("gemma2"), "pfeiffer")
        recipes.append(changed(recipe, "adapter", dropout=0.1))
    list(train(recipes[0]))
    train_in_two_runs(recipes[1])
    assert_same(*(adapter_of(Path(recipe.run.folder) / "first") for recipe in recipes))


def test_a_rehearsed_run_is_evaluated_with_and_without_its_adapter(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = bottleneck_recipe(tmp_path, tiny_model("phi3"), "parallel")
    recipe = changed(recipe, "train", rehearse=True, steps=12, sample_prompts=("say 3",))
    list(train(recipe))
    found = evaluate("first", folder=recipe.run.folder, answers=1, max_new_tokens=4)
    assert found.loss < found.base_loss
    assert len(found.answers) == 1


def test_an_adapter_of_the_library_is_kept_in_the_store_and_talked_to(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    base = tiny_model("llama")
    theirs = of_the_library(pfeiffer_of(base, torch.float32), tmp_path / "theirs")
    store = Store(tmp_path / "store")
    with pytest.raises(BadAdapter, match="nothing there says how its base was held"):
        add(str(theirs), store)
    with pytest.raises(BadAdapter, match="names no base"):
        add(str(theirs), store, said=Said(held="none"))
    kept = add(str(theirs), store, said=Said(held="none", base=str(base)))
    place = store.folder_of(kept.version.id)
    found = load_partner(Partner("adapter", place)).model
    model = pfeiffer_of(base, DTYPES[read_facts(place).load_dtype])
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, model(input_ids=ids).logits)
    (theirs / "adapter.safetensors").rename(theirs / "pytorch_adapter.bin")
    with pytest.raises((BadAdapter, Unsupported), match="pickle"):
        add(str(theirs), store, said=Said(held="none", base=str(base)))


def pfeiffer_of(folder: Path, dtype: torch.dtype) -> SideCar:
    base = load_base(folder, quantization="none", double_quant=False, dtype=dtype, device=torch.device("cpu"))
    return drawn(attach_bottleneck(base, Bottleneck("pfeiffer", 5, "silu", scale=1.5)))


def beside(method: Method, **changes: Any) -> Setting:
    rank = 8 if METHODS[method].is_hypercomplex else 6
    return dataclasses.replace(CPU, method=method, rank=rank, **changes)


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("llama", "houlsby", {}),
        ("llama", "pfeiffer", {"recompute": "none"}),
        ("gemma2", "houlsby", {"recompute": 2, "dropout": 0.1}),
        ("phi3", "parallel", {"compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("mistral", "parallel", {"mlp_tiles": 3}),
        ("qwen3", "pfeiffer", {"compute_dtype": "bf16"}),
        ("llama", "compacter", {"recompute": 2, "dropout": 0.1}),
        ("gemma2", "compacterplus", {"compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("llama", "houlsby", {"nonlinearity": "layernorm-gelu", "compute_dtype": "bf16"}),
        ("qwen2", "compacterplus", {"nonlinearity": "layernorm-tanh", "recompute": "none", "dropout": 0.1}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte_whatever_the_scale(
    family: str, method: Method, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = beside(method, accumulates=False, **changes)
    assert_real_step(family, setting, folders[family], alphas=(6, 12))


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize(
    ("model", "card", "changes"),
    [
        ("SmolLM2-360M", None, {"length": 300, "recompute": "none", "dropout": 0.1, **FULL}),
        *BESIDE,
        ("SmolLM2-360M", None, {"length": 300, "recompute": 2, "nonlinearity": "layernorm-relu", **FULL}),
        ("gemma-2-2b", "T4", {"length": 900, "nonlinearity": "layernorm-silu", "dropout": 0.1, **HALF}),
    ],
)
def test_the_closed_form_is_the_dry_run_within_three_percent(
    model: str, card: str | None, changes: dict[str, Any], method: Method
) -> None:
    found = compared(model, card, method=method, rank=64, **changes)
    assert_near(found)


@pytest.mark.parametrize("method", KINDS)
def test_the_adapters_size_on_disk_is_known_to_the_byte(
    method: Method, folders: dict[str, Path], tmp_path: Path
) -> None:
    nonlinearity: Nonlinearity = "layernorm-tanh"
    setting = beside(method, adapter_dtype="bf16", nonlinearity=nonlinearity)
    base = load_base(
        folders["qwen2"],
        quantization="nf4",
        double_quant=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    adapter = Adapter(method, setting.rank, 6.0, nonlinearity=nonlinearity)
    model = attach(base, adapter, dtype=torch.bfloat16, seed=0)
    assert isinstance(model, SideCar)
    save_side_car(model, tmp_path)
    stored = load_file(tmp_path / "side_car.safetensors").values()
    shape = shape_of("qwen2")
    assert sum(each.nbytes for each in stored) == 2 * trainable_count(shape, setting) > 0
    path = tmp_path / "side_car.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + 2 * trainable_count(shape, setting)


def test_a_bottleneck_as_wide_as_the_model_is_refused_by_the_plan() -> None:
    setting = dataclasses.replace(beside("houlsby"), rank=shape_of("llama").width)
    with pytest.raises(BadRecipe, match=r"a bottleneck is narrower than .*\n.*; 12, a reduction factor"):
        estimate_step(shape_of("llama"), setting)


def test_new_tokens_beside_a_bottleneck_are_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = bottleneck_recipe(tmp_path, tiny_model("qwen2"), "houlsby")
    with pytest.raises(BadRecipe, match=r"data.new_tokens: with Houlsby adapters no rows of new tokens"):
        changed(recipe, "data", new_tokens=("<a>",))


def test_a_run_is_exported_as_an_adapter_and_as_nothing_else(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = bottleneck_recipe(tmp_path, tiny_model("qwen2"), "pfeiffer")
    list(train(recipe))
    for form in ("merged-fp16", "gguf-lora", "gguf-q8_0", "bnb-4bit"):
        with pytest.raises(Unsupported, match=rf"Pfeiffer adapters, .*no {form} of it.\n.*--form"):
            list(export("first", form=form, folder=recipe.run.folder))
    list(export("first", form="adapter", folder=recipe.run.folder))
    folder = Path(recipe.run.folder) / "first" / "export" / "adapter"
    run = Path(recipe.run.folder) / "first" / "adapter"
    for name in ("side_car.json", "side_car.safetensors", "qadapt.json", "prompt.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    card = (folder / "README.md").read_text("utf-8")
    assert "library_name: qadapt" in card
    assert "by Pfeiffer adapters, width 4, relu; this is the adapter alone" in card
    assert "tensors as written are the run's own, byte for byte" in card
    partner = load_partner(find_partner(str(folder)))
    tuned = load("first", folder=recipe.run.folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(partner.model(input_ids=ids).logits, tuned.model(input_ids=ids).logits)
    path = folder / "side_car.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert prove_copied(folder, run).faults == (Fault(path.name, OTHER_FILE),)
