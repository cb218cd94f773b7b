"""Runs killed with SIGKILL at random moments end as if nothing had happened; and the harness can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).parents[1] / "tools" / "bench" / "faults.py"


def judged(*options: str) -> subprocess.CompletedProcess[str]:
    """The harness in a process of its own: this one has threads, which a fork would leave behind."""
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HARNESS), "--stops", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)


def test_twenty_killed_runs_end_bit_identical() -> None:
    done = judged("--trials", "14", "--at-files", "6", "--seed", "2")
    assert "20 of 20 runs ended bit-identical to the uninterrupted run" in done.stdout, (
        done.stdout + done.stderr
    )
    assert done.returncode == 0


def test_a_resume_that_forgets_the_random_state_is_seen() -> None:
    done = judged("--trials", "0", "--at-files", "3", "--seed", "2", "--break", "replay")
    assert "DIFFERS" in done.stdout, done.stdout + done.stderr
    assert "adapter/adapter_model.safetensors" in done.stdout
    assert done.returncode == 1
