"""Compares the plan with trying everything: every number of rows with every number of recomputed layers.

    python tools/bench/exhaustive.py [--points N]

Each point is a model, a card, a length, a number of rows per step and a share of learned tokens, drawn with a
fixed seed; the budget lies anywhere from what the smallest step takes to what the largest one does. The
search below shares nothing with `plan/fit.py` but the closed form's bytes and seconds of one step.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator
from typing import NamedTuple

from qadapt.hardware.cards import Card, cards
from qadapt.plan.estimate import estimate_step
from qadapt.plan.fit import fit
from qadapt.plan.knobs import KNOBS, PLANNED
from qadapt.plan.room import Room
from qadapt.plan.setting import Recompute, Setting, auto_dtypes
from qadapt.plan.speed import step_seconds
from qadapt.shape import ModelShape, known_shapes

POINTS = 240
BAR = 1.02
SEED = 0
FIRST = PLANNED - {knob.name for knob in KNOBS if knob.last_resort}
"""The knobs that a plan turns before its last resorts; the budgets here never need those."""


class Way(NamedTuple):
    """One way to place a step: what it needs, its stated error included, and how long it takes."""

    rows: int
    recompute: Recompute
    needed_bytes: int
    seconds: float


def all_ways(shape: ModelShape, setting: Setting, *, rows_per_step: int, card: Card) -> Iterator[Way]:
    """Every number of rows with every number of recomputed layers."""
    recomputes: tuple[Recompute, ...] = ("none", *range(1, shape.layers), "all")
    for rows, recompute in itertools.product(range(1, rows_per_step + 1), recomputes):
        tried = dataclasses.replace(setting, rows=rows, recompute=recompute, accumulates=rows_per_step > rows)
        estimate = estimate_step(shape, tried, card=card)
        seconds = step_seconds(shape, tried, rows_per_step=rows_per_step, card=card)
        assert seconds is not None
        yield Way(rows, recompute, estimate.needed_bytes + estimate.error_bytes, seconds)


class Point(NamedTuple):
    """The plan and the best way at one point; `ratio` is the plan's time over the best one's."""

    text: str
    ratio: float
    is_same: bool
    plan_seconds: float


def compare(draw: random.Random) -> Point:
    """Plans one drawn point and tries everything there."""
    shape = draw.choice(known_shapes())
    card = draw.choice([card for card in cards() if card.tflops and card.bandwidth_gb])
    rows_per_step = draw.randint(1, 16)
    compute_dtype, adapter_dtype = auto_dtypes("cuda", has_bf16=card.has_bf16)
    setting = Setting(
        length=min(shape.context, draw.randint(64, 4096)),
        compute_dtype=compute_dtype,
        adapter_dtype=adapter_dtype,
        supervised_share=draw.choice((0.1, 0.4, 1.0)),
    )
    ways = list(all_ways(shape, setting, rows_per_step=rows_per_step, card=card))
    least, most = (each(way.needed_bytes for way in ways) for each in (min, max))
    budget_bytes = round(least * (most / least) ** draw.random())
    best = min((way for way in ways if way.needed_bytes <= budget_bytes), key=lambda way: way.seconds)
    start = time.perf_counter()
    plan = fit(shape, setting, room=Room(budget_bytes), rows_per_step=rows_per_step, free=FIRST, card=card)
    taken = time.perf_counter() - start
    assert plan.seconds_per_step is not None
    chosen = (plan.setting.rows, plan.setting.recompute)
    text = (
        f"{shape.name.rpartition('/')[2]:28} {card.name:20} {setting.length:5} tokens,"
        f" {rows_per_step:2} rows a step,"
        f" {budget_bytes / 2**30:6.2f} GiB: plan {chosen[0]:2} rows, {chosen[1]!s:4} best {best.rows:2} rows,"
        f" {best.recompute!s:4}"
    )
    ratio = plan.seconds_per_step / best.seconds
    return Point(text, ratio, chosen == (best.rows, best.recompute), taken)


def compare_all(count: int) -> list[Point]:
    """So many points, always the same ones."""
    draw = random.Random(SEED)
    return [compare(draw) for _ in range(count)]


def report(count: int = POINTS) -> Iterator[str]:
    """The comparison, the worst point last."""
    points = compare_all(count)
    for point in points:
        yield f"{point.text}  x {point.ratio:.4f}"
    same = sum(point.is_same for point in points)
    slowest = max(point.plan_seconds for point in points)
    worst = max(points, key=lambda point: point.ratio)
    yield f"\n{len(points)} points, {same} with the very same plan; the slowest plan took {slowest:.2f} s"
    met = "met" if worst.ratio <= BAR else "MISSED"
    yield f"worst: x {worst.ratio:.4f} (bar x {BAR}): {met}  {worst.text}"


def main() -> None:
    """Prints it."""
    parser = argparse.ArgumentParser(description="Compares the plan with trying everything.")
    parser.add_argument("--points", type=int, default=POINTS)
    for line in report(parser.parse_args().points):
        print(line, flush=True)


if __name__ == "__main__":
    main()
