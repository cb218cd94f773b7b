"""Which type a CPU computes in is measured once, and kept; what is kept may be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qadapt import measured
from qadapt.errors import BadRecipe
from qadapt.model import precision
from qadapt.model.precision import choose_compute_dtype, known_cpu_dtype, measured_cpu_dtype

CPU = torch.device("cpu")


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the next measurements find; each is taken once."""
    found: list[str] = []
    monkeypatch.setattr(precision, "measured_cpu_dtype", lambda: found.pop(0))
    return found


def test_a_real_measurement_names_one_of_two_types_and_follows_the_faster_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert measured_cpu_dtype() in ("bf16", "fp32")
    for half_seconds, expected in ((1.0, "fp32"), (0.8, "fp32"), (0.7, "bf16")):
        monkeypatch.setattr(
            precision,
            "_product_seconds",
            lambda left, _, half=half_seconds: half if left.dtype == torch.bfloat16 else 1.0,
        )
        assert measured_cpu_dtype() == expected, half_seconds


def test_it_is_measured_once_for_a_processor_a_torch_and_a_number_of_threads(
    measurements: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements += ["bf16", "fp32", "bf16"]
    assert choose_compute_dtype("auto", CPU) == "bf16"
    assert choose_compute_dtype("auto", CPU) == "bf16", "kept"
    monkeypatch.setattr(precision, "processor_name", lambda: "another processor")
    assert known_cpu_dtype() == "fp32", "another machine that shares the cache"
    assert len(json.loads(measured.measured_file().read_text(encoding="utf-8"))) == 2


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '"bf16"', "\x00\xff", '{"a": 1, "b": ["bf16"]}'])
def test_a_broken_file_is_measured_again_and_mended(broken: str, measurements: list[str]) -> None:
    measured.measured_file().write_text(broken, encoding="latin-1")
    measurements += ["bf16"]
    assert known_cpu_dtype() == "bf16"
    assert known_cpu_dtype() == "bf16", "mended: it is not measured a second time"


def test_a_kept_type_that_is_none_is_measured_again(measurements: list[str]) -> None:
    measurements += ["fp32", "bf16"]
    known_cpu_dtype()
    kept = measured.measured_file().read_text(encoding="utf-8")
    measured.measured_file().write_text(kept.replace("fp32", "fp8"), encoding="utf-8")
    assert known_cpu_dtype() == "bf16"


def test_a_cache_that_cannot_be_written_costs_a_measurement_and_no_more(
    measurements: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(measured, "measured_file", lambda: blocked / "measured.json")
    measurements += ["fp32", "fp32"]
    assert [known_cpu_dtype(), known_cpu_dtype()] == ["fp32", "fp32"]
    assert not measurements


def test_what_the_recipe_asks_for_is_not_measured(measurements: list[str]) -> None:
    assert choose_compute_dtype("bf16", CPU) == "bf16"
    assert choose_compute_dtype("fp32", CPU) == "fp32"
    with pytest.raises(BadRecipe, match="fp16, which CPUs compute"):
        choose_compute_dtype("fp16", CPU)
