"""A run that is asked to save, to pause or to leave, that waits by its rules, and that finds no room."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from datetime import time as time_of_day
from pathlib import Path
from threading import Timer
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

from qadapt import control, durable
from qadapt.cli import pause as cli_pause
from qadapt.cli.main import run as run_command
from qadapt.errors import BadOutput, NoRoom
from qadapt.events import (
    CheckpointSaved,
    Continued,
    Evaluated,
    Event,
    Paused,
    Resumed,
    RunFinished,
    StepDone,
    Stopped,
    Warned,
    to_line,
)
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe, dump_yaml
from qadapt.run import resume, train
from qadapt.run_folder import RunFolder, is_worked_on, working_on
from qadapt.train import checkpoint, guards, pauses, saver
from qadapt.train.checkpoint import find_checkpoints, find_damage
from qadapt.train.guards import FreeDisk, Guards, Heat, Hours, OnBattery, OtherProgram
from qadapt.train.spill import CardMemory
from qadapt.units import GIB
from qadapt.view.figures import figures
from qadapt.view.journal import FILE_NAME, Journal, effective, read_events
from qadapt.view.screen import show
from qadapt.view.state import fold_all

if TYPE_CHECKING:
    from conftest import TinyModel

NOON = datetime(2026, 5, 1, 12, 0)


def make_recipe(
    folder: Path, model: Path, *, pause_when: dict[str, Any] | None = None, **train: Any
) -> Recipe:
    """Six steps of three micro-batches; evaluations of three after steps 3 and 6."""
    folder.mkdir(exist_ok=True)
    for name, numbers in (("rows", range(24)), ("held_out", range(100, 106))):
        rows = [{"prompt": f"say {n}{' please' * (n % 4)}", "completion": str(n)} for n in numbers]
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    values = {
        "model": str(model),
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl")}],
            "held_out": str(folder / "held_out.jsonl"),
            "length": 128,
            "packing": False,
        },
        "train": {"steps": 6, "rows_per_step": 5, "learning_rate": 1e-2, "evaluate_every": 3}
        | {"rehearse": False}
        | train,
        "memory": {"compute_dtype": "fp32", "micro_batch": 2},
        "run": {"name": "first", "folder": str(folder / "runs"), "pause_when": pause_when or {}},
    }
    return check_recipe(values, origin="the test")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> list[Event]:
    """The events of the run that nobody disturbs; its folder is in the first one."""
    torch.set_num_threads(1)
    return list(train(make_recipe(tmp_path_factory.mktemp("straight"), tiny_model("llama"))))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pauses, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(pauses, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(guards, "LOOK_SECONDS", 0.0)


def only(kind: type[Event], events: Iterable[Event]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


def assert_same_as(straight: list[Event], run: Path) -> None:
    """The adapter to the bit, and what the journal counts: losses, evaluations, each once."""
    left, right = (
        load_file(folder / "adapter/adapter_model.safetensors")
        for folder in (Path(straight[-1].adapter).parent, run)  # type: ignore[attr-defined]
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    counted = effective(read_events(run))
    for kind, names in (
        (StepDone, ("step", "loss", "gradient_norm")),
        (Evaluated, ("step", "loss", "is_best")),
    ):
        both = [
            [tuple(getattr(e, name) for name in names) for e in only(kind, each)]
            for each in (straight, counted)
        ]
        assert both[0] == both[1]


def asking(run: Path, request: control.Request, *, at_look: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request comes while the run works, before so many looks at its folder."""
    looks = 0
    look = control.is_asked_to_leave

    def counted(folder: Path) -> bool:
        nonlocal looks
        looks += 1
        if looks == at_look:
            control.ask(run, request)
        return look(folder)

    monkeypatch.setattr(control, "is_asked_to_leave", counted)


@pytest.mark.parametrize(("at_look", "step"), [(3, 1), (8, 3)], ids=["in step 2", "in an evaluation"])
def test_a_pause_ends_the_micro_batch_and_changes_nothing(
    tmp_path: Path,
    tiny_model: TinyModel,
    straight: list[Event],
    monkeypatch: pytest.MonkeyPatch,
    at_look: int,
    step: int,
) -> None:
    run = tmp_path / "runs/first"
    with monkeypatch.context() as context:
        asking(run, "pause", at_look=at_look, monkeypatch=context)
        events = list(train(make_recipe(tmp_path, tiny_model("llama"))))
    assert events[-1] == Stopped(step=step, reason="paused on request")
    assert events[-2].step == step  # type: ignore[attr-defined]
    assert isinstance(events[-2], CheckpointSaved)
    assert not only(Evaluated, events)
    assert not control.is_asked(run, "pause")
    list(resume("first", folder=str(tmp_path / "runs")))
    assert_same_as(straight, run)


def test_what_came_of_an_evaluation_that_no_checkpoint_knows_counts_once(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/first"
    with monkeypatch.context() as context:
        asking(run, "stop", at_look=8, monkeypatch=context)
        list(train(make_recipe(tmp_path, tiny_model("llama"))))
    events = resume("first", folder=str(tmp_path / "runs"))
    next(event for event in events if isinstance(event, StepDone))
    events.close()  # type: ignore[attr-defined]
    list(resume("first", folder=str(tmp_path / "runs")))
    assert_same_as(straight, run)


def test_a_request_to_save_is_done_and_the_run_goes_on(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event]
) -> None:
    run, saved = tmp_path / "runs/first", []
    for event in train(make_recipe(tmp_path, tiny_model("llama"))):
        saved += [event.step] if isinstance(event, CheckpointSaved) else []
        if isinstance(event, StepDone) and event.step == 1:
            control.ask(run, "save")
    assert saved == [1, 3, 6]
    assert not control.is_asked(run, "save")
    assert_same_as(straight, run)


class Fed:
    """A rule that holds at the given looks."""

    name = "fed"

    def __init__(self, *held: int, leaves: bool = False) -> None:
        self.held, self.leaves, self.looks = held, leaves, 0

    def reason(self, now: datetime) -> str | None:
        self.looks += 1
        return "it is fed" if self.looks in self.held else None

    def problem(self) -> str | None:
        return None


def feed(*rules: Fed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qadapt.run.guards_of", lambda *_, **__: Guards(rules))


def test_a_rule_that_holds_pauses_the_run_and_changes_nothing(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(Fed(1, 2, 5, 6, 7), monkeypatch=monkeypatch)
    events = list(train(make_recipe(tmp_path, tiny_model("llama"))))
    waits = [event for event in events if isinstance(event, Paused | Continued)]
    assert [(type(event), event.step) for event in waits] == [
        (Paused, 0),
        (Continued, 0),
        (Paused, 2),
        (Continued, 2),
    ]
    assert waits[0].reason == "it is fed"  # type: ignore[union-attr]
    assert {0, 2} <= {event.step for event in only(CheckpointSaved, events)}, "it waits saved"
    assert_same_as(straight, tmp_path / "runs/first")


def test_a_waiting_run_obeys(tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(Fed(*range(2, 10_000)), monkeypatch=monkeypatch)
    run, events = tmp_path / "runs/first", []
    for event in train(make_recipe(tmp_path, tiny_model("llama"))):
        events.append(event)
        if isinstance(event, Paused):
            control.ask(run, "pause")
    assert events[-1] == Stopped(step=1, reason="paused on request")
    assert not only(Continued, events)


def test_a_rule_for_another_program_makes_the_run_leave(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as context:
        feed(Fed(3, leaves=True), monkeypatch=context)
        events = list(train(make_recipe(tmp_path, tiny_model("llama"))))
    assert events[-1] == Stopped(step=2, reason="it is fed")
    list(resume("first", folder=str(tmp_path / "runs")))
    assert_same_as(straight, tmp_path / "runs/first")


def test_a_waiting_run_leaves_for_another_program(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(Fed(*range(2, 9)), Fed(4, leaves=True), monkeypatch=monkeypatch)
    events = list(train(make_recipe(tmp_path, tiny_model("llama"))))
    assert [event.step for event in only(Paused, events)] == [1]
    assert events[-1] == Stopped(step=1, reason="it is fed")


def test_a_rule_that_cannot_be_watched_is_said(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(
        tmp_path,
        tiny_model("llama"),
        pause_when={"temperature": 85, "vram": "2GiB"},
        steps=1,
        evaluate_every=None,
    )
    said = [warned.message for warned in only(Warned, train(recipe))]
    assert any("run.pause_when.vram cannot be watched: the run is on no CUDA card" in text for text in said)
    assert any("run.pause_when.temperature cannot be watched" in text for text in said)


def test_a_warning_of_the_run_is_said_by_its_first_process_only(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    events = train(make_recipe(tmp_path, tiny_model("llama"), pause_when={"vram": "2GiB"}, steps=2))
    run = tmp_path / "runs/first"
    for event in events:
        if isinstance(event, StepDone) and event.step == 1:
            control.ask(run, "pause")
    list(resume("first", folder=str(run.parent)))
    assert len(only(Resumed, read_events(run))) == 1
    assert len(only(Warned, read_events(run))) == 1


def test_a_run_that_is_drawn_is_the_run_that_nobody_looks_at(
    straight: list[Event], tmp_path: Path, tiny_model: TinyModel
) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=30)
    show(train(make_recipe(tmp_path, tiny_model("llama"))), console=console, is_live=True, is_quiet=False)
    assert "last events" in screen.getvalue()
    assert_same_as(straight, tmp_path / "runs/first")


def test_heat_is_let_go_of_five_degrees_below() -> None:
    measured = iter([84, 85, 84, 81, 80, 79, 84, None])
    rule = Heat(85, lambda: next(measured))
    assert [rule.reason(NOON) is not None for _ in range(8)] == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
    ]


def test_another_program_is_what_grows_and_not_the_run_itself() -> None:
    free_and_others = [(GIB, GIB), (GIB, GIB + GIB // 8), (3 * GIB, 3 * GIB), (GIB, 3 * GIB)]
    uses = iter(
        CardMemory(8 * GIB, free_bytes, 8 * GIB - free_bytes - others_bytes)
        for free_bytes, others_bytes in free_and_others
    )
    rule = OtherProgram(2 * GIB, lambda: next(uses))
    assert [rule.reason(NOON) is not None for _ in range(4)] == [False, False, False, True]
    assert rule.leaves


@pytest.mark.parametrize(
    ("first", "last", "waits"), [(18, 23, {18, 22}), (22, 6, {22, 23, 0, 5}), (0, 12, {0, 5, 11})]
)
def test_hours_may_span_midnight(first: int, last: int, waits: set[int]) -> None:
    rule = Hours(time_of_day(first), time_of_day(last))
    hours = (0, 5, 6, 11, 12, 17, 18, 22, 23)
    assert {hour for hour in hours if rule.reason(NOON.replace(hour=hour))} == waits & set(hours) | (
        {hour for hour in hours if first <= hour < last}
    )


def test_a_full_disk_and_a_battery_hold_until_it_is_over() -> None:
    free, plugged = iter([500, 499, 510, 526]), iter([True, False, None])
    disk, battery = FreeDisk(500, lambda: next(free)), OnBattery(lambda: next(plugged))
    assert [disk.reason(NOON) is not None for _ in range(4)] == [False, True, True, False]
    assert [battery.reason(NOON) is not None for _ in range(3)] == [False, True, False]


def test_rules_are_not_looked_at_more_often_than_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "LOOK_SECONDS", 5.0)
    clock, rule = iter([0.0, 0.0, 3.0, 4.9, 5.0, 5.0]), Fed(2)
    watched = Guards([rule], clock=lambda: next(clock), now=lambda: NOON)
    assert [watched.reason() is not None for _ in range(4)] == [False, False, False, True]
    assert rule.looks == 2


def fill(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next checkpoints find no room."""
    left = times
    save = checkpoint.save_checkpoint

    def full(*arguments: Any, **options: Any) -> Path:
        nonlocal left
        left -= 1
        if left >= 0:
            raise NoRoom("There is no room for 3 MiB.", cure="Make some.")
        return save(*arguments, **options)

    monkeypatch.setattr(saver, "save_checkpoint", full)


def test_a_full_disk_pauses_the_run_until_there_is_room(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(3, monkeypatch)
    events = list(train(make_recipe(tmp_path, tiny_model("llama"))))
    assert [event.reason for event in only(Paused, events)] == ["There is no room for 3 MiB."]
    assert len(only(Continued, events)) == 1
    assert only(CheckpointSaved, events)
    assert_same_as(straight, tmp_path / "runs/first")


def test_a_run_that_waits_for_room_leaves_when_asked_with_what_was_saved_whole(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "runs/first"
    with monkeypatch.context() as context, pytest.raises(NoRoom, match="no room for 3 MiB"):
        for event in train(make_recipe(tmp_path, tiny_model("llama"), checkpoint_every=1)):
            if isinstance(event, CheckpointSaved) and event.step == 1:
                fill(10_000, context)
            if isinstance(event, Paused):
                control.ask(run, "stop")
    assert {find_damage(folder) for folder in find_checkpoints(run)} == {None}
    list(resume("first", folder=str(tmp_path / "runs")))
    assert_same_as(straight, run)


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """A real limit of the system: a file that grows beyond it gets EFBIG, in the middle of a write."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_real_limit_pauses_the_run_and_loses_nothing(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event]
) -> None:
    events: list[Event] = []
    limit = largest_file(30_000)
    for event in train(make_recipe(tmp_path, tiny_model("llama"))):
        events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            limit.__enter__()
        if isinstance(event, Paused):
            limit.__exit__(None, None, None)
    assert "File too large" in only(Paused, events)[0].reason
    assert isinstance(events[-1], RunFinished)
    assert_same_as(straight, tmp_path / "runs/first")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
def test_a_journal_without_room_waits_and_keeps_every_line(tmp_path: Path) -> None:
    def steps() -> Iterator[Event]:
        for number in range(1, 5):
            yield Stopped(step=number, reason="x" * 40)

    line = len(to_line(Stopped(step=1, reason="x" * 40))) + 1
    limit = largest_file(2 * line + 40)  # the third line is cut in the middle
    limit.__enter__()
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 4:
            limit.__exit__(None, None, None)

    with Journal(tmp_path / FILE_NAME, sleep=nap) as journal:
        seen = list(journal.record(steps()))
    assert [type(event).__name__ for event in seen] == ["Stopped"] * 2 + ["Paused", "Continued"] + [
        "Stopped"
    ] * 2
    assert "File too large" in seen[2].reason  # type: ignore[attr-defined]
    assert seen[2].step == 2  # type: ignore[attr-defined]
    assert [type(event) for event in read_events(tmp_path)] == [type(event) for event in seen]
    assert len(naps) == 6, "asked between two tries whether it is to leave"


def test_a_journal_without_room_leaves_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / FILE_NAME, sleep=lambda _: None)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal, "_write_whole", full)
    with journal, pytest.raises(NoRoom, match="No space left"):
        for _ in journal.record([Stopped(step=1, reason="")]):
            control.ask(tmp_path, "pause")


def test_a_folder_that_becomes_read_only_is_an_error_and_harms_nothing(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    run = tmp_path / "runs/first"
    with monkeypatch.context() as context, pytest.raises(BadOutput, match="Read-only file system") as error:
        for event in train(make_recipe(tmp_path, tiny_model("llama"), checkpoint_every=1)):
            if isinstance(event, CheckpointSaved):
                context.setattr(checkpoint, "whole_folder", read_only)
    assert not isinstance(error.value, NoRoom), "waiting would cure nothing"
    assert {find_damage(folder) for folder in find_checkpoints(run)} == {None}
    list(resume("first", folder=str(tmp_path / "runs")))
    assert_same_as(straight, run)


def test_a_clock_that_jumps_by_a_day_changes_nothing(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, jumps = time.time, {2: 86_400.0, 4: -86_400.0}
    shift = 0.0
    monkeypatch.setattr(time, "time", lambda: now() + shift)
    for event in train(make_recipe(tmp_path, tiny_model("llama"))):
        if isinstance(event, StepDone):
            shift = jumps.get(event.step, shift)
            object.__setattr__(event, "time", event.time + shift)
    assert_same_as(straight, tmp_path / "runs/first")


def test_a_journal_whose_times_go_back_is_read_all_the_same(tmp_path: Path, straight: list[Event]) -> None:
    with Journal(tmp_path / FILE_NAME) as journal:
        for event in straight:
            jump = -86_400 if isinstance(event, StepDone) and event.step in (2, 4) else 0
            object.__setattr__(event, "time", event.time + jump)
            journal.append(event)
            object.__setattr__(event, "time", event.time - jump)
    read = read_events(tmp_path)
    assert read == straight
    for end in range(1, len(read)):
        shown = figures(fold_all(read[:end]), read[end - 1].time)
        below = {name: value for name, value in shown.items() if "seconds" in name and (value or 0) < 0}
        assert not below, f"after {end} events"


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot stop a process so")
def test_a_process_that_sleeps_and_is_paused_from_outside_goes_on_exactly(
    tmp_path: Path, tiny_model: TinyModel, straight: list[Event], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(make_recipe(tmp_path, tiny_model("llama"))), encoding="utf-8")
    run, folder = tmp_path / "runs/first", str(tmp_path / "runs")
    slow = (  # so that there is time to ask between two steps
        "import sys, time, torch\nfrom qadapt.cli.main import run\nfrom qadapt.train import pauses\n"
        "torch.set_num_threads(1)\n"
        "look = pauses.Pauses.is_leaving\n"
        "pauses.Pauses.is_leaving = lambda self: time.sleep(0.1) or look(self)\n"
        "sys.exit(run(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", slow, "train", str(recipe), "--plain"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and not (run.is_dir() and '"StepDone"' in _text(run / FILE_NAME)):
            time.sleep(0.05)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
        assert is_worked_on(RunFolder(run))
        assert run_command(["save", "first", "--folder", folder]) == 0
        assert run_command(["pause", "first", "--folder", folder]) == 0
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    out = capsys.readouterr().out
    assert "the run goes on" in out
    assert "paused after step" in out
    assert run_command(["pause", "first", "--folder", folder]) == 2
    assert "No process works on the run first" in capsys.readouterr().err
    list(resume("first", folder=folder))
    assert_same_as(straight, run)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def test_a_request_that_was_cleared_away_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process that works on the run had just taken it up."""
    run = tmp_path / "first"
    run.mkdir()
    looks = 0

    def look(_: RunFolder) -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            control.take(run)
        if looks == 5 and control.is_asked(run, "pause"):
            control.take(run)
            journal.append(Stopped(step=4, reason="paused on request"))
        return looks < 10 and looks != 7

    monkeypatch.setattr("qadapt.run_folder.is_worked_on", look)
    monkeypatch.setattr(cli_pause, "POLL_SECONDS", 0)
    with Journal(run / FILE_NAME) as journal:
        journal.append(Stopped(step=1, reason="paused on request"))
        assert run_command(["pause", "first", "--folder", str(tmp_path)]) == 0
    assert looks == 7, "it waits until the process has left"
    assert "paused after step 4" in capsys.readouterr().out


def test_a_save_that_was_cleared_away_is_not_taken_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "first"
    run.mkdir()
    looks = 0

    def look(_: RunFolder) -> bool:
        nonlocal looks
        looks += 1
        if looks == 2:
            control.take(run)
        if looks == 5 and control.is_asked(run, "save"):
            journal.append(CheckpointSaved(step=4, folder="step-000004", is_best=False, bytes=1))
            control.take(run)
        return looks < 10

    monkeypatch.setattr("qadapt.run_folder.is_worked_on", look)
    monkeypatch.setattr(cli_pause, "POLL_SECONDS", 0)
    with Journal(run / FILE_NAME) as journal:
        journal.append(CheckpointSaved(step=1, folder="step-000001", is_best=False, bytes=1))
        assert run_command(["save", "first", "--folder", str(tmp_path)]) == 0
    assert "saved after step 4" in capsys.readouterr().out


def test_a_request_that_comes_while_the_journal_is_read_is_heard(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for event in train(make_recipe(tmp_path, tiny_model("llama"))):
        if isinstance(event, StepDone):
            control.ask(tmp_path / "runs/first", "stop")

    def read(run: Path) -> list[Event]:
        control.ask(run, "pause")
        return read_events(run)

    monkeypatch.setattr("qadapt.run.read_events", read)
    events = list(resume("first", folder=str(tmp_path / "runs")))
    assert events[-1] == Stopped(step=1, reason="paused on request")


def test_who_only_looks_at_a_run_keeps_nobody_from_taking_it_up(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    looker = FileLock(tmp_path / ".lock", thread_local=False)
    looker.acquire()
    Timer(0.2, looker.release).start()
    with working_on(run):
        assert is_worked_on(run)


@pytest.mark.parametrize(("refusals", "is_renamed"), [(2, True), (10_000, False)])
def test_a_rename_that_a_scanner_refuses_for_a_moment_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusals: int, is_renamed: bool
) -> None:
    left, replace = refusals, Path.replace

    def refuse(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PermissionError(errno.EACCES, "Access is denied")
        return replace(self, target)

    monkeypatch.setattr(durable, "REFUSED_SECONDS", 0.3)
    monkeypatch.setattr(Path, "replace", refuse)
    with nullcontext() if is_renamed else pytest.raises(PermissionError):
        durable.write_whole(tmp_path / "plan.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == (["plan.json"] if is_renamed else [])


def test_a_save_during_a_wait_says_that_the_run_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "first"
    run.mkdir()

    def look(_: RunFolder) -> bool:
        if control.is_asked(run, "save"):
            control.take(run)
        return True

    monkeypatch.setattr("qadapt.run_folder.is_worked_on", look)
    with Journal(run / FILE_NAME) as journal:
        journal.append(CheckpointSaved(step=4, folder="step-000004", is_best=False, bytes=1))
        journal.append(Paused(step=4, reason="it is between 18:00 and 23:00"))
    assert run_command(["save", "first", "--folder", str(tmp_path)]) == 0
    assert "saved after step 4; the run waits: it is between 18:00 and 23:00" in capsys.readouterr().out
