"""A fusion from a recipe to an answer: first stages, trained, stopped, resumed, kept, and what is refused."""

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
from beside_runs import assert_real_step, logits_of
from conftest import TinyModel
from safetensors.torch import load_file
from test_closed_form import BESIDE, FULL, assert_near, compared
from test_estimate import CPU, folders, shape_of
from test_train import assert_same, changed, make_recipe, only, train_in_two_runs, train_until
from two_adapters import PAIRS, first_stages, fused_pair

from qadapt.adapters.store import Store
from qadapt.cli.main import run as command
from qadapt.errors import BadRecipe, BadRun, Unsupported
from qadapt.events import AdapterAttached, RunFinished, StepDone
from qadapt.exporting.export import export
from qadapt.fusing import find_sources, fused_on
from qadapt.plan.adapters import saved_bytes
from qadapt.plan.adapters import trainable as trainable_count
from qadapt.plan.setting import Setting
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import evaluate, resume, train
from qadapt.shape import find_shape
from qadapt.trained.keeping import add

__all__ = ["folders"]  # a fixture
PROGRAM = """
import sys, torch
from safetensors.torch import save_file
from qadapt.run import load
torch.set_num_threads(1)
tuned = load("first", folder=sys.argv[1])
with torch.no_grad():
    logits = tuned.model(input_ids=torch.arange(3, 40)[None]).logits.contiguous()
save_file({"logits": logits}, sys.argv[2])
"""


def fusion_recipe(folder: Path, model: Path, targets: tuple[str, ...] = PAIRS["sum"]) -> Recipe:
    folder.mkdir(exist_ok=True)
    recipe = make_recipe(folder, model, learning_rate=3e-3)
    adapter = type(recipe.adapter)(method="fusion", targets=targets)
    return recipe.model_copy(update={"adapter": adapter})


def after_first_stages(folder: Path, model: Path) -> Recipe:
    recipe = fusion_recipe(folder, model)
    first_stages(recipe)
    return recipe


def adapter_of(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(recipe.run.folder) / "first" / "adapter" / "side_car.safetensors")


def test_a_run_needs_its_first_stages_no_more_once_it_is_trained(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = after_first_stages(tmp_path, tiny_model("llama"))
    runs = Path(recipe.run.folder)
    parents = {name: load_file(runs / name / "adapter" / "side_car.safetensors") for name in PAIRS["sum"]}
    events = list(train(recipe))
    (attached,), (finished,) = only(AdapterAttached, events), only(RunFinished, events)
    losses = [event.loss for event in only(StepDone, events)]
    assert losses[-1] < losses[0]
    assert attached.adapted_layers == 2
    assert attached.trainable == 2 * (3 * 64**2 + 64)
    tensors = adapter_of(recipe)
    assert sum(each.nbytes for each in tensors.values()) == attached.stored_bytes
    frozen = sum(each.numel() for parent in parents.values() for each in parent.values())
    assert sum(each.numel() for each in tensors.values()) == attached.trainable + frozen
    down = parents["pfeiffer"]["layers.1.feed_forward.down.weight"]
    assert torch.equal(tensors["layers.1.feed_forward.adapters.0.down.weight"], down)
    settings = json.loads((Path(finished.adapter) / "side_car.json").read_text("utf-8"))
    assert [each["name"] for each in settings["adapters"]] == ["pfeiffer", "compacterplus"]

    logits = logits_of(runs)
    found = evaluate("first", folder=str(runs))
    assert found.loss < found.base_loss
    assert [each.layer for each in found.attended] == [0, 1]
    assert all(sum(each.weights.values()) == pytest.approx(1) for each in found.attended)
    assert {tuple(each.weights) for each in found.attended} == {("pfeiffer", "compacterplus")}
    assert command(["evaluate", "first", "--folder", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert "attends in layer  pfeiffer  compacterplus" in shown
    assert f"{found.attended[1].weights['pfeiffer']:.1%}" in shown
    assert command(["evaluate", "first", "--folder", str(runs), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["attended"][1]
    assert values == {"layer": 1, "place": "feed_forward", "weights": dict(found.attended[1].weights)}

    for name in PAIRS["sum"]:
        shutil.rmtree(runs / name)
    place = tmp_path / "logits.safetensors"
    subprocess.run([sys.executable, "-c", PROGRAM, str(runs), str(place)], check=True)
    assert torch.equal(load_file(place)["logits"], logits)
    kept = add("first", Store(tmp_path / "store"), name="both", folder=str(runs))
    assert kept.version.record.method == "fusion"
    for form in ("merged-fp16", "gguf-lora"):
        with pytest.raises(Unsupported, match=rf"AdapterFusion, .*no {form} of it.\n.*--form"):
            list(export("first", form=form, folder=str(runs)))


def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path: Path, tiny_model: TinyModel) -> None:
    straight, broken = (
        after_first_stages(tmp_path / name, tiny_model("llama")) for name in ("straight", "broken")
    )
    list(train(straight))
    train_in_two_runs(broken)
    assert_same(adapter_of(straight), adapter_of(broken))


def test_a_run_whose_first_stage_changed_is_not_gone_on_with(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = after_first_stages(tmp_path, tiny_model("llama"))
    train_until(recipe, step=2)
    path = Path(recipe.run.folder) / "pfeiffer" / "adapter" / "side_car.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadRun, match=r"is made of changed: adapters \(its hash was .*\n.*--allow-change"):
        list(resume("first", folder=recipe.run.folder))


def test_adapters_are_found_by_run_store_and_folder_and_told_by_name(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = after_first_stages(tmp_path, tiny_model("llama"))
    monkeypatch.chdir(tmp_path)
    version = add("pfeiffer", Store(Path("adapters")), name="tone", folder=recipe.run.folder).version.id
    copied = shutil.copytree(tmp_path / "runs" / "compacterplus" / "adapter", tmp_path / "mine")
    for targets in (("tone", "mine"), (f"adapters/versions/{version}/adapter", str(copied))):
        sources = find_sources(changed(recipe, "adapter", targets=targets))
        assert [source.fused.name for source in sources] == ["tone", "mine"]
        assert [source.fused.width for source in sources] == [4, 4]
    with pytest.raises(BadRecipe, match=r"two adapters are called mine"):
        place = shutil.copytree(copied, tmp_path / "other" / "mine")
        find_sources(changed(recipe, "adapter", targets=("mine", str(place))))


@pytest.mark.parametrize(
    ("targets", "problem"),
    [
        ("all-linear", "targets = all-linear: attention needs two adapters or more"),
        (("pfeiffer",), "targets = pfeiffer: attention needs two adapters or more"),
        (("pfeiffer", "pfeiffer"), "targets = pfeiffer, pfeiffer: pfeiffer is named twice"),
    ],
)
def test_fewer_than_two_adapters_are_refused(
    targets: Any, problem: str, tmp_path: Path, tiny_model: TinyModel
) -> None:
    values = make_recipe(tmp_path, tiny_model("llama")).model_dump()
    values["adapter"] = {"method": "fusion", "targets": targets}
    with pytest.raises(BadRecipe, match=rf"{problem}.*Give the names of two or more runs"):
        check_recipe(values, origin="the test")
    values["adapter"] = {"method": "fusion", "targets": ("a", "b"), "rank": 8}
    with pytest.raises(BadRecipe, match="rank = 8 means nothing to AdapterFusion"):
        check_recipe(values, origin="the test")


def test_what_cannot_be_attended_over_is_refused_by_name(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = fusion_recipe(tmp_path, tiny_model("llama"))
    with pytest.raises(BadRun, match="There is no run 'pfeiffer'"):
        list(train(recipe))
    first_stages(recipe, "pfeiffer", "lora", "houlsby")
    for name, problem in (
        ("lora", r"adapter.targets: lora is LoRA, and attention is over bottleneck adapters.\n.*houlsby, "),
        ("houlsby", r"pfeiffer \(Pfeiffer adapters\) is after the feed-forward part, of the sum, from layer "
         r"0 on, houlsby \(Houlsby adapters\) after the feed-forward part and after attention, "),
        ("absent", "There is no run 'absent'"),
    ):  # fmt: skip
        with pytest.raises((BadRecipe, BadRun), match=problem):
            list(train(changed(recipe, "adapter", targets=("pfeiffer", name))))
    wider = dataclasses.replace(find_shape(str(tiny_model("llama"))), width=128)
    first_stages(recipe, "compacterplus")
    with pytest.raises(BadRecipe, match=r"pfeiffer is for a base of 2 layers of width 64; .* of width 128"):
        fused_on(recipe, wider)
    assert not (tmp_path / "runs" / "first").exists()


def test_adapters_of_another_base_are_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = after_first_stages(tmp_path, tiny_model("llama"))
    base = Path(shutil.copytree(tiny_model("llama"), tmp_path / "base"))
    [weights] = base.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BadRecipe, match=r"pfeiffer was trained on .*, whose files are others than those of "):
        list(train(changed(recipe, "model", source=str(base))))


def fused(kinds: tuple[Any, Any] = PAIRS["sum"], **changes: Any) -> Setting:
    pair = fused_pair(kinds, first_layer=changes.pop("first_layer", 0))
    targets = tuple(each.name for each in pair)
    return dataclasses.replace(CPU, method="fusion", targets=targets, fused=pair, **changes)


@pytest.mark.parametrize(
    ("family", "sees", "changes"),
    [
        ("llama", "sum", {}),
        ("llama", "sum", {"recompute": "none", "first_layer": 1}),
        ("gemma2", "output", {"recompute": 2, "compute_dtype": "bf16"}),
        ("phi3", "stream", {"compute_dtype": "bf16", "adapter_dtype": "bf16", "mlp_tiles": 3}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte(
    family: str, sees: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    assert_real_step(family, fused(PAIRS[sees], **changes), folders[family])


@pytest.mark.parametrize("sees", PAIRS)
@pytest.mark.parametrize(
    ("model", "card", "changes"),
    [
        ("SmolLM2-360M", None, {"length": 300, "recompute": "none", **FULL}),
        *BESIDE,
    ],
)
def test_the_closed_form_is_the_dry_run_within_three_percent(
    model: str, card: str | None, changes: dict[str, Any], sees: str
) -> None:
    pair = tuple(dataclasses.replace(each, width=64) for each in fused_pair(PAIRS[sees]))
    found = compared(model, card, method="fusion", targets=("one", "two"), fused=pair, **changes)
    assert_near(found)


def test_the_size_on_disk_is_known_to_the_byte(folders: dict[str, Path]) -> None:
    from test_estimate import build

    from qadapt.adapters.lora import stored_bytes, trainable

    for sees in PAIRS.values():
        setting = fused(sees, adapter_dtype="bf16")
        model = build(folders["qwen2"], setting)
        shape = shape_of("qwen2")
        assert stored_bytes(model) == saved_bytes(shape, setting)
        assert sum(each.numel() for each in trainable(model).values()) == trainable_count(shape, setting)
