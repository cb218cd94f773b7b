"""Virtual tokens from a recipe to an answer: planned, trained, resumed, loaded in another process."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from beside_runs import assert_real_step, kept_and_exported, logits_elsewhere, logits_of
from safetensors.torch import load_file
from test_closed_form import FULL, HALF, assert_near, compared
from test_estimate import CPU, build, folders, shape_of
from test_method_runs import recipe_of
from test_train import assert_same, changed, only

from qadapt.adapters.lora import trainable
from qadapt.adapters.prompt import PROMPT_KINDS, PromptKind
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_car_files import save_side_car
from qadapt.errors import BadRecipe, Unsupported
from qadapt.events import (
    AdapterAttached,
    CheckpointSaved,
    DataReady,
    Evaluated,
    Event,
    RunFinished,
    StepDone,
)
from qadapt.plan.adapters import saved_bytes
from qadapt.plan.adapters import trainable as planned
from qadapt.run import evaluate, resume, train
from qadapt.running.data_check import check_data
from qadapt.running.material import prepare, reading_of

if TYPE_CHECKING:
    from conftest import TinyModel

__all__ = ["folders"]  # a fixture


def test_runs_train_resume_bit_for_bit_and_a_new_process_has_the_same_logits(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    logits, base_losses = {}, []
    for kind in PROMPT_KINDS:
        (tmp_path / kind).mkdir()
        runs, recipe = tmp_path / kind / "runs", recipe_of(kind, tmp_path / kind, tiny_model("gemma2"))
        recipe = changed(recipe, "train", rehearse=kind == "prompt", sample_prompts=("say 3",))
        events = list(train(recipe))
        (attached,) = only(AdapterAttached, events)
        assert (attached.adapted_layers, attached.trainable) == (1, trained_values(kind))
        losses = [event.loss for event in only(Evaluated, events)]
        assert losses[-1] < losses[0]
        assert {path.name for path in (runs / "first/adapter").iterdir()} == {
            "side_car.json", "side_car.safetensors", "qadapt.json", "prompt.json",
        }  # fmt: skip
        whole = (runs / "first/adapter/side_car.safetensors").read_bytes()
        if kind == "ptuning":  # the vectors themselves are no different
            (runs / "first").rename(tmp_path / kind / "straight")
            begun = train(recipe)
            next(event for event in begun if isinstance(event, CheckpointSaved))
            begun.close()  # type: ignore[attr-defined]
            assert isinstance(list(resume("first", folder=str(runs)))[-1], RunFinished)
            assert (runs / "first/adapter/side_car.safetensors").read_bytes() == whole
        found = evaluate("first", folder=str(runs), answers=1, max_new_tokens=4)
        assert found.loss < found.base_loss
        assert found.loss == pytest.approx(losses[-1], rel=1e-5)
        base_losses.append(found.base_loss)
        logits[kind] = logits_of(runs)
    assert base_losses[0] == base_losses[1]
    assert_same(logits_elsewhere(tmp_path, PROMPT_KINDS), logits)


def trained_values(kind: PromptKind) -> int:
    return 4 * 64 + (2 * 512 * 64 + 512 + 64 if kind == "ptuning" else 0)


def test_a_packed_run_is_the_one_that_fills_rows_up_and_its_rows_count_virtual_tokens(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = recipe_of("prompt", tmp_path, tiny_model("llama"), steps=2, evaluate_every=None)
    losses, tokens = [], []
    for packing in (True, False):
        events = list(train(changed(changed(recipe, "data", packing=packing), "run", name=f"run{packing}")))
        losses.append([event.loss for event in only(StepDone, events)])
        tokens.append([event.tokens for event in only(StepDone, events)])
        (ready,) = only(DataReady, events)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tokens[0] == tokens[1]
    plain = changed(recipe, "adapter", method="lora")
    counts = []
    for each in (recipe, plain):
        material = _result(prepare(each, revision=None))
        counts.append((material.rows.tokens, material.rows.longest, material.rows.supervised_tokens))
        assert {len(row) for row in material.rows.train} == set(material.rows.train.lengths.tolist())
    (more, longer, learned), (fewer, shorter, same) = counts
    assert (more, longer, learned) == (fewer + 4 * 24, shorter + 4, same)
    assert (ready.tokens, ready.longest_row_tokens) == (more, longer)
    assert reading_of(recipe).length == reading_of(plain).length - 4 == 124


def _result(begun: Generator[Event, None, Any]) -> Any:
    found: list[Any] = []

    def steps() -> Iterator[Event]:
        found.append((yield from begun))

    list(steps())
    return found[0]


def test_rows_to_look_at_have_no_virtual_tokens(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = recipe_of("prompt", tmp_path, tiny_model("llama"))
    report, plain = (
        _result(check_data(each)) for each in (recipe, changed(recipe, "adapter", method="lora"))
    )
    assert report.examples == plain.examples
    assert report.tokens == plain.tokens + 4 * report.rows


def test_a_run_is_kept_exported_as_an_adapter_and_as_nothing_else(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = recipe_of("ptuning", tmp_path, tiny_model("qwen2"), steps=2)
    kept_and_exported(recipe, tmp_path, title="P-tuning", said="P-tuning, 4 virtual tokens")


def test_new_tokens_behind_virtual_ones_are_refused(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = recipe_of("prompt", tmp_path, tiny_model("qwen2"))
    with pytest.raises((BadRecipe, Unsupported), match=r"data.new_tokens: .*prompt tuning"):
        list(train(changed(recipe, "data", new_tokens=("<a>",))))


# --- what is planned --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "kind", "changes"),
    [
        ("llama", "prompt", {}),
        ("gemma2", "ptuning", {"recompute": 2}),
        ("phi3", "ptuning", {"compute_dtype": "bf16", "adapter_dtype": "bf16"}),
        ("qwen3", "prompt", {"recompute": "none", "compute_dtype": "bf16", "mlp_tiles": 3}),
    ],
)
def test_the_dry_run_is_the_real_step_to_the_byte(
    family: str, kind: PromptKind, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(CPU, method=kind, rank=6, **changes)
    assert_real_step(family, setting, folders[family])


@pytest.mark.parametrize(
    ("kind", "model", "card", "changes"),
    [
        ("prompt", "SmolLM2-360M", None, {"length": 300, "recompute": "none", **FULL}),
        ("prompt", "Mistral-7B-v0.1", "RTX 3060 12GB", {"length": 4096, "supervised_share": 0.1}),
        ("ptuning", "Llama-3.2-1B", "T4", {"length": 3000, "recompute": 2, "supervised_share": 0.05, **HALF}),
        (
            "ptuning",
            "gemma-2-2b",
            "A100 80GB",
            {"length": 777, "recompute": "none", "supervised_share": 0.05},
        ),
        (
            "prompt",
            "Qwen3-0.6B",
            "RTX 4060 8GB",
            {"rows": 2, "length": 777, "supervised_share": 0.02, "mlp_tiles": 4},
        ),
    ],
)
def test_the_closed_form_is_the_dry_run_within_three_percent(
    kind: PromptKind, model: str, card: str | None, changes: dict[str, Any]
) -> None:
    found = compared(model, card, method=kind, rank=20, **changes)
    assert_near(found)


@pytest.mark.parametrize("kind", PROMPT_KINDS)
def test_what_is_trained_and_what_stands_on_disk_is_known_to_the_byte(
    kind: PromptKind, folders: dict[str, Path], tmp_path: Path
) -> None:
    setting = dataclasses.replace(CPU, method=kind, rank=6, adapter_dtype="bf16")
    model = build(folders["qwen2"], setting)
    shape = shape_of("qwen2")
    assert sum(each.numel() for each in trainable(model).values()) == planned(shape, setting)
    assert isinstance(model, SideCar)
    save_side_car(model, tmp_path)
    stored = load_file(tmp_path / "side_car.safetensors").values()
    assert sum(each.nbytes for each in stored) == saved_bytes(shape, setting) == 2 * 6 * 192
