import errno
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadapt.errors import BadOutput, BadRun, NoRoom
from qadapt.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    Resumed,
    RunFinished,
    RunStarted,
    Sampled,
    StepDone,
    Stopped,
    Warned,
)
from qadapt.run_folder import run_names
from qadapt.view.journal import FILE_NAME, Journal, effective, follow, read_events


def started(steps: int = 10) -> RunStarted:
    return RunStarted(name="r", model="m", method="lora", device="cpu", steps=steps, time=100.0)


def step(number: int, loss: float = 1.0) -> StepDone:
    return StepDone(
        step=number,
        loss=loss,
        learning_rate=1e-3,
        gradient_norm=1.0,
        tokens=100,
        supervised_tokens=40,
        rows=4,
        seconds=2.0,
        time=100.0 + 2 * number,
    )


def stopped(number: int) -> Stopped:
    return Stopped(step=number, reason="asked to", time=200.0)


def finished(number: int) -> RunFinished:
    return RunFinished(step=number, adapter="a", best_step=number, best_loss=0.5, seconds=20.0, time=300.0)


def write(folder: Path, *events: Event) -> Path:
    with Journal(folder / FILE_NAME) as journal:
        for event in events:
            journal.append(event)
    return folder / FILE_NAME


class Clock:
    """A sleep that does one thing of a list at each call, and fails when the list is over."""

    def __init__(self, *deeds) -> None:
        self.deeds = list(deeds)

    def __call__(self, seconds: float) -> None:
        assert self.deeds, "follow waited although nothing more could come"
        self.deeds.pop(0)()


def test_written_events_are_read_back_with_their_times(tmp_path):
    events = [started(), step(1), Warned(message="ü → ß", cure="none"), finished(1)]
    write(tmp_path, *events)
    read = read_events(tmp_path)
    assert read == events
    assert [event.time for event in read] == [event.time for event in events]


def test_each_event_is_in_the_file_before_append_returns(tmp_path):
    journal = Journal(tmp_path / FILE_NAME)
    for number in range(1, 4):
        journal.append(step(number))
        assert len(read_events(tmp_path)) == number
    journal.close()


def test_record_writes_an_event_before_it_passes_it_on(tmp_path):
    with Journal(tmp_path / FILE_NAME) as journal:
        for event in journal.record([started(), step(1)]):
            assert read_events(tmp_path)[-1] == event


def test_a_last_line_cut_off_anywhere_is_left_out_and_reported(tmp_path):
    path = write(tmp_path, started(), step(1), step(2))
    whole = path.read_bytes()
    last_line = len(whole) - whole[:-1].rindex(b"\n") - 1
    for lost in range(2, last_line):
        path.write_bytes(whole[:-lost])
        *before, warned = read_events(tmp_path)
        assert before == [started(), step(1)]
        assert isinstance(warned, Warned)
        assert "line 3" in warned.message
        assert warned.time == step(1).time


def test_a_cut_between_two_lines_loses_nothing_else(tmp_path):
    path = write(tmp_path, started(), step(1), step(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # only the line end
    assert read_events(tmp_path) == [started(), step(1), step(2)]
    path.write_bytes(whole[: whole[:-1].rindex(b"\n") + 1])  # the whole line
    assert read_events(tmp_path) == [started(), step(1)]


def test_a_damaged_line_in_the_middle_hides_no_other_event(tmp_path):
    path = write(tmp_path, started(), step(1), step(2))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\x00\x00\xff", *lines[2:]]))
    kinds = [type(event) for event in read_events(tmp_path)]
    assert kinds == [RunStarted, Warned, StepDone]


def test_a_resumed_journal_begins_on_a_fresh_line(tmp_path):
    path = write(tmp_path, started(), step(1), step(2))
    path.write_bytes(path.read_bytes()[:-20])
    write(tmp_path, Resumed(step=1), step(2))
    assert read_events(tmp_path) == [started(), step(1), Resumed(step=1), step(2)]


def test_a_last_line_that_lacks_only_its_end_is_kept_when_resuming(tmp_path):
    path = write(tmp_path, started(), step(1))
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, step(2))
    assert read_events(tmp_path) == [started(), step(1), step(2)]


def test_events_of_a_later_version_are_left_out(tmp_path):
    path = write(tmp_path, started())
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"event": "Teleported", "version": 9, "time": 1.0}) + "\n")
    assert read_events(tmp_path) == [started()]


def test_a_run_without_events_yet_has_none(tmp_path):
    assert read_events(tmp_path) == []


def test_a_missing_run_folder_names_the_runs_that_exist(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, started())
    (tmp_path / "not-a-run").mkdir()
    for read in (read_events, follow):
        with pytest.raises(BadRun, match="there is no run folder") as error:
            read(tmp_path / "thrid")
        assert "first" in error.value.cure
        assert "second" in error.value.cure
        assert "not-a-run" not in error.value.cure
    assert set(run_names(tmp_path)) == {"first", "second"}


def test_a_missing_run_folder_without_any_runs_says_how_to_start_one(tmp_path):
    with pytest.raises(BadRun) as error:
        read_events(tmp_path / "nowhere" / "run")
    assert "qadapt train" in error.value.cure


def test_a_full_disk_is_one_clear_error(tmp_path):
    class FullDisk(io.RawIOBase):
        def write(self, line) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    journal = Journal(tmp_path / FILE_NAME)
    journal.close()
    journal._file = FullDisk()
    with pytest.raises(BadOutput, match="No space left on device") as error:
        journal.append(step(1))
    assert "qadapt resume" in error.value.cure


def test_a_line_that_found_no_room_leaves_no_half_of_it(tmp_path):
    class FillingDisk(io.RawIOBase):
        def write(self, line) -> int:
            if len(line) < 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            with (tmp_path / FILE_NAME).open("ab") as file:
                return file.write(line[:40])

    journal = Journal(tmp_path / FILE_NAME)
    journal.append(Resumed(step=1))
    whole, journal._file = journal._file, FillingDisk()
    with pytest.raises(NoRoom, match="No space left on device"):
        journal.append(Resumed(step=2))
    journal._file = whole
    journal.append(Resumed(step=3))
    assert [event.step for event in read_events(tmp_path)] == [1, 3]
    journal.close()


def test_a_disk_that_takes_a_line_in_pieces_gets_all_of_it(tmp_path):
    class SlowDisk(io.RawIOBase):
        taken = b""

        def write(self, line) -> int:
            self.taken += bytes(line[:7])
            return min(7, len(line))

    journal = Journal(tmp_path / FILE_NAME)
    journal.close()
    journal._file = disk = SlowDisk()
    journal.append(step(1))
    assert json.loads(disk.taken)["step"] == 1
    assert disk.taken.endswith(b"\n")


def test_a_journal_in_a_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(BadOutput, match="cannot be written"):
        Journal(tmp_path / "missing" / FILE_NAME)


def test_steps_after_the_checkpoint_are_superseded_by_a_resume():
    evaluated = Evaluated(step=4, loss=0.9, is_best=True, seconds=1.0)
    warned = Warned(message="m", cure="c")
    events = [
        started(),
        *map(step, range(1, 5)),
        evaluated,
        warned,
        stopped(4),
        Resumed(step=2),
        step(3, 0.5),
    ]
    assert effective(events) == [started(), step(1), step(2), warned, Resumed(step=2), step(3, 0.5)]


def test_what_an_evaluation_said_counts_once_though_two_processes_said_it():
    def saved(is_best: bool) -> CheckpointSaved:
        return CheckpointSaved(step=3, folder="step-000003", is_best=is_best, bytes=1)

    said = [
        Evaluated(step=3, loss=0.9, is_best=True, seconds=1.0),
        Warned(message="m", cure="c", step=3),
        *(Sampled(step=3, prompt=ask, answer="a", base_answer="b", divergence=0.0) for ask in "pq"),
    ]
    events = [
        step(3), saved(False), Resumed(step=3), *said[:3], Resumed(step=3), *said, saved(True),
        Warned(message="m", cure="c", step=4),
    ]  # fmt: skip
    kept = effective(events)
    again = [event for event in kept if not isinstance(event, Resumed)]
    assert again == [step(3), *said, saved(True), events[-1]]


@given(st.lists(st.tuples(st.booleans(), st.integers(min_value=0, max_value=9)), max_size=30))
def test_effective_steps_rise_and_what_counts_already_counts_again(moves):
    # A simple reference: replay step numbers on a list, cutting it at each resume.
    events, straight, done = [], [], 0
    for is_resume, back in moves:
        if is_resume:
            done = max(0, done - back)
            straight = straight[:done]
            events.append(Resumed(step=done))
        else:
            done += 1
            straight.append(done)
            events.append(step(done))
    kept = effective(events)
    assert [event.step for event in kept if isinstance(event, StepDone)] == straight
    assert effective(kept) == kept


def test_follow_waits_for_the_file_and_ends_with_the_run(tmp_path):
    path = tmp_path / FILE_NAME
    clock = Clock(
        lambda: None,
        lambda: write(tmp_path, started()),
        lambda: write(tmp_path, step(1), step(2)),
        lambda: write(tmp_path, finished(2)),
    )
    events = list(follow(tmp_path, sleep=clock))
    assert events == [started(), step(1), step(2), finished(2)]
    assert path.exists()


def test_follow_waits_for_the_rest_of_a_half_written_line(tmp_path):
    path = write(tmp_path, started(), step(1), finished(1))
    whole = path.read_bytes()
    seen = []
    for cut in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        clock = Clock(lambda: path.write_bytes(whole))
        seen.append(list(follow(tmp_path, sleep=clock)))
    assert seen == [[started(), step(1), finished(1)]] * 3


def test_follow_survives_that_a_resume_removes_a_half_line(tmp_path):
    path = write(tmp_path, started(), step(1))
    whole_bytes = len(path.read_bytes())
    with path.open("ab") as file:
        file.write(b'{"event": "StepDone", "version": 1, "ti')
    clock = Clock(lambda: None, lambda: write(tmp_path, Resumed(step=1), step(2), finished(2)))
    assert list(follow(tmp_path, sleep=clock)) == [started(), step(1), Resumed(step=1), step(2), finished(2)]
    assert path.read_bytes()[whole_bytes:].startswith(b'{"event": "Resumed"')


def test_follow_of_a_run_that_is_over_does_not_wait(tmp_path):
    write(tmp_path, started(), step(1), stopped(1))
    assert list(follow(tmp_path, sleep=Clock())) == [started(), step(1), stopped(1)]


def test_follow_passes_over_a_stop_that_was_resumed(tmp_path):
    write(tmp_path, started(), step(1), stopped(1), Resumed(step=1), step(2))
    clock = Clock(lambda: write(tmp_path, finished(2)))
    assert list(follow(tmp_path, sleep=clock))[-1] == finished(2)


def test_the_caller_may_leave_while_the_run_goes_on(tmp_path):
    write(tmp_path, started(), step(1))
    events = follow(tmp_path, sleep=Clock())
    assert [next(events), next(events)] == [started(), step(1)]
    events.close()
