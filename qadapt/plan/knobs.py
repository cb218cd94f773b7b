"""The one registry of what trades memory for something: each knob's values, its change, its rung.

`fit`, `ladder` and the commands read it; whoever adds a knob registers it here and reruns
`tools/bench/estimator.py`. Rungs go from what costs nothing but time to what changes the run: 1 time
only, 2 the numbers (types, states), 3 what is trained. A knob's price is not written down: it is the
difference of two estimates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qadapt.methods import METHODS
from qadapt.plan.setting import LOSS_CHUNK, MOST_ROWS, Setting
from qadapt.shape import ModelShape

Value = int | str | bool | tuple[str, ...]
_CHUNKS = (LOSS_CHUNK, 128, 64, 32)
LEAST_PLANNED_PIECE = 1024
"""Tokens of a feed-forward part at once: with fewer, products of common widths are not busy any more."""


@dataclass(frozen=True)
class Knob:
    """Something that can be set to fit.

    `values` gives every value worth trying for a model, a setting and a number of rows per step, the one with
    the most memory first; `change` makes the setting; `describe` says it in words, for a value and a model;
    `rise` says what the next value up would do, where that reads better than describing that value; `typed`
    is the override that sets a value, None where no recipe names the knob and a plan turns it by itself.

    Of a `fine` knob each value takes less memory and more time than the one before it (the last one may take
    more memory than the last but one), so the fastest value that fits is found by halving.

    What a knob that `needs_rows` is worth depends on how long the rows are; who has them turns it.

    A `last_resort` knob is turned by `fit` only where nothing fits without it, in the registry's order; else
    it stands where the setting has it.

    A `live` knob can be turned in the middle of a run where memory runs out (`train/oom.py`): it changes how
    a step is computed and not what. They are taken in the order of the registry, the cheapest first.
    """

    name: str
    field: str
    rung: int
    values: Callable[[ModelShape, Setting, int], tuple[Value, ...]]
    describe: Callable[[Value, ModelShape], str]
    typed: Callable[[Value], str] | None = None
    rise: str | None = None
    fine: bool = False
    needs_rows: bool = False
    live: bool = False
    last_resort: bool = False

    def change(self, setting: Setting, value: Value, *, rows_per_step: int) -> Setting:
        """The setting with this knob at a value."""
        changed: dict[str, Any] = {self.field: value}
        if self.field == "rows":
            assert isinstance(value, int)
            changed["accumulates"] = rows_per_step > value
        return dataclasses.replace(setting, **changed)

    def value_of(self, setting: Setting) -> Value:
        """Where this knob stands."""
        value: Value = vars(setting)[self.field]
        return value


def micro_batches(rows_per_step: int, rows: int) -> int:
    """How many micro-batches make one optimizer step."""
    return -(-rows_per_step // rows)


def _row_values(_: ModelShape, __: Setting, rows_per_step: int) -> tuple[int, ...]:
    """The smallest number of rows for every number of micro-batches: more rows than that buy nothing."""
    most = min(rows_per_step, MOST_ROWS)
    smallest = {micro_batches(rows_per_step, micro_batches(rows_per_step, n)) for n in range(1, most + 1)}
    return tuple(sorted(smallest, reverse=True))


def _halves(value: int, least: int) -> tuple[int, ...]:
    found = [value]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return tuple(found)


def _ranks(setting: Setting) -> tuple[int, ...]:
    step = METHODS[setting.method].size_step
    return tuple(each for each in _halves(setting.rank, 4) if each % step == 0)


def _lengths(setting: Setting) -> tuple[int, ...]:
    """The length, then three quarters and a half of it, and so on, in whole 64s down to 256.

    None that the virtual tokens leave little of.
    """
    length, least = setting.length, max(256, 2 * setting.virtual_tokens)
    shorter = (whole // 4 * part // 64 * 64 for whole in _halves(length, 256) for part in (3, 2))
    return (length, *dict.fromkeys(each for each in shorter if least <= each < length))


def _rows_text(value: Value, _: ModelShape) -> str:
    return "1 row at a time" if value == 1 else f"{value} rows at a time"


def _recompute_values(shape: ModelShape, setting: Setting, _: int) -> tuple[Value, ...]:
    """None, then one layer more at a time; last all of them, which alone goes with streamed layers.

    Boundaries that are put away are those of recomputed layers: at least one there is.

    All may take more than all but the last: that one goes backward before anything else is rebuilt, so that
    keeping what it keeps saves its boundary where the logits are not the peak.
    """
    if "layers" in setting.offload:
        return ("all",)
    kept = () if "boundaries" in setting.offload else ("none",)
    return (*kept, *range(1, shape.layers), "all")


def _recompute_text(value: Value, shape: ModelShape) -> str:
    if isinstance(value, int):
        return f"recompute {value} of {shape.layers} layers"
    return "recompute every layer" if value == "all" else "keep every layer's activations"


def _chunk_values(_: ModelShape, setting: Setting, __: int) -> tuple[int, ...]:
    """The setting's own, if it is larger than what a plan starts from; then half as many tokens at a time."""
    chunk = setting.loss_chunk
    return (*((chunk,) if chunk not in _CHUNKS else ()), *_CHUNKS)


def _chunk_text(value: Value, _: ModelShape) -> str:
    return f"the loss of {value} tokens at a time" if value else "the loss of all tokens at once"


def _tile_values(_: ModelShape, setting: Setting, __: int) -> tuple[int, ...]:
    """Whole, then four times as many pieces at a time, none below `LEAST_PLANNED_PIECE` tokens."""
    most = max(1, setting.tokens // LEAST_PLANNED_PIECE)
    return tuple(4**power for power in range(4) if 4**power <= most)


def _tile_text(value: Value, _: ModelShape) -> str:
    return "feed-forward parts whole" if value == 1 else f"feed-forward parts and norms in {value} pieces"


def _offload_values(shape: ModelShape, setting: Setting, _: int) -> tuple[Value, ...]:
    """Nothing, then more and more, the dearest last; none that would win nothing.

    Layers also without boundaries, which take more of the host than they do where rows are long. A tied head
    goes with the embeddings, none where rows of new tokens are trained in it.
    """
    boundaries = () if setting.recompute == "none" else ("boundaries",)
    if setting.device == "cpu":
        return tuple(dict.fromkeys(((), boundaries)))
    table = () if shape.tied else ("embeddings",)
    ends = table if setting.new_tokens else ("embeddings", "head")
    ways = [(), table, (*table, *boundaries), (*ends, *boundaries)]
    if setting.recompute == "all" and setting.quantization != "int8":
        ways += [(*table, "layers"), (*table, *boundaries, "layers"), (*ends, *boundaries, "layers")]
    return tuple(dict.fromkeys(ways))


def _offload_text(value: Value, _: ModelShape) -> str:
    assert isinstance(value, tuple)
    return f"{', '.join(value)} in the memory of the host" if value else "nothing on the host"


def _quantizations(_: ModelShape, setting: Setting, __: int) -> tuple[Value, ...]:
    """All, but for 8 bits where layers are streamed: those cannot be; and bits for what mends a base."""
    none = () if METHODS[setting.method].mends_base else ("none",)
    return (*none, "nf4") if "layers" in setting.offload else (*none, "int8", "nf4")


def _offload_typed(value: Value) -> str:
    assert isinstance(value, tuple)
    return f"memory.offload=[{','.join(value)}]" if value else "memory.offload=none"


def _assigned(field: str) -> Callable[[Value], str]:
    """The override that sets a value: `train.optimizer=adamw`."""
    return lambda value: f"{field}={str(value).lower()}"


def _by_override(
    name: str, rung: int, override: str, values: Callable[[ModelShape, Setting, int], tuple[Value, ...]]
) -> Knob:
    """A knob that no words describe better than its override does; its field has its name."""
    typed = _assigned(override)
    return Knob(name, name, rung, values, lambda value, _: typed(value), typed)


KNOBS: tuple[Knob, ...] = (
    Knob("micro_batch", "rows", 1, _row_values, _rows_text, _assigned("memory.micro_batch"), live=True),
    Knob("loss_chunk", "loss_chunk", 1, _chunk_values, _chunk_text, live=True, last_resort=True),
    Knob("mlp_tiles", "mlp_tiles", 1, _tile_values, _tile_text, live=True, last_resort=True),
    Knob(
        "recompute",
        "recompute",
        1,
        _recompute_values,
        _recompute_text,
        _assigned("memory.recompute"),
        rise="keeping another layer's activations",
        fine=True,
        live=True,
    ),
    Knob(
        "offload", "offload", 1, _offload_values, _offload_text, _offload_typed, live=True, last_resort=True
    ),
    Knob(
        "packing",
        "packed",
        1,
        lambda _, setting, __: (True, False) if setting.packed else (False,),
        lambda value, _: _assigned("data.packing")(value),
        _assigned("data.packing"),
        needs_rows=True,  # `plan/packing.py`
    ),
    _by_override("double_quant", 2, "model.double_quant", lambda *_: (False, True)),
    _by_override("optimizer", 2, "train.optimizer", lambda *_: ("adamw", "adamw-8bit")),
    _by_override("quantization", 2, "model.quantization", _quantizations),
    _by_override("length", 3, "data.length", lambda _, setting, __: _lengths(setting)),
    _by_override("rank", 3, "adapter.rank", lambda _, setting, __: _ranks(setting)),
)

LIVE = tuple(knob.name for knob in KNOBS if knob.live)
"""The knobs of the out-of-memory ladder, in its order."""

PLANNED = frozenset(knob.name for knob in KNOBS if knob.rung == 1 and not knob.needs_rows)
"""The knobs that a plan may turn by itself where the recipe says `auto`: they change no result."""
