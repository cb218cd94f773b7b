"""The fastest plan within a budget: every combination of the free knobs is estimated, the best one taken.

The closed form takes well under a millisecond per combination, so nothing is searched cleverly. Knows no
screen and no recipe file.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from qadapt.errors import DoesNotFit
from qadapt.hardware.cards import Card
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.knobs import KNOBS, Knob, micro_batches
from qadapt.plan.ladder import ladder
from qadapt.plan.setting import Setting
from qadapt.plan.speed import relative_cost
from qadapt.shape import ModelShape
from qadapt.units import format_bytes


@dataclass(frozen=True)
class Plan:
    """How a step is placed in memory; `reasons` gives each choice with its price."""

    setting: Setting
    estimate: Estimate
    budget_bytes: int
    micro_batches_per_step: int
    reasons: tuple[str, ...]

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of one optimizer step, all its micro-batches; None if the device's speed is unknown."""
        if self.estimate.seconds_per_step is None:
            return None
        return self.estimate.seconds_per_step * self.micro_batches_per_step


def fit(
    shape: ModelShape,
    setting: Setting,
    *,
    budget_bytes: int,
    rows_per_step: int,
    free: frozenset[str],
    card: Card | None = None,
) -> Plan:
    """The fastest setting that fits; between equally fast ones the one with fewer micro-batches.

    Args:
        shape: The model.
        setting: Where the knobs that are not free stand.
        budget_bytes: What there is, a CUDA context included.
        rows_per_step: Rows of one optimizer step.
        free: Names of the knobs (`plan/knobs.py`) that may be turned, such as `micro_batch`, `recompute`.
        card: The card, if known: its speed decides; without it the count of operations does.

    Raises:
        DoesNotFit: No combination fits; the cure lists the cheapest changes.
        BadRecipe: See `check_setting`.
    """
    knobs = [knob for knob in KNOBS if knob.name in free]
    tried = _combinations(shape, setting, knobs, rows_per_step=rows_per_step, card=card)
    fitting = [estimate for estimate in tried if estimate.fits(budget_bytes)]
    if not fitting:
        raise _does_not_fit(shape, tried, budget_bytes=budget_bytes, rows_per_step=rows_per_step, card=card)

    def order(estimate: Estimate) -> tuple[float, int, int]:
        count = micro_batches(rows_per_step, estimate.setting.rows)
        return (_seconds(shape, estimate) * count, count, estimate.needed_bytes)

    best = min(fitting, key=order)
    reasons = [
        _reason(knob, shape, best, tried=tried, budget_bytes=budget_bytes, rows_per_step=rows_per_step)
        for knob in knobs
    ]
    return Plan(
        setting=best.setting,
        estimate=best,
        budget_bytes=budget_bytes,
        micro_batches_per_step=micro_batches(rows_per_step, best.setting.rows),
        reasons=tuple(reasons),
    )


def _combinations(
    shape: ModelShape, setting: Setting, knobs: list[Knob], *, rows_per_step: int, card: Card | None
) -> list[Estimate]:
    estimates = []
    for values in itertools.product(*(knob.values(setting, rows_per_step) for knob in knobs)):
        changed = setting
        for knob, value in zip(knobs, values, strict=True):
            changed = knob.change(changed, value, rows_per_step=rows_per_step)
        estimates.append(estimate_step(shape, changed, card=card))
    return estimates


def _seconds(shape: ModelShape, estimate: Estimate) -> float:
    """Seconds of a micro-batch, or a number that compares like them where no speed is known."""
    if estimate.seconds_per_step is not None:
        return estimate.seconds_per_step
    return relative_cost(shape, estimate.setting)


def _reason(
    knob: Knob,
    shape: ModelShape,
    best: Estimate,
    *,
    tried: list[Estimate],
    budget_bytes: int,
    rows_per_step: int,
) -> str:
    """Why a knob stands where it does: what the next value up would take and change."""
    chosen = knob.value_of(best.setting)
    values = knob.values(best.setting, rows_per_step)
    place = values.index(chosen) if chosen in values else 0
    text = knob.describe(chosen)
    if place == 0:
        return f"{text}: there is room for it."
    above = knob.change(best.setting, values[place - 1], rows_per_step=rows_per_step)
    other = next(estimate for estimate in tried if estimate.setting == above)
    more = other.needed_bytes - best.needed_bytes
    here = _seconds(shape, best) * micro_batches(rows_per_step, best.setting.rows)
    there = _seconds(shape, other) * micro_batches(rows_per_step, above.rows)
    change = f"{abs(there / here - 1):.0%} {'faster' if there < here else 'slower'}"
    needs = f"{knob.describe(values[place - 1])} would take {format_bytes(more)} more"
    if other.fits(budget_bytes):
        return f"{text}: {needs} and be {change}."
    return f"{text}: {needs} than this, and does not fit ({change})."


def _does_not_fit(
    shape: ModelShape,
    tried: list[Estimate],
    *,
    budget_bytes: int,
    rows_per_step: int,
    card: Card | None,
) -> DoesNotFit:
    least = min(tried, key=lambda estimate: estimate.needed_bytes)
    where = f" on {card.name}" if card else ""
    changes = ladder(shape, least.setting, budget_bytes=budget_bytes, rows_per_step=rows_per_step, card=card)
    problem = (
        f"{shape.name} at {least.setting.length:,} tokens needs {format_bytes(least.needed_bytes)} "
        f"± {format_bytes(least.error_bytes)}; {format_bytes(budget_bytes)} are free{where}."
    )
    enough = [change for change in changes if change.is_enough] or list(changes)
    if not enough:
        return DoesNotFit(problem, cure="No single change is enough; choose a smaller model.")
    others = "; ".join(change.sentence for change in enough[1:4])
    rest = f" Or: {others}." if others else ""
    word = "Cheapest change" if enough[0].is_enough else "No single change is enough; start with"
    return DoesNotFit(problem, cure=f"{word}: {enough[0].sentence}.{rest}")
