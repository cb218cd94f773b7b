"""What every test may ask for, and the quiet it runs in."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

TinyModel = Callable[..., Path]

# A shared machine is now and then slow for a while; that is no failure. The same draws in every run.
settings.register_profile(
    "qadapt", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], max_examples=60
)
settings.load_profile("qadapt")


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Every test starts from the same random state, on one thread, which is faster for small tensors.

    Tests that do not need torch do not pay for its import here.
    """
    random.seed(0)
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _remembers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs of the tests measure and prepare stays out of the user's own calibration and cache."""
    monkeypatch.setattr(
        "qadapt.hardware.calibration.calibration_file", lambda: tmp_path / "calibration.jsonl"
    )
    monkeypatch.setattr("qadapt.measured.measured_file", lambda: tmp_path / "measured.json")
    monkeypatch.setattr(
        "qadapt.data.row_cache.data_folder", lambda: tmp_path.with_name(f"{tmp_path.name}-cache") / "data"
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """`tiny_model("llama", layers=3)`: the folder of a tiny random model, made once and not to be changed."""
    from tiny_model import make_tiny_model
    from transformers.utils import logging

    logging.disable_progress_bar()
    made: dict[tuple[object, ...], Path] = {}

    def make(family: str, **options: object) -> Path:
        key = (family, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            made[key] = make_tiny_model(folder, family, **options)  # type: ignore[arg-type]
        return made[key]

    return make


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of the quick-start model, out of the cache or the package index; mark the test `model`."""
    from qadapt.model.source import find_model

    return find_model("smollm2-135m").folder
