"""What happens in a run: one frozen dataclass each, to and from one JSON line.

A run *is* its sequence of events: the dashboard, the journal (`events.jsonl`) and the tests only consume
them, and what they show is folded from events alone (`view/state.py`). `time` is seconds since the epoch and
takes no part in equality. Bytes, seconds and tokens are plain numbers in the unit their name says.
"""

from __future__ import annotations

import dataclasses
import json
import time as clock
from dataclasses import dataclass, field
from typing import Any

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened."""

    time: float = field(default_factory=clock.time, compare=False)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A run begins: what is trained on what."""

    name: str
    model: str
    method: str
    device: str
    steps: int
    folder: str = ""


@dataclass(frozen=True, kw_only=True)
class StageStarted(Event):
    """A stage before or after the steps begins, such as `loading the base`."""

    stage: str


@dataclass(frozen=True, kw_only=True)
class StageAdvanced(Event):
    """A long stage moved on; `done` and `total` in `unit`."""

    stage: str
    done: int
    total: int
    unit: str = "bytes"


@dataclass(frozen=True, kw_only=True)
class Planned(Event):
    """How the step is placed in memory, with the predicted bytes of each category at the peak.

    `recompute` is `all`, `none`, or how many of the first layers. If rows are packed, `micro_batch` is how
    many of the longest fill one. `device`, `loss_chunk`, `mlp_tiles` and `offload` are those of
    `plan.setting.Setting`; an event of an earlier release has none.
    """

    micro_batch: int
    recompute: str | int
    compute_dtype: str
    adapter_dtype: str
    optimizer: str
    predicted: dict[str, int]
    predicted_peak_bytes: int
    budget_bytes: int
    reasons: tuple[str, ...] = ()
    packed: bool = False
    device: str = ""
    loss_chunk: int = 0
    mlp_tiles: int = 1
    offload: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DataReady(Event):
    """The rows as tokens; `formats` are what they were recognised as, such as `sharegpt`."""

    rows: int
    held_out_rows: int
    tokens: int
    supervised_tokens: int
    truncated_rows: int
    longest_row_tokens: int
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BaseLoaded(Event):
    """The frozen base is in memory."""

    resident_bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AdapterAttached(Event):
    """The adapter is on the base; `trainable` counts the rows of new tokens, too.

    `stored_bytes` is what its numbers will take on disk.
    """

    trainable: int
    adapted_layers: int
    base_parameters: int
    new_tokens: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StepDone(Event):
    """One optimizer step: the mean loss over its supervised tokens, before the update."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    supervised_tokens: int
    rows: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class MemoryMeasured(Event):
    """Measured bytes by category; `peak_bytes` is the highest so far, above the level after imports."""

    step: int
    measured: dict[str, int]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Evaluated(Event):
    """The mean loss over the held-out rows' supervised tokens."""

    step: int
    loss: float
    is_best: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(Event):
    """A saved state the run can go on from."""

    step: int
    folder: str
    is_best: bool
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Resumed(Event):
    """The run goes on from a checkpoint; earlier events with a higher step no longer count."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Warned(Event):
    """Something asked for is not given, or something to know about; nothing stops.

    `step` is the step it was seen after, if it belongs to one.
    """

    message: str
    cure: str
    step: int | None = None


@dataclass(frozen=True, kw_only=True)
class Rehearsed(Event):
    """The rows that take the most memory went through everything once, and all is as it was before.

    `measured_peak_bytes` is the peak of the step and the evaluation, above the level after imports (on a CPU
    of the step alone); `parts` are seconds: `step`, `evaluation`, `checkpoint`, `answer`, those there were.
    """

    predicted_peak_bytes: int
    measured_peak_bytes: int
    longest_row_tokens: int
    parts: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Eased(Event):
    """Memory ran out in step `step`, nothing was lost, and the same rows are done again with less memory.

    `phase` is where it ran out (`training`, `update`, `evaluation`, `generation`), `knob` and `value` what is
    changed from this step on, `price` says in words what that costs.
    """

    step: int
    phase: str
    knob: str
    value: int | str
    price: str


@dataclass(frozen=True, kw_only=True)
class UpdateSkipped(Event):
    """The loss or the gradient of a step was not finite: nothing was changed. `cause` says where it began."""

    step: int
    loss: float
    gradient_norm: float
    cause: str


@dataclass(frozen=True, kw_only=True)
class Paused(Event):
    """The run waits, saved, for `reason` to pass; it goes on by itself."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Continued(Event):
    """The reason for a pause is over."""

    step: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Sampled(Event):
    """What the model answers to one of the recipe's prompts with the adapter, and without it.

    `divergence` is KL(base || adapted) on the base's answer, in nats per token: how far the adapter has gone.
    """

    step: int
    prompt: str
    answer: str
    base_answer: str
    divergence: float


@dataclass(frozen=True, kw_only=True)
class Stopped(Event):
    """The run left before its last step, whole: `qadapt resume` goes on."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunFinished(Event):
    """The run is complete; the adapter of its best (else last) step is in `adapter`."""

    step: int
    adapter: str
    best_step: int
    best_loss: float | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class BasesCompared(Event):
    """The held-out loss per learned token (nats) of merges on both bases, before either is written.

    `low` to `high` is the 95 % interval of original less dequantized; `better` is the base with the lower
    loss, the dequantized one where that may be chance; `base` is the one that is merged on.
    """

    losses: dict[str, float]
    low: float
    high: float
    rows: int
    tokens: int
    better: str
    base: str


@dataclass(frozen=True, kw_only=True)
class Exported(Event):
    """A model or adapter was written, whole; `base` is empty for the adapter alone.

    `notes` are what was found out about it, one sentence each.
    """

    form: str
    base: str
    folder: str
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


EVENTS: dict[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        RunStarted, StageStarted, StageAdvanced, Planned, DataReady, BaseLoaded, AdapterAttached, StepDone,
        MemoryMeasured, Evaluated, CheckpointSaved, Resumed, Warned, Rehearsed, Eased, UpdateSkipped, Paused,
        Continued, Sampled, Stopped, RunFinished, BasesCompared, Exported,
    )
}  # fmt: skip


def to_line(event: Event) -> str:
    """The event as one line of JSON, without the line end."""
    values = {item.name: getattr(event, item.name) for item in dataclasses.fields(event)}
    return json.dumps({"event": type(event).__name__, "version": VERSION, **values}, allow_nan=True)


def from_line(line: str) -> Event | None:
    """The event of a line; None for a kind that this version does not know.

    Raises:
        ValueError: The line is no event (cut off, or not written by `to_line`).
    """
    values: dict[str, Any] = json.loads(line)
    if not isinstance(values, dict) or "event" not in values:
        raise ValueError(f"not an event: {line[:80]!r}")
    kind = EVENTS.get(values.pop("event"))
    values.pop("version", None)
    if kind is None:
        return None
    known = {item.name for item in dataclasses.fields(kind)}
    kept: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if name in known
    }
    try:
        return kind(**kept)
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from None
