"""An adapter on a trained one, from a recipe to an answer: trained, resumed, kept, estimated, refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.closed_form import BAR
from conftest import TinyModel
from safetensors.torch import load_file
from test_closed_form import FULL, HALF, compared
from test_dryrun import counted
from test_estimate import CPU, build, folders, shape_of, values_of
from test_fusion_runs import PROGRAM, adapter_of
from test_stack import PAIRS, language
from test_train import assert_same, changed, make_recipe, only, train_in_two_runs, train_until
from two_adapters import first_stages

from qadapt import load_together
from qadapt.adapters.lora import stored_bytes, trainable
from qadapt.adapters.store import Store
from qadapt.cli.main import run as command
from qadapt.errors import BadRecipe, BadRun, Unsupported
from qadapt.events import AdapterAttached, RunStarted, StepDone
from qadapt.exporting.export import export
from qadapt.fusing import find_sources, found_targets, fused_on, shown_target
from qadapt.methods import METHODS, Method
from qadapt.plan.adapters import saved_bytes
from qadapt.plan.adapters import trainable as trainable_count
from qadapt.plan.setting import Setting
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import evaluate, load, resume, train
from qadapt.shape import find_shape
from qadapt.train.dryrun import dry_run
from qadapt.trained.adapter import find_trained
from qadapt.trained.keeping import add

__all__ = ["folders"]  # a fixture


def stack_recipe(folder: Path, model: Path, *, on: str = "pfeiffer") -> Recipe:
    folder.mkdir(exist_ok=True)
    recipe = make_recipe(folder, model, learning_rate=3e-3)
    adapter = type(recipe.adapter)(method="parallel", rank=6, alpha=12, targets=(f"on:{on}",))
    return recipe.model_copy(update={"adapter": adapter})


def after_first_stage(folder: Path, model: Path) -> Recipe:
    recipe = stack_recipe(folder, model)
    first_stages(recipe, "pfeiffer")
    return recipe


def test_a_run_needs_what_it_stands_on_no_more_once_it_is_trained(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = after_first_stage(tmp_path, tiny_model("llama"))
    runs = Path(recipe.run.folder)
    parent = load_file(runs / "pfeiffer" / "adapter" / "side_car.safetensors")
    events = list(train(recipe))
    (attached,), (began,) = only(AdapterAttached, events), only(RunStarted, events)
    losses = [event.loss for event in only(StepDone, events)]
    assert losses[-1] < losses[0]
    assert began.method == "parallel adapters, width 6, on pfeiffer"
    assert (attached.adapted_layers, attached.trainable) == (2, 2 * (2 * 6 * 64 + 6 + 64))
    tensors = adapter_of(recipe)
    assert sum(each.nbytes for each in tensors.values()) == attached.stored_bytes
    assert_same(parent, {name[6:]: each for name, each in tensors.items() if name.startswith("below.")})
    settings = json.loads((runs / "first" / "adapter" / "side_car.json").read_text("utf-8"))
    assert (settings["kind"], settings["below"]["name"]) == ("parallel", "pfeiffer")

    tuned = load("first", folder=str(runs))
    with torch.no_grad():
        logits = tuned.model(input_ids=torch.arange(3, 40)[None]).logits
    found, lower = (evaluate(name, folder=str(runs)) for name in ("first", "pfeiffer"))
    assert found.below is not None and lower.below is None
    assert (found.below.name, found.below.loss) == ("pfeiffer", pytest.approx(lower.loss, rel=1e-6))
    assert found.loss < found.below.loss < found.base_loss
    assert command(["evaluate", "first", "--folder", str(runs)]) == 0
    assert f"pfeiffer alone    {found.below.loss:.4f}" in capsys.readouterr().out
    assert command(["evaluate", "first", "--folder", str(runs), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["below"] == {"name": "pfeiffer", "loss": found.below.loss}
    together = load_together(["pfeiffer", "first"], folder=str(runs)).model
    for names in (("first",), ("pfeiffer", "first")):
        together.stack(names)
        with torch.no_grad():
            assert torch.equal(together(input_ids=torch.arange(3, 40)[None]).logits, logits)

    shutil.rmtree(runs / "pfeiffer")
    place = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", PROGRAM, str(runs), str(place)], check=True)
    assert torch.equal(load_file(place)["logits"], logits)
    kept = add("first", Store(tmp_path / "store"), name="task", folder=str(runs))
    assert kept.version.record.method == "parallel"
    assert command(["adapters", "show", "task", "--store", str(tmp_path / "store")]) == 0
    assert f"stands on      pfeiffer, {settings['below']['sha256']}\n" in capsys.readouterr().out
    list(export("first", form="adapter", folder=str(runs)))
    assert find_trained(str(runs / "first" / "adapter")).said_method == "parallel adapters, relu, on pfeiffer"
    card = (runs / "first" / "export" / "adapter" / "README.md").read_text("utf-8")
    assert "parallel adapters, width 6, relu, on pfeiffer" in card
    assert "on:pfeiffer" in card
    assert str(tmp_path) not in card
    for form in ("merged-fp16", "gguf-lora"):
        with pytest.raises(Unsupported, match=rf"width 6, relu, on pfeiffer, .*no {form} of it.\n.*--form"):
            list(export("first", form=form, folder=str(runs)))


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path, tiny_model: TinyModel) -> None:
    found = []
    for name in ("straight", "broken"):
        recipe = after_first_stage(tmp_path / name, tiny_model("llama"))
        if name == "straight":
            list(train(recipe))
        else:
            train_in_two_runs(recipe)
        found.append(adapter_of(recipe))
    assert_same(*found)


def test_a_run_whose_lower_adapter_changed_or_went_is_not_gone_on_with(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = after_first_stage(tmp_path, tiny_model("llama"))
    train_until(recipe, step=2)
    folder = Path(recipe.run.folder) / "pfeiffer"
    path = folder / "adapter" / "side_car.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadRun, match=r"is made of changed: adapters \(its hash was .*\n.*--allow-change"):
        list(resume("first", folder=recipe.run.folder))
    shutil.rmtree(folder)
    with pytest.raises(BadRun, match=r"pfeiffer"):
        list(resume("first", folder=recipe.run.folder))


def test_what_it_stands_on_is_found_by_run_store_and_folder(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = after_first_stage(tmp_path, tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    add("pfeiffer", Store(Path("adapters")), name="english", folder=recipe.run.folder)
    shutil.copytree(tmp_path / "runs" / "pfeiffer" / "adapter", tmp_path / "mine")
    for place in ("pfeiffer", "english", "mine", str(tmp_path / "mine")):
        asked = changed(recipe, "adapter", targets=("layers.1-", f"on:{place}"))
        (source,) = find_sources(asked)
        assert source.fused.name == Path(place).name
        first, on = found_targets(asked)
        assert (first, on) == ("layers.1-", f"on:{source.folder}")
        assert Path(on.removeprefix("on:")).is_absolute()
        assert shown_target(on) == f"on:{Path(place).name}"
    assert (shown_target("q_proj"), shown_target("layers.1-")) == ("q_proj", "layers.1-")


def test_what_cannot_be_stood_on_is_refused_by_name(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = after_first_stage(tmp_path, tiny_model("llama"))
    first_stages(recipe, "lora")
    list(train(recipe))
    again = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": "again"})})
    for name, problem in (
        ("lora", r"targets: lora is LoRA, and an adapter stands on a bottleneck adapter.\n.*houlsby, "),
        ("first", "targets: first stands on pfeiffer itself, and an adapter stands on a bottleneck adapter "
         r"of the base alone.\n.*without `on:`"),
        ("absent", "There is no run 'absent'"),
    ):  # fmt: skip
        with pytest.raises((BadRecipe, BadRun), match=problem):
            list(train(changed(again, "adapter", targets=(f"on:{name}",))))
    wider = dataclasses.replace(find_shape(str(tiny_model("llama"))), width=128)
    with pytest.raises(BadRecipe, match=r"pfeiffer is for a base of 2 layers of width 64; .* of width 128"):
        fused_on(again, wider)
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    [weights] = base.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadRecipe, match=r"pfeiffer was trained on .*, whose files are others than those of "):
        list(train(changed(again, "model", source=str(base))))
    assert not (tmp_path / "runs" / "again").exists()
    values = recipe.model_dump()
    values["adapter"] = {"method": "lora", "targets": ["on:pfeiffer"]}
    with pytest.raises(BadRecipe, match=r"LoRA stands on no other adapter. Set adapter.method to one of"):
        check_recipe(values, origin="the test")


def on(pair: tuple[Method, Method], **changes: Any) -> Setting:
    lower = language(pair[0], first_layer=changes.pop("first", 0))  # type: ignore[arg-type]
    rank = 8 if METHODS[pair[1]].is_hypercomplex else 6
    return dataclasses.replace(CPU, method=pair[1], rank=rank, fused=(lower,), **changes)


@pytest.mark.parametrize(
    ("family", "pair", "changes"),
    [
        ("llama", PAIRS[0], {}),
        ("llama", PAIRS[1], {"recompute": "none", "targets": ("layers.1-",)}),
        ("gemma2", PAIRS[2], {"recompute": 2, "compute_dtype": "bf16"}),
        ("phi3", PAIRS[3], {"compute_dtype": "bf16", "adapter_dtype": "bf16", "mlp_tiles": 3, "first": 1}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte(
    family: str, pair: tuple[Method, Method], changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = on(pair, **changes)
    dry = dry_run({"model_type": family, **values_of(family)}, setting)
    ledger = counted(folders[family], setting)
    assert dry.peak == ledger.peak
    assert dry.phase_bytes == dict(ledger.phase_bytes)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    ("model", "card", "changes"),
    [
        ("SmolLM2-360M", None, {"length": 300, "recompute": "none", **FULL}),
        ("Mistral-7B-v0.1", "RTX 3060 12GB", {"length": 4096, "supervised_share": 0.1}),
        ("Llama-3.2-1B", "T4", {"length": 3000, "recompute": 2, "supervised_share": 0.05, **HALF}),
        ("gemma-2-2b", "A100 80GB", {"length": 777, "recompute": "none", "supervised_share": 0.05}),
        ("Qwen3-0.6B", "RTX 4060 8GB", {"rows": 2, "length": 777, "supervised_share": 0.02, "mlp_tiles": 4}),
        ("Llama-3.2-1B", "RTX 3090", {"length": 999, "recompute": "none", "targets": ("layers.1-",)}),
    ],
)
def test_the_closed_form_is_the_dry_run_within_three_percent(
    model: str, card: str | None, changes: dict[str, Any], pair: tuple[Method, Method]
) -> None:
    lower = dataclasses.replace(language(pair[0]), width=256)  # type: ignore[arg-type]
    found = compared(model, card, method=pair[1], rank=64, fused=(lower,), **changes)
    for part in ("peak", "working"):
        assert abs(found.errors[part]) <= BAR, "\n".join(found.lines())


def test_the_size_on_disk_is_known_to_the_byte(folders: dict[str, Path]) -> None:
    for pair in PAIRS:
        setting = on(pair, adapter_dtype="bf16", first=1)
        model = build(folders["qwen2"], setting)
        shape = shape_of("qwen2")
        assert stored_bytes(model) == saved_bytes(shape, setting)
        assert sum(each.numel() for each in trainable(model).values()) == trainable_count(shape, setting)
