"""What a step costs with everything that watches over it, against the same step bare, in one run.

    python tools/bench/overhead.py                      the demo model
    python tools/bench/overhead.py --tiny --pairs 3     a tiny random one: shows the parts, not the share

A real run trains: events, journal, health gauges, requests and rules looked at, a checkpoint saved in the
background every ten steps. After every ten of its steps the very same rows are trained bare by `train_step`
with the same model and optimizer, and nothing else. Steps whose memory is counted are compared one by one and
weigh in as rarely as they come. The sum of both medians is the share; the bar is 2 %. Exits with 1 above it.
The machine must be left alone meanwhile. The share of the processor's time counts what the saving thread
works but not what it waits, and hardly feels other programs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_task import write_task

import qadapt.run
from qadapt.data.batches import micro_batches
from qadapt.events import MemoryMeasured, StepDone
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import check_recipe
from qadapt.train import loop as loop_module
from qadapt.train.loop import MEMORY_EVERY, Loop
from qadapt.train.step import train_step

if TYPE_CHECKING:
    from qadapt.recipe import Recipe

BAR = 0.02
BLOCK = 10
FIRST = 2 * BLOCK  # steps before the first pair: the first step makes, imports and warms things
COUNTED_EVERY = 2 * BLOCK + 1  # more often than a run counts its memory, and at no block's last step


@dataclass(frozen=True)
class Clock:
    """Seconds on the wall and of the processor, all threads of this process together."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def since(self, other: Clock) -> Clock:
        return Clock(self.seconds - other.seconds, self.cpu_seconds - other.cpu_seconds)

    def more_than(self, other: Clock) -> Clock:
        return Clock(self.seconds / other.seconds - 1, self.cpu_seconds / other.cpu_seconds - 1)

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s ({self.cpu_seconds:.2f} of the processor)"


def sum_of(clocks: Iterable[Clock]) -> Clock:
    seconds, cpu_seconds = zip(*((clock.seconds, clock.cpu_seconds) for clock in clocks), strict=True)
    return Clock(sum(seconds), sum(cpu_seconds))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_DATA_HOME"] = place  # what this run measures is no calibration
        recipe = recipe_for(Path(place), is_tiny=arguments.tiny, steps=FIRST + arguments.pairs * BLOCK + 1)
        pairs = compared(recipe)
    between, counted = (
        [pair for pair in pairs if not pair.is_counted],
        [pair for pair in pairs if pair.is_counted],
    )
    shares = []
    for what, kind in (("step time", "seconds"), ("the processor's time", "cpu_seconds")):
        often, seldom = (
            statistics.median(getattr(pair.more, kind) for pair in kept) for kept in (between, counted)
        )
        shares.append(often + seldom / MEMORY_EVERY)
        print(
            f"of {what}: {often:+.2%} in all steps, {seldom:+.2%} in one of {MEMORY_EVERY}, "
            f"together {shares[-1]:+.2%}"
        )
    print(f"bar {BAR:.0%}: {'kept' if shares[0] <= BAR else 'BROKEN'}")
    return 0 if shares[0] <= BAR else 1


def recipe_for(place: Path, *, is_tiny: bool, steps: int) -> Recipe:
    training, held_out = write_task(place)
    model = "smollm2-135m"
    if is_tiny:
        from tiny_model import make_tiny_model

        model = str(make_tiny_model(place / "model", "llama"))
    values: dict[str, Any] = {
        "model": model,
        "data": {
            "sources": [{"path": str(training)}],
            "held_out": str(held_out),
            "length": 512,
            "packing": False,
        },
        "train": {"steps": steps, "rows_per_step": 4, "checkpoint_every": BLOCK, "rehearse": False},
        "memory": {"micro_batch": 2, "compute_dtype": "fp32"},
        "run": {"name": "overhead", "folder": str(place / "runs")},
    }
    return check_recipe(values, origin="tools/bench/overhead.py")


@dataclass(frozen=True)
class Pair:
    """The share that steps of a run took more than bare ones; or one step whose memory was counted."""

    more: Clock
    is_counted: bool


def compared(recipe: Recipe) -> list[Pair]:
    """Blocks of a run against the same done bare, and each counted step of them against itself."""
    loops: list[Loop] = []

    class Kept(Loop):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            loops.append(self)

    pairs: list[Pair] = []
    times, counted = [Clock.now()], set[int]()  # when each step of a block was done
    with (
        mock.patch.object(qadapt.run, "Loop", Kept),
        mock.patch.object(loop_module, "MEMORY_EVERY", COUNTED_EVERY),
    ):
        for event in qadapt.run.train(recipe):
            if isinstance(event, MemoryMeasured):
                counted.add(event.step)
            if not isinstance(event, StepDone):
                continue
            times.append(Clock.now())
            if event.step % BLOCK:
                continue
            if event.step > FIRST:
                pairs += compared_block(loops[0], event.step - BLOCK, times, counted)
            times = [Clock.now()]
    return pairs


def compared_block(loop: Loop, done: int, times: list[Clock], counted: set[int]) -> list[Pair]:
    """The pairs of the ten steps after `done`; `times` has their beginning and the end of each."""
    steps = [after.since(before) for before, after in pairwise(times)]
    bares = [bare(loop, done + number) for number in range(BLOCK)]
    inside = {number for number in range(BLOCK) if done + number + 1 in counted}
    seconds = [
        sum_of(each for number, each in enumerate(kind) if number not in inside) for kind in (steps, bares)
    ]
    print(f"{BLOCK - len(inside)} steps: bare {seconds[1]}, watched over {seconds[0]}", flush=True)
    found = [Pair(seconds[0].more_than(seconds[1]), is_counted=False)]
    return found + [Pair(steps[number].more_than(bares[number]), is_counted=True) for number in inside]


def bare(loop: Loop, step: int) -> Clock:
    """What training the rows of a step takes with nothing around."""
    rows = [loop.rows.train[index] for index in loop.order.rows_of_step(step)]
    settings, began = loop.settings, Clock.now()
    train_step(
        loop.model,
        loop.optimizer,
        micro_batches(rows, size=settings.micro_batch, pad_id=loop.rows.pad_id),
        learning_rate=settings.learning_rate,
        clip_norm=settings.clip_norm,
        scaler=None,
    )
    return Clock.now().since(began)


if __name__ == "__main__":
    sys.exit(main())
