"""What is known of a run at one moment, folded from its events alone.

`fold(state, event)` is a pure function; dashboard, plain lines and `watch --json` only read its result.
Bounded: curves are thinned (`view/series.py`), lists keep their last entries, so that a run of a million
steps costs no more than a short one. Knows no screen and no clock: the moment `now` is an argument, in
seconds since the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from qadapt.events import (
    AdapterAttached,
    BaseLoaded,
    CheckpointSaved,
    Continued,
    DataReady,
    Eased,
    Evaluated,
    Event,
    Exported,
    MemoryMeasured,
    Paused,
    Planned,
    Rehearsed,
    Resumed,
    RunFinished,
    RunStarted,
    Sampled,
    StageAdvanced,
    StageStarted,
    StepDone,
    Stopped,
    UpdateSkipped,
    Warned,
)
from qadapt.view.series import Series

RECENT_STEPS = 20  # tokens/s, the mean loss and the time left look at so many steps
KEPT_EVENTS = 40
KEPT_WARNINGS = 40
KEPT_EASED = 40
KEPT_PROMPTS = 20

AtStep = TypeVar("AtStep", Eased, Warned, Sampled)


@dataclass(frozen=True)
class Stage:
    """What goes on before, between or after the steps; `total` 0 while its length is unknown."""

    name: str
    done: int = 0
    total: int = 0
    unit: str = ""


@dataclass(frozen=True)
class Session:
    """One process's share of a run: its clock stands still while no process works on the run, or it pauses.

    `active_seconds` are those up to the last event, earlier sessions included. `first_step_began` is when
    this session's first step began (None before), `steps` and `step_seconds` count this session's steps,
    `widest_gap` is the longest time between two events since the last step.
    """

    active_seconds: float = 0.0
    last_event: float | None = None
    widest_gap: float = 0.0
    first_step_began: float | None = None
    last_step_ended: float | None = None
    steps: int = 0
    step_seconds: float = 0.0


@dataclass(frozen=True)
class RunState:
    """A run so far. Whole events are kept where they say all there is to say."""

    run: RunStarted | None = None
    stage: Stage | None = None
    plan: Planned | None = None
    data: DataReady | None = None
    base: BaseLoaded | None = None
    adapter: AdapterAttached | None = None
    step: StepDone | None = None
    done_steps: int = 0
    recent: tuple[StepDone, ...] = ()
    losses: Series = Series()  # noqa: RUF009 - frozen
    evaluations: Series = Series()  # noqa: RUF009 - frozen
    memory: MemoryMeasured | None = None
    peak_bytes: int | None = None
    saved_step: int | None = None
    warnings: tuple[Warned, ...] = ()
    warning_count: int = 0
    rehearsed: Rehearsed | None = None
    is_ready: bool = False  # what comes next is a step
    eased: tuple[Eased, ...] = ()
    skipped_steps: tuple[int, ...] = ()  # whose update was left out; health ends a run before they are many
    samples: tuple[Sampled, ...] = ()  # the latest answers to each prompt
    paused: Paused | None = None
    notes: tuple[tuple[float, Event], ...] = ()  # (seconds into the run, event), for people to read
    finished: RunFinished | None = None
    stopped: Stopped | None = None
    is_left: bool = False  # no process works on it, though it never said that it ended
    exported: Exported | None = None
    session: Session = field(default_factory=Session)

    @property
    def total_steps(self) -> int:
        """How many steps were asked for; 0 when unknown."""
        return self.run.steps if self.run else 0

    @property
    def status(self) -> str:
        """`waiting`, `preparing`, `training`, `paused`, `stopped`, `finished`, `ended` (killed, crashed)."""
        if self.is_over:
            return "finished" if self.finished else "stopped"
        if self.is_left:
            return "ended"
        if self.paused is not None:
            return "paused"
        if self.session.steps or self.is_ready:
            return "training"
        return "waiting" if self.session.last_event is None else "preparing"

    @property
    def is_over(self) -> bool:
        """Whether no more steps come: finished, or stopped and not resumed."""
        return self.finished is not None or self.stopped is not None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation."""
        return self.evaluations.lowest

    @property
    def recent_loss(self) -> float | None:
        """The mean loss of the recent steps, weighted by their supervised tokens as the training is.

        A step whose loss was no number changed nothing, and does not count.
        """
        counted = [step for step in self.recent if math.isfinite(step.loss)]
        weight = sum(step.supervised_tokens for step in counted)
        if not weight:
            return None
        return sum(step.loss * step.supervised_tokens for step in counted) / weight

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of step time, over the recent steps; evaluation and saving do not count."""
        seconds = sum(step.seconds for step in self.recent)
        return sum(step.tokens for step in self.recent) / seconds if seconds > 0 else None

    @property
    def supervised_share(self) -> float | None:
        """The share of the trained tokens that the loss was taken over; of the data before the first step."""
        if self.losses.tokens:
            return self.losses.supervised_tokens / self.losses.tokens
        return self.data.supervised_tokens / self.data.tokens if self.data and self.data.tokens else None

    def elapsed_seconds(self, now: float) -> float:
        """Seconds that processes worked on the run, without pauses and the time from a stop to a resume."""
        last = self.session.last_event
        is_still = self.is_over or self.is_left or self.paused is not None or last is None
        running = 0.0 if is_still or last is None else max(0.0, now - last)
        return self.session.active_seconds + running

    def silent_seconds(self, now: float) -> float:
        """Seconds since the last event of a run that is not over."""
        last = self.session.last_event
        return 0.0 if self.is_over or self.is_left or last is None else max(0.0, now - last)

    def seconds_left(self, now: float) -> float | None:
        """Seconds until the last step; None while unknown.

        The recent time per step, times the share by which this session took longer than its steps did
        (evaluation, saving), times the steps left, less the time since the last step. It stands still in a
        pause.
        """
        session = self.session
        if self.is_left or not self.recent or not self.total_steps or session.step_seconds <= 0:
            return None
        assert session.first_step_began is not None and session.last_step_ended is not None
        if self.is_over:
            return 0.0 if self.finished else None
        recent_seconds = sum(step.seconds for step in self.recent) / len(self.recent)
        spent = session.last_step_ended - session.first_step_began
        overhead = max(1.0, spent / session.step_seconds)
        left = (self.total_steps - self.done_steps) * recent_seconds * overhead
        if self.paused is not None and session.last_event is not None:
            now = session.last_event
        return max(0.0, left - max(0.0, now - session.last_step_ended))


def left(state: RunState) -> RunState:
    """The state of a run that no process works on any more: it ended by itself, or where it last was."""
    return state if state.is_over else replace(state, is_left=True, paused=None, stage=None)


def fold_all(events: Iterable[Event], state: RunState | None = None) -> RunState:
    """The state after all of the events."""
    folded = state or RunState()
    for event in events:
        folded = fold(folded, event)
    return folded


def fold(state: RunState, event: Event) -> RunState:
    """The state after one more event."""
    state = replace(state, session=_clocked(state, event))
    if isinstance(event, StepDone):
        return _with_step(state, event)
    if isinstance(event, MemoryMeasured):
        return replace(state, memory=event, peak_bytes=max(state.peak_bytes or 0, event.peak_bytes))
    if isinstance(event, StageAdvanced):
        return replace(state, stage=Stage(event.stage, event.done, event.total, event.unit))
    if isinstance(event, Resumed):
        state = _back_to(state, event.step)
    state = _with_end(_with_care(_with_progress(_with_fact(state, event), event), event), event)
    if isinstance(event, StageStarted) and state.session.steps:
        return state  # between steps a stage leaves its own event (evaluated, saved) behind
    note = (state.session.active_seconds, event)
    return replace(state, notes=(*state.notes, note)[-KEPT_EVENTS:])


def _with_fact(state: RunState, event: Event) -> RunState:
    match event:
        case RunStarted():
            return replace(
                state, run=event, stage=None, is_ready=False, finished=None, stopped=None, paused=None
            )
        case StageStarted():
            return replace(state, stage=Stage(event.stage))
        case Planned():
            return replace(state, plan=event)
        case DataReady():
            return replace(state, data=event)
        case BaseLoaded():
            return replace(state, base=event, stage=None)
        case AdapterAttached():
            return replace(state, adapter=event)
    return state


def _with_progress(state: RunState, event: Event) -> RunState:
    match event:
        case Evaluated():
            return replace(state, evaluations=state.evaluations.add(event.step, event.loss), stage=None)
        case CheckpointSaved():
            return replace(state, saved_step=event.step, stage=None)
        case Warned():
            kept = (*state.warnings, event)[-KEPT_WARNINGS:]
            return replace(state, warnings=kept, warning_count=state.warning_count + 1)
    return state


def _with_care(state: RunState, event: Event) -> RunState:
    match event:
        case Rehearsed():
            return replace(state, rehearsed=event, stage=None, is_ready=True)
        case Eased():
            return replace(state, eased=(*state.eased, event)[-KEPT_EASED:])
        case UpdateSkipped():
            return replace(state, skipped_steps=(*state.skipped_steps, event.step))
        case Sampled():
            others = tuple(sample for sample in state.samples if sample.prompt != event.prompt)
            return replace(state, samples=(*others, event)[-KEPT_PROMPTS:], stage=None)
        case Paused():
            return replace(state, paused=event, stage=None)
        case Continued():
            return replace(state, paused=None)
    return state


def _with_end(state: RunState, event: Event) -> RunState:
    match event:
        case Stopped():
            return replace(state, stopped=event, stage=None, paused=None)
        case RunFinished():
            return replace(state, finished=event, stage=None, paused=None)
        case Exported():
            return replace(state, exported=event, stage=None)
    return state


def _with_step(state: RunState, event: StepDone) -> RunState:
    losses = state.losses.add(
        event.step, event.loss, tokens=event.tokens, supervised_tokens=event.supervised_tokens
    )
    return replace(
        state,
        step=event,
        done_steps=event.step,
        stage=None,
        recent=(*state.recent, event)[-RECENT_STEPS:],
        losses=losses,
        finished=None,
        stopped=None,
        paused=None,
    )


def _back_to(state: RunState, step: int) -> RunState:
    # What came after the checkpoint no longer counts; speed, memory and a step's numbers are the new
    # process's.
    warnings = _up_to(step, state.warnings)
    return replace(
        state,
        step=None,
        is_ready=True,
        done_steps=step,
        saved_step=step,
        recent=(),
        losses=state.losses.up_to(step),
        evaluations=state.evaluations.up_to(step),
        memory=None,
        peak_bytes=None,
        warnings=warnings,
        warning_count=state.warning_count - len(state.warnings) + len(warnings),
        eased=_up_to(step, state.eased),
        skipped_steps=tuple(skipped for skipped in state.skipped_steps if skipped <= step),
        samples=_up_to(step, state.samples),
        paused=None,
        finished=None,
        stopped=None,
    )


def _up_to(step: int, events: tuple[AtStep, ...]) -> tuple[AtStep, ...]:
    return tuple(event for event in events if event.step is None or event.step <= step)


def _clocked(state: RunState, event: Event) -> Session:
    session = _moved(state, event)
    if not isinstance(event, StepDone):
        return session
    began = event.time - event.seconds if session.first_step_began is None else session.first_step_began
    return replace(
        session,
        first_step_began=began,
        last_step_ended=event.time,
        steps=session.steps + 1,
        step_seconds=session.step_seconds + event.seconds,
    )


def _moved(state: RunState, event: Event) -> Session:
    before = state.session
    if before.last_event is None:
        return replace(before, last_event=event.time)
    is_working = isinstance(event, StageStarted | StageAdvanced | RunStarted | Resumed | StepDone)
    if state.is_over:  # an export long after the end is no training time
        return Session(before.active_seconds, event.time) if is_working else before
    gap = max(0.0, event.time - before.last_event)
    waited = gap if state.paused is not None else 0.0
    active, widest = before.active_seconds + gap - waited, max(before.widest_gap, gap - waited)
    if before.steps and isinstance(event, RunStarted | Resumed):
        # Another process, after a crash. It may have prepared before it said so: the widest gap since the
        # last step is the time when nothing ran.
        return Session(active - widest, event.time)
    widest = 0.0 if isinstance(event, StepDone | Evaluated | CheckpointSaved | MemoryMeasured) else widest
    return replace(
        before,
        active_seconds=active,
        last_event=event.time,
        widest_gap=widest,
        # a pause is no part of what steps take
        first_step_began=_later(before.first_step_began, waited),
        last_step_ended=_later(before.last_step_ended, waited),
    )


def _later(moment: float | None, seconds: float) -> float | None:
    return None if moment is None else moment + seconds
