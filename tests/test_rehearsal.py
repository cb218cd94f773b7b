"""The rehearsal: the rows with the most memory go through everything, and no number of the run changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_resume import plan_pieces
from test_train import adapter_of, assert_same, make_recipe, only
from torch import Tensor, nn

from qadapt import control
from qadapt.cli.main import run as run_command
from qadapt.data.order import Order
from qadapt.data.rows import RowSet
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.errors import DoesNotFit, NoRoom
from qadapt.events import (
    CheckpointSaved,
    DataReady,
    Eased,
    Evaluated,
    Event,
    MemoryMeasured,
    Rehearsed,
    RunFinished,
    StageStarted,
    StepDone,
    Stopped,
    Warned,
)
from qadapt.hardware import calibration
from qadapt.plan.estimate import CLOSED_ERROR, UNSEEN_BYTES, peak_error_bytes
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe, dump_yaml
from qadapt.run import rehearse, resume, train
from qadapt.train import loop, rehearsal
from qadapt.train.oom import read_rungs
from qadapt.train.optimizer import make_optimizer
from qadapt.train.rehearsal import fullest_step, leaving_no_trace, prompt_of
from qadapt.train.saver import Saver
from qadapt.train.settings import LoopSettings
from qadapt.train.step import find_gradient

if TYPE_CHECKING:
    from conftest import TinyModel


def rehearsed_recipe(folder: Path, model: Path, **sections: dict[str, Any]) -> Recipe:
    """Two steps with an evaluation and a checkpoint after each, rehearsed; fields by section."""
    folder.mkdir(exist_ok=True)
    values = make_recipe(folder, model, steps=2, evaluate_every=1, rehearse=True).model_dump()
    for section, fields in sections.items():
        values[section] |= fields
    return check_recipe(values, origin="the test")


def without_clock(event: Event) -> Event:
    """The event with no seconds in it."""
    values = vars(event) | {"time": 0.0, "seconds": 0.0}
    return type(event)(**{name: values[name] for name in vars(event)})


def files_of(run: Path) -> dict[str, bytes]:
    """What a run left behind, but for its journal, recipe and environment; equal for equal runs."""
    written = [path for path in sorted(run.rglob("*")) if path.is_file()]
    kinds = {".safetensors", ".json", ".lock", ""}
    named = {path.relative_to(run).as_posix(): path for path in written if path.suffix in kinds}
    skipped = {"environment.json"}
    return {name: path.read_bytes() for name, path in named.items() if name not in skipped}


KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {},
    "bf16, what rounding lost kept": {"memory": {"compute_dtype": "bf16"}, "adapter": {"dtype": "bf16"}},
    "8-bit states": {"train": {"optimizer": "adamw-8bit"}},
    "bf16 and 8-bit": {
        "memory": {"compute_dtype": "bf16"},
        "adapter": {"dtype": "bf16"},
        "train": {"optimizer": "adamw-8bit"},
    },
    "packed": {"data": {"packing": True}},
    "in pieces": {"memory": {"recompute": "all"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rehearsed_run_is_the_run_without_a_rehearsal_bit_for_bit(
    kind: str, tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All with dropout 0.1, which draws from the random state that the rehearsal drew from, too."""
    if kind == "in pieces":
        plan_pieces(monkeypatch)
    seen = {}
    for name in ("with", "without"):
        fields = KINDS[kind] | {"train": {**KINDS[kind].get("train", {}), "rehearse": name == "with"}}
        recipe = rehearsed_recipe(tmp_path / name, tiny_model("llama"), **fields)
        events = list(train(recipe))
        assert len(only(Rehearsed, events)) == (name == "with")
        assert isinstance(events[-1], RunFinished)
        seen[name] = [without_clock(event) for event in events if isinstance(event, STEPS)]
        seen[name].sort(key=lambda event: isinstance(event, CheckpointSaved))  # said once it is written
    assert seen["with"] == seen["without"]
    left, right = (files_of(tmp_path / name / "runs/first") for name in ("with", "without"))
    assert left.keys() == right.keys()
    differing = [name for name in left if left[name] != right[name]]
    assert not {name for name in differing if name.endswith(".safetensors")}


STEPS = (StepDone, MemoryMeasured, Evaluated, CheckpointSaved, Warned)


def test_the_longest_rows_go_through_everything_before_the_first_step(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    events = list(train(rehearsed_recipe(tmp_path, tiny_model("llama"))))
    [rehearsed], [data] = only(Rehearsed, events), only(DataReady, events)
    assert rehearsed.longest_row_tokens == data.longest_row_tokens
    assert list(rehearsed.parts) == ["step", "evaluation", "checkpoint", "answer"]
    assert all(seconds > 0 for seconds in rehearsed.parts.values())
    assert events.index(rehearsed) < events.index(only(StepDone, events)[0])
    stages = [event.stage for event in only(StageStarted, events) if "rehearsing" in event.stage]
    assert stages == [
        "rehearsing the longest step",
        "rehearsing an evaluation",
        "rehearsing a checkpoint",
        "rehearsing an answer",
    ]


def test_the_rehearsal_measures_what_the_run_then_takes(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = list(train(rehearsed_recipe(tmp_path, tiny_model("llama"), train={"epochs": 1, "steps": None})))
    [rehearsed] = only(Rehearsed, events)
    assert rehearsed.measured_peak_bytes == only(MemoryMeasured, events)[-1].peak_bytes
    assert not only(Warned, events)


def test_what_a_run_has_not_is_left_out(tmp_path: Path, tiny_model: TinyModel) -> None:
    """No held-out rows; rows that are learned as a whole; a model that has no chat template."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    (model / "chat_template.jinja").unlink()
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(f'{{"text": "a text of {number} words"}}\n' for number in range(9)))
    fields = {"held_out": None, "sources": [{"path": str(rows)}]}
    recipe = rehearsed_recipe(tmp_path, model, data=fields, train={"evaluate_every": None})
    [rehearsed] = only(Rehearsed, list(train(recipe)))
    assert list(rehearsed.parts) == ["step", "checkpoint"]


def test_more_memory_than_the_estimate_allows_for_is_said(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "peak_error_bytes", lambda *_, **__: -(2**20))
    [warned] = only(Warned, list(rehearse(rehearsed_recipe(tmp_path, tiny_model("llama")))))
    assert "more than the predicted" in warned.message


def test_the_estimate_allows_for_its_error_in_what_comes_and_goes_alone() -> None:
    categories = {"base_weights": 10**9, "optimizer": 10**8, "activations": 900_000, "loss": 100_000}
    assert peak_error_bytes(categories, device="cpu") == 1_000_000 * CLOSED_ERROR
    assert peak_error_bytes(categories, device="cuda") > 1_000_000 * CLOSED_ERROR + UNSEEN_BYTES


def test_a_run_is_remembered_once_by_its_rehearsal_and_then_by_its_end(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = rehearsed_recipe(tmp_path, tiny_model("llama"))

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in calibration.calibration_file().read_bytes().splitlines()]

    events = train(recipe)
    rehearsed = next(event for event in events if isinstance(event, Rehearsed))
    next(events)
    assert [line["measured_bytes"] for line in lines()] == [rehearsed.measured_peak_bytes]
    list(events)
    assert len(lines()) == 1
    list(rehearse(recipe))
    assert len(lines()) == 2, "a run of its own"


def test_a_resumed_run_is_not_rehearsed_and_clears_what_a_killed_rehearsal_left(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    folder = tmp_path / "runs"
    events = train(rehearsed_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, StepDone) and event.step == 2)  # step 1 is saved
    events.close()  # type: ignore[attr-defined]
    (folder / "first/.rehearsal/checkpoints").mkdir(parents=True)
    resumed = list(resume("first", folder=str(folder)))
    assert isinstance(resumed[-1], RunFinished)
    assert not only(Rehearsed, resumed)
    assert not (folder / "first/.rehearsal").exists()
    (tmp_path / "straight").mkdir()
    list(train(rehearsed_recipe(tmp_path / "straight", tiny_model("llama"))))
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(folder / "first"))


def test_a_run_killed_in_its_rehearsal_is_rehearsed_when_it_goes_on(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    kept = tmp_path / "kept"
    events = train(rehearsed_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, StageStarted) and "checkpoint" in event.stage)
    shutil.copytree(tmp_path / "runs", kept)  # what a kill would leave here
    events.close()  # type: ignore[attr-defined]
    resumed = list(resume("first", folder=str(kept)))
    seen = [type(event) for event in resumed if isinstance(event, Rehearsed | StepDone)]
    assert seen == [Rehearsed, StepDone, StepDone]
    (tmp_path / "straight").mkdir()
    list(train(rehearsed_recipe(tmp_path / "straight", tiny_model("llama"))))
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(kept / "first"))


def test_a_run_that_is_planned_anew_is_rehearsed_and_goes_on_as_it_would_have(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    events = train(rehearsed_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, StepDone) and event.step == 2)  # step 1 is saved
    events.close()  # type: ignore[attr-defined]
    resumed = list(resume("first", folder=str(tmp_path / "runs"), replan=True))
    assert [type(e) for e in resumed if isinstance(e, Rehearsed | StepDone)] == [Rehearsed, StepDone]
    (tmp_path / "straight").mkdir()
    list(train(rehearsed_recipe(tmp_path / "straight", tiny_model("llama"))))
    assert_same(adapter_of(tmp_path / "straight/runs/first"), adapter_of(tmp_path / "runs/first"))


def test_a_rehearsal_killed_before_leaves_nothing_for_the_next_one(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    (tmp_path / "runs/.rehearsal-999999999/first").mkdir(parents=True)
    list(rehearse(rehearsed_recipe(tmp_path, tiny_model("llama"))))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_run_left_in_its_rehearsal_leaves_nothing(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = train(rehearsed_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, StageStarted) and "checkpoint" in event.stage)
    events.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "runs").iterdir()) == []


# --- what does not fit ------------------------------------------------------------------------------------


@dataclass
class Card:
    """Memory runs out in every gradient of more rows at once than `rows`."""

    rows: int

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def limited(model: Any, optimizer: Any, batches: Any, **how: Any) -> Any:
            if max(len(batch.input_ids) for batch in batches) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return find_gradient(model, optimizer, batches, **how)

        monkeypatch.setattr(loop, "find_gradient", limited)


def test_a_rung_that_the_rehearsal_needed_is_taken_from_the_first_step(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(rows=1).put_in(monkeypatch)
    events = list(train(rehearsed_recipe(tmp_path, tiny_model("llama"), adapter={"dropout": 0.0})))
    [eased] = only(Eased, events)
    assert (eased.step, eased.knob, eased.value) == (1, "micro_batch", 1)
    assert events.index(eased) < events.index(only(Rehearsed, events)[0])
    assert len(only(StepDone, events)) == 2
    assert read_rungs(tmp_path / "runs/first/rungs.json") == [eased]


def test_memory_that_runs_out_on_the_last_rung_ends_the_run_before_it_begins(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Card(rows=0).put_in(monkeypatch)
    with pytest.raises(DoesNotFit, match="Memory ran out in step 1 on the last rung"):
        list(train(rehearsed_recipe(tmp_path, tiny_model("llama"))))
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_answer_that_does_not_fit_is_a_warning_as_training_needs_none(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rehearsal, "generate", out_of_memory)
    events = list(train(rehearsed_recipe(tmp_path, tiny_model("llama"))))
    assert ["Memory ran out in a short answer" in event.message for event in only(Warned, events)] == [True]
    assert "answer" not in only(Rehearsed, events)[0].parts
    assert isinstance(events[-1], RunFinished)


def test_a_full_disk_is_an_error_before_the_first_step(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise NoRoom("The disk of there is full.", cure="Free space there.")

    monkeypatch.setattr(Saver, "save", full)
    with pytest.raises(NoRoom, match="No checkpoint can be written: The disk of there is full"):
        list(train(rehearsed_recipe(tmp_path, tiny_model("llama"))))


# --- the command ------------------------------------------------------------------------------------------


def test_rehearse_only_prints_measured_against_predicted_and_leaves_no_run(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(rehearsed_recipe(tmp_path, tiny_model("llama"))), encoding="utf-8")
    assert run_command(["train", str(recipe), "--rehearse-only"]) == 0
    said = capsys.readouterr().out
    assert "MiB measured, " in said and "MiB predicted (" in said
    assert "first: LoRA, rank 4" in said and "it fits" in said
    assert "step 1/" not in said
    assert list((tmp_path / "runs").iterdir()) == []


def test_rehearse_only_leaves_with_2_where_it_cannot_fit(
    tmp_path: Path,
    tiny_model: TinyModel,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Card(rows=0).put_in(monkeypatch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(rehearsed_recipe(tmp_path, tiny_model("llama"))), encoding="utf-8")
    assert run_command(["train", str(recipe), "--rehearse-only"]) == 2
    said = capsys.readouterr()
    assert "Memory ran out in step 1 on the last rung" in said.err and "it fits" not in said.out
    assert list((tmp_path / "runs").iterdir()) == []


# --- its parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
def test_all_is_leaving_no_trace_even_after_an_error(dtype: torch.dtype, kind: str) -> None:
    model = nn.Linear(64, 80).to(dtype).eval()
    optimizer = make_optimizer(dict(model.named_parameters()), kind=kind, betas=(0.9, 0.99), weight_decay=0.1)

    def everything() -> dict[str, Tensor]:
        values = {**optimizer.parameters, **optimizer.tensors(), "random": torch.get_rng_state()}
        return {name: value.detach().clone() for name, value in values.items()}

    def one_step() -> None:
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step(1e-2)

    one_step()
    before = everything()
    with pytest.raises(KeyboardInterrupt), leaving_no_trace(model, optimizer):
        model.train()
        one_step()
        assert all(not torch.equal(value, everything()[name]) for name, value in before.items())
        raise KeyboardInterrupt
    assert_same(everything(), before)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def rows_of(lengths: list[int]) -> RowSet:
    return RowSet(
        [tokens_of([5] * length, [False] + [True] * (length - 1), place="row") for length in lengths]
    )


def settings_of(**fields: Any) -> LoopSettings:
    values: dict[str, Any] = dict.fromkeys(LoopSettings.__dataclass_fields__)
    return LoopSettings(**{**values, "steps": 100, "packed": False, "packed_tokens": 0, **fields})


def test_the_step_with_the_most_memory_has_the_longest_row_or_the_fullest_micro_batch() -> None:
    rows = rows_of([3, 3, 3, 9, 1, 1, 6, 5, 1, 2, 2, 2])  # three rows a step
    order = Order(rows.lengths, rows_per_step=3, kind="given")
    assert fullest_step(rows, order, settings_of()) == 1
    assert fullest_step(rows, order, settings_of(packed=True, packed_tokens=12)) == 2
    assert fullest_step(rows, order, settings_of(steps=1, packed=True, packed_tokens=12)) == 0


def test_a_prompt_ends_where_the_last_answer_begins() -> None:
    def row(text: str) -> Tokens:
        return tokens_of(range(len(text)), [letter == "a" for letter in text], place="row")

    assert prompt_of(row("qqaaqqqaa")) == [0, 1, 2, 3, 4, 5, 6]
    assert prompt_of(row("qqaaqqq")) == [0, 1]
    assert prompt_of(row("aaaa")) == [0, 1, 2, 3]


def test_a_rehearsal_is_left_within_a_micro_batch_and_the_run_goes_on_as_without(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    run, events = tmp_path / "paused/runs/first", []
    for event in train(rehearsed_recipe(tmp_path / "paused", tiny_model("llama"))):
        events.append(event)
        if isinstance(event, StageStarted) and event.stage == "rehearsing the longest step":
            control.ask(run, "pause")
    assert events[-1] == Stopped(step=0, reason="paused on request")
    assert not only(Rehearsed, events)
    assert "rehearsing an evaluation" not in {event.stage for event in only(StageStarted, events)}
    assert not (run / ".rehearsal").exists()
    list(resume("first", folder=str(run.parent)))
    list(train(rehearsed_recipe(tmp_path / "straight", tiny_model("llama"))))
    assert_same(adapter_of(run), adapter_of(tmp_path / "straight/runs/first"))
