"""When nothing fits: the cheapest changes, each with the bytes it wins and the time it costs.

Knows no screen. A change is one knob turned as little as makes the step fit, or as far as it goes, in the
words that can be typed; what no recipe names is left to `qadapt plan`. A larger card comes last. Order:
changes that are enough by themselves before those that are not, then by rung, then by what is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qadapt.hardware.cards import Card, cards, this_platform
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.knobs import KNOBS, Knob
from qadapt.plan.room import Room
from qadapt.plan.setting import Setting
from qadapt.plan.speed import step_seconds
from qadapt.shape import ModelShape
from qadapt.units import GIB, format_bytes


@dataclass(frozen=True)
class Change:
    """One change: bytes won on the device (below 0: lost), seconds lost per optimizer step.

    None where no speed is known, and for a shorter length: its steps learn from less.
    """

    text: str
    rung: int
    bytes_won: int
    seconds_lost: float | None
    is_enough: bool

    @property
    def sentence(self) -> str:
        """`memory.recompute=all (-3.10 GiB, 2.1 s slower per step)`."""
        sign = "-" if self.bytes_won > 0 else "+"
        parts = [f"{sign}{format_bytes(abs(self.bytes_won))}"] if self.bytes_won else []
        if self.seconds_lost is not None and abs(self.seconds_lost) >= 0.05:
            word = "slower" if self.seconds_lost > 0 else "faster"
            parts.append(f"{abs(self.seconds_lost):.1f} s {word} per step")
        return f"{self.text} ({', '.join(parts)})" if parts else self.text


@dataclass(frozen=True)
class _Place:
    """Where changes are tried: a model, what there is, the rows of an optimizer step, a card."""

    shape: ModelShape
    room: Room
    rows_per_step: int
    card: Card | None

    def estimate(self, setting: Setting) -> Estimate:
        return estimate_step(self.shape, setting, card=self.card)

    def change(self, text: str, rung: int, *, now: Estimate, then: Estimate) -> Change:
        return Change(
            text=text,
            rung=rung,
            bytes_won=now.needed_bytes - then.needed_bytes,
            seconds_lost=self._lost(now.setting, then.setting),
            is_enough=self.room.holds(then),
        )

    def is_better(self, then: Estimate, than: Estimate) -> bool:
        """Whether it fits, or is nearer to that: where the host lacks memory, only its memory counts."""
        if self.room.holds(then):
            return True
        if not self.room.host_holds(then):
            return then.host_bytes < than.host_bytes
        return then.needed_bytes < than.needed_bytes or not self.room.host_holds(than)

    def _lost(self, now: Setting, then: Setting) -> float | None:
        before, after = (
            step_seconds(self.shape, each, rows_per_step=self.rows_per_step, card=self.card)
            for each in (now, then)
        )
        if before is None or after is None or now.length != then.length:
            return None
        return after - before


def ladder(
    shape: ModelShape,
    setting: Setting,
    *,
    room: Room,
    rows_per_step: int,
    card: Card | None = None,
) -> tuple[Change, ...]:
    """Every single change that brings a step nearer to what there is, best first; last a larger card.

    Where no single change is enough, several together that are come before them.
    """
    place = _Place(shape, room, rows_per_step, card)
    now = place.estimate(setting)
    turned = [_turned(knob, place, now) for knob in KNOBS if knob.typed is not None]
    found = [each[0] for each in (*turned, _planned(place, now)) if each is not None]
    found.sort(key=lambda change: (not change.is_enough, change.rung, change.seconds_lost or 0.0))
    if len(found) > 1 and not found[0].is_enough:
        together = _together(place, now)
        found = [together, *found] if together else found
    larger = _larger_card(place, now) if setting.device == "cuda" else None
    return (*found, larger) if larger else tuple(found)


def _together(place: _Place, now: Estimate) -> Change | None:
    """Several changes that are enough: each as far as it goes, the last one only as far as it must."""
    reached, texts = now, []
    for knob in KNOBS:
        turned = _turned(knob, place, reached) if knob.typed is not None else None
        if turned is None:
            continue
        change, reached = turned
        texts.append(change.text)
        if change.is_enough:
            return place.change(" and ".join(texts), change.rung, now=now, then=reached)
    return None


def _turned(knob: Knob, place: _Place, now: Estimate) -> tuple[Change, Estimate] | None:
    """The least turn of a knob that fits, or the furthest one, and its step; None if it wins nothing."""
    if knob.name == "quantization" and now.setting.quantization == "nf4":
        return None  # less quantization is no cure, even where a tiny model would be smaller for it
    best = now
    text = ""
    for value in knob.values(place.shape, now.setting, place.rows_per_step):
        then = place.estimate(knob.change(now.setting, value, rows_per_step=place.rows_per_step))
        if then.setting == now.setting or not place.is_better(then, best):
            continue
        best, text = then, knob.typed(value) if knob.typed else knob.describe(value, place.shape)
        if place.room.holds(then):
            break
    return None if best is now else (place.change(text, knob.rung, now=now, then=best), best)


def _planned(place: _Place, now: Estimate) -> tuple[Change, Estimate] | None:
    """What a plan does by itself, as no recipe names it; None if it wins nothing."""
    reached, texts = now, []
    for knob in KNOBS:
        turned = _turned(knob, place, reached) if knob.typed is None else None
        if turned is not None:
            texts.append(turned[0].text)
            reached = turned[1]
    if reached is now:
        return None
    text = f"`qadapt plan`, which takes {' and '.join(texts)} by itself"
    return place.change(text, 1, now=now, then=reached), reached


def _larger_card(place: _Place, now: Estimate) -> Change | None:
    """The smallest gaming card above the one at hand on which it fits as it is."""
    platform = this_platform()
    owned_bytes = place.card.memory_bytes if place.card else place.room.free_bytes
    larger = [
        card
        for card in cards()
        if card.name.startswith("RTX ")
        and not card.name.startswith("RTX A")
        and "Laptop" not in card.name
        and round(card.memory_bytes / GIB) > round(owned_bytes / GIB)
        and replace(place.room, free_bytes=card.free_bytes(platform)).holds(
            estimate_step(place.shape, now.setting, card=card)
        )
    ]
    if not larger:
        return None
    smallest = min(larger, key=lambda card: (round(card.memory_bytes / GIB), card.tflops or 0.0))
    return Change(f"a larger card, such as the {smallest.name}", 4, 0, None, is_enough=True)
