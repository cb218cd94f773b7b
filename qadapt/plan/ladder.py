"""When nothing fits: the cheapest changes, each with the bytes it wins and the time it costs.

Knows no screen. A change is one knob turned as little as makes the step fit, or as far as it goes; a larger
card comes last. Order: changes that are enough by themselves before those that are not, then by rung, then
by what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from qadapt.hardware.cards import Card, cards, this_platform
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.knobs import KNOBS, Knob
from qadapt.plan.setting import Setting
from qadapt.plan.speed import step_seconds
from qadapt.shape import ModelShape
from qadapt.units import GIB, format_bytes


@dataclass(frozen=True)
class Change:
    """One change: bytes won (of what is needed), seconds lost per optimizer step.

    None where no speed is known, and for a shorter length: its steps learn from less.
    """

    text: str
    rung: int
    bytes_won: int
    seconds_lost: float | None
    is_enough: bool

    @property
    def sentence(self) -> str:
        """`recompute every layer (-3.10 GiB, 2.1 s slower per step)`."""
        parts = [f"-{format_bytes(self.bytes_won)}"] if self.bytes_won else []
        if self.seconds_lost is not None and abs(self.seconds_lost) >= 0.05:
            word = "slower" if self.seconds_lost > 0 else "faster"
            parts.append(f"{abs(self.seconds_lost):.1f} s {word} per step")
        return f"{self.text} ({', '.join(parts)})" if parts else self.text


def ladder(
    shape: ModelShape,
    setting: Setting,
    *,
    budget_bytes: int,
    rows_per_step: int,
    card: Card | None = None,
) -> tuple[Change, ...]:
    """Every single change that wins memory, best first; last the smallest card that would do.

    Where no single change is enough, several together that are come before them.
    """
    now = estimate_step(shape, setting, card=card)
    limits = {"budget_bytes": budget_bytes, "rows_per_step": rows_per_step}
    turned = [_turned(knob, shape, now, card=card, **limits) for knob in KNOBS]
    found = [each[0] for each in turned if each is not None]
    found.sort(key=lambda change: (not change.is_enough, change.rung, change.seconds_lost or 0.0))
    if len(found) > 1 and not found[0].is_enough:
        together = _together(shape, now, card=card, **limits)
        found = [together, *found] if together else found
    owned = card.memory_bytes if card else budget_bytes
    larger = _larger_card(shape, now, owned_bytes=owned) if setting.device == "cuda" else None
    return (*found, larger) if larger else tuple(found)


def _together(
    shape: ModelShape, now: Estimate, *, budget_bytes: int, rows_per_step: int, card: Card | None
) -> Change | None:
    """Several changes that are enough: each as far as it goes, the last one only as far as it must."""
    reached, texts = now, []
    for knob in KNOBS:
        turned = _turned(
            knob, shape, reached, budget_bytes=budget_bytes, rows_per_step=rows_per_step, card=card
        )
        if turned is None:
            continue
        change, reached = turned
        texts.append(change.text)
        if change.is_enough:
            lost = _lost(shape, now.setting, reached.setting, rows_per_step=rows_per_step, card=card)
            won = now.needed_bytes - reached.needed_bytes
            return Change(" and ".join(texts), change.rung, won, lost, is_enough=True)
    return None


def _turned(
    knob: Knob,
    shape: ModelShape,
    now: Estimate,
    *,
    budget_bytes: int,
    rows_per_step: int,
    card: Card | None,
) -> tuple[Change, Estimate] | None:
    """The least turn of a knob that fits, or the furthest one, and its step; None if it wins nothing."""
    best: tuple[Change, Estimate] | None = None
    if knob.name == "quantization" and now.setting.quantization == "nf4":
        return None  # less quantization is no cure, even where a tiny model would be smaller for it
    for value in knob.values(shape, now.setting, rows_per_step):
        changed = knob.change(now.setting, value, rows_per_step=rows_per_step)
        estimate = estimate_step(shape, changed, card=card)
        won = now.needed_bytes - estimate.needed_bytes
        if won <= 0 or (best is not None and won <= best[0].bytes_won):
            continue
        change = Change(
            text=knob.describe(value, shape),
            rung=knob.rung,
            bytes_won=won,
            seconds_lost=_lost(shape, now.setting, changed, rows_per_step=rows_per_step, card=card),
            is_enough=estimate.fits(budget_bytes),
        )
        best = change, estimate
        if change.is_enough:
            break
    return best


def _lost(
    shape: ModelShape, now: Setting, then: Setting, *, rows_per_step: int, card: Card | None
) -> float | None:
    before = step_seconds(shape, now, rows_per_step=rows_per_step, card=card)
    after = step_seconds(shape, then, rows_per_step=rows_per_step, card=card)
    if before is None or after is None or now.length != then.length:
        return None
    return after - before


def _larger_card(shape: ModelShape, now: Estimate, *, owned_bytes: int) -> Change | None:
    """The smallest gaming card above the one at hand on which it fits as it is."""
    platform = this_platform()
    larger = [
        card
        for card in cards()
        if card.name.startswith("RTX ")
        and not card.name.startswith("RTX A")
        and "Laptop" not in card.name
        and round(card.memory_bytes / GIB) > round(owned_bytes / GIB)
        and estimate_step(shape, now.setting, card=card).fits(card.free_bytes(platform))
    ]
    if not larger:
        return None
    smallest = min(larger, key=lambda card: (round(card.memory_bytes / GIB), card.tflops or 0.0))
    return Change(f"a larger card, such as the {smallest.name}", 4, 0, None, is_enough=True)
