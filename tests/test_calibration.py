"""What runs measured on this machine: kept whole, read by kind, never a reason for anything to fail."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.hardware import calibration
from qadapt.hardware.calibration import Calibration, Kind, kind_of, recall, remember

KIND = Kind("0badcafe", "llama-3.1-8b", "NVIDIA GeForce RTX 4060", "lora", "nf4", "2.13.0")


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "calibration.jsonl"


def keep(path: Path, *measured: int, kind: Kind = KIND) -> None:
    for each in measured:
        assert remember(kind, predicted_bytes=1000, measured_bytes=each, path=path)


def test_the_last_five_comparable_runs_are_summed_up(path: Path) -> None:
    assert recall(KIND, path=path) is None
    keep(path, 3000, 996, 1021, 1018, 1019, 1000)
    found = recall(KIND, path=path)
    assert found is not None
    assert (found.runs, round(found.low, 6), round(found.middle, 6), round(found.high, 6)) == (
        5, -0.004, 0.018, 0.021,
    )  # fmt: skip
    assert found.sentence == (
        "on this machine: measured 1.8 % above the estimate in the last 5 runs (-0.4 to +2.1 %)"
    )
    assert found.above == found.high


def test_one_run_is_one_run() -> None:
    assert Calibration(1, -0.03, -0.03, -0.03).sentence == (
        "on this machine: measured 3.0 % below the estimate in the last run"
    )
    assert Calibration(2, -0.03, -0.01, 0.01).above == 0.01
    assert Calibration(2, -0.03, -0.02, -0.01).above == 0


@pytest.mark.parametrize("field", ["machine", "device", "method", "quantization", "torch"])
def test_runs_of_another_kind_are_not_comparable(path: Path, field: str) -> None:
    keep(path, 2000, kind=dataclasses.replace(KIND, **{field: "other"}))
    assert recall(KIND, path=path) is None


def test_a_damaged_line_is_ignored_and_nothing_else_is_lost(path: Path) -> None:
    keep(path, 1010)
    broken = b'{"machine": "0bad\n\xff\xfe\x00\n[1]\n{"measured_bytes": 1}\n'
    path.write_bytes(path.read_bytes() + broken + b'{"half a line')
    keep(path, 1030)
    found = recall(KIND, path=path)
    assert found is not None
    assert (found.runs, round(found.low, 6), round(found.high, 6)) == (2, 0.01, 0.03)
    assert broken in path.read_bytes(), "what cannot be read stays until it ages out"


@given(st.binary(max_size=300))
def test_no_content_makes_reading_fail(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "any.jsonl")
        file.write_bytes(content)
        recall(KIND, path=file)
        assert remember(KIND, predicted_bytes=100, measured_bytes=110, path=file)
        found = recall(KIND, path=file)
    assert found is not None
    assert found.runs == 1


@pytest.mark.parametrize(
    ("predicted", "measured"), [(0, 5), (5, 0), (-1, 5)]
)  # fmt: skip
def test_numbers_that_are_no_peak_are_not_kept(path: Path, predicted: int, measured: int) -> None:
    assert not remember(KIND, predicted_bytes=predicted, measured_bytes=measured, path=path)
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("a file where a folder should be", encoding="utf-8")
    assert not remember(KIND, predicted_bytes=1, measured_bytes=1, path=file / "calibration.jsonl")
    assert recall(KIND, path=file / "calibration.jsonl") is None
    assert recall(KIND, path=tmp_path) is None, "a folder in the file's place"
    assert not remember(KIND, predicted_bytes=1, measured_bytes=1, path=tmp_path)
    left = [each.name for each in (*tmp_path.parent.glob(".*"), *tmp_path.iterdir())]
    assert [name for name in left if name != ".lock"] == ["taken"], "nothing is left of the attempts"


def test_an_interrupted_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(path, 1010)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert not remember(KIND, predicted_bytes=1000, measured_bytes=1500, path=path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_file_does_not_grow_without_end(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"x" * 2_000_000)
    keep(path, 1010)
    assert 100 < path.stat().st_size < 1000
    line = path.read_bytes()
    path.write_bytes(line * 1000)
    keep(path, 1020)
    assert len(path.read_bytes().splitlines()) == calibration._MOST_LINES
    found = recall(KIND, path=path)
    assert found is not None
    assert round(found.high, 6) == 0.02


def test_a_kind_says_what_torch_is_installed_without_importing_it() -> None:
    kind = kind_of(model="meta-llama/Llama-3.1-8B", device="cpu", method="lora", quantization="nf4")
    assert kind.torch[0].isdigit()
    assert "+" not in kind.torch
    assert json.loads(json.dumps(dataclasses.asdict(kind)))["machine"] == kind.machine
