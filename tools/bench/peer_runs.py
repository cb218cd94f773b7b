"""Runs the sides of `peers.py`: each in its own environment and process, its memory sampled from here.

The environments are made once, by pip, in a folder outside the repository. Every outcome is written down as
soon as it is there, so that a run that is cut off goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from host_memory import anonymous_bytes
from peer_table import Outcome, Side, outcome_of
from side import Task

HERE = Path(__file__).parent
SAMPLE_SECONDS = 0.05
SHARED = ("torch==2.13.0", "bitsandbytes==0.50.2")
REQUIREMENTS = {
    "trl": (*SHARED, "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2"),
    "llamafactory": (*SHARED, "llamafactory==0.9.5"),
}
"""What a peer's environment has; what is not named is what the peer asks for."""
FOR_CUDA = ("torchvision", "torchaudio")
"""Their builds on the package index cannot be loaded beside a torch without CUDA; text does not need them."""


class SideFailed(Exception):
    """A side's process ended badly; the argument is the end of what it wrote."""


@dataclass(frozen=True)
class Environments:
    """The peers' virtual environments, in one folder."""

    folder: Path

    def python(self, name: str) -> Path:
        """The interpreter of a side; its environment is made the first time."""
        if name not in REQUIREMENTS:
            return Path(sys.executable)
        place = self.folder / name
        python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        stamp, wanted = place / "stamp.txt", "\n".join(REQUIREMENTS[name])
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            print(f"making the environment of {name} in {place}: some minutes ...", flush=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS[name]], check=True)
            subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", *FOR_CUDA], check=True)
            stamp.write_text(wanted, encoding="utf-8")
        return python


def top_bytes_of(running: psutil.Popen) -> int:
    """The most anonymous memory that a process and its descendants had together, until it ends.

    Who is a descendant is asked once a second: that reads all of the machine's processes.
    """
    top_bytes, family = 0, [running.pid]
    for sample in itertools.count():
        if running.poll() is not None:
            return top_bytes
        if sample % round(1 / SAMPLE_SECONDS) == 0:
            with suppress(psutil.NoSuchProcess):  # it ended meanwhile
                family = [running.pid, *(child.pid for child in running.children(recursive=True))]
        total = 0
        for pid in family:
            with suppress(OSError):
                total += anonymous_bytes(pid)
        top_bytes = max(top_bytes, total)
        time.sleep(SAMPLE_SECONDS)
    raise AssertionError("counts without end")


def run_side(side: Side, task: Task, python: Path, *, log: Path) -> list[dict[str, Any]]:
    """Trains the task in a process of its own; its lines, the last of them with `top_bytes`.

    Raises:
        SideFailed: It did not end well.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        given, report = folder / "task.json", folder / "report.jsonl"
        replace(task, report=str(report), place=str(folder / "place")).write(given)
        (folder / "place").mkdir()
        program = [str(python), str(HERE / f"side_{side.name}.py"), str(given)]
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "off",
        }
        with log.open("w", encoding="utf-8") as written:
            running = psutil.Popen(program, stdout=written, stderr=written, env=environment)
            top_bytes = top_bytes_of(running)
        if running.returncode:
            ends = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise SideFailed(" / ".join(ends))
        lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    lines[-1]["top_bytes"] = top_bytes
    return lines


@dataclass(frozen=True)
class Bench:
    """The sides' environments, the task, and the file of what was measured already."""

    environments: Environments
    task: Task
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "outcomes.jsonl"

    def known(self) -> Iterator[tuple[str, Outcome | None]]:
        """Keys and outcomes that were measured before; None for a side that failed."""
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(line)
                outcome = entry["outcome"]
                yield entry["key"], outcome and Outcome(**outcome)

    def outcome(self, side: Side, *, repeat: int, steps: int) -> Outcome | None:
        """A side's outcome, measured now if it was not before; None if it cannot train so."""
        key = f"{side.key} | {repeat} | {steps} steps"
        known = dict(self.known())
        if key in known:
            self._print(key, known[key], "measured before")
            return known[key]
        return self._measured(side, key, steps)

    def _measured(self, side: Side, key: str, steps: int) -> Outcome | None:
        task = task_of(self.task, side, steps=steps)
        python = self.environments.python(side.name)
        began, reason = time.monotonic(), ""
        outcome: Outcome | None = None
        try:
            lines = run_side(side, task, python, log=self.folder / "side.log")
            outcome = outcome_of(lines, top_bytes=lines[-1]["top_bytes"], padding=side.padding)
        except SideFailed as error:
            reason = str(error)
        entry = {"key": key, "outcome": outcome and asdict(outcome), "reason": reason}
        with self.file.open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(entry) + "\n")
        self._print(key, outcome, reason or f"{time.monotonic() - began:.0f} s")
        return outcome

    def _print(self, key: str, outcome: Outcome | None, note: str) -> None:
        print(f"{key}: {outcome.line if outcome else 'FAILED'}; {note}", flush=True)


def model_in(folder: Path, dtype: str, place: Path) -> str:
    """The same model, its configuration naming a type, as peers take that over."""
    made = place / f"model-{dtype}"
    made.mkdir(exist_ok=True)
    for file in folder.iterdir():
        link = made / file.name
        if file.name == "config.json":
            values = json.loads(file.read_text(encoding="utf-8"))
            values.pop("torch_dtype", None)
            link.write_text(json.dumps(values | {"dtype": dtype}), encoding="utf-8")
        elif not link.exists():
            link.symlink_to(file.resolve())
    return str(made)


def task_of(task: Task, side: Side, *, steps: int) -> Task:
    """The task as this side is given it.

    Our copy of the demo model was made of fp16 weights and says so. The published one says bf16, so that is
    what peers are given at their defaults; fp16, in which a CPU is slowest, would be unfair.
    """
    model = task.model
    if side.name != "qadapt":
        dtype = "float32" if side.dtype == "fp32" else "bfloat16"
        model = model_in(Path(task.model), dtype, Path(task.rows).parent)
    return replace(
        task,
        model=model,
        steps=steps,
        dtype=side.dtype,
        is_recomputing=side.is_recomputing,
        padding=side.padding,
    )
