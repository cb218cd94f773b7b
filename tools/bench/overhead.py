"""What a step costs with everything that watches over it, against the same step bare, in one run.

    python tools/bench/overhead.py                      the demo model
    python tools/bench/overhead.py --tiny --pairs 3     a tiny random one: shows the parts, not the share

A real run trains: events, journal, memory meter, health gauges, requests and rules looked at, a checkpoint
saved in the background every ten steps. After every ten of its steps the very same rows are trained bare by
`train_step` with the same model and optimizer, and nothing else. The share is the median over such pairs; the
bar is 2 %. Exits with 1 above it. The machine must be left alone meanwhile. The share of the processor's
time counts what the saving thread works but not what it waits, and hardly feels other programs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

from demo_task import write_task

import qadapt.run
from qadapt.data.batches import micro_batches
from qadapt.events import StepDone
from qadapt.quiet import quiet_libraries
from qadapt.recipe_file import check_recipe
from qadapt.train.loop import MEMORY_EVERY, Loop
from qadapt.train.step import train_step

if TYPE_CHECKING:
    from qadapt.recipe import Recipe

BAR = 0.02
FIRST = 2 * MEMORY_EVERY  # steps before the first pair: the first step makes, imports and warms things


@dataclass(frozen=True)
class Clock:
    """Seconds on the wall and of the processor, all threads of this process together."""

    seconds: float
    cpu_seconds: float

    @classmethod
    def now(cls) -> Clock:
        return cls(time.perf_counter(), time.process_time())

    def until_now(self) -> Clock:
        now = Clock.now()
        return Clock(now.seconds - self.seconds, now.cpu_seconds - self.cpu_seconds)

    def more_than(self, other: Clock) -> Clock:
        return Clock(self.seconds / other.seconds - 1, self.cpu_seconds / other.cpu_seconds - 1)

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s ({self.cpu_seconds:.2f} of the processor)"


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
        recipe = recipe_for(Path(place), is_tiny=arguments.tiny, steps=FIRST + arguments.pairs * MEMORY_EVERY)
        pairs = list(compared(recipe))
    shares = [pair.seconds for pair in pairs]
    median = statistics.median(shares)
    verdict = "kept" if median <= BAR else "BROKEN"
    print(f"of the processor's time: {statistics.median(pair.cpu_seconds for pair in pairs):+.2%}")
    print(f"of step time: {median:+.2%} ({min(shares):+.2%} to {max(shares):+.2%}); bar {BAR:.0%}: {verdict}")
    return 0 if median <= BAR else 1


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
        "train": {"steps": steps, "rows_per_step": 4, "checkpoint_every": MEMORY_EVERY},
        "memory": {"micro_batch": 2, "compute_dtype": "fp32"},
        "run": {"name": "overhead", "folder": str(place / "runs")},
    }
    return check_recipe(values, origin="tools/bench/overhead.py")


def compared(recipe: Recipe) -> Iterator[Clock]:
    """What each ten steps of a run took more than the same ten done bare, as shares."""
    loops: list[Loop] = []

    class Kept(Loop):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            loops.append(self)

    began, watched, plain = Clock.now(), [], []
    with mock.patch.object(qadapt.run, "Loop", Kept):
        for event in qadapt.run.train(recipe):
            if not isinstance(event, StepDone):
                continue
            (watched if event.step % MEMORY_EVERY == 0 else plain).append(event.seconds)
            if event.step % MEMORY_EVERY or event.step < FIRST:
                continue
            if event.step > FIRST:
                seconds = began.until_now()
                bare_seconds = bare(loops[0], range(event.step - MEMORY_EVERY, event.step))
                print(f"{MEMORY_EVERY} steps: bare {bare_seconds}, watched over {seconds}", flush=True)
                yield seconds.more_than(bare_seconds)
            began = Clock.now()
    more, usual = statistics.median(watched) - statistics.median(plain), statistics.median(plain)
    print(f"a step whose memory is counted takes {more:+.4f} s more than one of {usual:.4f} s")


def bare(loop: Loop, steps: range) -> Clock:
    """What training the rows of these steps takes with nothing around."""
    settings = loop.settings
    began = Clock.now()
    for step in steps:
        rows = [loop.rows.train[index] for index in loop.order.rows_of_step(step)]
        train_step(
            loop.model,
            loop.optimizer,
            micro_batches(rows, size=settings.micro_batch, pad_id=loop.rows.pad_id),
            learning_rate=settings.learning_rate,
            clip_norm=settings.clip_norm,
            scaler=None,
        )
    return began.until_now()


if __name__ == "__main__":
    sys.exit(main())
