"""The one registry of what trades memory for something: each knob's values, its change, its rung.

`fit`, `ladder` and the commands read it; whoever adds a knob registers it here and reruns
`tools/bench/estimate_rows.py`. Rungs go from what costs nothing but time to what changes the run: 1 time
only, 2 the numbers (types, states), 3 what is trained. A knob's price is not written down: it is the
difference of two estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qadapt.plan.setting import Setting

Value = int | str | bool


@dataclass(frozen=True)
class Knob:
    """Something that can be set to fit.

    `values` gives every value worth trying for a setting and a number of rows per step, the one with the most
    memory first; `change` makes the setting; `describe` says it in words after a number or a name.
    """

    name: str
    field: str
    rung: int
    values: Callable[[Setting, int], tuple[Value, ...]]
    describe: Callable[[Value], str]

    def change(self, setting: Setting, value: Value, *, rows_per_step: int) -> Setting:
        """The setting with this knob at a value."""
        changed: dict[str, Any] = {self.field: value}
        if self.field == "rows":
            changed["accumulates"] = rows_per_step > int(value)
        return dataclasses.replace(setting, **changed)

    def value_of(self, setting: Setting) -> Value:
        """Where this knob stands."""
        values: dict[str, Value] = {name: vars(setting)[name] for name in (self.field,)}
        return values[self.field]


def micro_batches(rows_per_step: int, rows: int) -> int:
    """How many micro-batches make one optimizer step."""
    return -(-rows_per_step // rows)


def _row_values(_: Setting, rows_per_step: int) -> tuple[int, ...]:
    """The smallest number of rows for every number of micro-batches: more rows than that buy nothing."""
    smallest = {
        micro_batches(rows_per_step, micro_batches(rows_per_step, n)) for n in range(1, rows_per_step + 1)
    }
    return tuple(sorted(smallest, reverse=True))


def _halves(value: int, least: int) -> tuple[int, ...]:
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(found)


def _lengths(length: int) -> tuple[int, ...]:
    """The length, then three quarters and a half of it, and so on, in whole 64s down to 256."""
    shorter = (whole // 4 * part // 64 * 64 for whole in _halves(length, 256) for part in (3, 2))
    return (length, *dict.fromkeys(each for each in shorter if 256 <= each < length))


def _rows_text(value: Value) -> str:
    return "1 row at a time" if value == 1 else f"{value} rows at a time"


KNOBS: tuple[Knob, ...] = (
    Knob("micro_batch", "rows", 1, _row_values, _rows_text),
    Knob(
        "recompute",
        "recompute",
        1,
        lambda _, __: ("none", "all"),
        lambda value: "recompute every layer" if value == "all" else "keep every layer's activations",
    ),
    Knob(
        "double_quant",
        "double_quant",
        2,
        lambda _, __: (False, True),
        lambda value: "model.double_quant=true" if value else "model.double_quant=false",
    ),
    Knob(
        "optimizer",
        "optimizer",
        2,
        lambda _, __: ("adamw", "adamw-8bit"),
        lambda value: f"train.optimizer={value}",
    ),
    Knob(
        "quantization",
        "quantization",
        2,
        lambda _, __: ("none", "nf4"),
        lambda value: f"model.quantization={value}",
    ),
    Knob(
        "length",
        "length",
        3,
        lambda setting, _: _lengths(setting.length),
        lambda value: f"data.length={value}",
    ),
    Knob(
        "rank",
        "rank",
        3,
        lambda setting, _: _halves(setting.rank, 4),
        lambda value: f"adapter.rank={value}",
    ),
)

PLANNED = frozenset(knob.name for knob in KNOBS if knob.rung == 1)
"""The knobs that a plan may turn by itself where the recipe says `auto`: they change no result."""
