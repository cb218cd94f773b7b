"""The dashboard: a run on one screen, drawn from its state alone.

A rich renderable: `console.print(Dashboard(state, now))`. It fits itself into the width and height it is
given: panels side by side on a screen of at least 76 × 18, fewer and one below the other on a smaller one.
Uses the terminal's own sixteen colours, so that it reads on light and dark ones, and shapes where colour
could be missing. Knows no clock (`now` is an argument) and no run folder.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.align import Align
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qadapt.events import (
    AdapterAttached,
    BaseLoaded,
    CheckpointSaved,
    DataReady,
    Eased,
    Evaluated,
    Event,
    Paused,
    Planned,
    Rehearsed,
    RunStarted,
    Sampled,
    Stopped,
    UpdateSkipped,
    Warned,
)
from qadapt.plan.setting import LOSS_CHUNK
from qadapt.units import format_bytes, format_count, format_seconds
from qadapt.view.chart import LossChart
from qadapt.view.lines import describe, ended_words, format_loss, format_recompute, run_argument
from qadapt.view.memory import MemoryRow, difference_percent, memory_rows
from qadapt.view.memory_table import MemoryTable
from qadapt.view.placing import elsewhere
from qadapt.view.sample_table import SampleTable
from qadapt.view.state import RunState

LARGEST_WIDTH, LARGEST_HEIGHT = 160, 48  # beyond this, more room only pulls things apart
SIDE_BY_SIDE_WIDTH, SIDE_BY_SIDE_HEIGHT = 76, 18
SAMPLES_FROM_HEIGHT = 24  # of the panels; answers stand in the list of last events on smaller screens
SILENT_SECONDS = 180.0  # a first step or an evaluation may well take a minute or two


@dataclass(frozen=True)
class Dashboard:
    """The picture of a run.

    Args:
        state: The run.
        now: The moment it is drawn at, in seconds since the epoch.
        height: Lines to fill; the console's height less one line when None.
    """

    state: RunState
    now: float
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, LARGEST_WIDTH)
        height = min(self.height or options.height or console.size.height - 1, LARGEST_HEIGHT)
        is_roomy = height >= 27
        parts: list[RenderableType] = [_title(self.state, self.now)]
        if is_roomy:
            parts += [_facts(self.state), Text()]
        parts.append(_progress(self.state, self.now))
        if is_roomy:
            parts.append(Text())
        rest = height - len(parts)
        if width >= SIDE_BY_SIDE_WIDTH and height >= SIDE_BY_SIDE_HEIGHT:
            parts.append(_grid(self.state, width=width, height=rest))
        else:
            parts += _stack(self.state, width=width, height=rest)
        yield from console.render(Group(*parts), options.update(width=width, height=None))


def _grid(state: RunState, *, width: int, height: int) -> RenderableType:
    """Loss and numbers above, memory and last events below, then sample answers if there is room."""
    samples = state.samples[-max(1, (height - SAMPLES_FROM_HEIGHT) // 5 + 1) :]
    if samples and height >= SAMPLES_FROM_HEIGHT:
        answers = _panel(
            SampleTable(samples), f"answers after step {samples[-1].step:,}", height=3 * len(samples) + 2
        )
        return Group(_four(state, width=width, height=height - 3 * len(samples) - 2), answers)
    return _four(state, width=width, height=height)


def _four(state: RunState, *, width: int, height: int) -> RenderableType:
    right = max(31, min(52, width * 36 // 100))
    left = width - right
    is_compact = height < 26
    rows = _rows(state, is_compact=is_compact)
    below = max(min(len(rows) + 4, height - 7), height * 35 // 100)
    above = height - below
    grid = Table.grid(padding=0)
    grid.add_column(width=left)
    grid.add_column(width=right)
    grid.add_row(_loss_panel(state, above), _panel(_numbers(state, above - 2), "numbers", height=above))
    grid.add_row(
        _memory_panel(state, rows, height=below),
        _panel(_notes(state, width=right - 4, height=below - 2), "last events", height=below),
    )
    return grid


def _stack(state: RunState, *, width: int, height: int) -> list[RenderableType]:
    """For small screens: a line of numbers, a line of memory, and the curve when there is room."""
    parts: list[RenderableType] = []
    if height >= 1:
        parts.append(_line_of_numbers(state))
    if height >= 2:
        parts.append(_line_of_memory(state))
    if height >= 8:
        parts.append(_loss_panel(state, height - 2))
    return parts


def _panel(content: RenderableType, title: str, *, height: int, subtitle: str | None = None) -> Panel:
    return Panel(
        content,
        title=Text(title, style="not dim bold"),
        subtitle=Text(subtitle, style="dim") if subtitle else None,
        title_align="left",
        subtitle_align="right",
        height=height,
        border_style="dim",
        padding=(0, 1),
    )


def _title(state: RunState, now: float) -> RenderableType:
    name = state.run.name if state.run else ""
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, ratio=1)
    line.add_column(no_wrap=True, justify="right")
    status, style = _status(state, now)
    right = Text.assemble((status, style), (f"  {format_seconds(state.elapsed_seconds(now))}", ""))
    line.add_row(Text.assemble((" qadapt ", "bold reverse"), " ", (name, "bold")), right)
    return line


def _status(state: RunState, now: float) -> tuple[str, str]:
    if state.status in ("finished", "stopped"):
        return state.status, "bold green" if state.finished else "bold yellow"
    if state.paused is not None:
        return f"paused for {format_seconds(state.silent_seconds(now))}", "bold reverse yellow"
    if state.is_left:
        return ended_words(state), "bold yellow"
    silent = state.silent_seconds(now)
    step_seconds = state.step.seconds if state.step else 0.0
    if silent > max(SILENT_SECONDS, 10 * step_seconds):
        return f"no news for {format_seconds(silent)}", "bold yellow"
    if state.stage is not None:
        return _stage(state), "cyan"
    return state.status, "cyan"


def _stage(state: RunState) -> str:
    assert state.stage is not None
    stage = state.stage
    if not stage.total:
        return f"{stage.name}: {stage.done:,} {stage.unit}" if stage.done else stage.name
    if stage.unit == "bytes":
        return f"{stage.name} {format_bytes(stage.done)} of {format_bytes(stage.total)}"
    return f"{stage.name} {stage.done:,} of {stage.total:,} {stage.unit}"


def _facts(state: RunState) -> Text:
    facts = [state.run.model, state.run.method, state.run.device] if state.run else []
    if state.adapter is not None:
        counts = (state.adapter.trainable, state.adapter.base_parameters)
        facts.append(f"{format_count(counts[0])} of {format_count(counts[1])} parameters trained")
    return Text(" " + " · ".join(facts), style="dim", no_wrap=True, overflow="ellipsis")


def _progress(state: RunState, now: float) -> RenderableType:
    if state.paused is not None:
        words = f" paused after step {state.done_steps:,} of {state.total_steps:,}: {state.paused.reason} "
        return Text(words, style="bold reverse yellow", no_wrap=True, overflow="ellipsis")
    total, done = float(state.total_steps or 1), float(state.done_steps)
    text = f"step {state.done_steps:,} of {state.total_steps:,}" if state.total_steps else ""
    left = state.seconds_left(now)
    if not state.done_steps and state.stage is not None and state.stage.total:
        total, done = float(state.stage.total), float(state.stage.done)
        text = f"{state.stage.name} {done / total:.0%}".replace("%", " %")
    elif state.is_left:
        text += f" · qadapt resume {run_argument(state)} goes on"
    elif left is not None and not state.is_over:
        text += f" · {format_seconds(left)} left"
    line = Table.grid(expand=True, padding=(0, 1))
    line.add_column(ratio=1)
    line.add_column(no_wrap=True, justify="right")
    bar = ProgressBar(total=total, completed=done, style="dim", complete_style="cyan", finished_style="green")
    line.add_row(bar, Text(text))
    return line


def _loss_panel(state: RunState, height: int) -> Panel:
    if not state.losses and not state.evaluations:
        waiting = Align.center(Text("the curve begins with the first step", style="dim"), vertical="middle")
        return _panel(waiting, "loss", height=height)
    chart = LossChart(
        state.losses, state.evaluations, total_steps=state.total_steps, height=max(4, height - 2)
    )
    return _panel(chart, "loss", height=height)


def _numbers(state: RunState, height: int) -> RenderableType:
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(no_wrap=True, justify="right", ratio=1)
    pairs = [*_progress_numbers(state), *_setting_numbers(state)]
    for name, value in pairs[:height]:
        table.add_row(name, value)
    return table


def _progress_numbers(state: RunState) -> list[tuple[str, Text]]:
    step, best = state.step, state.best
    evaluated = state.evaluations.last
    share, speed = state.supervised_share, state.tokens_per_second
    return [
        ("loss", _loss(step.loss if step else None)),
        ("recent mean", _loss(state.recent_loss)),
        ("evaluation", _loss(evaluated[1] if evaluated else None)),
        ("best" if best is None else f"best (step {best[0]:,})", _loss(best[1] if best else None)),
        ("learning rate", Text("–" if step is None else f"{step.learning_rate:.2e}")),
        ("gradient norm", _finite(step.gradient_norm if step else None)),
        ("tokens/s", Text("–" if speed is None else f"{speed:,.0f}")),
        ("supervised", Text("–" if share is None else f"{share:.0%}".replace("%", " %"))),
        *(
            [("updates left out", Text(f"{len(state.skipped_steps):,}", style="bold red"))]
            * bool(state.skipped_steps)
        ),
        *((f"since step {eased.step:,}", Text(f"{eased.knob} {eased.value}")) for eased in state.eased[-2:]),
    ]


def _setting_numbers(state: RunState) -> list[tuple[str, Text]]:
    pairs = [("tokens", Text(format_count(state.losses.tokens)))]
    if state.saved_step is not None:
        pairs.append(("saved at step", Text(f"{state.saved_step:,}")))
    if state.plan is not None:
        pairs += [
            ("micro-batch", Text(f"{state.plan.micro_batch} rows{', packed' if state.plan.packed else ''}")),
            ("recompute", Text(format_recompute(state.plan.recompute))),
            *((name, Text(value)) for name, value in _arranged_numbers(state.plan)),
            ("compute", Text(state.plan.compute_dtype)),
            ("adapters", Text(state.plan.adapter_dtype)),
            ("optimizer", Text(state.plan.optimizer)),
        ]
    if state.data is not None:
        pairs.append(("rows", Text(f"{state.data.rows:,}")))
        pairs.append(("held out", Text(f"{state.data.held_out_rows:,}")))
    return pairs


def _arranged_numbers(plan: Planned) -> list[tuple[str, str]]:
    """What else the plan chose, where it is not the usual."""
    pairs = []
    if plan.loss_chunk not in (0, LOSS_CHUNK):  # 0: of an earlier release
        pairs.append(("loss chunk", f"{plan.loss_chunk} tokens"))
    if plan.mlp_tiles > 1:
        pairs.append(("feed-forward", f"{plan.mlp_tiles} pieces"))
    return [*pairs, *((part, elsewhere(plan.device)) for part in plan.offload)]


def _loss(loss: float | None) -> Text:
    is_broken = loss is not None and not math.isfinite(loss)
    return Text(format_loss(loss), style="bold red" if is_broken else "bold")


def _finite(value: float | None) -> Text:
    if value is None:
        return Text("–")
    return Text(f"{value:.3g}", style="" if math.isfinite(value) else "bold red")


def _rows(state: RunState, *, is_compact: bool) -> tuple[MemoryRow, ...]:
    predicted = state.plan.predicted if state.plan else {}
    measured = state.memory.measured if state.memory else {}
    return memory_rows(predicted, measured, is_compact=is_compact)


def _memory_panel(state: RunState, rows: Sequence[MemoryRow], *, height: int) -> Panel:
    if not rows and state.peak_bytes is None:
        waiting = Align.center(Text("nothing planned or measured yet", style="dim"), vertical="middle")
        return _panel(waiting, "memory", height=height)
    predicted_peak = state.plan.predicted_peak_bytes if state.plan else None
    table = MemoryTable(tuple(rows[: height - 4]), predicted_peak, state.peak_bytes)
    return _panel(table, "memory", height=height, subtitle=_budget(state))


def _budget(state: RunState) -> str | None:
    if state.plan is None or not state.plan.budget_bytes:
        return None
    is_measured = state.peak_bytes is not None
    peak = state.peak_bytes if state.peak_bytes is not None else state.plan.predicted_peak_bytes
    share = f"{peak / state.plan.budget_bytes * 100:.0f} % {'used' if is_measured else 'planned'}"
    return f"budget {format_bytes(state.plan.budget_bytes)} · {share}"


def _notes(state: RunState, *, width: int, height: int) -> Text:
    """The last events that fit, the latest at the bottom, warnings on up to three lines."""
    lines: list[Text] = []
    for seconds, event in reversed(state.notes):
        words = _short(event) if width < 38 else describe(event)
        if words is None or isinstance(event, RunStarted):
            continue
        is_care = isinstance(event, Warned | Stopped | Paused | Eased | UpdateSkipped)
        style = "yellow" if is_care else ""
        style = "magenta" if isinstance(event, Evaluated) else style
        most = 3 if isinstance(event, Warned | Eased | UpdateSkipped) else 2
        clock = _clock(seconds)
        wrapped = textwrap.wrap(words, width - len(clock) - 1, max_lines=most, placeholder=" …")
        if len(lines) + len(wrapped) > height:
            break
        marks = [(clock, "dim"), *[(" " * len(clock), "")] * (most - 1)]
        lines[:0] = [
            Text.assemble(mark, " ", (part, style)) for mark, part in zip(marks, wrapped, strict=False)
        ]
    return Text("\n").join(lines)


def _short(event: Event) -> str | None:
    match event:
        case DataReady():
            return f"{event.rows:,} rows read"
        case Planned():
            return f"planned: micro-batch {event.micro_batch}"
        case BaseLoaded():
            return f"base loaded: {format_bytes(event.resident_bytes)}"
        case AdapterAttached():
            return f"adapter: {format_count(event.trainable)}"
        case Evaluated():
            return f"evaluated {format_loss(event.loss)}{' best' if event.is_best else ''}"
        case CheckpointSaved():
            return f"saved step {event.step:,}"
    return _short_care(event) or describe(event)


def _short_care(event: Event) -> str | None:
    match event:
        case Rehearsed():
            return f"rehearsed: peak {format_bytes(event.measured_peak_bytes)}"
        case Eased():
            return f"out of memory: {event.knob} {event.value}, {event.price}"
        case UpdateSkipped():
            return f"update {event.step:,} left out: {event.cause}"
        case Sampled():
            return f"answered {event.answer!r}"
    return None


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 60:02d}:{whole % 60:02d}"
        if whole < 6000
        else f"{whole // 3600:>2d}h{whole % 3600 // 60:02d}"
    )


def _line_of_numbers(state: RunState) -> Text:
    parts = [f"loss {format_loss(state.step.loss if state.step else None)}"]
    if state.evaluations.last is not None:
        parts.append(f"evaluation {format_loss(state.evaluations.last[1])}")
    if state.tokens_per_second is not None:
        parts.append(f"{state.tokens_per_second:,.0f} tokens/s")
    return Text(" " + " · ".join(parts), no_wrap=True, overflow="ellipsis")


def _line_of_memory(state: RunState) -> Text:
    predicted = state.plan.predicted_peak_bytes if state.plan else None
    percent = difference_percent(predicted, state.peak_bytes)
    parts = [f"peak {_bytes(state.peak_bytes)} measured", f"{_bytes(predicted)} predicted"]
    if percent is not None:
        parts.append(f"{percent:+.1f} %")
    return Text(" " + " · ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def _bytes(amount: int | None) -> str:
    return "–" if amount is None else format_bytes(amount)
