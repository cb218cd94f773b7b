"""A run in plain lines, for pipes, logs and CI: one short line per event that matters, steps thinned.

`describe` also gives the dashboard its list of last events. Knows no screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    Paused,
    Planned,
    Rehearsed,
    Resumed,
    RunFinished,
    RunStarted,
    Sampled,
    StageStarted,
    StepDone,
    Stopped,
    UpdateSkipped,
    Warned,
)
from qadapt.plan.setting import LOSS_CHUNK
from qadapt.units import format_bytes, format_count, format_seconds
from qadapt.view.memory import difference_percent
from qadapt.view.placing import arranged_words
from qadapt.view.state import RunState

STARTING = "starting"
"""The stage while the heavy libraries are imported: for the live screen; what follows may be a refusal."""
LINES_PER_RUN = 50
SAMPLE_WIDTH = 90
SHORTEST_PAUSE_SECONDS = 3.0
LONGEST_PAUSE_SECONDS = 60.0  # CI systems take a long silence for a hang


def describe(event: Event) -> str | None:
    """The event in a few words; None for the many that only move numbers."""
    return _preparation(event) or _progress(event) or _care(event) or _end(event)


def _preparation(event: Event) -> str | None:
    match event:
        case RunStarted():
            return f"{event.name}: {event.method} on {event.model}, {event.steps:,} steps, {event.device}"
        case StageStarted():
            return event.stage
        case Planned():
            peak = format_bytes(event.predicted_peak_bytes)
            recompute = format_recompute(event.recompute)
            packed = " packed" if event.packed else ""
            arranged = "".join(f", {words}" for words in format_arranged(event))
            rows = f"micro-batch {event.micro_batch}{packed}"
            return f"planned: {rows}, recompute {recompute}{arranged}, peak {peak}"
        case DataReady():
            cut = f", {event.truncated_rows:,} cut to length" if event.truncated_rows else ""
            form = f" ({', '.join(event.formats)})" if event.formats else ""
            return f"data: {event.rows:,} rows{form}, {format_count(event.tokens)} tokens{cut}"
        case BaseLoaded():
            return f"base loaded: {format_bytes(event.resident_bytes)} in {format_seconds(event.seconds)}"
        case AdapterAttached():
            rows = f" and {event.new_tokens} new tokens" if event.new_tokens else ""
            layers = "1 layer" if event.adapted_layers == 1 else f"{event.adapted_layers} layers"
            share = f"{event.trainable / (event.trainable + event.base_parameters):.2%}".replace("%", " %")
            stored = f", {format_bytes(event.stored_bytes)} stored" if event.stored_bytes else ""
            count = f"{format_count(event.trainable)} parameters ({share} of all){stored}"
            return f"adapter on {layers}{rows}: {count}"
    return None


def _progress(event: Event) -> str | None:
    match event:
        case Evaluated():
            best = ", best" if event.is_best else ""
            return f"step {event.step:,}: evaluation {format_loss(event.loss)}{best}"
        case CheckpointSaved():
            return f"step {event.step:,}: saved, {format_bytes(event.bytes)}"
        case Resumed():
            return f"resumed at step {event.step:,}"
        case Warned():
            return f"warning: {event.message}"
    return None


def _care(event: Event) -> str | None:
    match event:
        case Rehearsed():
            percent = difference_percent(event.predicted_peak_bytes, event.measured_peak_bytes)
            off = "" if percent is None else f" ({percent:+.1f} % of plan)"
            return (
                f"rehearsed: peak {format_bytes(event.measured_peak_bytes)} measured{off}, longest row "
                f"{event.longest_row_tokens:,} tokens, {format_seconds(sum(event.parts.values()))}"
            )
        case Eased():
            now = f"{event.knob} is {event.value} from here on, {event.price}"
            return f"step {event.step:,}: memory ran out ({event.phase}) and nothing is lost: {now}"
        case UpdateSkipped():
            return f"step {event.step:,}: update left out, nothing changed: {event.cause}"
        case Paused():
            return f"paused after step {event.step:,}, its memory kept: {event.reason}"
        case Continued():
            return f"goes on after a pause of {format_seconds(event.seconds)}"
        case Sampled():
            return f"step {event.step:,}: answered {cut_text(event.answer, 60)!r}"
    return None


def _end(event: Event) -> str | None:
    match event:
        case Stopped():
            return f"stopped after step {event.step:,}: {event.reason}"
        case RunFinished():
            return f"finished after {format_seconds(event.seconds)}"
        case Exported():
            return f"exported {event.form}: {format_bytes(event.bytes)} in {event.folder}"
    return None


@dataclass
class Lines:
    """Turns events into lines; keeps when the last step was written, nothing else.

    Args:
        is_quiet: Only warnings (pauses, eased steps and skipped updates are some) and the end.
    """

    is_quiet: bool = False
    last_step: int = 0
    last_time: float = float("-inf")

    def of(self, event: Event, state: RunState) -> list[str]:
        """The lines for one event, often none.

        Args:
            event: What happened.
            state: The run after it.
        """
        if isinstance(event, Warned):
            return [f"warning: {event.message}", f"         {event.cure}"]
        if isinstance(event, Stopped | Paused | Continued | Eased | UpdateSkipped):
            return [str(describe(event))]
        if self.is_quiet:
            return []
        if isinstance(event, Resumed):
            self.last_step = event.step
        if isinstance(event, StepDone):
            return [_step(event, state)] if self._is_due(event, state.total_steps) else []
        if isinstance(event, StageStarted) and (state.session.steps or event.stage == STARTING):
            return []  # between steps a stage leaves its own event (evaluated, saved) behind
        if isinstance(event, Sampled):
            return _sample(event)
        text = describe(event)
        return [] if text is None else [text]

    def _is_due(self, event: StepDone, total_steps: int) -> bool:
        waited_seconds = event.time - self.last_time
        is_step_due = (event.step - self.last_step) * LINES_PER_RUN >= total_steps
        is_due = (
            event.step == total_steps
            or (is_step_due and waited_seconds >= SHORTEST_PAUSE_SECONDS)
            or waited_seconds >= LONGEST_PAUSE_SECONDS
        )
        if is_due:
            self.last_step, self.last_time = event.step, event.time
        return is_due


def summary(state: RunState) -> list[str]:
    """The end of a run in three to six lines, the last one the next command; nothing when it is not over.

    Of a rehearsal without a run: what it measured, and what was needed to make it fit.
    """
    name = run_argument(state)
    if state.stopped is not None:
        kept = (
            f"saved at step {state.saved_step:,}" if state.saved_step is not None else "nothing was saved yet"
        )
        done = f"{state.done_steps:,} of {state.total_steps:,} steps; {kept}"
        return [f"stopped: {state.stopped.reason}", done, f"go on with: qadapt resume {name}"]
    if state.is_left:
        done = f"{state.done_steps:,} of {state.total_steps:,} steps"
        return [ended_words(state), done, f"go on with: qadapt resume {name}"]
    if state.finished is None:
        return [] if state.rehearsed is None or state.done_steps else _rehearsal(state.rehearsed, state.eased)
    lines = [_losses(state), _speed(state)]
    if state.peak_bytes is not None:
        lines.append(_peak(state))
    lines += [f"adapter: {state.finished.adapter}", f"next: qadapt export {name}"]
    return lines


def ended_words(state: RunState) -> str:
    """How a run stands whose process is gone: `ended without saving since step 300`."""
    saved = state.saved_step
    if saved is None:
        return "ended before anything was saved"
    return (
        f"ended, saved at step {saved:,}"
        if saved == state.done_steps
        else (f"ended without saving since step {saved:,}")
    )


def _rehearsal(rehearsed: Rehearsed, eased: Sequence[Eased]) -> list[str]:
    measured, predicted = rehearsed.measured_peak_bytes, rehearsed.predicted_peak_bytes
    percent = difference_percent(predicted, measured)
    difference = "" if percent is None else f" ({percent:+.1f} %)"
    parts = (f"{name} {format_seconds(seconds)}" for name, seconds in rehearsed.parts.items())
    return [
        f"peak memory: {format_bytes(measured)} measured, {format_bytes(predicted)} predicted{difference}",
        *(f"memory ran out ({each.phase}): {each.knob} {each.value}, {each.price}" for each in eased),
        f"rehearsed: {', '.join(parts)}; the longest row has {rehearsed.longest_row_tokens:,} tokens",
        "it fits; without --rehearse-only it is trained",
    ]


def run_argument(state: RunState) -> str:
    """What to call the run in a command: its name where runs are looked for by default, else its folder."""
    if state.run is None:
        return "RUN"
    folder = Path(state.run.folder or f"runs/{state.run.name}")
    return state.run.name if folder.parent == Path("runs") else str(folder)


def format_recompute(recompute: str | int) -> str:
    """`all`, `none`, `20 layers`: a plan's `recompute` in a word or two."""
    if isinstance(recompute, str):
        return recompute
    return "1 layer" if recompute == 1 else f"{recompute} layers"


def format_arranged(plan: Planned) -> tuple[str, ...]:
    """What else a plan chose, where it is not the usual; a plan of an earlier release says nothing."""
    return arranged_words(
        loss_chunk=plan.loss_chunk or LOSS_CHUNK,
        mlp_tiles=plan.mlp_tiles,
        offload=plan.offload,
        device=plan.device,
    )


def cut_text(text: str, width: int) -> str:
    """A text on one line of at most `width` letters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: max(0, width - 2)].rstrip()} …"


def _sample(event: Sampled) -> list[str]:
    return [
        f"step {event.step:,}: asked    {cut_text(event.prompt, SAMPLE_WIDTH)}",
        f"         now      {cut_text(event.answer, SAMPLE_WIDTH)}",
        f"         base     {cut_text(event.base_answer, SAMPLE_WIDTH)}",
    ]


def format_loss(loss: float | None) -> str:
    """`0.4123`; four digits, so that 12.34 and 0.012 are as exact as they need to be."""
    if loss is None:
        return "–"
    return f"{loss:.2f}" if abs(loss) >= 10 else f"{loss:.4f}"


def _step(event: StepDone, state: RunState) -> str:
    left = state.seconds_left(event.time)
    parts = [
        f"step {event.step:>{len(str(state.total_steps))}}/{state.total_steps}",
        f"loss {format_loss(event.loss)}",
        f"learning rate {event.learning_rate:.2e}",
        f"gradient norm {event.gradient_norm:.3g}",
        f"{state.tokens_per_second or 0:,.0f} tokens/s",
    ]
    if left:
        parts.append(f"{format_seconds(left)} left")
    return "  ".join(parts)


def _losses(state: RunState) -> str:
    assert state.finished is not None
    text = f"finished {state.done_steps:,} steps: training loss {format_loss(state.recent_loss)}"
    if state.finished.best_loss is None:
        return text
    best = format_loss(state.finished.best_loss)
    return f"{text}, best evaluation {best} at step {state.finished.best_step:,}"


def _speed(state: RunState) -> str:
    text = f"time: {format_seconds(state.session.active_seconds)}, {format_count(state.losses.tokens)} tokens"
    return text + (f" at {state.tokens_per_second:,.0f} tokens/s" if state.tokens_per_second else "")


def _peak(state: RunState) -> str:
    assert state.peak_bytes is not None
    text = f"peak memory: {format_bytes(state.peak_bytes)} measured"
    if state.plan is None:
        return text
    percent = difference_percent(state.plan.predicted_peak_bytes, state.peak_bytes)
    difference = "" if percent is None else f" ({percent:+.1f} %)"
    return f"{text}, {format_bytes(state.plan.predicted_peak_bytes)} predicted{difference}"
