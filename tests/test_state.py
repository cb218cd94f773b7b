import dataclasses
import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.events import (
    CheckpointSaved,
    Continued,
    DataReady,
    Eased,
    Evaluated,
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
from qadapt.plan.categories import STATIC, WORKING
from qadapt.view.figures import figures
from qadapt.view.journal import effective
from qadapt.view.memory import difference_percent, memory_rows
from qadapt.view.series import LIMIT, Series
from qadapt.view.state import (
    KEPT_EVENTS,
    KEPT_PROMPTS,
    KEPT_WARNINGS,
    RECENT_STEPS,
    RunState,
    fold,
    fold_all,
)

START = 1_000.0


def started(steps: int = 60, time: float = START) -> RunStarted:
    return RunStarted(name="r", model="m", method="lora", device="cpu", steps=steps, time=time)


def step(number: int, *, loss=1.0, tokens=100, supervised_tokens=40, seconds=2.0, time=None) -> StepDone:
    return StepDone(
        step=number,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=0.5,
        tokens=tokens,
        supervised_tokens=supervised_tokens,
        rows=4,
        seconds=seconds,
        time=START + 2.0 * number if time is None else time,
    )


def evaluated(number: int, loss: float, time: float = START) -> Evaluated:
    return Evaluated(step=number, loss=loss, is_best=True, seconds=1.0, time=time)


def planned(**predicted: int) -> Planned:
    return Planned(
        micro_batch=2,
        recompute="all",
        compute_dtype="bf16",
        adapter_dtype="bf16",
        optimizer="adamw-8bit",
        predicted=predicted,
        predicted_peak_bytes=sum(predicted.values()),
        budget_bytes=1000,
        time=START,
    )


def eased(number: int) -> Eased:
    return Eased(step=number, phase="training", knob="micro_batch", value=1, price="about 3 % slower")


def skipped(number: int) -> UpdateSkipped:
    return UpdateSkipped(step=number, loss=math.nan, gradient_norm=math.inf, cause="row 7")


def sampled(number: int, prompt: str = "p", answer: str = "a") -> Sampled:
    return Sampled(step=number, prompt=prompt, answer=answer, base_answer="b", divergence=0.5)


def warned(number: int | None) -> Warned:
    return Warned(message=f"at {number}", cure="c", step=number)


def test_a_hundred_thousand_steps_are_kept_in_bounded_memory_with_first_last_and_lowest():
    noise = random.Random(7)
    losses = [3 / (1 + number / 5_000) + noise.random() for number in range(100_000)]
    losses[61_803] = 0.001
    series = Series()
    for number, loss in enumerate(losses, start=1):
        series = series.add(number, loss, tokens=number % 7, supervised_tokens=1)
        assert len(series.stretches) <= LIMIT
    assert series.first == (1, losses[0])
    assert series.last == (100_000, losses[-1])
    assert series.lowest == (61_804, 0.001)
    assert series.points == 100_000
    assert series.tokens == sum(number % 7 for number in range(1, 100_001))
    assert series.supervised_tokens == 100_000
    assert len(series.stretches) > LIMIT // 4, "thinned more than needed"
    spans = {stretch.points for stretch in series.stretches[:-1]}
    assert spans == {series.width}, "the start of a long run is as fine as its end"


@given(
    st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan), st.just(math.inf)), min_size=1, max_size=1500)
)
def test_stretches_agree_with_the_values_they_stand_for(values):
    series = Series()
    for number, value in enumerate(values, start=1):
        series = series.add(number, value)
    for stretch in series.stretches:
        part = values[stretch.first_step - 1 : stretch.last_step]
        finite = [value for value in part if math.isfinite(value)]
        assert stretch.points == len(part)
        assert stretch.finite == len(finite)
        if finite:
            assert stretch.low == min(finite)
            assert stretch.high == max(finite)
            assert stretch.low_step == values.index(stretch.low, stretch.first_step - 1) + 1
            assert stretch.mean == pytest.approx(sum(finite) / len(finite), abs=1e-6, rel=1e-9)
        else:
            assert math.isnan(stretch.mean)
    assert [stretch.first_step for stretch in series.stretches[1:]] == [
        stretch.last_step + 1 for stretch in series.stretches[:-1]
    ]


def test_the_first_of_equal_losses_is_the_lowest_after_thinning_too():
    series = Series()
    for number in range(1, 2 * LIMIT + 1):
        series = series.add(number, 0.5)
    assert series.width > 1
    assert series.lowest == (1, 0.5)


@pytest.mark.parametrize("cut", [1, 700, 1999, 2000, 3000])
def test_cutting_a_thinned_series_keeps_what_came_before(cut):
    series = Series()
    for number in range(1, 2001):
        series = series.add(number, float(number), tokens=10)
    before = series.up_to(cut)
    kept = min(cut, 2000)
    assert before.stretches[-1].last_step == kept
    assert before.points == kept
    assert before.tokens == kept * 10
    assert series.up_to(0) == Series()


def test_a_long_run_folds_into_a_bounded_state():
    events = [started(steps=3000)]
    for number in range(1, 3001):
        events += [step(number), evaluated(number, 1.0), Warned(message=str(number), cure="c")]
    state = fold_all(events)
    assert len(state.losses.stretches) <= LIMIT
    assert len(state.evaluations.stretches) <= LIMIT
    assert len(state.recent) == RECENT_STEPS
    assert len(state.warnings) == KEPT_WARNINGS
    assert len(state.notes) == KEPT_EVENTS
    assert state.warning_count == 3000


def test_tokens_per_second_is_that_of_the_recent_steps():
    early = [step(number, tokens=1, seconds=9.0) for number in range(1, 31)]
    late = [
        step(30 + number, tokens=90 + number, seconds=1.0 + number / 10)
        for number in range(1, RECENT_STEPS + 1)
    ]
    state = fold_all([started(), *early, *late])
    reference = sum(one.tokens for one in late) / sum(one.seconds for one in late)
    assert state.tokens_per_second == pytest.approx(reference)


def test_the_recent_loss_is_weighted_by_supervised_tokens():
    state = fold_all([step(1, loss=1.0, supervised_tokens=30), step(2, loss=4.0, supervised_tokens=10)])
    assert state.recent_loss == pytest.approx((1.0 * 30 + 4.0 * 10) / 40)


def test_time_left_of_even_steps_is_steps_left_times_their_seconds():
    state = fold_all([started(steps=60), *map(step, range(1, 21))])
    assert state.seconds_left(START + 40) == pytest.approx(40 * 2.0)
    assert state.seconds_left(START + 41.5) == pytest.approx(40 * 2.0 - 1.5)
    assert state.seconds_left(START + 1e6) == 0


def test_time_left_counts_the_share_that_evaluations_take():
    events, time = [started(steps=100)], START
    for number in range(1, 51):
        time += 2.0
        events.append(step(number, time=time))
        if number % 10 == 0 and number < 50:
            time += 10.0
            events.append(evaluated(number, 1.0, time=time))
    # 50 steps of 2 s and 4 evaluations of 10 s so far: 140 s for 50 steps, so 140 s for the other 50.
    assert fold_all(events).seconds_left(time) == pytest.approx(140.0)


def test_time_left_is_unknown_before_the_first_step_and_nothing_after_the_last():
    assert fold_all([started()]).seconds_left(START) is None
    assert RunState().seconds_left(START) is None
    end = RunFinished(step=3, adapter="a", best_step=3, best_loss=None, seconds=6.0, time=START + 6)
    state = fold_all([started(steps=3), step(1), step(2), step(3), end])
    assert state.seconds_left(START + 100) == 0


def test_the_clock_stands_still_between_a_stop_and_a_resume():
    stop = Stopped(step=5, reason="asked to", time=START + 10)
    first = fold_all([started(), *map(step, range(1, 6)), stop])
    assert first.elapsed_seconds(START + 5_000) == 10
    again = fold_all([started(time=START + 9_000), Resumed(step=5, time=START + 9_003)], first)
    assert again.elapsed_seconds(START + 9_004) == pytest.approx(10 + 4)
    assert not again.is_over
    assert again.seconds_left(START + 9_004) is None, "a new process has a speed of its own"


def test_the_clock_stands_still_after_a_crash_too():
    crashed = fold_all([started(), *map(step, range(1, 6))])
    assert crashed.silent_seconds(START + 100) == 90
    again = fold(crashed, Resumed(step=4, time=START + 9_000))
    assert again.elapsed_seconds(START + 9_001) == pytest.approx(10 + 1)


def test_preparing_a_resumed_process_counts_and_the_pause_before_it_does_not():
    crashed = [started(), *map(step, range(1, 6)), Warned(message="m", cure="c", time=START + 11)]
    prepared = [
        StageStarted(stage="loading the base", time=START + 9_000),
        StageAdvanced(stage="loading the base", done=1, total=2, time=START + 9_002),
        Resumed(step=4, time=START + 9_005),
    ]
    state = fold_all([*crashed, *prepared, step(5, time=START + 9_007)])
    assert state.elapsed_seconds(START + 9_007) == pytest.approx(11 + 5 + 2)


def test_a_pause_takes_no_time_of_the_run_and_is_over_when_it_goes_on():
    before = [started(steps=60), *map(step, range(1, 21))]
    paused = fold_all([*before, Paused(step=20, reason="the card has 91 °C", time=START + 40)])
    assert paused.status == "paused"
    assert not paused.is_over
    assert paused.elapsed_seconds(START + 4_000) == 40
    assert paused.seconds_left(START + 4_000) == pytest.approx(40 * 2.0)
    assert paused.silent_seconds(START + 4_000) == 3_960
    again = fold(paused, Continued(step=20, seconds=3_960.0, time=START + 4_000))
    assert again.status == "training"
    assert again.elapsed_seconds(START + 4_001) == 41
    assert again.seconds_left(START + 4_001) == pytest.approx(40 * 2.0 - 1.0)
    later = fold(again, step(21, time=START + 4_002))
    assert later.seconds_left(START + 4_002) == pytest.approx(39 * 2.0), "the pause is no overhead of steps"


@pytest.mark.parametrize(
    "event",
    [Resumed(step=1), Stopped(step=1, reason="r"), started(), step(2), Continued(step=1, seconds=1.0)],
)
def test_whatever_happens_after_a_pause_ends_it(event):
    state = fold_all([started(), step(1), Paused(step=1, reason="r"), event])
    assert state.paused is None
    assert state.status != "paused"


def test_a_process_that_died_in_a_pause_left_its_clock_where_the_pause_began():
    paused = [started(), *map(step, range(1, 6)), Paused(step=5, reason="r", time=START + 10)]
    again = fold_all([*paused, started(time=START + 9_000), Resumed(step=5, time=START + 9_003)])
    assert again.elapsed_seconds(START + 9_004) == pytest.approx(10 + 4)


def test_a_step_whose_loss_is_no_number_is_no_part_of_the_recent_mean():
    state = fold_all([started(), step(1, loss=2.0), step(2, loss=math.nan), skipped(2), step(3, loss=4.0)])
    assert state.recent_loss == pytest.approx(3.0)
    assert state.skipped_steps == (2,)


def test_of_each_prompt_the_latest_answer_is_kept():
    state = fold_all([sampled(10, "x", "old"), sampled(10, "y"), sampled(20, "x", "new"), sampled(20, "y")])
    assert [(sample.step, sample.prompt, sample.answer) for sample in state.samples] == [
        (20, "x", "new"),
        (20, "y", "a"),
    ]
    assert len(fold_all([sampled(1, f"p{number}") for number in range(99)]).samples) == KEPT_PROMPTS


def test_an_export_long_after_the_end_is_no_training_time():
    end = RunFinished(step=2, adapter="a", best_step=2, best_loss=None, seconds=4.0, time=START + 5)
    exported = Exported(form="merged-fp16", base="b", folder="f", bytes=1, seconds=1.0, time=START + 9_000)
    state = fold_all([started(steps=2), step(1), step(2), end, exported])
    assert state.elapsed_seconds(START + 99_000) == 5
    assert state.is_over


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(min_value=0, max_value=9), st.floats(0.1, 9.0)), max_size=40
    )
)
def test_a_resumed_run_folds_like_one_that_never_took_the_superseded_steps(moves):
    events, done = [started()], 0
    for is_resume, back, loss in moves:
        if is_resume:
            done = max(0, done - back)
            events.append(Resumed(step=done))
        else:
            done += 1
            events += [step(done, loss=loss, tokens=done), evaluated(done, loss / 2)]
            events += [CheckpointSaved(step=done, folder="c", is_best=False, bytes=1)]
            events += [
                eased(done),
                skipped(done),
                sampled(done, prompt=f"p{done}"),
                warned(done),
                warned(None),
            ]
    folded, straight = fold_all(events), fold_all(effective(events))
    for name in ("done_steps", "saved_step", "step", "recent", "losses", "evaluations", "best", "memory"):
        assert getattr(folded, name) == getattr(straight, name), name
    if len(moves) < KEPT_PROMPTS:
        for name in ("eased", "skipped_steps", "samples", "warnings", "warning_count"):
            assert getattr(folded, name) == getattr(straight, name), name
    assert folded.done_steps == done


def test_stages_come_and_go():
    state = fold_all([StageStarted(stage="loading"), StageAdvanced(stage="loading", done=5, total=10)])
    assert state.stage is not None
    assert (state.stage.name, state.stage.done, state.stage.total) == ("loading", 5, 10)
    assert state.status == "preparing"
    state = fold_all([started(), step(1), StageStarted(stage="evaluating")], state)
    assert state.stage is not None
    assert fold(state, evaluated(1, 1.0)).stage is None
    assert state.status == "training"


def test_the_best_evaluation_ignores_a_loss_that_is_no_number():
    state = fold_all([evaluated(1, 0.9), evaluated(2, 0.4), evaluated(3, math.nan), evaluated(4, 0.4)])
    assert state.best == (2, 0.4)


def test_the_peak_is_the_highest_measured():
    measured = [
        MemoryMeasured(step=number, measured={}, peak_bytes=peak) for number, peak in ((1, 9), (2, 7))
    ]
    assert fold_all(measured).peak_bytes == 9


def test_the_supervised_share_is_the_datas_before_and_the_steps_after_training_begins():
    data = DataReady(
        rows=1, held_out_rows=0, tokens=100, supervised_tokens=25, truncated_rows=0, longest_row_tokens=9
    )
    state = fold(RunState(), data)
    assert state.supervised_share == 0.25
    assert fold(state, step(1)).supervised_share == 0.4


def test_working_memory_measured_as_a_sum_is_compared_with_the_sum_of_its_predictions():
    predicted = {
        "base_weights": 100,
        "recompute_boundaries": 1,
        "activations": 20,
        "loss": 300,
        "temporary": 4000,
    }
    rows = memory_rows(predicted, {"base_weights": 101, "working": 4000})
    assert [(row.category, row.predicted_bytes, row.measured_bytes) for row in rows] == [
        ("base_weights", 100, 101),
        ("working", 4321, 4000),
    ]


def test_working_memory_measured_by_category_is_compared_by_category():
    everything = {category: number for number, category in enumerate([*STATIC, *WORKING], start=1)}
    rows = memory_rows(everything, everything)
    assert {row.category: row.measured_bytes for row in rows} == everything
    compact = memory_rows(everything, everything, is_compact=True)
    assert compact[-1].category == "working"
    assert compact[-1].measured_bytes == sum(everything[category] for category in WORKING)


def test_categories_nobody_has_are_left_out_and_unknown_ones_are_shown():
    rows = memory_rows({"base_weights": 5, "gradients": 0}, {"base_weights": 5, "leak": 7})
    assert [(row.title, row.predicted_bytes) for row in rows] == [("base weights", 5), ("leak", None)]


def test_the_difference_is_in_percent_of_the_prediction():
    assert difference_percent(200, 210) == pytest.approx(5.0)
    assert difference_percent(None, 210) is None
    assert difference_percent(0, 210) is None
    assert difference_percent(200, None) is None


FIELDS = {
    "schema", "name", "model", "method", "device", "status", "stage", "step", "steps", "loss",
    "recent_loss", "evaluation_loss", "best_step", "best_loss", "learning_rate", "gradient_norm",
    "tokens", "supervised_share", "tokens_per_second", "elapsed_seconds", "seconds_left",
    "silent_seconds", "saved_step", "memory", "predicted_peak_bytes", "peak_bytes",
    "peak_difference_percent", "budget_bytes", "rehearsal", "eased", "skipped_steps", "samples", "warnings",
    "pause_reason", "stop_reason", "adapter",
}  # fmt: skip


def test_figures_are_strict_json_with_the_documented_fields():
    memory = MemoryMeasured(step=1, measured={"base_weights": 11}, peak_bytes=11)
    cared = [
        Rehearsed(predicted_peak_bytes=9, measured_peak_bytes=8, longest_row_tokens=7, parts={"step": 0.5}),
        eased(1),
        skipped(1),
        dataclasses.replace(sampled(1), divergence=math.nan),
        warned(1),
    ]
    state = fold_all([started(), planned(base_weights=10), step(1, loss=math.nan), memory, *cared])
    state = fold(state, Paused(step=1, reason="it is between 18:00 and 23:00"))
    for one in (RunState(), state):
        numbers = json.loads(json.dumps(figures(one, START + 5), allow_nan=False))
        assert set(numbers) == FIELDS
        assert all(f"`{name}`" in (figures.__doc__ or "") for name in FIELDS)
    assert numbers["loss"] is None
    assert (numbers["status"], numbers["pause_reason"]) == ("paused", "it is between 18:00 and 23:00")
    assert numbers["rehearsal"]["parts"] == {"step": 0.5}
    assert numbers["eased"][0]["price"] == "about 3 % slower"
    assert numbers["skipped_steps"] == [1]
    assert (numbers["samples"][0]["base_answer"], numbers["samples"][0]["divergence"]) == ("b", None)
    assert numbers["warnings"] == [{"message": "at 1", "cure": "c", "step": 1}]
    assert numbers["peak_difference_percent"] == pytest.approx(10.0)
    assert numbers["memory"] == [{"category": "base_weights", "predicted_bytes": 10, "measured_bytes": 11}]


def test_a_state_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunState().done_steps = 5  # type: ignore[misc]
