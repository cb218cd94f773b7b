"""The rules of a recipe's `run.pause_when`: what each name takes, and what it means in flat values.

Knows no card, no clock and no run: `train/guards.py` looks whether a rule holds.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, time

from qadapt.units import parse_bytes

COOLEST, HOTTEST = 30, 110


@dataclass(frozen=True)
class PauseRules:
    """When a run is to pause; None and False where that is not asked for.

    `hours` is from when to when the run is to wait, in local time; it may span midnight. With less than
    `vram_bytes` free on the card because of another program the run leaves; for all else it waits.
    """

    temperature_celsius: float | None = None
    vram_bytes: int | None = None
    hours: tuple[time, time] | None = None
    free_disk_bytes: int | None = None
    battery: bool = False


def parse_pause_rules(values: Mapping[str, object]) -> PauseRules:
    """The rules of a mapping such as `{temperature: 85, hours: "18:00-23:00", free_disk: 5GiB}`.

    Raises:
        ValueError: A name is no rule, or a value does not fit its rule; says all that is wrong.
    """
    found: dict[str, object] = {}
    problems = []
    for name, value in values.items():
        if name not in _PARSERS:
            close = difflib.get_close_matches(str(name), _PARSERS, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"there are {', '.join(_PARSERS)}"
            problems.append(f"no rule is named {name!r}; {hint}")
            continue
        field, parse = _PARSERS[name]
        try:
            found[field] = parse(value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("; ".join(problems))
    return PauseRules(**found)  # type: ignore[arg-type]


def _celsius(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not COOLEST <= float(str(value)) <= HOTTEST:
        raise ValueError(f"give degrees Celsius from {COOLEST} to {HOTTEST}, such as 85")
    return float(str(value))


def _amount(value: object) -> int:
    return parse_bytes(str(value))


def _hours(value: object) -> tuple[time, time]:
    first_text, _, last_text = str(value).partition("-")
    try:
        first, last = (datetime.strptime(text.strip(), "%H:%M").time() for text in (first_text, last_text))
    except ValueError:
        raise ValueError('give two times of a day, such as "18:00-23:00"') from None
    if first == last:
        raise ValueError("the two times are the same; give when the run is to wait, such as 18:00-23:00")
    return first, last


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("give true or false")
    return value


_PARSERS: dict[str, tuple[str, Callable[[object], object]]] = {
    "temperature": ("temperature_celsius", _celsius),
    "vram": ("vram_bytes", _amount),
    "hours": ("hours", _hours),
    "free_disk": ("free_disk_bytes", _amount),
    "battery": ("battery", _flag),
}
