"""Prefix tuning from a recipe to an answer: planned, trained, stopped, resumed, loaded in another process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from beside_runs import assert_real_step, kept_and_exported, logits_elsewhere, logits_of
from test_closed_form import FULL, HALF, assert_near, compared
from test_estimate import CPU, build, folders, shape_of
from test_method_runs import recipe_of
from test_train import assert_same, only

from qadapt.adapters.lora import trainable
from qadapt.adapters.prefix import PREFIX_KINDS, PrefixKind
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.errors import BadRecipe, Unsupported
from qadapt.events import AdapterAttached, CheckpointSaved, RunFinished, StepDone
from qadapt.export.combine import combine
from qadapt.plan.adapters import saved_bytes
from qadapt.plan.adapters import trainable as planned
from qadapt.plan.inverse import most
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.recipe_file import check_recipe
from qadapt.run import evaluate, resume, train

if TYPE_CHECKING:
    from conftest import TinyModel

__all__ = ["folders"]  # a fixture


def test_runs_train_resume_bit_for_bit_and_a_new_process_has_the_same_logits(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    logits = {}
    for kind in PREFIX_KINDS:
        (tmp_path / kind).mkdir()
        runs, recipe = tmp_path / kind / "runs", recipe_of(kind, tmp_path / kind, tiny_model("gemma2"))
        events = list(train(recipe))
        (attached,) = only(AdapterAttached, events)
        assert attached.adapted_layers == 2
        assert attached.trainable == planned_for(kind, tiny_model)
        losses = [event.loss for event in only(StepDone, events)]
        assert losses[-1] < losses[0]
        assert {path.name for path in (runs / "first/adapter").iterdir()} == {
            "side_car.json", "side_car.safetensors", "qadapt.json", "prompt.json",
        }  # fmt: skip
        whole = (runs / "first/adapter/side_car.safetensors").read_bytes()
        (runs / "first").rename(tmp_path / kind / "straight")
        begun = train(recipe)
        next(event for event in begun if isinstance(event, CheckpointSaved))
        begun.close()  # type: ignore[attr-defined]
        assert isinstance(list(resume("first", folder=str(runs)))[-1], RunFinished)
        assert (runs / "first/adapter/side_car.safetensors").read_bytes() == whole
        found = evaluate("first", folder=str(runs), answers=1, max_new_tokens=4)
        assert found.loss < found.base_loss
        logits[kind] = logits_of(runs)
    assert_same(logits_elsewhere(tmp_path, PREFIX_KINDS), logits)


def planned_for(kind: PrefixKind, tiny_model: TinyModel) -> int:
    from qadapt.shape import find_shape

    return planned(find_shape(str(tiny_model("gemma2"))), Setting(method=kind, rank=4))


def test_a_run_is_kept_exported_as_an_adapter_and_as_nothing_else(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = recipe_of("prefix", tmp_path, tiny_model("qwen2"), steps=2)
    folders = kept_and_exported(recipe, tmp_path, title="prefix tuning", said="prefix tuning, length 4")
    with pytest.raises(Unsupported, match="of the kind prefix: only bottleneck adapters have a mean"):
        list(combine([(folder, 0.5) for folder in folders], tmp_path / "both"))


# --- what is planned --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "prefix-flat", {}),
        ("gemma2", "prefix", {"recompute": 2}),
        ("phi3", "prefix", {"compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("qwen3", "prefix-flat", {"recompute": "none", "compute_dtype": "bf16", "mlp_tiles": 3}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte(
    family: str, kind: PrefixKind, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(CPU, method=kind, rank=6, **changes)
    assert_real_step(family, setting, folders[family])


@pytest.mark.parametrize(
    ("kind", "model", "card", "changes"),
    [
        ("prefix", "SmolLM2-360M", None, {"length": 300, "recompute": "none", **FULL}),
        ("prefix-flat", "SmolLM2-360M", None, {"length": 300, "packed": True, "rows": 6, "rank": 64, **FULL}),
        ("prefix-flat", "Mistral-7B-v0.1", "RTX 3060 12GB", {"length": 4096}),
        ("prefix", "Mistral-7B-v0.1", "A100 80GB", {"length": 8192, "packed": True, "recompute": "none"}),
        ("prefix-flat", "Llama-3.2-1B", "T4", {"length": 3000, "recompute": 2, **HALF}),
        ("prefix", "Llama-3.2-1B", "RTX 4090", {"length": 500, "packed": True, "rows": 8, "documents": 20}),
        ("prefix-flat", "gemma-2-2b", "A100 80GB", {"length": 777, "recompute": "none"}),
        ("prefix", "Phi-3-mini-4k-instruct", "RTX 3090", {"length": 512}),
        ("prefix-flat", "Qwen3-0.6B", "RTX 4060 8GB", {"rows": 2, "length": 777, "mlp_tiles": 4}),
    ],
)
def test_the_closed_form_is_the_dry_run_within_three_percent(
    kind: PrefixKind, model: str, card: str | None, changes: dict[str, Any]
) -> None:
    found = compared(model, card, method=kind, **{"supervised_share": 0.02, **changes})
    assert_near(found)


@pytest.mark.parametrize("kind", PREFIX_KINDS)
def test_what_is_trained_and_what_is_saved_is_known_to_the_byte(
    kind: PrefixKind, folders: dict[str, Path], tmp_path: Path
) -> None:
    setting = dataclasses.replace(CPU, method=kind, rank=6, adapter_dtype="bf16")
    model = build(folders["qwen2"], setting)
    assert isinstance(model, SideCar)
    assert sum(each.numel() for each in trainable(model).values()) == planned(shape_of("qwen2"), setting)
    save_side_car(model, tmp_path)
    path = tmp_path / "side_car.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size == header + saved_bytes(shape_of("qwen2"), setting)


def test_the_longest_prefix_that_fits_is_found() -> None:
    found = most(
        shape_of("llama"), dataclasses.replace(CPU, method="prefix-flat"), what="rank", room=Room(1 << 40)
    )
    assert found.value == shape_of("llama").context


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [("alpha", 8.0), ("dropout", 0.1), ("targets", ["q_proj"])])
def test_fields_that_mean_nothing_to_a_prefix_are_refused(field: str, value: object) -> None:
    least = {"model": "m", "data": {"sources": [{"path": "p"}]}, "run": {"name": "n"}}
    with pytest.raises(BadRecipe, match=f"{field} = .* means nothing to prefix tuning"):
        check_recipe({**least, "adapter": {"method": "prefix", field: value}}, origin="the test")
