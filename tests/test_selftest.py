"""The self-test: right on a machine that computes right, and wrong where one does not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from qadapt.cli.main import app
from qadapt.hardware.calibration import SELF_TEST, kind_of, recall
from qadapt.hardware.cards import Card
from qadapt.hardware.probe import Device
from qadapt.selftest import equality, measures, report
from qadapt.selftest.check import Check, Found, tried
from qadapt.selftest.equality import equality_checks
from qadapt.selftest.measures import Measures, Residual, found_context
from qadapt.selftest.trainee import TINY, Trainee, make_model
from qadapt.train.oom import Ladder
from qadapt.units import MIB

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("self-test"), TINY, device=CPU)


def verdicts(checks: Iterator[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_the_self_test_of_a_cpu_is_one_plain_block_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equality, "POLICIES", equality.POLICIES[1:2])
    result = CliRunner().invoke(app, ["doctor", "--selftest"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("qadapt self-test\nmachine   ")
    assert "\x1b" not in result.output
    assert f"torch {torch.__version__}" in result.output
    assert "\ncard      none: the checks are of the CPU\n" in result.output
    lines = result.output.split("\n\n")[1].splitlines()
    assert lines[-1].endswith(" s, 0 failed.")
    assert int(lines[-1].split()[0]) == len(lines) - 1 > 6
    assert all(line.startswith("ok        ") for line in lines[:-1])


def test_a_failed_check_is_said_and_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        Check("one", "1 of 1", "ok"),
        Check("two", "0 of 1", "FAILED"),
        Check("three", "no card", "left out"),
    ]
    monkeypatch.setattr(report.SelfTest, "checks", lambda self: iter(found))
    result = CliRunner().invoke(app, ["doctor", "--selftest"])
    assert result.exit_code == 1
    assert "\nFAILED    two: 0 of 1\nleft out  three: no card\n3 checks in " in result.output
    as_json = CliRunner().invoke(app, ["doctor", "--selftest", "--json"])
    assert as_json.exit_code == 1
    values = json.loads(as_json.output)
    assert values.keys() == {"schema", "is_right", "seconds", "facts", "checks"}
    assert values["checks"][1] == {"name": "two", "said": "0 of 1", "verdict": "FAILED"}
    assert not values["is_right"]
    assert CliRunner().invoke(app, ["doctor", "--selftests"]).exit_code == 2


def test_a_missing_library_is_something_to_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qadapt.selftest.report", None)
    result = CliRunner().invoke(app, ["doctor", "--selftest"])
    assert result.exit_code == 2
    assert "needs what `qadapt doctor` looks at first" in result.output


@pytest.mark.parametrize(
    "error", [RuntimeError("no kernel image\nfor this card"), ImportError("a library"), NotImplementedError()]
)
def test_a_check_that_breaks_has_failed_and_the_next_is_made(error: Exception) -> None:
    def break_down() -> Found:
        raise error

    found = tried("product", break_down)
    assert found.verdict == "FAILED"
    assert found.said.startswith(type(error).__name__) and "\n" not in found.said
    with pytest.raises(KeyboardInterrupt):
        tried("product", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_every_gradient_of_a_cpu_is_right(folder: Path) -> None:
    found = list(equality_checks(folder, device=CPU))
    assert len(found) == 3 * len(equality.POLICIES) + 3
    assert any(check.name.startswith("gradient, int8") for check in found)
    assert {check.verdict for check in found} == {"ok"}, found


def test_a_device_whose_gradients_are_off_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Trainee.taken_gradient

    def off_where_recomputed(trainee: Trainee) -> Tensor:
        found = real(trainee)
        return found * 1.01 if trainee.setting.recompute == "all" else found

    monkeypatch.setattr(Trainee, "taken_gradient", off_where_recomputed)
    monkeypatch.setattr(equality, "POLICIES", ({"recompute": "none"}, {"recompute": "all"}))
    found = verdicts(equality_checks(folder, device=CPU))
    assert found["gradient, none, recompute none"] == "ok"
    assert found["gradient, none, recompute all"] == "FAILED"
    assert found["recomputation, dropout, mlp_tiles 1"] == "FAILED"


def test_states_that_do_not_come_back_are_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = equality.make_optimizer
    assert equality._states(folder, CPU)[1]

    def forgetful(*given: Any, **named: Any) -> Any:
        made = real(*given, **named)
        made.load = lambda tensors: None
        return made

    monkeypatch.setattr(equality, "make_optimizer", forgetful)
    assert equality._states(folder, CPU)[1] is False


def test_a_prediction_that_is_off_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = measures.dry_run

    def too_little(*given: Any, **named: Any) -> Any:
        run = real(*given, **named)
        return replace(run, peak=replace(run.peak, bytes=run.peak.bytes // 10))

    monkeypatch.setattr(measures, "dry_run", too_little)
    monkeypatch.setattr(measures, "ALLOCATED_BYTES", 0)
    assert verdicts(Measures(CPU, card=None, size=TINY).step_checks(folder))["memory, allocated"] == "FAILED"


def test_a_ladder_that_is_never_climbed_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "ROOM", 2.0)
    name = "out-of-memory ladder"
    assert verdicts(Measures(CPU, card=None, size=TINY).other_checks(folder))[name] == "FAILED"
    monkeypatch.setattr(measures, "ROOM", 0.6)
    monkeypatch.setattr(
        Ladder, "training", property(lambda ladder: lambda rows: ladder._splitting.division(rows[:5]))
    )
    assert verdicts(Measures(CPU, card=None, size=TINY).other_checks(folder))[name] == "FAILED"


@pytest.mark.parametrize(("taken_mib", "verdict"), [(250, "ok"), (501, "FAILED")])
def test_a_context_above_its_range_is_found(
    taken_mib: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Device(0, "a card", 8000 * MIB, 7000 * MIB, 8.9, "580", uuid="GPU-1")
    now = replace(before, free_bytes=before.free_bytes - (taken_mib + 1000) * MIB)
    monkeypatch.setattr(measures, "probe", lambda: type("Machine", (), {"devices": (now,)})())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 1000 * MIB)
    check = tried("context", lambda: found_context(before))
    assert (check.verdict, check.said) == (verdict, f"{taken_mib}.0 MiB, 140 to 500 MiB expected")


def test_what_a_card_took_is_kept_for_later_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Measures, folder: Path) -> Iterator[Check]:
        self.residual = Residual(1000, 1015)
        yield tried("memory", lambda: ("", True))

    test = report.SelfTest()
    monkeypatch.setattr(Measures, "step_checks", nothing)
    monkeypatch.setattr(Measures, "other_checks", lambda self, folder: iter(()))
    monkeypatch.setattr(report, "equality_checks", lambda folder, device: iter(()))
    monkeypatch.setattr(report, "make_model", lambda folder, size, device: folder)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    list(test.checks())
    kind = kind_of(model="any/model", device="a card", method="lora", quantization="nf4")
    assert recall(kind) is None, "a CPU's model is too small to say anything"
    monkeypatch.setattr(test, "_size", lambda: report.MIDDLING)
    list(test.checks())
    found = recall(kind)
    assert found is not None and found.is_self_test
    assert found.sentence == "on this machine: measured 1.5 % above the estimate in the self-test"
    assert kind_of(model=SELF_TEST, device="a card", method="lora", quantization="nf4") != kind


def test_a_card_with_little_room_gets_the_small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    test = report.SelfTest()
    assert test._size() is TINY
    test.device = torch.device("cuda")
    for free_bytes, size in ((7000 * MIB, report.MIDDLING), (5000 * MIB, TINY)):
        test._card = Device(0, "a card", 8000 * MIB, free_bytes, 8.9, "580", uuid="GPU-1")
        assert test._size() is size
    assert isinstance(test._card.card, Card)
    assert "4.88 GiB of 7.81 GiB free, compute capability 8.9, driver 580" in test.facts()["card"]
