"""What only a CUDA device can show: run with `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from test_train import adapted, changed, make_recipe, only

from qadapt.adapters.lora import trainable
from qadapt.events import MemoryMeasured, Planned, RunFinished, StepDone
from qadapt.run import resume, train
from qadapt.train.optimizer import make_optimizer

if TYPE_CHECKING:
    from conftest import TinyModel

pytestmark = pytest.mark.gpu


def test_a_run_on_the_card_learns_within_its_prediction(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama", layers=4), steps=12)
    events = list(train(changed(recipe, "memory", device="cuda", compute_dtype="auto")))
    steps = only(StepDone, events)
    assert steps[-1].loss < steps[0].loss
    predicted = only(Planned, events)[0].predicted_peak_bytes
    measured = only(MemoryMeasured, events)[-1].peak_bytes
    assert measured <= predicted * 1.1 + 64 * 1024**2
    assert isinstance(events[-1], RunFinished)


def test_a_run_on_the_card_resumes(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = changed(
        make_recipe(tmp_path, tiny_model("llama")), "memory", device="cuda", compute_dtype="auto"
    )
    events = train(recipe)
    for event in events:
        if isinstance(event, StepDone) and event.step == 4:
            break
    events.close()  # type: ignore[attr-defined]
    assert isinstance(list(resume("first", folder=str(tmp_path / "runs")))[-1], RunFinished)


def test_paged_states_are_saved_and_read_back(tiny_model: TinyModel) -> None:
    parameters = {
        name: torch.nn.Parameter(parameter.detach().to("cuda", torch.bfloat16).repeat(8, 8))
        for name, parameter in list(trainable(adapted(tiny_model("llama"))).items())[:2]
    }
    optimizer = make_optimizer(parameters, kind="adamw-8bit", betas=(0.9, 0.999), weight_decay=0.0)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-3)
    saved = {name: value.detach().cpu().clone() for name, value in optimizer.tensors().items()}
    again = make_optimizer(parameters, kind="adamw-8bit", betas=(0.9, 0.999), weight_decay=0.0)
    again.load(saved)
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in again.tensors().items())
