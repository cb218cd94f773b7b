"""A run that may be killed: what a child of `faults.py` does, and what it leaves to be compared.

It is paused and stopped on request in the middle, goes on by itself, and memory runs out in one of its steps.

Knows nothing of who kills it, but can kill itself right before a file operation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from qadapt import control
from qadapt.events import Event, Paused, Resumed, RunFinished, StepDone, Stopped, Warned
from qadapt.exporting.export import export
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import check_recipe
from qadapt.run import resume, train
from qadapt.run_folder import RunFolder
from qadapt.train import loop, oom
from qadapt.train.step import find_gradient
from qadapt.view.journal import STEPPED, effective, read_events

if TYPE_CHECKING:
    from qadapt.recipe import Recipe

STEPS = 9
ASKED: dict[int, control.Request] = {4: "pause", 8: "stop"}
"""Step → what the run is asked after it; a checkpoint of it is due, so that no state is kept for it alone."""
DONE_BEFORE_SHORTAGE = 4
FORM = "merged-fp16"
WARM = (  # what a run imports on its way, so that children do not
    "pandas", "peft.utils.transformers_weight_conversion", "pyarrow.compute",
    "transformers.integrations.bitsandbytes", "transformers.models.llama.modeling_llama",
)  # fmt: skip
UNLIKE = {"time", "seconds"}  # what may differ between two runs of the same


def carry_on(folder: Path, inputs: Path) -> None:
    """What a user would do next, until the exported model is there."""
    run = run_of(folder)
    if run.export(FORM).exists():
        return
    while not any(isinstance(event, RunFinished) for event in events_of(run)):
        if run.plan.is_file():
            exhaust(resume("killed", folder=str(run.path.parent.relative_to(folder))), run)
        else:  # it never began
            shutil.rmtree(run.path, ignore_errors=True)
            exhaust(train(recipe_for(inputs)), run)
    exhaust(export("killed", folder=str(run.path.parent.relative_to(folder)), proof=False))


def exhaust(events: Iterable[Event], run: RunFolder | None = None) -> None:
    for event in events:
        if run is not None and isinstance(event, StepDone) and event.step in ASKED:
            control.ask(run.path, ASKED[event.step])


def short_of_memory(run: RunFolder) -> Callable[..., Any]:
    """`find_gradient` on a machine whose memory runs out in the fifth step, until a rung is taken."""

    def find(model: Any, optimizer: Any, batches: Any, **how: Any) -> Any:
        [done, *_] = {int(state["step"]) for state in optimizer.inner.state.values()}
        if done >= DONE_BEFORE_SHORTAGE and not (run.path / oom.FILE_NAME).exists():
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return find_gradient(model, optimizer, batches, **how)

    return find


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


def child(folder: Path, inputs: Path, last_operation: int | None, break_: str | None) -> None:
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
    count = FileOperations(folder / "runs", last_operation)
    sys.addaudithook(count.see)
    shortage = mock.patch.object(loop, "find_gradient", short_of_memory(run_of(Path())))
    with breaking(break_), shortage:
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


# What it leaves


def run_of(folder: Path) -> RunFolder:
    return RunFolder(folder / "runs" / "killed")


def events_of(run: RunFolder) -> list[Event]:
    return effective(read_events(run.path)) if run.path.is_dir() else []


def result(folder: Path) -> dict[str, str]:
    """All that must be the same: files by their hash, the events that count, without times."""
    run = run_of(folder)
    found = {}
    for part in (run.adapter, run.path / "checkpoints", run.path / "export"):
        for path in sorted(part.rglob("*")):
            if path.is_file():
                found[str(path.relative_to(run.path))] = content(path)
    seen = Counter[str]()
    for event in events_of(run):
        if (text := plain(event)) is not None and text not in found.values():  # a leaving run saves once more
            name = f"{type(event).__name__} {event.step}"  # type: ignore[attr-defined]
            seen[name] += 1
            found[f"event {name}, number {seen[name]}"] = text
    return found


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
    """An event of a step as text; None for what each process does anew, or a killed one does not."""
    if (
        isinstance(event, Resumed | Paused | Stopped)
        or not isinstance(event, (*STEPPED, Warned))
        or event.step is None
    ):
        return None
    return str({name: each for name, each in dataclasses.asdict(event).items() if name not in UNLIKE})


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
