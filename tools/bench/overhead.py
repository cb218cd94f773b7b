"""What watching over a run costs, part by part, against the same steps bare, in one run.

    python tools/bench/overhead.py                      the demo model
    python tools/bench/overhead.py --tiny --pairs 4     a tiny random one: shows the parts, not the share

A real run trains. Three parts are compared, each with the very same rows on the same model and optimizer,
either way first in turn (ABBA):

    steps     a step of the run, with its events, journal, gauges, requests and rules, against `train_step`
    counted   a step whose memory is counted by the ledger, which is one of `MEMORY_EVERY`
    saving    a few steps beside which a checkpoint is written, against those steps alone; a run writes one
              every 100 steps, if so asked, or every `SAVE_SECONDS`, whichever comes first

Each is a median with its 95 % interval (bootstrap), of the time on the wall and of the processor's, all
threads together: that one counts what the saving thread works but not what it waits, and hardly feels other
programs. The sum is the share; the bar is 2 % of the time on the wall, for which the machine must be left
alone. Exits with 1 above it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_task import write_task

import qadapt.run
from qadapt.events import StepDone
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import check_recipe
from qadapt.train import loop as loop_module
from qadapt.train.checkpoint import drop_newer
from qadapt.train.loop import MEMORY_EVERY, SAVE_SECONDS, Loop
from qadapt.train.memory import MemoryMeter
from qadapt.train.step import train_step

if TYPE_CHECKING:
    from qadapt.recipe import Recipe

BAR = 0.02
FIRST = 4  # steps before the first pair: the first ones make, import and warm things; the third is a gauge's
BESIDE = 3  # steps beside which a checkpoint is written: more than it takes
SAVE_STEPS = 100
DRAWS = 2_000
NEVER = 10**9


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


@dataclass(frozen=True)
class Pair:
    """The same steps with a part and without it."""

    watched: Clock
    bare: Clock

    def share(self, kind: str) -> float:
        watched, bare = self.both(kind)
        return watched / bare - 1

    def extra(self, kind: str) -> float:
        watched, bare = self.both(kind)
        return watched - bare

    def both(self, kind: str) -> tuple[float, float]:
        watched, bare = (getattr(clock, kind) for clock in (self.watched, self.bare))
        return watched, bare


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=24, help="of steps; a third of it of the other parts")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    pairs = arguments.pairs - arguments.pairs % 2
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_DATA_HOME"] = place  # what this run measures is no calibration
        recipe = recipe_for(Path(place), is_tiny=arguments.tiny, steps=FIRST + pairs + BESIDE + 2)
        steps, counted, saving = measured(recipe, pairs=pairs)
    total = dict.fromkeys(("seconds", "cpu_seconds"), 0.0)
    for kind, what in (("seconds", "step time"), ("cpu_seconds", "the processor's time")):
        step_seconds = statistics.median(pair.both("seconds")[1] for pair in steps)
        between = min(SAVE_STEPS * step_seconds, SAVE_SECONDS)
        print(f"of {what}:")
        parts = {
            "in every step": [pair.share(kind) for pair in steps],
            f"by one counted in {MEMORY_EVERY}": [pair.share(kind) / MEMORY_EVERY for pair in counted],
            f"by saving every {between:.0f} s": [pair.extra(kind) / between for pair in saving],
        }
        for name, shares in parts.items():
            low, high = interval(shares)
            total[kind] += statistics.median(shares)
            print(f"  {name:<24} {statistics.median(shares):+8.3%}   ({low:+.3%} to {high:+.3%})")
        print(f"  {'together':<24} {total[kind]:+8.3%}")
    print(f"bar {BAR:.0%}: {'kept' if total['seconds'] <= BAR else 'BROKEN'}")
    return 0 if total["seconds"] <= BAR else 1


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with 95 %: percentiles of the medians of seeded redraws."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return medians[DRAWS // 40], medians[-DRAWS // 40]


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
        "train": {"steps": steps, "rows_per_step": 4, "rehearse": False},
        "memory": {"micro_batch": 2, "compute_dtype": "fp32"},
        "run": {"name": "overhead", "folder": str(place / "runs")},
    }
    return check_recipe(values, origin="tools/bench/overhead.py")


def measured(recipe: Recipe, *, pairs: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Pairs of a run's steps, then of counted ones, then of steps beside a save."""
    loops: list[Loop] = []

    class Kept(Loop):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            loops.append(self)

    with (
        mock.patch.object(qadapt.run, "Loop", Kept),
        mock.patch.multiple(loop_module, MEMORY_EVERY=NEVER, SAVE_SECONDS=NEVER),
    ):
        steps = compared_steps(qadapt.run.train(recipe), loops, pairs)
        loop = loops[0]
        meter, third = MemoryMeter(loop.model, loop.optimizer), range(max(2, pairs // 3))
        counted = [compared(loop, number, lambda step: counted_step(loop, meter, step)) for number in third]
        saving = [compared(loop, number, lambda step: beside_save(loop, step), BESIDE) for number in third]
    return steps, counted, saving


def compared_steps(events: Iterator[Any], loops: list[Loop], pairs: int) -> list[Pair]:
    """A run's steps against bare ones, which stand behind every second step, and before the next."""
    found: list[Pair] = []
    bares: dict[int, Clock] = {}
    began = Clock.now()
    for event in events:
        if not isinstance(event, StepDone):
            continue
        watched, step = Clock.now().since(began), event.step
        if step % 2 == 0:
            for number in (step, step + 1):
                bares[number] = timed(lambda number=number: bare(loops[0], number - 1))  # type: ignore[misc]
        if step > FIRST and step in bares:
            found.append(Pair(watched, bares[step]))
        if len(found) == pairs:
            return found
        began = Clock.now()
    raise AssertionError("the run has too few steps")


def compared(loop: Loop, number: int, watched: Callable[[int], None], steps: int = 1) -> Pair:
    """Some steps, watched or bare first in turn."""
    first = FIRST + steps * number

    def alone() -> None:
        for step in range(first, first + steps):
            bare(loop, step)

    if number % 2:
        return Pair(bare=timed(alone), watched=timed(lambda: watched(first)))
    return Pair(timed(lambda: watched(first)), timed(alone))


def counted_step(loop: Loop, meter: MemoryMeter, step: int) -> None:
    with meter.watching():
        bare(loop, step)


def beside_save(loop: Loop, first: int) -> None:
    """Steps beside which a checkpoint is written; what it replaces is removed, as a run does, too."""
    drop_newer(loop.run_folder, -1)
    for _ in loop._begin_save():
        pass
    for step in range(first, first + BESIDE):
        bare(loop, step)
    loop._saver.wait()


def timed(work: Callable[[], None]) -> Clock:
    began = Clock.now()
    work()
    return Clock.now().since(began)


def bare(loop: Loop, step: int) -> None:
    """Trains the rows of a step with nothing around."""
    step %= loop.settings.steps
    train_step(
        loop.model,
        loop.optimizer,
        loop.ladder.training([loop.rows.train[index] for index in loop.order.rows_of_step(step)]),
        learning_rate=loop.settings.learning_rate,
        clip_norm=loop.settings.clip_norm,
        scaler=None,
    )


if __name__ == "__main__":
    sys.exit(main())
