"""Who trains on which card: one run, or several whose budgets fit; a dead process holds nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qadapt.errors import BadRun
from qadapt.hardware.claims import SharedCard, claiming
from qadapt.units import GIB

CARD = SharedCard("GPU-4f1c-made-up", "Made-up RTX 9010", 8 * GIB)
OTHER = SharedCard("GPU-77aa-made-up", "Made-up RTX 9010", 8 * GIB)
HOLDER = """
import sys, time
from pathlib import Path
from qadapt.hardware.claims import SharedCard, claiming
card = SharedCard({card.identity!r}, {card.name!r}, {card.memory_bytes})
with claiming(Path({folder!r}), card, run=Path("/home/somebody/runs/first"), budget_bytes={budget}):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held_elsewhere(
    folder: Path, *, card: SharedCard = CARD, budget: int | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A second process that holds the card."""
    text = HOLDER.format(card=card, folder=str(folder), budget=budget)
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextmanager
def claimed(folder: Path, *, card: SharedCard = CARD, budget: int | None = None) -> Iterator[None]:
    with claiming(folder, card, run=folder / "second", budget_bytes=budget):
        yield


def test_a_second_run_on_a_card_is_refused_by_name_and_let_in_when_the_first_was_killed(
    tmp_path: Path,
) -> None:
    with held_elsewhere(tmp_path) as process:
        with (
            pytest.raises(BadRun, match="Another run trains on this Made-up RTX 9010") as refusal,
            claimed(tmp_path, budget=2 * GIB),
        ):
            pass
        assert str(Path("/home/somebody/runs/first")) in refusal.value.problem
        assert f"process {process.pid}" in refusal.value.problem
        assert "memory.budget" in refusal.value.cure
        with claimed(tmp_path, card=OTHER):
            pass  # another card of the same name is another card
        process.kill()  # -9 where there are signals
        process.wait()
        if sys.platform != "win32":
            assert process.returncode == -signal.SIGKILL
        with claimed(tmp_path):
            pass
    left = [path.name for path in tmp_path.rglob("claim-*")]
    assert left == [], "nothing of a dead process or of a finished run stays"


def test_two_runs_share_a_card_when_both_have_budgets_that_fit(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, budget=5 * GIB):
        with claimed(tmp_path, budget=3 * GIB):
            pass
        with (
            pytest.raises(BadRun, match=r"come to 9\.00 GiB, and the card has 8\.00 GiB"),
            claimed(tmp_path, budget=4 * GIB),
        ):
            pass
        with pytest.raises(BadRun, match="Another run trains"), claimed(tmp_path):
            pass


def test_a_third_run_must_fit_beside_both(tmp_path: Path) -> None:
    with claimed(tmp_path, budget=3 * GIB), claimed(tmp_path, budget=3 * GIB):
        with claimed(tmp_path, budget=2 * GIB):
            pass
        with pytest.raises(BadRun, match=r"second.* and .*second"), claimed(tmp_path, budget=3 * GIB):
            pass


def test_a_run_that_fails_lets_go_of_its_card(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the run failed"), claimed(tmp_path):
        raise ValueError("the run failed")
    with claimed(tmp_path):
        pass


def test_a_claim_that_cannot_be_read_still_counts(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path, budget=1 * GIB):
        claim = next(tmp_path.rglob("claim-*.json"))
        claim.write_text(json.dumps({"run": 3}), encoding="utf-8")
        with pytest.raises(BadRun, match="an unknown run"), claimed(tmp_path, budget=1 * GIB):
            pass
