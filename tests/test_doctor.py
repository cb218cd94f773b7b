"""The doctor names each problem with its cure, and says with its exit code whether this machine can train."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from qadapt.cli import doctor_facts
from qadapt.cli.doctor import doctor, record, table
from qadapt.cli.doctor_facts import four_bit_round_trip, gather_facts
from qadapt.hardware.checks import Facts, Finding, FourBit, Gpu, can_train, cuda_build_command, findings
from qadapt.units import GIB

HEALTHY = Facts(
    python=(3, 11, 7),
    system="linux",
    torch="2.13.0+cu130",
    torch_failure=None,
    torch_cuda="13.0",
    torch_architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120a"),
    sees_gpu=True,
    driver="581.42",
    driver_cuda=(13, 0),
    gpus=(Gpu("NVIDIA GeForce RTX 4060", 8 * GIB, 7 * GIB, 8.9),),
    four_bit=(FourBit("cpu", 0.09), FourBit("cuda", 0.09)),
    threads=8,
    cores=8,
    host_total_bytes=32 * GIB,
    host_available_bytes=20 * GIB,
    cache_folder="/home/ann/.cache/qadapt",
    cache_failure=None,
    cache_bytes=GIB,
    cached_models=("SmolLM2",),
    disk_free_bytes=100 * GIB,
)
BUILD = "python -m uv pip install torch==2.13.0 --torch-backend=auto --reinstall-package torch"


def bad(facts: Facts) -> Finding:
    """The only finding that is not good."""
    found = [finding for finding in findings(facts) if finding.level != "good"]
    assert len(found) == 1
    assert found[0].cure
    assert "\n" not in found[0].cure
    return found[0]


def test_healthy_machine_has_nothing_to_cure() -> None:
    found = findings(HEALTHY)
    assert {finding.level for finding in found} == {"good"}
    assert can_train(found)
    assert "bf16" in next(finding.value for finding in found if finding.subject == "GPU")


@pytest.mark.parametrize(
    ("change", "level", "problem", "cure"),
    [
        ({"python": (3, 9, 1)}, "blocks", "3.9.1", "Python 3.10 or newer"),
        (
            {"torch_cuda": None, "torch": "2.13.0+cpu", "sees_gpu": False, "torch_architectures": ()},
            "problem",
            "CPU build and leaves the GPU idle",
            BUILD,
        ),
        ({"driver_cuda": (12, 8), "sees_gpu": False}, "problem", "too old for this torch", BUILD),
        ({"sees_gpu": False}, "problem", "torch cannot use the GPU", "CUDA_VISIBLE_DEVICES"),
        (
            {"driver": None, "driver_cuda": None, "gpus": (), "sees_gpu": False},
            "note",
            "trains on the CPU",
            "install its driver",
        ),
        (
            {"gpus": (Gpu("GTX 1080", 8 * GIB, 8 * GIB, 6.1),)},
            "problem",
            "no code for compute capability 6.1, only from 7.5",
            "newer card",
        ),
        (
            {"gpus": (Gpu("RTX 4060", 8 * GIB, 5 * GIB, 8.9),)},
            "note",
            "5.00 GiB of 8.00 GiB free",
            "hold 3.00 GiB",
        ),
        (
            {"four_bit": (FourBit("cuda", None, "no kernel image"),)},
            "blocks",
            "no kernel image",
            "bitsandbytes",
        ),
        ({"four_bit": (FourBit("cpu", 0.9),)}, "blocks", "0.900; 0.09 is right", "another version"),
        ({"threads": 16}, "note", "16 threads; the cores it may use: 8", "OMP_NUM_THREADS=8"),
        ({"threads": 1}, "note", "1 thread; the cores it may use: 8", "OMP_NUM_THREADS"),
        ({"host_available_bytes": 3 * GIB}, "problem", "3.00 GiB of 32.00 GiB free", "Close other programs"),
        ({"disk_free_bytes": 10 * GIB}, "problem", "10.00 GiB free", "15 GiB to fetch"),
        ({"disk_free_bytes": GIB // 2}, "blocks", "512.0 MiB free", "Free at least"),
        ({"cache_failure": "Permission denied"}, "blocks", "Permission denied", "Make it writable"),
        ({"system": "win32"}, "note", "spill", "Sysmem Fallback"),
        ({"system": "wsl"}, "note", "spill", "Sysmem Fallback"),
    ],
)
def test_each_problem_has_its_line_and_its_cure(
    change: dict[str, Any], level: str, problem: str, cure: str
) -> None:
    facts = replace(HEALTHY, **change)
    finding = bad(facts)
    assert finding.level == level
    assert problem in finding.value
    assert cure in str(finding.cure)
    assert can_train(findings(facts)) == (level != "blocks")


def test_missing_torch_blocks_and_names_the_reason() -> None:
    facts = replace(HEALTHY, torch=None, torch_failure="DLL load failed", four_bit=(), torch_architectures=())
    finding = bad(facts)
    assert finding.level == "blocks"
    assert finding.value == "DLL load failed"


def test_older_card_without_bf16_is_told_apart() -> None:
    facts = replace(HEALTHY, gpus=(Gpu("Tesla T4", 16 * GIB, 15 * GIB, 7.5),))
    assert "fp16 with loss scaling" in next(f.value for f in findings(facts) if f.subject == "GPU")


def test_newer_minor_version_of_a_build_runs_on_an_older_driver() -> None:
    assert {f.level for f in findings(replace(HEALTHY, torch_cuda="13.2"))} == {"good"}


def test_cuda_command_names_the_version_and_no_host() -> None:
    command = cuda_build_command("2.13.0+cpu")
    assert command == f"python -m pip install uv, then {BUILD}"
    assert "://" not in command


def test_table_shows_problem_cure_and_verdict_in_sixty_columns() -> None:
    console = Console(width=60, record=True, file=open_nowhere())
    console.print(table(findings(replace(HEALTHY, disk_free_bytes=10 * GIB))))
    text = console.export_text()
    assert "! " in text
    assert "→ A 7B model is 15 GiB to fetch" in text
    assert "This machine can train; 1 problem above." in text
    assert all(len(line.rstrip()) <= 60 for line in text.splitlines())


def test_table_without_unicode_uses_words() -> None:
    console = Console(width=100, record=True, file=open_nowhere())
    console.print(table(findings(replace(HEALTHY, python=(3, 9, 0))), is_ascii=True))
    text = console.export_text()
    assert text.isascii()
    assert "BLOCKS" in text
    assert "cannot train yet" in text


def open_nowhere() -> Any:
    import io

    return io.StringIO()


def test_record_has_the_documented_keys() -> None:
    values = json.loads(json.dumps(record(HEALTHY, findings(HEALTHY))))
    assert values.keys() == {"schema", "can_train", "findings", "facts"}
    assert values["findings"][0] == {"subject": "Python", "value": "3.11.7", "level": "good", "cure": None}
    assert values["facts"]["gpus"][0]["name"] == "NVIDIA GeForce RTX 4060"


@pytest.mark.parametrize(("change", "code"), [({}, 0), ({"sees_gpu": False}, 0), ({"python": (3, 9, 0)}, 2)])
def test_exit_code_says_whether_this_machine_can_train(
    change: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_facts, "gather_facts", lambda: replace(HEALTHY, **change))
    app = typer.Typer()
    app.command()(doctor)
    result = CliRunner().invoke(app, ["--json"])
    assert result.exit_code == code
    assert json.loads(result.stdout)["can_train"] == (code == 0)
    assert CliRunner().invoke(app, []).exit_code == code


def test_facts_of_this_machine_are_gathered(tmp_path: Path) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "weights").write_bytes(b"12345")
    facts = gather_facts(tmp_path)
    assert facts.python == sys.version_info[:3]
    assert facts.cached_models == ("tiny",)
    assert facts.cache_bytes == 5
    assert facts.cache_failure is None
    assert facts.torch is not None
    cpu = facts.four_bit[0]
    assert cpu.device == "cpu"
    assert cpu.relative_error == pytest.approx(0.09, abs=0.02)


def test_cache_that_cannot_be_made_is_a_fact(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert gather_facts(tmp_path / "file" / "cache").cache_failure


def test_broken_device_is_a_fact_and_no_traceback() -> None:
    trip = four_bit_round_trip("meta:9x")
    assert trip.relative_error is None
    assert trip.failure


def test_doctor_prints_nothing_but_its_table() -> None:
    code = "import typer; from qadapt.cli.doctor import doctor; typer.run(doctor)"
    result = subprocess.run(
        [sys.executable, "-c", code, "--json"], capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, 2)
    assert result.stderr == ""
    assert json.loads(result.stdout)["schema"] == 1
