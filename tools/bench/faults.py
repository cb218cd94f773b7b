"""Runs that are killed at random moments, resumed, and compared with the run that was not.

    python tools/bench/faults.py                                100 trials killed by the clock, 40 at files
    python tools/bench/faults.py --trials 20 --at-files 5 --seed 7
    python tools/bench/faults.py --break replay                 must fail: resuming forgets the random state
    python tools/bench/faults.py --trials 0 --at-files 0 --stops 2      only stopped for 30 s and woken

A warm process (everything imported, nothing computed) forks one child per attempt. A child does what a user
would do next: train, or resume what began, then export. It is killed with SIGKILL at a moment drawn uniformly
over the life of an uninterrupted child; what is left goes on in the next child, which may be killed again, up
to three times. It is also paused and stopped on request, and once runs out of memory. Renames take
microseconds, so that more trials are killed right before a file operation (an open for writing, a rename, a
removal, a new folder), drawn from equal parts of a child's life. In the end adapter, checkpoints, exported
model and the journal that counts must be those of the uninterrupted run to the bit; times are left out.
Prints the seed, where each kill fell and the count; exits with 1 if any trial differs, or if so many as 50
trials never hit a phase. A seed draws the same kills; what they hit depends on the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from killed_run import STEPS, WARM, child, differences, events_of, result, run_of, write_inputs

from qadapt.events import CheckpointSaved, Event, Resumed, RunFinished, RunStarted, StageAdvanced, StepDone
from qadapt.quiet import quiet_libraries
from qadapt.run_folder import RunFolder

MOST_KILLS = 3
FEW_TRIALS = 50  # fewer may well miss a phase that takes a moment
SLOWEST_SECONDS = 300.0
ASLEEP_SECONDS = 30.0
PHASES = ("preparing", "training", "writing a checkpoint", "ending", "exporting")
MEMORY = Path("/dev/shm")  # a kill loses nothing that was written, so no disk has to be waited for
FORKED: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


@dataclass(frozen=True)
class Kill:
    """When a child is to die: after so many seconds, or right before so many file operations."""

    seconds: float | None = None
    operation: int | None = None

    def __str__(self) -> str:
        return f"at {self.seconds:.2f} s" if self.operation is None else f"at file operation {self.operation}"


@dataclass(frozen=True)
class Hit:
    """Where a kill fell."""

    kill: Kill
    phase: str
    after: str

    def __str__(self) -> str:
        return f"{self.kill}, {self.phase}, after {self.after}"


class Broken(Exception):
    """A child ended with an error."""


def attempt(folder: Path, inputs: Path, kill: Kill, break_: str | None = None) -> bool:
    """One child's life; says whether it was killed.

    Raises:
        Broken: It ended with an error of its own.
    """
    process = FORKED.Process(target=child, args=(folder, inputs, kill.operation, break_))
    process.start()
    process.join(SLOWEST_SECONDS if kill.seconds is None else kill.seconds)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == 0:
        return False
    if process.exitcode == -signal.SIGKILL and kill != Kill():
        return True
    said = (folder / "log.txt").read_text(encoding="utf-8").strip()
    raise Broken(f"exit code {process.exitcode}: {said[-2000:]}")


def hit(folder: Path, kill: Kill) -> Hit:
    """Where a killed child stood, by what it left behind."""
    run = run_of(folder)
    events = events_of(run)
    last = next((event for event in reversed(events) if not isinstance(event, StageAdvanced)), None)
    step = getattr(last, "step", None)
    after = "nothing" if last is None else type(last).__name__ + ("" if step is None else f" {step}")
    return Hit(kill, phase_of(run, events), after)


def phase_of(run: RunFolder, events: list[Event]) -> str:
    saving = [path for path in run.path.glob("checkpoints/*") if path.name.startswith(".")]
    if any(isinstance(event, RunFinished) for event in events):
        return "exporting"
    if saving:
        return "writing a checkpoint"
    for event in reversed(events):
        if isinstance(event, CheckpointSaved) and event.step == STEPS:
            return "ending"
        if isinstance(event, StepDone | Resumed):
            return "training"
        if isinstance(event, RunStarted):
            break
    return "preparing"


def sleep_through(folder: Path, inputs: Path, after_seconds: float, seconds: float) -> None:
    """One child's life that is stopped by the system for a while, as by a suspend, and woken.

    Raises:
        Broken: It ended with an error of its own.
    """
    process = FORKED.Process(target=child, args=(folder, inputs, None, None))
    process.start()
    process.join(after_seconds)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    if process.exitcode != 0:
        raise Broken(f"exit code {process.exitcode} after {seconds:.0f} s of sleep")


@dataclass
class Harness:
    """The uninterrupted run, and trials against it.

    Args:
        place: A folder for everything.
        break_: What to break on purpose, if anything.
    """

    place: Path
    break_: str | None = None
    life_seconds: float = 0.0
    operations: int = 0
    hits: list[Hit] = dataclasses.field(default_factory=list)

    def begin(self) -> dict[str, str]:
        """Makes the inputs and the uninterrupted run, twice: what differs between them is no measure."""
        self.inputs.mkdir(parents=True)
        maker = FORKED.Process(target=write_inputs, args=(self.inputs,))
        maker.start()
        maker.join()
        results = []
        for name in ("first", "second"):
            began = time.monotonic()
            attempt(self.place / name, self.inputs, Kill())
            seconds = time.monotonic() - began
            self.life_seconds = min(seconds, self.life_seconds or seconds)
            results.append(result(self.place / name))
        self.operations = int((self.place / "second" / "operations.txt").read_text(encoding="utf-8"))
        unlike = differences(*results)
        if unlike:
            raise Broken("two uninterrupted runs differ:\n" + "\n".join(unlike))
        return results[0]

    @property
    def inputs(self) -> Path:
        return self.place / "inputs"

    def trial(self, draw: random.Random, folder: Path, *, part: tuple[int, int] | None) -> list[Hit]:
        """One run, killed at least once, to its end; the folder is left for `result`.

        `part` is None for kills by the clock; (2, 5) begins with one in the third fifth of file operations.
        """
        hits: list[Hit] = []
        self.hits = hits
        while not hits:
            shutil.rmtree(folder, ignore_errors=True)
            began = time.monotonic()
            for _ in range(draw.randint(1, MOST_KILLS)):
                kill = self._draw(draw, part if not hits else part and (0, 1))
                if not attempt(folder, self.inputs, kill, self.break_):
                    break
                hits.append(hit(folder, kill))
            else:
                attempt(folder, self.inputs, Kill(), self.break_)
            if not hits:  # it was done before its time: the machine has become faster
                self.life_seconds = time.monotonic() - began
        return hits

    def _draw(self, draw: random.Random, part: tuple[int, int] | None) -> Kill:
        if part is None:
            return Kill(seconds=draw.uniform(0.0, self.life_seconds))
        index, parts = part
        first = self.operations * index // parts + 1
        return Kill(operation=draw.randint(first, max(first, self.operations * (index + 1) // parts)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=100, help="killed at a drawn moment")
    parser.add_argument("--at-files", type=int, default=40, help="killed before a drawn file operation")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--stops", type=int, default=1, help=f"runs stopped for {ASLEEP_SECONDS:.0f} s")
    parser.add_argument("--break", dest="break_", choices=["replay"], help="break it: the harness must fail")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # no thread pool in the process that forks
    quiet_libraries()
    for module in WARM:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as place:
        harness = Harness(Path(place), arguments.break_)
        expected = harness.begin()
        print(
            f"seed {arguments.seed}; an uninterrupted run lives {harness.life_seconds:.2f} s, "
            f"does {harness.operations} file operations, leaves {len(expected)} things to compare"
        )
        parts = [(index, arguments.at_files) for index in range(arguments.at_files)]
        code = judged(harness, expected, [None] * arguments.trials + parts, seed=arguments.seed)
        return max(code, slept(harness, expected, arguments.stops, seed=arguments.seed))


def slept(harness: Harness, expected: dict[str, str], stops: int, *, seed: int) -> int:
    """Runs that are stopped by the system for half a minute and woken; returns the exit code."""
    draw, code = random.Random(seed), 0
    for number in range(1, stops + 1):
        folder, after = harness.place / f"slept-{number}", draw.uniform(0.0, harness.life_seconds)
        sleep_through(folder, harness.inputs, after, ASLEEP_SECONDS)
        unlike = differences(expected, result(folder))
        print(f"{'DIFFERS' if unlike else 'same'}: asleep for {ASLEEP_SECONDS:.0f} s at {after:.2f} s")
        for line in unlike[:6]:
            print(f"      {line}")
        code = max(code, int(bool(unlike)))
    return code


def judged(
    harness: Harness, expected: dict[str, str], parts: list[tuple[int, int] | None], *, seed: int
) -> int:
    """Runs and prints the trials, and returns the exit code."""
    draw, phases, same = random.Random(seed), Counter[str](), 0
    for number, part in enumerate(parts, start=1):
        folder = harness.place / "trial"
        try:
            hits = harness.trial(draw, folder, part=part)
            unlike = differences(expected, result(folder))
        except Broken as error:
            hits, unlike = harness.hits, [str(error)]
        phases.update(each.phase for each in hits)
        same += not unlike
        print(f"{number:3d} {'DIFFERS' if unlike else 'same'}: " + "; ".join(map(str, hits)), flush=True)
        for line in unlike[:6]:
            print(f"      {line}")
    print("kills by phase: " + ", ".join(f"{phase} {phases[phase]}" for phase in PHASES))
    print(f"{same} of {len(parts)} runs ended bit-identical to the uninterrupted run (seed {seed})")
    missed = [phase for phase in PHASES if not phases[phase]] if len(parts) >= FEW_TRIALS else []
    if missed:
        print(f"never hit: {', '.join(missed)}")
    return 0 if same == len(parts) and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
