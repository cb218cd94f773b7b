"""From the command to the screen and to the first step, against what the imports alone take, in one run.

    python tools/bench/start.py                five rounds
    python tools/bench/start.py --rounds 2

Every round starts three processes, one after another: one that imports torch, transformers, peft and
bitsandbytes and nothing else, and `qadapt train quickstart-smollm2-135m` in a pseudo-terminal, without and
with its rehearsal. The screen is there when the first frame of the dashboard is on the terminal, the first
step when it begins, by the run's own journal. The rehearsal is a step, an evaluation, a checkpoint and an
answer by itself, with the longest rows: with it, the beginning of its step is shown, and the first step of
the run, which comes after. A first call that is not counted fills the caches.

Bars: the screen within 1.5 s, the first step (without the rehearsal) within 4 s of the imports, by the
medians. Exits with 1 above them. The machine must be left alone meanwhile; the processor's seconds, which
stand beside those on the wall, feel other programs less.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_task import write_task

SCREEN_SECONDS, STEP_SECONDS = 1.5, 4.0
FRAME = "╭".encode()  # the corner of the dashboard's first panel
LONGEST_SECONDS = 600
IMPORTS = "import torch, transformers, peft, bitsandbytes"


@dataclass(frozen=True)
class Moment:
    """When something happened after the command: seconds on the wall, and the processor's until then."""

    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:6.2f} s ({self.cpu_seconds:5.2f} of the processor)"


@dataclass(frozen=True)
class Start:
    """A run's beginning; `rehearsal` is None where there is none."""

    screen: Moment
    step: Moment
    rehearsal: Moment | None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_task(folder)
        started(folder, is_rehearsed=False)
        imports, bare, rehearsed = [], [], []
        for number in range(1, rounds + 1):
            imports.append(imported())
            bare.append(started(folder, is_rehearsed=False))
            rehearsed.append(started(folder, is_rehearsed=True))
            print(f"round {number}: imports {imports[-1]}, first step {bare[-1].step}", flush=True)
    return verdict(imports, bare, rehearsed)


def imported() -> Moment:
    """What the four libraries take by themselves, from the command to the end of the imports."""
    program = f"{IMPORTS}; import time; print(time.time(), time.process_time())"
    began = time.time()
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    return Moment(float(said[0]) - began, float(said[1]))


def started(folder: Path, *, is_rehearsed: bool) -> Start:
    """Starts a run in a pseudo-terminal, and ends it when its first step is done."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    words = (
        f"data.sources=[{{path: {folder / 'train.jsonl'}}}]",
        f"data.held_out={folder / 'held_out.jsonl'}",
        f"run.folder={runs}",
        f"train.rehearse={str(is_rehearsed).lower()}",
    )
    command = [sys.executable, "-m", "qadapt", "train", "quickstart-smollm2-135m", *words]
    outside, inside = pty.openpty()
    began = time.time()
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside) as process:
        os.close(inside)
        try:
            return watched(psutil.Process(process.pid), outside, began=began, journal=runs / "quickstart")
        finally:
            process.kill()
            os.close(outside)


def watched(process: psutil.Process, terminal: int, *, began: float, journal: Path) -> Start:
    """Reads the terminal and the journal until the first step is done."""
    screen, rehearsal, before, shown, known = None, None, None, b"", 0
    while True:
        now = moment(process, began)
        if now.seconds > LONGEST_SECONDS or process.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit(f"no first step after {now.seconds:.0f} s:\n{shown[-2000:].decode()}")
        if select.select([terminal], [], [], 0.02)[0]:
            shown += read_from(terminal)
            if screen is None and FRAME in shown:
                screen = moment(process, began)
        events = events_of(journal / "events.jsonl")
        for event in events[known:]:
            if event["event"] == "StepDone":
                assert screen is not None, "the dashboard comes before the first step"
                assert before is not None, "so does the plan"
                begins = float(event["time"]) - float(event["seconds"]) - began
                return Start(screen, Moment(begins, before.cpu_seconds), rehearsal)
            before = now  # the step begins when the event before it is said
            if rehearsal is None and str(event.get("stage", "")).startswith("rehearsing"):
                rehearsal = now
        known = len(events)


def read_from(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # so Linux says that nobody writes to it any more
        return b""


def events_of(path: Path) -> list[dict[str, Any]]:
    """What the journal says so far."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def moment(process: psutil.Process, began: float) -> Moment:
    times = process.cpu_times()
    return Moment(time.time() - began, times.user + times.system)


def verdict(imports: Sequence[Moment], bare: list[Start], rehearsed: list[Start]) -> int:
    """The medians, and whether they are within the bars."""
    screen, step = (
        middle([start.screen for start in bare + rehearsed]),
        middle([start.step for start in bare]),
    )
    alone = middle(imports)
    print(f"\nimports alone                     {alone}")
    print(f"screen                            {screen}, at most {SCREEN_SECONDS} s is asked")
    print(f"first step, no rehearsal          {step}")
    print(
        f"rehearsal begins                  {middle([start.rehearsal or start.step for start in rehearsed])}"
    )
    print(f"first step after the rehearsal    {middle([start.step for start in rehearsed])}")
    later = statistics.median(b.step.seconds - i.seconds for b, i in zip(bare, imports, strict=True))
    ratio = statistics.median(b.step.seconds / i.seconds for b, i in zip(bare, imports, strict=True))
    work = statistics.median(b.step.cpu_seconds - i.cpu_seconds for b, i in zip(bare, imports, strict=True))
    print(
        f"first step after the imports: {later:.2f} s ({work:.2f} of the processor), {ratio:.2f} times the "
        f"imports; at most {STEP_SECONDS} s is asked"
    )
    is_within = screen.seconds <= SCREEN_SECONDS and later <= STEP_SECONDS
    print("within the bars" if is_within else "ABOVE the bars")
    return 0 if is_within else 1


def middle(moments: Sequence[Moment]) -> Moment:
    return Moment(
        statistics.median(each.seconds for each in moments),
        statistics.median(each.cpu_seconds for each in moments),
    )


if __name__ == "__main__":
    sys.exit(main())
