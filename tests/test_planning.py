"""Questions of estimate and plan: where they are answered from."""

from __future__ import annotations

import pytest

import qadapt
from qadapt.estimating.planning import ask_of
from qadapt.hardware import target
from qadapt.hardware.probe import Device, Machine
from qadapt.recipe_file import read_recipe
from qadapt.units import GIB


def test_a_run_that_trains_on_the_cpu_is_planned_for_it_though_a_card_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU build of torch beside an NVIDIA driver, as Windows' package index gives it."""
    card = Device(0, "NVIDIA GeForce RTX 4060", 8 * GIB, 7 * GIB, 8.9, "580.10")
    machine = Machine((card,), 32 * GIB, 24 * GIB, 100 * GIB)
    monkeypatch.setattr(target, "probe", lambda: machine)
    recipe = read_recipe("quickstart-smollm2-135m")
    assert ask_of(recipe).setting.device == "cuda", "a control: the card would be taken"
    asked = ask_of(recipe, device="cpu")
    assert asked.setting.device == "cpu"
    assert asked.setting.optimizer == "adamw"
    assert asked.target.free_bytes > 16 * GIB


def test_the_python_surface_answers_like_the_commands() -> None:
    found = qadapt.estimate("Llama-3.1-8B", card="RTX 4090", length=1024, rank=8)
    assert found.setting.length == 1024
    assert found.peak_allocated_bytes == sum(found.categories.values())
    planned = qadapt.plan("llama-3.1-8b-qlora-12gb", card="RTX 4090")
    assert planned.estimate.fits(planned.budget_bytes)


def test_functions_keep_their_names_beside_the_subpackages() -> None:
    import qadapt.plan.fit
    import qadapt.train.step

    assert callable(qadapt.train)
    assert callable(qadapt.plan)
