import errno
import io
import itertools
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from qadapt.cli.watch import watch
from qadapt.errors import BadRun
from qadapt.events import (
    AdapterAttached,
    BaseLoaded,
    CheckpointSaved,
    Continued,
    DataReady,
    Eased,
    Evaluated,
    Event,
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
from qadapt.run_folder import RunFolder, working_on
from qadapt.view.chart import LossChart, smoothed
from qadapt.view.dashboard import Dashboard
from qadapt.view.journal import FILE_NAME, Journal, follow
from qadapt.view.lines import describe
from qadapt.view.memory_table import memory_bar
from qadapt.view.screen import show
from qadapt.view.series import Series
from qadapt.view.state import RunState, fold_all

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import picture

NOTHING = Series()

MIB = 1024**2
START = 50_000.0
PREDICTED = {
    "base_weights": 72 * MIB,
    "quantization_constants": 2 * MIB,
    "unquantized": 108 * MIB,
    "adapters": 10 * MIB,
    "gradients": 10 * MIB,
    "optimizer": 20 * MIB,
    "recompute_boundaries": 60 * MIB,
    "activations": 140 * MIB,
    "loss": 150 * MIB,
    "temporary": 50 * MIB,
}
STATIC = dict(itertools.islice(PREDICTED.items(), 6))


def step(number: int, loss: float, time: float) -> StepDone:
    return StepDone(
        step=number,
        loss=loss,
        learning_rate=5e-4,
        gradient_norm=0.75,
        tokens=1200,
        supervised_tokens=420,
        rows=16,
        seconds=3.0,
        time=time,
    )


def run(steps: int = 60, done: int = 60) -> list[Event]:
    """A run of steps of 3 seconds; evaluation and checkpoint at every 20th step, an end when all are done."""
    events: list[Event] = [
        RunStarted(name="demo", model="SmolLM2", method="LoRA r16", device="cpu", steps=steps, time=START),
        DataReady(
            rows=960,
            held_out_rows=64,
            tokens=71_200,
            supervised_tokens=24_100,
            truncated_rows=0,
            longest_row_tokens=142,
            time=START,
        ),
        Planned(
            micro_batch=8,
            recompute="none",
            compute_dtype="fp32",
            adapter_dtype="fp32",
            optimizer="adamw",
            predicted=PREDICTED,
            predicted_peak_bytes=sum(PREDICTED.values()),
            budget_bytes=6 * 1024 * MIB,
            time=START,
        ),
        StageStarted(stage="loading the base", time=START),
        StageAdvanced(stage="loading the base", done=135 * MIB, total=270 * MIB, time=START),
        BaseLoaded(resident_bytes=182 * MIB, seconds=6.4, time=START),
        AdapterAttached(trainable=4_884_480, adapted_layers=210, base_parameters=134_515_008, time=START),
    ]
    for number in range(1, done + 1):
        now = START + 3 * number
        events.append(step(number, 0.1 + 2.5 * math.exp(-number / 10), now))
        if number == 1:
            measured = {**STATIC, "working": 410 * MIB}
            events.append(MemoryMeasured(step=1, measured=measured, peak_bytes=632 * MIB, time=now))
        if number % 20 == 0:
            loss = 0.2 + 2.5 * math.exp(-number / 10)
            events.append(Evaluated(step=number, loss=loss, is_best=True, seconds=0.0, time=now))
            events.append(CheckpointSaved(step=number, folder="c", is_best=True, bytes=29 * MIB, time=now))
        if number == 5:
            events.append(Warned(message="bf16 is slow here", cure="set compute_dtype=bf16", time=now))
    if done == steps:
        adapter = "runs/demo/adapter"
        events.append(
            RunFinished(step=steps, adapter=adapter, best_step=60, best_loss=0.2062, seconds=180.0, time=now)
        )
    return events


HEAT = "the card has 91 °C; it is to stay below 83"
PAUSED = Paused(step=42, reason=HEAT, time=START + 126)
CARED = [
    Rehearsed(
        predicted_peak_bytes=622 * MIB,
        measured_peak_bytes=630 * MIB,
        longest_row_tokens=142,
        parts={"step": 3.5, "evaluation": 1.5},
        time=START,
    ),
    Eased(step=42, phase="training", knob="micro_batch", value=4, price="about 3 % slower", time=START + 126),
    UpdateSkipped(step=42, loss=math.nan, gradient_norm=math.inf, cause="row 17", time=START + 126),
    *[
        Sampled(
            step=40,
            prompt=f"Order {number}: two loaves",
            answer='{"items": 2}',
            base_answer="Sure! I would be glad to help you with that. " * 9,
            divergence=0.25,
            time=START + 126,
        )
        for number in range(3)
    ],
]


def console(width: int = 100, height: int = 30, **options) -> Console:
    options = {
        "force_terminal": True,
        "legacy_windows": False,
        "color_system": None,
        "_environ": {},
        **options,
    }
    return Console(width=width, height=height, file=io.StringIO(), **options)


def drawn(renderable, width: int = 100, height: int = 30) -> str:
    screen = console(width, height)
    screen.print(renderable)
    return screen.file.getvalue()


def dashboard(events: list[Event], width: int = 100, height: int = 30, *, later: float = 0.0) -> str:
    state = fold_all(events)
    now = (state.session.last_event or START) + later
    return drawn(Dashboard(state, now), width, height)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (140, 40)])
def test_the_dashboard_shows_what_matters_at_every_usual_size(width, height):
    text = dashboard(run(done=42), width, height)
    for words in (
        "demo", "training", "2 min 06 s", "step 42 of 60", "54 s left", "◆ evaluation", "best (step 40)",
        "0.2458", "5.00e-04", "0.75", "400", "35 %", "predicted", "measured", "base weights", "72.0 MiB",
        "optimizer", "working memory", "400.0 MiB", "410.0 MiB", "622.0 MiB", "632.0 MiB", "+1.6 %",
        "budget 6.00 GiB · 10 % used", "bf16 is slow",
    ):  # fmt: skip
        assert words in text, f"{words!r} is missing at {width} × {height}"


@pytest.mark.parametrize(
    "events",
    [
        [],
        run(done=0)[:1],
        run(done=0)[:5],
        run(done=0),
        run(done=1),
        run(),
        [*run(done=42), *CARED],
        [*run(done=42), *CARED, PAUSED],
    ],
)
@pytest.mark.parametrize(
    ("width", "height"), [(20, 5), (40, 10), (60, 20), (76, 18), (80, 24), (100, 27), (140, 40), (250, 80)]
)
def test_the_dashboard_fits_its_screen_at_every_moment(events, width, height):
    lines = dashboard(events, width, height).splitlines()
    assert len(lines) <= height - 1, "one line is left for the cursor"
    assert max(len(line) for line in lines) <= width


def test_the_dashboard_keeps_its_height_through_the_run():
    heights = {len(dashboard(run(done=done)).splitlines()) for done in (0, 1, 2, 20, 59, 60)}
    assert heights == {29}


def test_a_small_screen_has_the_numbers_in_lines():
    text = dashboard(run(done=42), 60, 9)
    assert "loss 0.1375" in text
    assert "peak 632.0 MiB measured" in text
    assert "╭" not in text


def test_before_the_first_step_the_stage_is_shown_with_its_progress():
    text = dashboard(run(done=0)[:5])
    assert "loading the base 135.0 MiB of 270.0 MiB" in text
    assert "loading the base 50 %" in text
    assert "the curve begins with the first step" in text


def test_before_anything_is_measured_the_prediction_stands_alone():
    text = dashboard(run(done=0))
    assert "622.0 MiB" in text
    assert "10 % planned" in text


def test_a_silent_run_is_said_to_be_silent():
    assert "no news" not in dashboard(run(done=42), later=179)
    assert "no news for 5 min 00 s" in dashboard(run(done=42), later=300)
    assert "no news" not in dashboard(run(), later=300), "a finished run has nothing more to say"


@pytest.mark.parametrize(("width", "height"), [(40, 10), (60, 20), (80, 24), (140, 40)])
def test_a_paused_run_cannot_be_taken_for_a_running_one(width, height):
    text = dashboard([*run(done=42), PAUSED], width, height, later=300)
    assert "paused for 5 min 00 s" in text
    assert "paused after step 42" in text
    assert "no news" not in text
    assert "training" not in text.splitlines()[0]
    assert " left" not in text
    if width >= 80:
        assert HEAT in text
    again = dashboard(
        [*run(done=42), PAUSED, Continued(step=42, seconds=300.0, time=START + 426)], width, height
    )
    assert "paused for" not in again
    assert "training" in again.splitlines()[0]


def test_what_care_was_taken_stands_in_numbers_and_last_events():
    text = dashboard([*run(done=42), *CARED], 140, 48)
    for words in (
        "updates left out", "since step 42", "micro_batch 4", "memory ran out", "about 3 % slower",
        "update left out", "row 17",
    ):  # fmt: skip
        assert words in text, words


def test_sample_answers_stand_side_by_side_where_there_is_room():
    text = dashboard([*run(done=42), *CARED], 140, 48)
    line = next(line for line in text.splitlines() if '{"items": 2}' in line and "Sure!" in line)
    assert line.index("Sure!") < line.index("│", 5) < line.index('{"items": 2}')
    assert "answers after step 40" in text
    assert "Order 2: two loaves" in text
    assert "0.25 nats from the base" in text
    assert "answers after" not in dashboard([*run(done=42), *CARED], 80, 24)


def test_the_end_is_shown():
    text = dashboard(run(), later=1000)
    assert "finished  3 min 00 s" in text
    assert " left" not in text
    stop = Stopped(step=10, reason="Ctrl-C", time=START + 30)
    assert "stopped  30 s" in dashboard([*run(done=10), stop], later=1000)


def test_a_loss_that_is_no_number_is_shown_as_such():
    text = dashboard([*run(done=3), step(4, math.nan, START + 12)])
    assert "nan" in text
    assert "×" in text


def test_colours_are_the_terminals_own_and_not_needed():
    screen = console(color_system="truecolor")
    screen.print(Dashboard(fold_all(run(done=42)), START + 126))
    coloured = screen.file.getvalue()
    assert "\x1b[" in coloured
    assert "38;2;" not in coloured, "an own colour may vanish on a light or dark background"


def series(*values: float) -> Series:
    result = Series()
    for number, value in enumerate(values, start=1):
        result = result.add(number, value)
    return result


def chart(
    training: Series, evaluation: Series = NOTHING, *, total_steps: int = 0, height: int = 12
) -> list[str]:
    return drawn(LossChart(training, evaluation, total_steps=total_steps, height=height), 60).splitlines()


def braille_rows(lines: list[str], column: int) -> list[int]:
    return [row for row, line in enumerate(lines) if 0x2800 < ord(line[column : column + 1] or " ") < 0x2900]


def test_a_falling_loss_falls_on_the_chart():
    lines = chart(series(*[3 - number / 20 for number in range(60)]))
    left = lines[0].index("│") + 2
    rows = [braille_rows(lines, column)[0] for column in range(left, 59, 4) if braille_rows(lines, column)]
    assert len(rows) > 8
    assert rows == sorted(rows)
    assert rows[0] == 0
    assert rows[-1] >= 8


def test_the_axes_name_the_loss_and_the_steps():
    lines = chart(series(2.5, 2.0, 1.0), total_steps=60)
    labels = [float(line.split("┤")[0]) for line in lines if "┤" in line]
    assert len(labels) >= 2
    assert labels == sorted(labels, reverse=True)
    assert all(1.0 - 0.1 <= label <= 2.6 for label in labels)
    assert "step 1" in lines[-1]


@pytest.mark.parametrize(
    ("done", "last"), [(1, "8"), (8, "8"), (9, "15"), (16, "30"), (31, "60"), (60, "60")]
)
def test_the_step_axis_grows_by_doubling_towards_the_last_step(done, last):
    lines = chart(series(*[1.0] * done), total_steps=60)
    assert lines[-1].split()[-1] == last


def test_one_value_is_one_mark():
    text = "\n".join(chart(series(1.5)))
    assert text.count("•") == 1
    assert "1.5" in text


def test_a_constant_loss_is_a_level_line_with_its_value_beside_it():
    lines = chart(series(*[0.7] * 30))
    curved = [line for line in lines if any(0x2800 < ord(char) < 0x2900 for char in line.split("│")[-1])]
    assert len(curved) - 1 == 1, "the line in one row, and the legend"
    assert any("0.70" in line for line in lines)


@pytest.mark.parametrize(
    "values", [[math.nan], [math.inf, math.nan], [1.0, math.nan, 2.0], [-3.0, 4.0], [0.0]]
)
def test_strange_values_are_drawn_honestly(values):
    text = "\n".join(chart(series(*values)))
    assert text.count("×") == sum(not math.isfinite(value) for value in values)


def test_no_values_draw_an_empty_chart():
    assert "×" not in "\n".join(chart(Series()))


def test_a_spike_is_marked_at_the_edge_and_does_not_flatten_the_curve():
    values = [2 - number / 100 for number in range(100)]
    values[50] = 900.0
    lines = chart(series(*values))
    assert "▴" in lines[0]
    assert all(float(line.split("┤")[0]) < 10 for line in lines if "┤" in line)


def test_evaluations_are_marked_where_they_are():
    evaluation = Series().add(1, 3.0).add(60, 1.0)
    lines = chart(series(*[2.0] * 60), evaluation)
    marks = [(row, line.index("◆")) for row, line in enumerate(lines[:-1]) if "◆" in line]
    assert [row for row, _ in marks] == [0, 9]
    assert marks[0][1] < 8
    assert marks[1][1] == 59


def test_the_smoothed_curve_has_no_start_up_bias_and_skips_gaps():
    assert smoothed([5.0] * 100) == pytest.approx([5.0] * 100)
    short = [3.0, 1.0, 2.0]
    assert smoothed(short) == short, "few values are drawn as they are"
    assert smoothed([1.0, math.nan, 1.0])[2] == 1.0


def test_a_memory_bar_is_as_long_as_its_bytes():
    assert str(memory_bar(100, 100, largest=100, width=10)) == "━" * 10
    assert str(memory_bar(100, 50, largest=100, width=10)) == "━" * 5 + "─" * 5
    assert str(memory_bar(100, None, largest=100, width=10)) == "─" * 10
    assert str(memory_bar(50, 100, largest=100, width=10)) == "━" * 10
    assert str(memory_bar(None, 1, largest=10_000, width=10)) == "╸", "what is there is seen"
    assert any(span.style == "yellow" for span in memory_bar(50, 100, largest=100, width=10).spans)
    assert not any(span.style == "yellow" for span in memory_bar(99, 100, largest=100, width=10).spans)


def printed(events, *, is_quiet: bool = False) -> list[str]:
    screen = console(force_terminal=False)
    show(events, console=screen, is_live=False, is_quiet=is_quiet)
    return screen.file.getvalue().splitlines()


def test_plain_lines_tell_the_run_and_end_with_the_next_command():
    lines = printed(run())
    assert lines[0] == "demo: LoRA r16 on SmolLM2, 60 steps, cpu"
    assert "step 20: evaluation 0.5383, best" in lines
    assert "warning: bf16 is slow here" in lines
    assert "         set compute_dtype=bf16" in lines
    assert "peak memory: 632.0 MiB measured, 622.0 MiB predicted (+1.6 %)" in lines
    assert "adapter: runs/demo/adapter" in lines
    assert lines[-1] == "next: qadapt export demo"
    first = next(line for line in lines if line.startswith("step  1/60"))
    assert "400 tokens/s" in first
    assert "2 min 57 s left" in first
    assert all("\x1b" not in line for line in lines)


def test_what_is_trained_is_told_as_a_share_and_in_stored_bytes():
    attached = AdapterAttached(
        trainable=4_884_480, adapted_layers=210, base_parameters=134_515_008, stored_bytes=9_768_960
    )
    assert describe(attached).endswith(" parameters (3.50 % of all), 9.3 MiB stored")


def test_steps_in_plain_lines_are_thinned_but_the_last_is_there():
    many = [step(number, 1.0, START + number * 0.1) for number in range(1, 10_001)]
    lines = [line for line in printed([*run(10_000, 0), *many]) if line.startswith("step ")]
    assert 40 <= len(lines) <= 52
    assert lines[-1].startswith("step 10000/10000")
    slow = [step(number, 1.0, START + number * 70) for number in range(1, 41)]
    lines = [line for line in printed([*run(10_000, 0), *slow]) if line.startswith("step ")]
    assert len(lines) == 40, "silence is never longer than about a minute when there are steps"


def test_quiet_prints_warnings_and_the_end_only():
    lines = printed(run(), is_quiet=True)
    assert lines[:2] == ["warning: bf16 is slow here", "         set compute_dtype=bf16"]
    assert lines[2].startswith("finished 60 steps")
    assert len(lines) == 7


def test_plain_lines_say_what_care_was_taken():
    lines = printed([*run(done=42), *CARED, PAUSED, Continued(step=42, seconds=300.0, time=START + 426)])
    for line in (
        "rehearsed: peak 630.0 MiB measured (+1.3 % of plan), longest row 142 tokens, 5.0 s",
        "step 42: memory ran out (training) and nothing is lost: "
        "micro_batch is 4 from here on, about 3 % slower",
        "step 42: update left out, nothing changed: row 17",
        "step 40: asked    Order 1: two loaves",
        '         now      {"items": 2}',
        f"paused after step 42, its memory kept: {HEAT}",
        "goes on after a pause of 5 min 00 s",
    ):
        assert line in lines, line
    base = next(line for line in lines if line.startswith("         base"))
    assert len(base) < 120
    assert base.endswith(" …")


def test_quiet_still_says_why_nothing_moves():
    lines = printed([*run(done=42), *CARED, PAUSED], is_quiet=True)
    assert f"paused after step 42, its memory kept: {HEAT}" in lines
    assert any("memory ran out" in line for line in lines)
    assert any("update left out" in line for line in lines)
    assert not any("asked" in line for line in lines)


def test_a_stopped_run_says_how_to_go_on():
    lines = printed([*run(done=25), Stopped(step=25, reason="Ctrl-C", time=START + 75)])
    assert lines[-3:] == [
        "stopped: Ctrl-C",
        "25 of 60 steps; saved at step 20",
        "go on with: qadapt resume demo",
    ]


def test_stages_between_steps_are_no_lines():
    lines = printed([*run(done=20), StageStarted(stage="evaluating", time=START + 61)])
    assert "loading the base" in lines
    assert "evaluating" not in lines


def test_after_a_resume_plain_steps_go_on():
    resumed = [*run(done=30), Resumed(step=20, time=START + 900), step(21, 1.0, START + 903)]
    lines = printed(resumed)
    assert "resumed at step 20" in lines
    assert lines[-1].startswith("step 21/60")


def test_a_resumed_run_is_shown_with_what_came_before():
    screen = console(force_terminal=False)
    events = [Resumed(step=20, time=START + 900), step(21, 1.0, START + 903)]
    state = show(events, console=screen, is_live=False, is_quiet=False, before=run(done=30))
    lines = screen.file.getvalue().splitlines()
    assert lines[0] == "resumed at step 20"
    assert lines[1].startswith("step 21/60")
    assert state.best == (20, pytest.approx(0.5383, abs=1e-4))


def test_a_console_without_the_letters_gets_question_marks_and_the_run_goes_on():
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="\n")
    screen = Console(file=file, width=80, force_terminal=True, _environ={})
    warned = Warned(message="naïve", cure="…")
    assert show([warned], console=screen, is_live=True, is_quiet=False).warning_count == 1
    file.flush()
    assert b"warning: na?ve" in file.buffer.getvalue()


def test_a_closed_pipe_ends_the_printing_but_not_the_run(monkeypatch):
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    screen = Console(file=ClosedPipe(), _environ={})

    def leave() -> None:
        screen.quiet = True
        raise SystemExit(1)

    monkeypatch.setattr(screen, "on_broken_pipe", leave)  # rich's own also closes stdout of this process
    state = show(run(), console=screen, is_live=False, is_quiet=False)
    assert state.finished is not None


@pytest.mark.parametrize("is_live", [True, False])
def test_a_closed_terminal_ends_the_printing_but_not_the_run(is_live):
    is_closed = False

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            if is_closed:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(text)

    def closing():
        nonlocal is_closed
        yield from run()[:20]
        is_closed = True
        yield from run()[20:]

    screen = Console(file=Terminal(), force_terminal=True, width=100, _environ={})
    excepthook, threading.excepthook = threading.excepthook, lambda _: None  # the thread that draws ends
    try:
        state = show(closing(), console=screen, is_live=is_live, is_quiet=False)
    finally:
        threading.excepthook = excepthook
    assert state.finished is not None
    assert screen.quiet


def test_the_live_screen_leaves_its_last_picture_and_the_summary():
    screen = console(80, 24)
    state = show(run(), console=screen, is_live=True, is_quiet=False, now=lambda: START + 180)
    text = screen.file.getvalue()
    assert state == fold_all(run())
    assert text.index("step 60 of 60") < text.index("finished 60 steps")
    assert text.rstrip().endswith("next: qadapt export demo")


def test_the_clock_on_the_live_screen_moves_while_no_event_comes():
    looked = threading.Event()
    clock = itertools.count(START)

    def now() -> float:
        time = next(clock)
        if time > START + 3:
            looked.set()
        return time

    def waiting():
        yield run()[0]
        assert looked.wait(10), "nothing was drawn while the run was silent"

    show(waiting(), console=console(), is_live=True, is_quiet=False, now=now)


@pytest.mark.parametrize("kind", [BadRun, KeyboardInterrupt, ZeroDivisionError])
def test_errors_of_the_run_pass_through_after_the_screen_is_restored(kind):
    def failing():
        yield run()[0]
        raise kind("broken", cure="mend it") if kind is BadRun else kind()

    before, screen = set(threading.enumerate()), console()
    with pytest.raises(kind):
        show(failing(), console=screen, is_live=True, is_quiet=False, now=lambda: START)
    assert "\x1b[?25h" in screen.file.getvalue(), "the cursor is shown again"
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)  # rich tells its thread to end, and does not wait for it
    assert set(threading.enumerate()) <= before, "nothing draws any more"


def written_run(folder: Path, events: list[Event]) -> None:
    folder.mkdir(parents=True)
    with Journal(folder / FILE_NAME) as journal:
        for event in events:
            journal.append(event)


def test_watch_shows_a_run_that_is_over_and_leaves(tmp_path, capsys):
    written_run(tmp_path / "demo", run())
    watch("demo", str(tmp_path))
    assert capsys.readouterr().out.rstrip().endswith("next: qadapt export demo")


def test_watch_once_prints_one_picture_of_a_run_that_goes_on(tmp_path, capsys):
    written_run(tmp_path / "demo", run(done=42))
    with working_on(RunFolder(tmp_path / "demo")):
        watch("demo", str(tmp_path), once=True)
    assert "step 42 of 60" in capsys.readouterr().out


def test_after_the_rehearsal_the_run_trains_though_no_step_is_done():
    rehearsed = Rehearsed(
        predicted_peak_bytes=1, measured_peak_bytes=1, longest_row_tokens=1, parts={}, time=START + 9
    )
    before = [event for event in run(done=0) if not isinstance(event, StepDone)]
    assert fold_all(before).status == "preparing"
    assert fold_all([*before, rehearsed]).status == "training"


def test_watch_says_that_a_run_died_and_how_to_go_on(tmp_path, capsys):
    written_run(tmp_path / "demo", run(done=42))
    watch("demo", str(tmp_path), once=True)
    text = capsys.readouterr().out
    assert "ended without saving since step 40" in text
    assert "no news" not in text
    assert "left" not in text, "there is no time left to say"
    watch("demo", str(tmp_path))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "ended without saving since step 40",
        "42 of 60 steps",
        f"go on with: qadapt resume {'demo'}",
    ]
    watch("demo", str(tmp_path), json=True)
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["status"], numbers["seconds_left"]) == ("ended", None)


def test_watch_json_prints_numbers_for_programs(tmp_path, capsys):
    written_run(tmp_path / "demo", run(done=42))
    with working_on(RunFolder(tmp_path / "demo")):
        watch(str(tmp_path / "demo"), json=True)
    numbers = json.loads(capsys.readouterr().out)
    assert (numbers["step"], numbers["steps"], numbers["status"]) == (42, 60, "training")


def test_watch_of_a_missing_run_names_the_others(tmp_path):
    written_run(tmp_path / "demo", run(done=0))
    with pytest.raises(BadRun) as error:
        watch("dmeo", str(tmp_path))
    assert "demo" in error.value.cure


def test_leaving_watch_says_that_the_run_goes_on(tmp_path, capsys, monkeypatch):
    written_run(tmp_path / "demo", run(done=42))

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(follow, "__kwdefaults__", {**follow.__kwdefaults__, "sleep": interrupted})
    with working_on(RunFolder(tmp_path / "demo")):
        watch("demo", str(tmp_path))
    captured = capsys.readouterr()
    assert "step 42/60" in captured.out or "step 41/60" in captured.out
    assert "the run goes on" in captured.err


def test_the_picture_is_an_svg_of_the_moment_asked_for():
    events = picture.events_until(run(), share=0.7)
    assert fold_all(events).done_steps == 42
    svg = picture.picture(events, width=100, height=30)
    assert svg.startswith("<svg")
    assert "42&#160;of&#160;60" in svg
    assert "url(" not in svg.replace("url(#", ""), "a picture fetches nothing"
    assert svg == picture.picture(events, width=100, height=30), "the same run gives the same file"


def test_the_view_needs_no_torch_and_no_pydantic():
    code = (
        "import sys, qadapt.view.screen, qadapt.view.figures, qadapt.view.journal, qadapt.cli.watch;"
        "print({'torch', 'transformers', 'peft', 'bitsandbytes', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_empty_state_draws_too():
    assert "waiting" in drawn(Dashboard(RunState(), START))


@pytest.mark.parametrize(("recompute", "words"), [(20, "20 layers"), (1, "1 layer"), ("all", "all")])
def test_recomputed_layers_are_said_in_words(recompute, words):
    planned = Planned(
        micro_batch=8,
        recompute=recompute,
        compute_dtype="fp32",
        adapter_dtype="fp32",
        optimizer="adamw",
        predicted=PREDICTED,
        predicted_peak_bytes=1,
        budget_bytes=2,
    )
    assert f", recompute {words}, peak" in describe(planned)


def arranged(**chosen) -> Planned:
    return Planned(
        micro_batch=4,
        recompute="all",
        compute_dtype="bf16",
        adapter_dtype="bf16",
        optimizer="adamw-8bit",
        predicted=PREDICTED,
        predicted_peak_bytes=1,
        budget_bytes=2,
        **chosen,
    )


def test_what_a_plan_chose_besides_is_in_its_line_and_on_the_screen():
    plan = arranged(device="cuda", loss_chunk=64, mlp_tiles=4, offload=("embeddings", "layers"))
    pieces = "loss of 64 tokens at a time, feed-forward in 4 pieces, embeddings, layers on the host"
    assert f", recompute all, {pieces}, peak" in describe(plan)
    screen = drawn(Dashboard(fold_all([*run(steps=60, done=1), plan]), START + 9), width=160, height=60)
    for words in ("loss chunk 64 tokens", "feed-forward 4 pieces", "embeddings on the host", "layers on the"):
        assert words in " ".join(screen.split())


def test_beside_a_cpu_boundaries_are_said_to_lie_in_a_file():
    plan = arranged(device="cpu", loss_chunk=256, offload=("boundaries",))
    assert "recompute all, boundaries in a temporary file, peak" in describe(plan)


def test_a_plan_of_an_earlier_release_is_said_to_be_as_usual():
    assert ", recompute all, peak" in describe(arranged())
