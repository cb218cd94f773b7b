"""AdapterDrop: the lowest layers have no adapter, which is no other model, and nothing goes back to them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_runs import assert_real_step
from conftest import TinyModel
from safetensors.torch import load_file
from test_bottleneck import IDS, base_of, drawn, gradients, of_the_library, trained, width_of
from test_bottleneck_runs import bottleneck_recipe
from test_closed_form import FULL, assert_near, compared
from test_estimate import CPU, folders, shape_of
from test_train import changed, only

from qadapt.adapters.adapters_library import import_bottleneck
from qadapt.adapters.bottleneck import KINDS, Bottleneck, Kind, attach_bottleneck, load_bottleneck
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.engine.recompute import set_recompute
from qadapt.errors import BadAdapter, BadRecipe, Unsupported
from qadapt.events import AdapterAttached, StepDone
from qadapt.methods import METHODS, Method
from qadapt.plan.adapters import trainable
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.plan.speed import passes
from qadapt.recipe import AdapterSection
from qadapt.run import evaluate, load, train

__all__ = ["folders"]  # a fixture


def upper(tiny_model: TinyModel, kind: Kind, *, layers: int = 3, first: int = 1) -> SideCar:
    """Adapters in the upper layers, not as they started."""
    base = base_of(tiny_model, "llama", layers=layers)
    return drawn(attach_bottleneck(base, Bottleneck(kind, width_of(kind), "gelu", first_layer=first)))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_whole_adapter_with_nothing_to_add_below(kind: Kind, tiny_model: TinyModel) -> None:
    model = upper(tiny_model, kind)
    whole = attach_bottleneck(
        base_of(tiny_model, "llama", layers=3), Bottleneck(kind, width_of(kind), "gelu")
    )
    for name, part in model.parts.items():
        whole.parts[name].load_state_dict(part.state_dict())
    assert whole.parts.keys() > model.parts.keys()
    logits, slopes = gradients(model)
    expected, all_slopes = gradients(whole)
    assert torch.equal(logits, expected)
    own = {name: each for name, each in slopes.items() if "shared" not in name}
    assert slopes.keys() == trained(model).keys()
    assert own.keys() < all_slopes.keys()
    assert all(torch.equal(each, all_slopes[name]) for name, each in own.items())


def test_nothing_goes_back_below_the_first_adapter(tiny_model: TinyModel) -> None:
    model = upper(tiny_model, "houlsby", first=2).train()
    set_recompute(model.base, "all")
    layers = model.base.get_decoder().layers
    seen: list[int] = []
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(lambda *_, each=number: seen.append(each))
    _, slopes = gradients(model)
    assert seen == [0, 1, 2, 2], "the last one alone is computed again"
    assert all(".layers.2." in name for name in slopes)


def test_what_is_saved_has_no_lower_layers(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = upper(tiny_model, "compacter")
    save_side_car(model, tmp_path)
    assert not any(name.startswith("layers.0.") for name in load_file(tmp_path / "side_car.safetensors"))
    again = load_bottleneck(base_of(tiny_model, "llama", layers=3), tmp_path)
    assert again.settings == model.settings
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"first_layer": 3}, "begins with layer 3, and its base has 3"),
        ({"first_layer": -1}, "describe no bottleneck: .*'first_layer': -1"),
        (
            {"first_layer": 0},
            r"does not fit its settings: layers.0.feed_forward.down.bias has the shape None",
        ),
    ],
)
def test_settings_of_other_layers_are_refused(
    change: dict[str, int], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(upper(tiny_model, "pfeiffer"), tmp_path)
    path = tmp_path / "side_car.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    with pytest.raises(BadAdapter, match=problem):
        load_bottleneck(base_of(tiny_model, "llama", layers=3), tmp_path)


@pytest.mark.parametrize("left_out", [[1], [0, 2], [0, 1, 2]])
def test_the_library_may_leave_out_the_lowest_layers_only(
    left_out: list[int], tiny_model: TinyModel, tmp_path: Path
) -> None:
    theirs = of_the_library(upper(tiny_model, "pfeiffer"), tmp_path / "a", leave_out=[0])
    import_bottleneck(theirs, tmp_path)
    again = load_bottleneck(base_of(tiny_model, "llama", layers=3), tmp_path)
    assert again.settings["first_layer"] == 1
    theirs = of_the_library(upper(tiny_model, "pfeiffer"), tmp_path / "b", leave_out=left_out)
    with pytest.raises(
        (Unsupported, BadAdapter), match=r"only the lowest layers can be|no tensors for some layer"
    ):
        import_bottleneck(theirs, tmp_path)


# --- asked for in a recipe ----------------------------------------------------------------------------------


def test_a_run_trains_and_answers_without_adapters_in_low_layers(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = changed(
        bottleneck_recipe(tmp_path, tiny_model("qwen2", layers=3), "houlsby"),
        "adapter",
        targets=("layers.1-",),
    )
    events = list(train(recipe))
    (attached,) = only(AdapterAttached, events)
    assert attached.adapted_layers == 4
    losses = [event.loss for event in only(StepDone, events)]
    assert losses[-1] < losses[0]
    tuned = load("first", folder=recipe.run.folder).model
    assert sorted({name.split(".")[1] for name in tuned.parts}) == ["1", "2"]
    found = evaluate("first", folder=recipe.run.folder, answers=1, max_new_tokens=4)
    assert found.loss < found.base_loss


@pytest.mark.parametrize("targets", [("q_proj",), ("layers.1",), ("layers.1-", "layers.2-"), ("layers.-",)])
def test_other_targets_of_bottlenecks_are_refused(targets: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"stand beside whole layers. .*\[layers.12-\]"):
        AdapterSection(method="pfeiffer", targets=targets)


def test_leaving_out_every_layer_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(
        BadRecipe, match=r"layers.3-: the model has 3 layers, 0 to 2.\nGive at most layers.2-"
    ):
        upper(tiny_model, "pfeiffer", first=3)
    with pytest.raises(BadRecipe, match=r"layers.3-: the model has 3 layers"):
        estimate_step(shape_of("llama"), step("houlsby", targets=("layers.3-",)))


# --- what it takes ------------------------------------------------------------------------------------------


def step(method: Method, **changes: Any) -> Setting:
    rank = 8 if METHODS[method].is_hypercomplex else 6
    values: dict[str, Any] = {"targets": ("layers.1-",), "accumulates": False} | changes
    return dataclasses.replace(CPU, method=method, rank=rank, **values)


@pytest.mark.parametrize(
    ("family", "method", "changes"),
    [
        ("llama", "houlsby", {"recompute": "none"}),
        ("gemma2", "pfeiffer", {"recompute": "all"}),
        ("qwen3", "compacter", {"recompute": 2, "compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("mistral", "parallel", {"recompute": 1}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte(
    family: str, method: Method, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    assert_real_step(family, step(method, **changes), folders[family])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("houlsby", {"recompute": "none"}),
        ("pfeiffer", {"recompute": "all"}),
        ("pfeiffer", {"recompute": 1}),
        ("compacterplus", {"recompute": 2}),
    ],
)
@pytest.mark.parametrize(("model", "card"), [("SmolLM2-360M", None), ("Mistral-7B-v0.1", "RTX 3060 12GB")])
def test_the_closed_form_is_the_dry_run_within_three_percent(
    model: str, card: str | None, method: Method, changes: dict[str, Any]
) -> None:
    types = {} if card else FULL
    found = compared(
        model,
        card,
        method=method,
        rank=64,
        length=700,
        targets=("layers.1-",),
        supervised_share=0.1,
        **changes,
        **types,
    )
    assert_near(found)


def test_leaving_layers_out_takes_less_of_everything() -> None:
    shape = shape_of("llama")
    whole, half = (step("houlsby", targets=each, recompute="none") for each in ("all-linear", ("layers.2-",)))
    assert trainable(shape, half) * 3 == trainable(shape, whole)
    assert estimate_step(shape, half).needed_bytes < estimate_step(shape, whole).needed_bytes
    assert passes(shape, whole) == 2
    assert passes(shape, half) == pytest.approx(1 + 1 / 3)
    for recompute, expected in (("all", 1 + 2 / 3), (2, 1 + 1 / 3), (1, 1 + 1 / 3)):
        assert passes(shape, dataclasses.replace(half, recompute=recompute)) == pytest.approx(expected)
