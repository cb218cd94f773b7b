"""Runs that are killed at random moments, resumed, and compared with the run that was not.

    python tools/bench/faults.py                                100 trials killed by the clock, 40 at files
    python tools/bench/faults.py --trials 20 --at-files 5 --seed 7
    python tools/bench/faults.py --break replay                 must fail: resuming forgets the random state

A warm process (everything imported, nothing computed) forks one child per attempt. A child does what a user
would do next: train, or resume what began, then export. It is killed with SIGKILL at a moment drawn uniformly
over the life of an uninterrupted child; what is left goes on in the next child, which may be killed again, up
to three times. Renames take microseconds, so that more trials are killed right before a file operation (an
open for writing, a rename, a removal, a new folder), drawn from equal parts of a child's life. In the end
adapter, checkpoints, exported model and the journal that counts must be those of the uninterrupted run to the
bit; times are left out. Prints the seed, where each kill fell and the count; exits with 1 if any trial
differs, or if so many as 50 trials never hit a phase. A seed draws the same kills; what they hit depends on
the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from qadapt.events import (
    EVENTS,
    CheckpointSaved,
    Event,
    Resumed,
    RunFinished,
    RunStarted,
    StageAdvanced,
    StepDone,
    Warned,
)
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import check_recipe
from qadapt.run import export, resume, train
from qadapt.run_folder import RunFolder
from qadapt.train import loop
from qadapt.view.journal import STEPPED, effective, read_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qadapt.recipe import Recipe

MOST_KILLS = 3
FEW_TRIALS = 50  # fewer may well miss a phase that takes a moment
WARM = (  # what a run imports on its way, so that children do not
    "pandas", "peft.utils.transformers_weight_conversion", "pyarrow.compute",
    "transformers.integrations.bitsandbytes", "transformers.models.llama.modeling_llama",
)  # fmt: skip
STEPS = 9
FORM = "merged-fp16"
SLOWEST_SECONDS = 300.0
PHASES = ("preparing", "training", "writing a checkpoint", "ending", "exporting")
UNLIKE = {"time", "seconds"}  # what may differ between two runs of the same
FORKED = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")


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


# What a child does


def carry_on(folder: Path, inputs: Path) -> None:
    """What a user would do next, until the exported model is there."""
    run = run_of(folder)
    if run.export(FORM).exists():
        return
    if not any(isinstance(event, RunFinished) for event in events_of(run)):
        if run.plan.is_file():
            exhaust(resume("killed", folder=str(run.path.parent.relative_to(folder))))
        else:  # it never began
            shutil.rmtree(run.path, ignore_errors=True)
            exhaust(train(recipe_for(inputs)))
    exhaust(export("killed", folder=str(run.path.parent.relative_to(folder))))


def exhaust(events: Iterable[Event]) -> None:
    for _ in events:
        pass


def recipe_for(inputs: Path) -> Recipe:
    """Short, with dropout, several micro-batches per step, and a saved state at every other step."""
    values = {
        "model": str(inputs / "model"),
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {
            "sources": [{"path": str(inputs / "train.jsonl")}],
            "held_out": str(inputs / "held_out.jsonl"),
            "length": 128,
        },
        "train": {
            "steps": STEPS,
            "rows_per_step": 4,
            "learning_rate": 1e-2,
            "evaluate_every": 3,
            "checkpoint_every": 2,
            "keep_checkpoints": 3,
        },
        "memory": {"device": "cpu", "compute_dtype": "fp32", "micro_batch": 2},
        "export": {"form": FORM},
        "run": {"name": "killed", "folder": "runs"},
    }
    return check_recipe(values, origin="tools/bench/faults.py")


def write_inputs(inputs: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tiny_model import make_tiny_model

    make_tiny_model(inputs / "model", "llama")
    for name, numbers in (("train", range(24)), ("held_out", range(100, 104))):
        with (inputs / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for number in numbers:
                asked = {"role": "user", "content": f"say {number}{' please' * (number % 4)}"}
                turns = [asked, {"role": "assistant", "content": str(number)}]
                file.write(json.dumps({"messages": turns}) + "\n")


def child(folder: Path, inputs: Path, kill: Kill, break_: str | None) -> None:
    """The body of a forked process; what it says goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)  # the run's folder is relative, so that nothing written names the trial
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["XDG_DATA_HOME"] = str(folder / "cache")
    log = (folder / "log.txt").open("a", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    quiet_libraries()
    count = FileOperations(folder / "runs", kill.operation)
    sys.addaudithook(count.see)
    with breaking(break_):
        carry_on(folder, inputs)
    (folder / "operations.txt").write_text(str(count.seen), encoding="utf-8")


@contextmanager
def breaking(break_: str | None) -> Iterator[None]:
    """A harness that cannot fail shows nothing: with `replay`, resuming forgets the random state."""
    doubled = mock.patch.object(loop, "restore_random_state") if break_ == "replay" else nullcontext()
    with doubled:
        yield


class FileOperations:
    """Counts what this process does to files below a folder, and kills it right before one of them.

    Args:
        below: The folder; what happens elsewhere does not count.
        last: The operation that does not happen any more, from 1; None kills never.
    """

    KINDS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

    def __init__(self, below: Path, last: int | None) -> None:
        self.below = str(below)
        self.last = last
        self.seen = 0
        self._lock = threading.RLock()

    def see(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name not in self.KINDS or not isinstance(arguments[0], str | os.PathLike):
            return
        if name == "open" and not is_writing(arguments):
            return
        if not os.path.abspath(arguments[0]).startswith(self.below):  # noqa: PTH100 - called very often
            return
        with self._lock:
            self.seen += 1
            if self.seen == self.last:
                os.kill(os.getpid(), signal.SIGKILL)


def is_writing(arguments: tuple[Any, ...]) -> bool:
    mode, flags = arguments[1], arguments[2]
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR))


# What the parent does


def attempt(folder: Path, inputs: Path, kill: Kill, break_: str | None = None) -> bool:
    """One child's life; says whether it was killed.

    Raises:
        Broken: It ended with an error of its own.
    """
    process = FORKED.Process(target=child, args=(folder, inputs, kill, break_))
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


def run_of(folder: Path) -> RunFolder:
    return RunFolder(folder / "runs" / "killed")


def events_of(run: RunFolder) -> list[Event]:
    return effective(read_events(run.path)) if run.path.is_dir() else []


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


def result(folder: Path) -> dict[str, str]:
    """All that must be the same: files by their hash, the events that count, without times."""
    run = run_of(folder)
    found = {}
    for part in (run.adapter, run.path / "checkpoints", run.path / "export"):
        for path in sorted(part.rglob("*")):
            if path.is_file():
                found[str(path.relative_to(run.path))] = content(path)
    lines = sorted(line for event in events_of(run) if (line := plain(event)) is not None)
    return found | {f"event {number}": line for number, line in enumerate(lines)}


def content(path: Path) -> str:
    if path.name == "state.json":
        return json.dumps(without_times(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
    if path.name == "manifest.json":  # sizes and hashes of the others, of which state.json may hold times
        return ", ".join(json.loads(path.read_text(encoding="utf-8"))["files"])
    return hashlib.sha256(path.read_bytes()).hexdigest()


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_times(each) for name, each in value.items() if name not in UNLIKE}
    return value


def plain(event: Event) -> str | None:
    """An event of a step as text, in the order of steps; None for what each process does anew."""
    if isinstance(event, Resumed) or not isinstance(event, (*STEPPED, Warned)) or event.step is None:
        return None
    values = {name: each for name, each in dataclasses.asdict(event).items() if name not in UNLIKE}
    order = f"{event.step:06d} {list(EVENTS).index(type(event).__name__):02d}"
    return f"{order} {type(event).__name__} {values}"


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    names = [name for name in expected | found if expected.get(name) != found.get(name)]
    return [f"{name}: {shortened(expected.get(name), found.get(name))}" for name in names]


def shortened(expected: str | None, found: str | None) -> str:
    """Two texts from a little before they part."""
    if expected is None or found is None:
        return f"missing, it was {expected[:120]}" if expected else f"too many: {str(found)[:120]}"
    same = next((at for at, two in enumerate(zip(expected, found, strict=False)) if two[0] != two[1]), 0)
    there = slice(max(0, same - 60), same + 100)
    return f"{expected[:40]} … {expected[there]} was expected, {found[there]} found"


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
    parser.add_argument("--break", dest="break_", choices=["replay"], help="break it: the harness must fail")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # no thread pool in the process that forks
    quiet_libraries()
    for module in WARM:
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as place:
        harness = Harness(Path(place), arguments.break_)
        expected = harness.begin()
        print(
            f"seed {arguments.seed}; an uninterrupted run lives {harness.life_seconds:.2f} s, "
            f"does {harness.operations} file operations, leaves {len(expected)} things to compare"
        )
        parts = [(index, arguments.at_files) for index in range(arguments.at_files)]
        return judged(harness, expected, [None] * arguments.trials + parts, seed=arguments.seed)


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
