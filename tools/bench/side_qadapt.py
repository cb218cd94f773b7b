"""The package's side of `peers.py`: a whole run by `qadapt.run.train`, with all that watches over it.

A run counts its memory in its first and its longest step, its last one and every fiftieth; such a step takes
longer and, with only a few steps here, would weigh ten times too much, so it is told apart. Where nothing is
recomputed the plan chooses how many rows it takes at once, as in any recipe without a word on it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import bitsandbytes  # noqa: F401 (what the imports take is no one's memory)
from side import Task, Telling, main_task
from transformers import LlamaForCausalLM  # noqa: F401

import qadapt.run
from qadapt.events import Event, MemoryMeasured, Planned, StepDone
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import check_recipe
from qadapt.train.loop import Loop


def recipe_of(task: Task) -> Any:
    memory: dict[str, Any] = {"device": "cpu"}
    if task.dtype is not None:
        memory["compute_dtype"] = task.dtype
    if task.is_recomputing is not None:
        memory["recompute"] = "all" if task.is_recomputing else "none"
    if task.is_recomputing:
        memory["micro_batch"] = task.micro_batch
    values: dict[str, Any] = {
        "model": task.model,
        "adapter": {"rank": task.rank, "alpha": task.alpha},
        "data": {
            "sources": [{"path": task.conversations}],
            "length": task.length,
            "order": "given",
            "packing": "auto" if task.padding == "filled" else task.padding == "packed",
        },
        "train": {
            "steps": task.steps,
            "rows_per_step": task.rows_per_step,
            "optimizer": "adamw",
            "learning_rate": task.learning_rate,
            "schedule": "constant",
            "warmup_steps": 0,
        },
        "memory": memory,
        "run": {"name": "side", "folder": task.place},
    }
    return check_recipe(values, origin="tools/bench/side_qadapt.py")


class KeepingLoop(Loop):
    """A loop that first keeps the adapter it begins with."""

    folder = ""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.model.save_pretrained(self.folder)


@dataclass
class Seen:
    """What the run said, and the seconds from each step's end to the next."""

    steps: list[StepDone]
    seconds: list[float]
    watched: set[int]
    plan: Planned | None = None

    def tell(self, telling: Telling) -> None:
        plan = self.plan
        assert plan is not None
        for step, seconds in zip(self.steps, self.seconds, strict=True):
            is_watched = step.step in self.watched
            telling.step(seconds=seconds, tokens=step.tokens, loss=step.loss, is_watched=is_watched)
        telling.done(
            dtype=plan.compute_dtype,
            recompute=str(plan.recompute),
            padding="packed" if plan.packed else "filled",
            reasons=list(plan.reasons),
        )


def seen(events: Iterator[Event]) -> Seen:
    found, last = Seen([], [], set()), 0.0
    for event in events:
        if isinstance(event, StepDone):
            now = time.perf_counter()
            found.steps.append(event)
            found.seconds.append(now - last if last else event.seconds)
            last = now
        elif isinstance(event, MemoryMeasured):
            found.watched.add(event.step)
        elif isinstance(event, Planned):
            found.plan = event
    return found


def main() -> None:
    task, telling = main_task()
    os.environ["XDG_DATA_HOME"] = task.place  # what this run measures is no calibration
    quiet_libraries()
    telling.imported()
    with ExitStack() as patches:
        if task.adapter is not None:
            KeepingLoop.folder = task.adapter
            patches.enter_context(mock.patch.object(qadapt.run, "Loop", KeepingLoop))
        seen(qadapt.run.train(recipe_of(task))).tell(telling)


if __name__ == "__main__":
    main()
