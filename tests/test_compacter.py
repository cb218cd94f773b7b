"""Compacter: as few numbers as its paper says, of widths it can have, and those of the library `adapters`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from safetensors.torch import save_file
from test_bottleneck import IDS, LIBRARY_CONFIG, adapted, base_of, drawn, gradients, trained
from test_estimate import CPU, shape_of

from qadapt.adapters.adapters_library import import_bottleneck
from qadapt.adapters.bottleneck import Bottleneck, Kind, attach_bottleneck, load_bottleneck
from qadapt.adapters.hypercomplex import HypercomplexProjection, SharedFactors
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.errors import BadAdapter, BadRecipe, Unsupported
from qadapt.methods import Method
from qadapt.plan.adapters import trainable
from qadapt.plan.estimate import estimate_step
from qadapt.plan.inverse import most
from qadapt.plan.knobs import KNOBS
from qadapt.plan.room import Room
from qadapt.recipe import AdapterSection

NORMS_OF_T5 = 62 * 768
NUMBERS_OF_T5 = 222_903_552


@pytest.mark.parametrize(("method", "percent"), [("compacter", 0.073), ("compacterplus", 0.047)])
def test_there_are_as_many_numbers_as_in_the_paper(method: Method, percent: float) -> None:
    t5_base = dataclasses.replace(shape_of("llama"), layers=24, width=768)
    setting = dataclasses.replace(CPU, method=method, rank=768 // 32)
    with_norms = trainable(t5_base, setting) + NORMS_OF_T5  # which the paper trains, too
    assert round(100 * with_norms / NUMBERS_OF_T5, 3) == percent


def test_a_projection_starts_as_large_as_a_plain_one() -> None:
    draw, shared = torch.Generator().manual_seed(0), SharedFactors()
    shared.start(draw)
    projection = HypercomplexProjection(512, 256, shared)
    projection.start(draw)
    weight = projection(torch.eye(512))  # (inputs, outputs), as there is no bias yet
    assert weight.std().item() == pytest.approx((3 * 512) ** -0.5, rel=0.3)


def test_every_trained_number_moves_within_two_steps(tiny_model: TinyModel) -> None:
    model = attach_bottleneck(base_of(tiny_model, "llama"), Bottleneck("compacter", 8, "gelu"))
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    _, slopes = gradients(model)
    assert {name for name, each in slopes.items() if each.any()} == {
        name for name in trained(model) if name.endswith(("up.right", "up.bias"))
    }, "the projection up is zero"
    optimizer.step()
    _, slopes = gradients(model)
    assert all(each.any() for each in slopes.values())


def test_all_adapters_share_one_set_of_factors(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = adapted(base_of(tiny_model, "llama"), "compacter")
    assert sum(name.endswith("factors") for name in trained(model)) == 1
    save_side_car(model, tmp_path)
    again = load_bottleneck(base_of(tiny_model, "llama"), tmp_path, is_trainable=True)
    assert sum(name.endswith("factors") for name in trained(again)) == 1
    with torch.no_grad():
        before = again(input_ids=IDS).logits
        next(again.parts["shared"].parameters()).mul_(2)
        assert not torch.allclose(again(input_ids=IDS).logits, before, atol=1e-2)


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_width_that_cannot_be_divided_is_refused(tiny_model: TinyModel) -> None:
    problem = r"adapter.rank is 10; of Compacter\+\+ it is a multiple of 4.\nSet adapter.rank=8"
    setting = dataclasses.replace(CPU, method="compacterplus", rank=10)
    with pytest.raises(BadRecipe, match=problem):
        estimate_step(shape_of("llama"), setting)
    with pytest.raises(BadRecipe, match=problem):
        attach_bottleneck(base_of(tiny_model, "llama"), Bottleneck("compacterplus", 10, "gelu"))
    with pytest.raises(ValueError, match=r"rank = 10; of Compacter\+\+ it is a multiple of 4"):
        AdapterSection(method="compacterplus", rank=10)
    odd = dataclasses.replace(shape_of("llama"), width=66)
    with pytest.raises(BadRecipe, match=r"Compacter\+\+ cannot divide .* 66, by 4.\n.*pfeiffer"):
        estimate_step(odd, dataclasses.replace(setting, rank=8))


@pytest.mark.parametrize("change", [{"width": 6}, {"model_width": 66}])
def test_settings_whose_widths_cannot_be_divided_are_refused(
    change: dict[str, int], tiny_model: TinyModel, tmp_path: Path
) -> None:
    save_side_car(adapted(base_of(tiny_model, "llama"), "compacter"), tmp_path)
    path = tmp_path / "side_car.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **change}), "utf-8")
    with pytest.raises(BadAdapter, match=r"describe no bottleneck|whose model_width is 66"):
        load_bottleneck(base_of(tiny_model, "llama"), tmp_path)


def test_only_widths_that_can_be_are_searched_and_proposed() -> None:
    shape, setting = shape_of("llama"), dataclasses.replace(CPU, method="compacter", rank=8)
    answer = most(shape, setting, what="rank", room=Room(80 << 30))
    assert (answer.value, answer.ceiling.value) == (shape.width - 4, shape.width - 4)
    assert answer.ceiling.reason == "4 less than the width of the model"
    needed = {rank: at(rank).needed_bytes + at(rank).error_bytes for rank in range(4, shape.width, 4)}
    for rank in (4, 24, 44):
        found = most(shape, setting, what="rank", room=Room(needed[rank]))
        assert found.value == max(each for each, bytes_ in needed.items() if bytes_ <= needed[rank])
        assert found.next_estimate is not None
        assert found.next_estimate.setting.rank == found.value + 4
    (knob,) = (knob for knob in KNOBS if knob.name == "rank")
    assert knob.values(shape, dataclasses.replace(setting, rank=24), 1) == (24, 12)


def at(rank: int) -> Any:
    return estimate_step(shape_of("llama"), dataclasses.replace(CPU, method="compacter", rank=rank))


# --- those of the library -----------------------------------------------------------------------------------


def of_the_library(model: SideCar, folder: Path, **changes: Any) -> Path:
    """A Compacter's numbers in the files of `adapters` 1.3."""
    folder.mkdir()
    is_plus = model.settings["kind"] == "compacterplus"
    config = {
        **LIBRARY_CONFIG, "non_linearity": "gelu", "reduction_factor": 8, "original_ln_before": is_plus,
        "mh_adapter": not is_plus, "phm_layer": True, "phm_dim": 4, "phm_rank": 1, "phm_bias": True,
        "factorized_phm_W": True, "shared_W_phm": False, "shared_phm_rule": True,
        "factorized_phm_rule": False, **changes,
    }  # fmt: skip
    values = {"hidden_size": 64, "model_type": "llama", "name": "mine", "config": config}
    (folder / "adapter_config.json").write_text(json.dumps(values), "utf-8")
    sides = {"down": "adapter_down.0", "up": "adapter_up"}
    names = {"left": "W_left", "right": "W_right", "bias": "b"}
    tensors = {"model.shared_parameters.mine.phm_rule": model.stored()["shared.factors"]}
    for name, tensor in model.stored().items():
        if name == "shared.factors":
            continue
        _, number, place, side, last = name.split(".")
        theirs = {"attention": "attention_adapters", "feed_forward": "output_adapters"}[place]
        front = f"model.layers.{number}.{theirs}.adapters.mine.{sides[side]}.{names[last]}"
        tensors[front] = tensor.unsqueeze({"left": 2, "right": 1}[last]) if last != "bias" else tensor
    save_file(
        {name: each.detach().contiguous() for name, each in tensors.items()}, folder / "adapter.safetensors"
    )
    return folder


@pytest.mark.parametrize("kind", ["compacter", "compacterplus"])
def test_an_adapter_of_the_library_is_imported(kind: Kind, tiny_model: TinyModel, tmp_path: Path) -> None:
    model = drawn(attach_bottleneck(base_of(tiny_model, "llama"), Bottleneck(kind, 8, "gelu", scale=1.5)))
    import_bottleneck(of_the_library(model, tmp_path / "theirs"), tmp_path)
    again = load_bottleneck(base_of(tiny_model, "llama"), tmp_path)
    assert again.settings == model.settings
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"phm_rank": 2}, "Its phm_rank is 2; only 1 is known here"),
        ({"shared_phm_rule": False}, "Its shared_phm_rule is False; only True"),
        ({"factorized_phm_rule": True}, "Its factorized_phm_rule is True; only False"),
        ({"is_parallel": True, "mh_adapter": False}, "It is of the kind parallel, with phm_layer"),
        ({"reduction_factor": 10}, "describe no bottleneck: .*'width': 6"),
        ({"phm_layer": False}, r"down.weight has the shape \(0,\) and must have \(8, 64\)"),
    ],
)
def test_what_the_library_does_otherwise_is_refused_by_name(
    change: dict[str, Any], problem: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    theirs = of_the_library(adapted(base_of(tiny_model, "llama"), "compacter"), tmp_path / "theirs", **change)
    with pytest.raises((BadAdapter, Unsupported), match=problem):
        import_bottleneck(theirs, tmp_path)
