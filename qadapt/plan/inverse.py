"""Inverse questions: the longest row, the most rows, the highest rank, the largest model that fits a budget.

By the closed form alone: whether there is room is asked at values that are halved between one that fits and
one that does not. That is right because every moment of the estimate takes more bytes for more tokens or a
higher rank (`tests/test_inverse.py` compares with asking every value), between the numbers of tokens at which
a plan may cut feed-forward parts into more pieces. Knobs that are free are turned as a plan turns them, but
only to the least memory (`least_way`): `fit` would find the fastest way, and take longer. Knows no screen and
no recipe file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from qadapt.errors import BadRecipe
from qadapt.hardware.cards import Card
from qadapt.methods import METHODS
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.knobs import KNOBS, LEAST_PLANNED_PIECE
from qadapt.plan.prefix import has_prefix
from qadapt.plan.room import Room
from qadapt.plan.setting import MOST_ROWS, Setting, check_setting
from qadapt.shape import ModelShape

What = Literal["length", "rows", "rank"]
"""The field of a `Setting` that is asked for."""


class Freedom(NamedTuple):
    """What a plan may turn: knobs by name, and the rows of an optimizer step; 0: a forward pass is one."""

    knobs: frozenset[str] = frozenset()
    rows_per_step: int = 0


HELD = Freedom()
"""Nothing is turned."""


class Ceiling(NamedTuple):
    """The largest value that may be asked for, and what sets it."""

    value: int
    reason: str


@dataclass(frozen=True)
class Most:
    """The answer: the largest value that fits, surely, by the estimate's own error.

    Attributes:
        what: What was asked for.
        value: The largest value that fits; None if not even the least does.
        ceiling: Where the search ended at the latest.
        estimate: The step at `value`, or at the least if nothing fits.
        next_estimate: The step at the next value, which does not fit; None at the ceiling or if nothing fits.
    """

    what: What
    value: int | None
    ceiling: Ceiling
    estimate: Estimate
    next_estimate: Estimate | None

    @property
    def is_at_ceiling(self) -> bool:
        """Whether not the memory but the ceiling ended the search."""
        return self.value == self.ceiling.value


def most(
    shape: ModelShape,
    setting: Setting,
    *,
    what: What,
    room: Room,
    freedom: Freedom = HELD,
    card: Card | None = None,
) -> Most:
    """The largest length, number of rows or rank that fits, all else as the setting has it but free knobs.

    Args:
        shape: The model.
        setting: The step.
        what: The field to raise.
        room: What there is.
        freedom: What a plan may turn for it.
        card: Where it runs.

    Raises:
        BadRecipe: See `check_setting`; or a rank is asked for, and the method has none.
    """
    facts = METHODS[setting.method]
    if what == "rank" and not facts.has_rank:
        raise BadRecipe(f"--max rank: {facts.title} has no rank.", cure="Ask for --max length or --max rows.")
    if what == "rank" and facts.size == "block":
        raise BadRecipe(
            "--max rank: OFT's blocks divide the widths of the layers; few widths do.",
            cure="Ask for --max length or --max rows.",
        )
    free, rows_per_step = freedom
    step = facts.size_step if what == "rank" else 1
    if what == "rows":
        free -= {"micro_batch"}
    least = setting.virtual_tokens + 1 if what == "length" else step
    check_setting(shape, _at(setting, what, least, rows_per_step=rows_per_step))
    ceiling = _ceiling(shape, setting, what, rows_per_step)

    def estimate(value: int) -> Estimate:
        asked = _at(setting, what, value, rows_per_step=rows_per_step)
        return least_way(shape, asked, room=room, freedom=Freedom(free, rows_per_step), card=card)

    stops = _stops(setting, what) if "mlp_tiles" in free else ()
    steps = largest(
        lambda tried: room.holds(estimate(tried * step)),
        ceiling.value // step,
        least=least // step,
        stops=stops,
    )
    value = steps and steps * step
    has_next = value is not None and value < ceiling.value
    found = value or least
    return Most(what, value, ceiling, estimate(found), estimate(found + step) if has_next else None)


def least_way(
    shape: ModelShape,
    setting: Setting,
    *,
    room: Room,
    freedom: Freedom,
    card: Card | None = None,
) -> Estimate:
    """The step that fits with the fewest last resorts of a plan; if none does, the smallest the host holds.

    Args:
        shape: The model.
        setting: Where the knobs that are not free stand.
        room: What there is.
        freedom: What may be turned.
        card: Where it runs.
    """
    tried = []
    for way in _ways(shape, setting, freedom):
        estimate = estimate_step(shape, way, card=card)
        if room.holds(estimate):
            return estimate
        tried.append(estimate)
    return min(tried, key=lambda each: (not room.host_holds(each), each.needed_bytes))


def _ways(shape: ModelShape, setting: Setting, freedom: Freedom) -> Iterator[Setting]:
    """Every free knob at its least memory; of the last resorts each only after the ones before it."""
    knobs = [knob for knob in KNOBS if knob.name in freedom.knobs]
    rows_per_step = max(freedom.rows_per_step, setting.rows)
    for knob in (knob for knob in knobs if not knob.last_resort):
        least = knob.values(shape, setting, rows_per_step)[-1]
        setting = knob.change(setting, least, rows_per_step=rows_per_step)
    yield setting
    for knob in (knob for knob in knobs if knob.last_resort):
        values = [
            each for each in knob.values(shape, setting, rows_per_step) if each != knob.value_of(setting)
        ]
        for value in values if knob.name == "offload" else values[-1:]:
            changed = knob.change(setting, value, rows_per_step=rows_per_step)
            yield changed
        setting = changed if values else setting


def _stops(setting: Setting, what: What) -> tuple[int, ...]:
    """The values from which on feed-forward parts may be in more pieces, which take less memory."""
    each = {"length": setting.rows, "rows": setting.length, "rank": 0}[what]
    return tuple(-(-LEAST_PLANNED_PIECE * 4**power // each) for power in (1, 2, 3)) if each else ()


def largest(
    fits: Callable[[int], bool], ceiling: int, *, least: int = 1, stops: tuple[int, ...] = ()
) -> int | None:
    """The largest of `least` to `ceiling` for which `fits` is true, if that is so up to there and not above.

    The ceiling is asked first: at the last number of rows the gradients need not wait, so that it may fit
    where the one before does not. At a stop it may be true again, and so up to somewhere.
    """
    if fits(ceiling):
        return ceiling
    starts = sorted({least, *(stop for stop in stops if least < stop < ceiling)}, reverse=True)
    ends = [ceiling, *starts]
    low, high = next(((start, end) for start, end in zip(starts, ends, strict=False) if fits(start)), (0, 0))
    if not low:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True)
class ModelAnswer:
    """One model of a list against a budget.

    Attributes:
        shape: The model.
        same: Names of other models with the same shape.
        estimate: Its step; None where it cannot be asked.
        refusal: Why it cannot: the length is above its context, say.
        fits: Whether it fits, surely.
    """

    shape: ModelShape
    same: tuple[str, ...]
    estimate: Estimate | None
    refusal: str | None
    fits: bool


def fitting_models(
    shapes: Iterable[ModelShape],
    setting: Setting,
    *,
    room: Room,
    free: frozenset[str] = frozenset(),
    card: Card | None = None,
) -> tuple[ModelAnswer, ...]:
    """Every shape against a budget, the largest model first; models of one shape are one answer."""
    names: dict[ModelShape, list[str]] = {}
    for shape in shapes:
        names.setdefault(dataclasses.replace(shape, name=""), []).append(shape.name)
    answers = [
        _model_answer(
            dataclasses.replace(key, name=first), tuple(others), setting, room=room, free=free, card=card
        )
        for key, (first, *others) in names.items()
    ]
    return tuple(sorted(answers, key=lambda answer: -answer.shape.parameters))


def _model_answer(
    shape: ModelShape,
    same: tuple[str, ...],
    setting: Setting,
    *,
    room: Room,
    free: frozenset[str],
    card: Card | None,
) -> ModelAnswer:
    try:
        estimate = least_way(shape, setting, room=room, freedom=Freedom(free, setting.rows), card=card)
    except BadRecipe as error:
        return ModelAnswer(shape, same, None, error.problem, fits=False)
    return ModelAnswer(shape, same, estimate, None, fits=room.holds(estimate))


def _at(setting: Setting, what: What, value: int, *, rows_per_step: int) -> Setting:
    if what == "length":
        return dataclasses.replace(setting, length=value)
    if what == "rank":
        return dataclasses.replace(setting, rank=value)
    return dataclasses.replace(setting, rows=value, accumulates=rows_per_step > value)


def _ceiling(shape: ModelShape, setting: Setting, what: What, rows_per_step: int) -> Ceiling:
    if what == "length":
        return Ceiling(shape.context, f"the context of {shape.name}")
    if what == "rank" and setting.virtual_tokens:
        return Ceiling(setting.length - 1, "one less than the length of a row")
    if what == "rank" and has_prefix(setting):
        return Ceiling(shape.context, f"the context of {shape.name}")
    if what == "rank" and METHODS[setting.method].usual_activation is not None:
        step = METHODS[setting.method].size_step
        return Ceiling(shape.width - step, f"{'one' if step == 1 else step} less than the width of the model")
    if what == "rank":
        adapted = [linear for linear in shape.linears if setting.adapts(linear)]
        if setting.method == "vera":
            return Ceiling(max(max(each.inputs, each.outputs) for each in adapted), "where the search ends")
        narrowest = min(min(linear.inputs, linear.outputs) for linear in adapted)
        if METHODS[setting.method].starts_wider:
            return Ceiling(narrowest * 2 // 3, "two thirds of the width of the narrowest adapted layer")
        return Ceiling(narrowest, "the width of the narrowest adapted layer")
    if rows_per_step:
        return Ceiling(rows_per_step, "the rows of one optimizer step")
    return Ceiling(MOST_ROWS, "where the search ends")
