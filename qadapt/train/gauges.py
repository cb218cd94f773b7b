"""What the losses and gradient norms of the last steps say about a run: pure functions of a few numbers.

Each gauge is well (None) or says what is wrong with its cure. They take medians, which a few odd steps do not
move. Knows no tensors, no events.

| gauge | ill when | why this limit |
|---|---|---|
| spike | loss > median + 8 robust sigmas, + half the median, + 0.1; in the first 16 steps > 3 times the first + 1 | see `SPIKE_SIGMAS`, `EXPLODED_TIMES` |
| diverging | median loss 1.25 times and median norm 3 times their lowest ones | the loss alone rises with harder rows, the norm alone with learning |
| stuck | median loss 1.25 times its lowest one, median norm at its lowest | harder rows raise both; past what it can learn from, no gradient pulls back |
| dead | 10 gradients in a row whose mean square is below Adam's epsilon | there it, not the gradient, sets the update |
| learned | 16 losses in a row below 0.001 | one token in 1,000 is still unsure; nothing is left to learn |
| clipped | 95 % of 50 norms above the clip, their median twice it | clipping is meant for the odd step |
"""  # noqa: E501 (a table)

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

HISTORY = 50
"""Steps whose loss and norm are kept."""
WINDOW = 32
"""Steps of a running median; half of them are enough to begin with."""
SPIKE_SIGMAS = 8
"""Losses of steps are skewed. Of 50,000 log-normal ones 1 was a spike at sigma 0.1, 5 at 0.2, 17 at 0.3."""
SPIKE_SHARE, SPIKE_NATS = 0.5, 0.1
"""Where the losses hardly differ, a spike is still at least this much above their median."""
EXPLODED_TIMES, EXPLODED_NATS = 3.0, 1.0
"""Before there are enough steps for a median; a first step of few rows may be low by chance."""
FIRST_STEPS = 8
"""The lowest medians begin with that of so many steps: a learning rate far too high shows before `WINDOW`."""
DIVERGING_LOSS, DIVERGING_NORM = 1.25, 3.0
ADAM_EPSILON = 1e-8
DEAD_STEPS, LEARNED_STEPS, LEARNED_NATS = 10, 16, 1e-3
CLIPPED_SHARE, CLIPPED_TIMES = 0.95, 2.0


@dataclass(frozen=True)
class Note:
    """What is wrong, and what to do about it."""

    message: str
    cure: str


@dataclass(frozen=True)
class History:
    """The last steps' mean losses and gradient norms before clipping, newest last, all finite.

    `lowest_loss` and `lowest_norm` are the lowest running medians so far; infinite before there were any.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    lowest_loss: float = math.inf
    lowest_norm: float = math.inf

    def after(self, loss: float, norm: float) -> History:
        """With one more step."""
        losses, norms = (*self.losses, loss)[-HISTORY:], (*self.norms, norm)[-HISTORY:]
        if len(losses) < WINDOW and len(losses) != FIRST_STEPS:
            return History(losses, norms, self.lowest_loss, self.lowest_norm)
        return History(
            losses,
            norms,
            min(self.lowest_loss, median(losses[-WINDOW:])),
            min(self.lowest_norm, median(norms[-WINDOW:])),
        )


def find_ill(
    history: History, *, clip_norm: float | None, trained_values: int
) -> Iterator[tuple[str, Note | None]]:
    """Every gauge by name, with what is wrong or None."""
    yield "spike", spike(history.losses)
    yield "diverging", diverging(history)
    yield "stuck", stuck(history)
    is_learned = learned(history.losses)
    yield "learned", is_learned
    yield "dead", None if is_learned else dead(history.norms, trained_values=trained_values)
    yield "clipped", clipped(history.norms, clip_norm=clip_norm)


def spike(losses: Sequence[float]) -> Note | None:
    """Whether the last loss stands far above those before it."""
    before = losses[:-1][-WINDOW:]
    if len(before) < WINDOW // 2:
        return _exploded(losses)
    middle = median(before)
    sigma = 1.4826 * median(abs(loss - middle) for loss in before)  # of a normal distribution
    if losses[-1] <= middle + max(SPIKE_SIGMAS * sigma, SPIKE_SHARE * middle, SPIKE_NATS):
        return None
    return Note(
        f"The loss jumped to {losses[-1]:.3g}; the median of the {len(before)} steps before is {middle:.3g}.",
        "One odd row does no harm. If it comes again and again, look at the rows (qadapt data preview) or "
        "lower train.learning_rate.",
    )


def _exploded(losses: Sequence[float]) -> Note | None:
    """Whether the loss of a run that has only begun is far above its first one."""
    if losses[-1] <= EXPLODED_TIMES * losses[0] + EXPLODED_NATS:
        return None
    return Note(
        f"The loss jumped from {losses[0]:.3g} to {losses[-1]:.3g} within {len(losses)} steps.",
        "Stop, and start again with a tenth of train.learning_rate or a longer train.warmup_steps.",
    )


def diverging(history: History) -> Note | None:
    """Whether loss and gradient norm both climb away from their lowest medians."""
    loss, norm = _medians(history)
    if not (_has_left(loss, history) and norm > DIVERGING_NORM * history.lowest_norm):
        return None
    return Note(
        f"The run climbs: over the last {WINDOW} steps the median loss is {loss:.3g} (its lowest was "
        f"{history.lowest_loss:.3g}), the median gradient norm {norm:.3g} ({history.lowest_norm:.3g}).",
        "Lower train.learning_rate, or lengthen train.warmup_steps; the best evaluation so far is kept.",
    )


def stuck(history: History) -> Note | None:
    """Whether the loss has left its lowest median and no gradient leads back: the rate is far too high."""
    loss, norm = _medians(history)
    if not (_has_left(loss, history) and norm <= history.lowest_norm):
        return None
    return Note(
        f"The run is stuck: over the last {WINDOW} steps the median loss is {loss:.3g} (its lowest was "
        f"{history.lowest_loss:.3g}), and the median gradient norm, {norm:.3g}, is the lowest of the run.",
        "It will not come back by itself: start again with a tenth of train.learning_rate, or from a "
        "checkpoint before the loss rose.",
    )


def _medians(history: History) -> tuple[float, float]:
    """The running medians of loss and norm; zero before there is a window of them."""
    if len(history.losses) < WINDOW:
        return 0.0, 0.0
    return median(history.losses[-WINDOW:]), median(history.norms[-WINDOW:])


def _has_left(loss: float, history: History) -> bool:
    return loss > DIVERGING_LOSS * history.lowest_loss + SPIKE_NATS


def learned(losses: Sequence[float]) -> Note | None:
    """Whether nothing is left to learn."""
    last = losses[-LEARNED_STEPS:]
    if len(last) < LEARNED_STEPS or max(last) >= LEARNED_NATS:
        return None
    return Note(
        f"The loss has been below {LEARNED_NATS} for {LEARNED_STEPS} steps: the rows are known by heart.",
        "Stop here, or give more rows or fewer epochs; see what is learned with `qadapt data preview`.",
    )


def dead(norms: Sequence[float], *, trained_values: int) -> Note | None:
    """Whether the gradient is too small to move anything."""
    last, limit = norms[-DEAD_STEPS:], ADAM_EPSILON * math.sqrt(trained_values)
    if len(last) < DEAD_STEPS or max(last) >= limit:
        return None
    return Note(
        f"The gradient has been next to nothing for {DEAD_STEPS} steps: its norm is {last[-1]:.2g}, and "
        f"below {limit:.2g} AdamW hardly moves.",
        "Look at what is learned (qadapt data preview), and whether adapter.targets are reached by text.",
    )


def clipped(norms: Sequence[float], *, clip_norm: float | None) -> Note | None:
    """Whether the clipping decides nearly every step."""
    if clip_norm is None or len(norms) < HISTORY:
        return None
    cut, middle = sum(norm > clip_norm for norm in norms), median(norms)
    if cut < CLIPPED_SHARE * len(norms) or middle <= CLIPPED_TIMES * clip_norm:
        return None
    return Note(
        f"train.clip_norm={clip_norm:g} cuts {cut} of the last {len(norms)} gradients; their median norm is "
        f"{middle:.3g}.",
        f"Set train.clip_norm to about {2 * middle:.2g}, so that it cuts odd steps only; if the loss does "
        "not fall, lower train.learning_rate.",
    )
