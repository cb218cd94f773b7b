"""The fastest plan within a budget: the combinations of the free knobs are estimated, the best one taken.

The closed form takes well under a millisecond per combination. All are tried, except that a fine knob's
values (`Knob.fine`: how many layers recompute) are searched by halving within each combination of the others,
and that last resorts (`Knob.last_resort`) are tried only where nothing fits without them, value by value:
a dearer one is not taken for a little speed, as its time rests on a bus that nobody has measured.
`tools/bench/exhaustive.py` compares with trying everything. Knows no screen and no recipe file.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from qadapt.errors import DoesNotFit
from qadapt.hardware.cards import Card
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.host import carried_bytes, looked_up_bytes, sliced_bytes, streamed_bytes, table_bytes
from qadapt.plan.knobs import KNOBS, Knob, Value
from qadapt.plan.ladder import ladder
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.plan.speed import BUS_GB, NOMINAL, micro_batch_count, step_seconds
from qadapt.shape import ModelShape
from qadapt.units import format_bytes, format_seconds


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
    tried: list[_Candidate] = []
    for choices in bench.stages(setting, knobs):
        tried += bench.search(setting, choices)
        fitting = [candidate for candidate in tried if bench.fits(candidate)]
        if fitting:
            break
    else:
        raise _does_not_fit(bench, _least(tried, room))
    best = min(fitting, key=lambda each: (each.cost, each.count, each.estimate.needed_bytes))
    return Plan(
        setting=best.estimate.setting,
        estimate=best.estimate,
        budget_bytes=room.free_bytes,
        micro_batches_per_step=best.count,
        seconds_per_step=best.seconds,
        reasons=bench.reasons(best, setting, knobs),
    )


Choice = tuple[Knob, tuple[Value, ...]]
"""A knob, and the values that are tried."""


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
            count=micro_batch_count(setting, rows_per_step=rows),
            seconds=seconds,
            cost=cost,
        )

    def fits(self, candidate: _Candidate) -> bool:
        return self.room.holds(candidate.estimate)

    def stages(self, setting: Setting, knobs: Sequence[Knob]) -> Iterator[list[Choice]]:
        """Which values to try together, until something fits: every next value of a last resort, in order.

        What was tried before is not tried again: a stage has the newest value alone.
        """
        free = [(knob, self.values(knob, setting)) for knob in knobs if not knob.last_resort]
        yield free
        taken: list[Choice] = []
        for knob in (knob for knob in knobs if knob.last_resort):
            values = self.values(knob, setting)
            start = values.index(knob.value_of(setting)) if knob.value_of(setting) in values else -1
            for value in values[start + 1 :]:
                yield [*taken, (knob, (value,)), *free]
            taken.append((knob, values))

    def words(self, knob: Knob, value: Value, setting: Setting) -> str:
        """A value in words; what is put away lies in a file where the device is the host itself."""
        words = knob.describe(value, self.shape)
        is_file = knob.name == "offload" and setting.device == "cpu"
        return (
            words.replace("the memory of the host", "a temporary file").replace("on the host", "in a file")
            if is_file
            else words
        )

    def values(self, knob: Knob, setting: Setting) -> tuple[Value, ...]:
        return knob.values(self.shape, setting, self.rows_per_step)

    def search(self, setting: Setting, choices: Sequence[Choice]) -> Iterator[_Candidate]:
        """Candidates, the fastest fitting one of every combination of the coarse knobs among them."""
        coarse = [choice for choice in choices if not choice[0].fine]
        fine = next((knob for knob, _ in choices if knob.fine), None)
        for values in itertools.product(*(values for _, values in coarse)):
            changed = setting
            for (knob, _), value in zip(coarse, values, strict=True):
                changed = knob.change(changed, value, rows_per_step=self.rows_per_step)
            yield from self._halve(changed, fine) if fine else [self.candidate(changed)]

    def _halve(self, setting: Setting, knob: Knob) -> Iterator[_Candidate]:
        """Candidates down to the first value of a fine knob that fits, and its last value."""
        values = self.values(knob, setting)
        low, high = 0, len(values) - 1
        yield self.candidate(knob.change(setting, values[high], rows_per_step=self.rows_per_step))
        while low < high:
            middle = (low + high) // 2
            tried = self.candidate(knob.change(setting, values[middle], rows_per_step=self.rows_per_step))
            yield tried
            low, high = (low, middle) if self.fits(tried) else (middle + 1, high)

    def reasons(self, best: _Candidate, asked: Setting, knobs: Sequence[Knob]) -> tuple[str, ...]:
        """A line for each free knob, but for a last resort that was not needed; and for what was asked."""
        lines = []
        for knob in KNOBS:
            is_moved = knob.value_of(best.estimate.setting) != knob.value_of(asked)
            if knob in knobs and (is_moved or not knob.last_resort):
                lines.append(self._reason(knob, best))
            elif knob.name == "offload" and asked.offload:
                lines.append(f"{self.words(knob, asked.offload, asked)}: as the recipe says.")
        return tuple(lines)

    def _reason(self, knob: Knob, best: _Candidate) -> str:
        """Why a knob stands where it does: what the next value up would take and change."""
        setting = best.estimate.setting
        chosen, values = knob.value_of(setting), self.values(knob, setting)
        text = self.words(knob, chosen, setting)
        if chosen == values[0]:
            return f"{text}: there is room for it{' with what follows' if setting.offload else ''}."
        above = values[values.index(chosen) - 1]
        other = self.candidate(knob.change(setting, above, rows_per_step=self.rows_per_step))
        more = format_bytes(other.estimate.needed_bytes - best.estimate.needed_bytes)
        needs = f"{knob.rise or self.words(knob, above, setting)} would take {more} more"
        if knob.name == "offload":
            return f"{text}: {needs}; it costs {self._bus_words(best)}."
        if not self.fits(other):
            needs += ", too much"
        return f"{text}: {needs}{self._speed_words(other, best)}."

    def _speed_words(self, other: _Candidate, best: _Candidate) -> str:
        """How fast another candidate would be; nothing where no speed is known."""
        if other.seconds is None or best.seconds is None:
            return ""
        comma = "," if not self.fits(other) else ""
        share = f"{abs(other.seconds / best.seconds - 1):.0%}"
        word = "faster" if other.seconds < best.seconds else "slower"
        return f"{comma} and be {'no faster' if share == '0%' else f'{share} {word}'}"

    def _bus_words(self, best: _Candidate) -> str:
        """What lies on the host, and how long the bus is busy with it."""
        setting = best.estimate.setting
        if setting.device == "cpu":
            return "writing them to a file and reading them again"
        carried = (streamed_bytes, carried_bytes, looked_up_bytes, sliced_bytes)
        moved = best.count * sum(each(self.shape, setting) for each in carried)
        there = table_bytes(self.shape, setting) + best.estimate.pinned_bytes
        seconds = format_seconds(moved / (BUS_GB * 1e9))
        return f"{format_bytes(there)} of the host's memory and {seconds} of an assumed bus per step"


def _least(tried: Sequence[_Candidate], room: Room) -> Estimate:
    """The step to start cures from: of those that the host has memory for, if any, the smallest.

    With every layer recomputed, though keeping the last may take a few MiB less: only then may layers go to
    the host, which wins far more.
    """
    estimates = [candidate.estimate for candidate in tried]
    return min(
        estimates,
        key=lambda each: (not room.host_holds(each), each.setting.recompute != "all", each.needed_bytes),
    )


def _does_not_fit(bench: _Bench, least: Estimate) -> DoesNotFit:
    shape, room, card = bench.shape, bench.room, bench.card
    changes = ladder(shape, least.setting, room=room, rows_per_step=bench.rows_per_step, card=card)
    problem = _problem(bench, least)
    enough = [change for change in changes if change.is_enough]
    if not enough:
        most = max(changes, key=lambda change: change.bytes_won, default=None)
        start = f" The most is won by: {most.sentence}." if most else ""
        return DoesNotFit(problem, cure=f"No change is enough; choose a smaller model.{start}")
    others = "; ".join(change.sentence for change in enough[1:4])
    rest = f" Or: {others}." if others else ""
    return DoesNotFit(problem, cure=f"Cheapest change: {enough[0].sentence}.{rest}")


def _problem(bench: _Bench, least: Estimate) -> str:
    """What is lacking: of the host if only that, else of the device, and what the host would have to give."""
    shape, room, card = bench.shape, bench.room, bench.card
    of_what = f"{shape.name} at {least.setting.length:,} tokens"
    if not room.host_holds(least):
        assert room.host_bytes is not None
        needed, free = format_bytes(least.host_bytes), format_bytes(room.host_bytes)
        return f"{of_what} needs {needed} of the host's memory; {free} are free there."
    where = f" on {card.name}" if card else ""
    amounts = f"{format_bytes(least.needed_bytes)} ± {format_bytes(room.error_bytes(least))}"
    problem = f"{of_what} needs {amounts}; {format_bytes(room.free_bytes)} are free{where}."
    return f"{problem}{_host_problem(bench, least)}"


def _host_problem(bench: _Bench, least: Estimate) -> str:
    """What a step needs that would fit but for the host, as a sentence to follow others; else nothing."""
    roomy = replace(bench.room, host_bytes=None)
    knob = next(knob for knob in KNOBS if knob.name == "offload")
    for value in bench.values(knob, least.setting):
        setting = knob.change(least.setting, value, rows_per_step=bench.rows_per_step)
        more = bench.candidate(setting).estimate
        if roomy.holds(more) and not bench.room.host_holds(more):
            assert bench.room.host_bytes is not None
            needed, free = format_bytes(more.host_bytes), format_bytes(bench.room.host_bytes)
            words = bench.words(knob, value, setting)
            return f" With {words} it would fit, but takes {needed} there, where {free} are free."
    return ""
