"""The fastest plan within a budget: the combinations of the free knobs are estimated, the best one taken.

The closed form takes well under a millisecond per combination. All are tried, except that a fine knob's
values (`Knob.fine`: how many layers recompute) are searched by halving within each combination of the others,
and that last resorts (`Knob.last_resort`) are tried only where nothing fits without them.
`tools/bench/exhaustive.py` compares with trying everything. Knows no screen and no recipe file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from qadapt.errors import DoesNotFit
from qadapt.hardware.cards import Card
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.knobs import KNOBS, Knob, micro_batches
from qadapt.plan.ladder import ladder
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.plan.speed import NOMINAL, step_seconds
from qadapt.shape import ModelShape
from qadapt.units import format_bytes


@dataclass(frozen=True)
class Plan:
    """How a step is placed in memory; `reasons` gives each choice with its price.

    `seconds_per_step` is of one optimizer step, all its micro-batches; None if the device's speed is unknown.
    """

    setting: Setting
    estimate: Estimate
    budget_bytes: int
    micro_batches_per_step: int
    seconds_per_step: float | None
    reasons: tuple[str, ...]


def fit(
    shape: ModelShape,
    setting: Setting,
    *,
    room: Room,
    rows_per_step: int,
    free: frozenset[str],
    card: Card | None = None,
) -> Plan:
    """The fastest setting that fits; between equally fast ones the one with fewer micro-batches.

    Args:
        shape: The model.
        setting: Where the knobs that are not free stand.
        room: What there is, and how far estimates have been off on this machine.
        rows_per_step: Rows of one optimizer step.
        free: Names of the knobs (`plan/knobs.py`) that may be turned, such as `micro_batch`, `recompute`.
        card: The card, if known: its speed decides; without it the count of operations does.

    Raises:
        DoesNotFit: No combination fits; the cure lists the cheapest changes.
        BadRecipe: See `check_setting`.
    """
    knobs = [knob for knob in KNOBS if knob.name in free]
    bench = _Bench(shape, rows_per_step, room, card)
    turned = [knob for knob in knobs if not knob.last_resort]
    for more in (None, *(knob for knob in knobs if knob.last_resort)):
        turned += [] if more is None else [more]
        tried = list(bench.search(setting, turned))
        fitting = [candidate for candidate in tried if bench.fits(candidate)]
        if fitting:
            break
    else:
        least = min((candidate.estimate for candidate in tried), key=lambda each: each.needed_bytes)
        raise _does_not_fit(shape, least, room=room, rows_per_step=rows_per_step, card=card)
    best = min(fitting, key=lambda each: (each.cost, each.count, each.estimate.needed_bytes))
    return Plan(
        setting=best.estimate.setting,
        estimate=best.estimate,
        budget_bytes=room.free_bytes,
        micro_batches_per_step=best.count,
        seconds_per_step=best.seconds,
        reasons=tuple(bench.reason(knob, best) for knob in turned),
    )


@dataclass(frozen=True)
class _Candidate:
    """A combination: `cost` is its seconds, or a number that compares like them where no speed is known."""

    estimate: Estimate
    count: int
    seconds: float | None
    cost: float


@dataclass(frozen=True)
class _Bench:
    """Where combinations are tried: a model, the rows of an optimizer step, a budget, a card."""

    shape: ModelShape
    rows_per_step: int
    room: Room
    card: Card | None

    def candidate(self, setting: Setting) -> _Candidate:
        rows, card = self.rows_per_step, self.card
        seconds = step_seconds(self.shape, setting, rows_per_step=rows, card=card)
        cost = seconds
        if cost is None:
            cost = step_seconds(self.shape, setting, rows_per_step=rows, card=NOMINAL)
        assert cost is not None
        return _Candidate(
            estimate=estimate_step(self.shape, setting, card=card),
            count=micro_batches(rows, setting.rows),
            seconds=seconds,
            cost=cost,
        )

    def fits(self, candidate: _Candidate) -> bool:
        return self.room.holds(candidate.estimate)

    def search(self, setting: Setting, knobs: list[Knob]) -> Iterator[_Candidate]:
        """Candidates, the fastest fitting one of every combination of the coarse knobs among them."""
        coarse = [knob for knob in knobs if not knob.fine]
        fine = next((knob for knob in knobs if knob.fine), None)
        choices = (knob.values(self.shape, setting, self.rows_per_step) for knob in coarse)
        for values in itertools.product(*choices):
            changed = setting
            for knob, value in zip(coarse, values, strict=True):
                changed = knob.change(changed, value, rows_per_step=self.rows_per_step)
            yield from self._halve(changed, fine) if fine else [self.candidate(changed)]

    def _halve(self, setting: Setting, knob: Knob) -> Iterator[_Candidate]:
        """Candidates down to the first value of a fine knob that fits, and its last value."""
        values = knob.values(self.shape, setting, self.rows_per_step)
        low, high = 0, len(values) - 1
        yield self.candidate(knob.change(setting, values[high], rows_per_step=self.rows_per_step))
        while low < high:
            middle = (low + high) // 2
            tried = self.candidate(knob.change(setting, values[middle], rows_per_step=self.rows_per_step))
            yield tried
            low, high = (low, middle) if self.fits(tried) else (middle + 1, high)

    def reason(self, knob: Knob, best: _Candidate) -> str:
        """Why a knob stands where it does: what the next value up would take and change."""
        setting = best.estimate.setting
        chosen = knob.value_of(setting)
        values = knob.values(self.shape, setting, self.rows_per_step)
        place = values.index(chosen)
        text = knob.describe(chosen, self.shape)
        if place == 0:
            return f"{text}: there is room for it."
        above = values[place - 1]
        other = self.candidate(knob.change(setting, above, rows_per_step=self.rows_per_step))
        more = format_bytes(other.estimate.needed_bytes - best.estimate.needed_bytes)
        word = "faster" if other.cost < best.cost else "slower"
        change = f"{abs(other.cost / best.cost - 1):.0%} {word}"
        needs = f"{knob.rise or knob.describe(above, self.shape)} would take {more} more"
        too_much = "" if self.fits(other) else ", too much,"
        return f"{text}: {needs}{too_much} and be {change}."


def _does_not_fit(
    shape: ModelShape,
    least: Estimate,
    *,
    room: Room,
    rows_per_step: int,
    card: Card | None,
) -> DoesNotFit:
    where = f" on {card.name}" if card else ""
    wider = room.error_bytes(least) - least.error_bytes
    budget_bytes = room.free_bytes - wider
    changes = ladder(shape, least.setting, budget_bytes=budget_bytes, rows_per_step=rows_per_step, card=card)
    problem = (
        f"{shape.name} at {least.setting.length:,} tokens needs {format_bytes(least.needed_bytes)} "
        f"± {format_bytes(room.error_bytes(least))}; {format_bytes(room.free_bytes)} are free{where}."
        f"{_host_problem(least, room)}"
    )
    enough = [change for change in changes if change.is_enough]
    if not enough:
        start = f" The most is won by: {changes[0].sentence}." if changes else ""
        return DoesNotFit(problem, cure=f"No change is enough; choose a smaller model.{start}")
    others = "; ".join(change.sentence for change in enough[1:4])
    rest = f" Or: {others}." if others else ""
    return DoesNotFit(problem, cure=f"Cheapest change: {enough[0].sentence}.{rest}")


def _host_problem(least: Estimate, room: Room) -> str:
    """What the least step lacks on the host, as a sentence to follow others; nothing if it lacks nothing."""
    if room.host_holds(least):
        return ""
    assert room.host_bytes is not None
    needed, free = format_bytes(least.host_bytes), format_bytes(room.host_bytes)
    return f" That takes {needed} of the host's memory, too; {free} are free there."
