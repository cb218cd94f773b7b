"""N steps = k steps, a death, resume, N - k steps: bit for bit, in all that a run leaves behind.

The end of a process is played by a copy of the run's folder, taken at a moment of a run that goes on: it is
what a process that dies at that moment leaves. Real processes are killed in `test_faults.py`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file
from test_train import adapter_of, assert_same, changed, make_recipe, only

from qadapt import control
from qadapt import run as run_module
from qadapt.errors import BadRun
from qadapt.events import (
    AdapterAttached,
    BaseLoaded,
    CheckpointSaved,
    DataReady,
    Evaluated,
    Event,
    MemoryMeasured,
    Planned,
    Rehearsed,
    Resumed,
    RunFinished,
    RunStarted,
    StageAdvanced,
    StageStarted,
    StepDone,
    Stopped,
    Warned,
    to_line,
)
from qadapt.recipe import Recipe
from qadapt.recipe_file import check_recipe
from qadapt.run import resume, train
from qadapt.running.material import Material
from qadapt.running.plan import make_plan
from qadapt.train.checkpoint import find_checkpoints
from qadapt.train.stored_plan import StoredPlan
from qadapt.view.journal import effective, read_events

if TYPE_CHECKING:
    from conftest import TinyModel

OF_A_START = (
    RunStarted, StageStarted, StageAdvanced, Planned, DataReady, BaseLoaded, AdapterAttached, Rehearsed,
    Resumed, Stopped,
)  # fmt: skip
Moment = Callable[[Event], bool]

MOMENTS: dict[str, Moment] = {
    "before the first checkpoint": lambda event: isinstance(event, StepDone) and event.step == 2,
    "at an evaluation": lambda event: isinstance(event, Evaluated) and event.step == 6,
    "at the last step": lambda event: isinstance(event, StepDone) and event.step == 8,
    "after the last checkpoint": lambda event: isinstance(event, CheckpointSaved) and event.step == 8,
    "after an early stop": lambda event: isinstance(event, Evaluated) and not event.is_best,
}
CHOICES: tuple[tuple[Any, ...], ...] = (
    ("none", "all", 1),  # layers that recompute
    (True, False),  # packed
    (5, 2),  # rows of a micro-batch: without and with accumulation
    ("fp32", "bf16", "8-bit"),  # types of adapter and optimizer
    (0.0, 0.1),  # dropout
    tuple(MOMENTS),
    ("whole", "in pieces"),  # losses, feed-forward parts; inputs of recomputed layers in a file
)
CASES = [
    ("none", False, 2, "bf16", 0.1, "before the first checkpoint", "whole"),
    (1, True, 5, "8-bit", 0.0, "before the first checkpoint", "whole"),
    ("all", False, 5, "fp32", 0.1, "before the first checkpoint", "in pieces"),
    ("all", False, 2, "8-bit", 0.0, "at an evaluation", "whole"),
    (1, True, 5, "bf16", 0.1, "at an evaluation", "whole"),
    ("none", True, 5, "fp32", 0.0, "at an evaluation", "in pieces"),
    (1, False, 5, "fp32", 0.1, "at the last step", "whole"),
    ("all", True, 2, "bf16", 0.0, "at the last step", "whole"),
    ("none", True, 5, "8-bit", 0.1, "at the last step", "in pieces"),
    ("none", True, 5, "bf16", 0.0, "after the last checkpoint", "whole"),
    (1, False, 2, "8-bit", 0.1, "after the last checkpoint", "whole"),
    ("all", True, 5, "fp32", 0.0, "after the last checkpoint", "in pieces"),
    ("all", True, 2, "fp32", 0.1, "after an early stop", "whole"),
    ("none", False, 5, "8-bit", 0.0, "after an early stop", "whole"),
    (1, True, 2, "bf16", 0.1, "after an early stop", "in pieces"),
]


def copied(run: Path, to: Path) -> Path:
    """The run's folder as it is at this moment, under another path."""
    is_whole = False
    while not is_whole:  # a checkpoint may be dropped meanwhile: the next look sees the folder without it
        shutil.rmtree(to / run.name, ignore_errors=True)
        with suppress(shutil.Error):
            shutil.copytree(run, to / run.name, ignore=shutil.ignore_patterns(".lock", ".step-*"))
            is_whole = True
    return to / run.name


def until(events: Iterable[Event], moment: Moment, act: Callable[[], object]) -> list[Event]:
    """All events; `act` is called at the first one that is the moment."""
    seen, is_done = [], False
    for event in events:
        seen.append(event)
        if not is_done and moment(event):
            act()
            is_done = True
    assert is_done, "a control: the moment came"
    return seen


def counted(run: Path) -> list[Event]:
    """The events that count, without those of a start, seconds and paths left out."""
    return [plain(event) for event in effective(read_events(run)) if not isinstance(event, OF_A_START)]


def plain(event: Event) -> Event:
    if isinstance(event, RunFinished):
        return replace(event, seconds=0.0, adapter=Path(event.adapter).name)
    if isinstance(event, StepDone | Evaluated):
        return replace(event, seconds=0.0)
    return event


def assert_same_run(left: Path, right: Path) -> None:
    """Adapter, newest checkpoint (weights, optimizer, random state, progress, gauges) and journal."""
    for is_saving in (False, True):  # a checkpoint is said when it is written, beside the steps
        events = [
            [event for event in counted(run) if isinstance(event, CheckpointSaved) == is_saving]
            for run in (left, right)
        ]
        assert events[0] == events[1]
    assert_same(adapter_of(left), adapter_of(right))
    names = [[folder.name for folder in find_checkpoints(run)] for run in (left, right)]
    assert names[0] == names[1]
    newest = [find_checkpoints(run)[-1] for run in (left, right)]
    for group in ("adapter", "optimizer", "random"):
        assert_same(*(load_file(folder / f"{group}.safetensors") for folder in newest))
    states = [json.loads((folder / "state.json").read_text(encoding="utf-8")) for folder in newest]
    assert states[0] == states[1]


def recipe_of(folder: Path, model: Path, case: tuple[Any, ...]) -> Recipe:
    recompute, packed, rows, types, dropout, moment, _ = case
    values = make_recipe(folder, model, steps=8, rows_per_step=5).model_dump()
    values["adapter"] |= {"dropout": dropout, "dtype": "bf16" if types == "bf16" else "fp32"}
    values["data"]["packing"] = packed
    values["train"]["optimizer"] = "adamw-8bit" if types == "8-bit" else "adamw"
    values["memory"] |= {"compute_dtype": "bf16" if types == "bf16" else "fp32", "micro_batch": rows}
    values["memory"]["recompute"] = recompute
    if moment == "after an early stop":
        values["train"] |= {"evaluate_every": 1, "patience": 1, "learning_rate": 1.0, "clip_norm": None}
        values["train"]["steps"] = 30
    return check_recipe(values, origin="the test")


def plan_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan for long rows chooses, for these short ones; resuming plans nothing."""

    def make(recipe: Recipe, material: Material) -> StoredPlan:
        return replace(make_plan(recipe, material), loss_chunk=7, mlp_tiles=3, offload=("boundaries",))

    monkeypatch.setattr(run_module, "make_plan", make)


def test_the_cases_hold_every_pair_of_choices() -> None:
    for left, right in itertools.combinations(range(len(CHOICES)), 2):
        pairs = {(case[left], case[right]) for case in CASES}
        assert pairs == set(itertools.product(CHOICES[left], CHOICES[right]))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(each) for each in case))
def test_a_resumed_run_is_the_straight_run(
    tmp_path: Path, tiny_model: TinyModel, case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tmp_path / "runs/first"
    if case[-1] == "in pieces":
        plan_pieces(monkeypatch)
    events = train(recipe_of(tmp_path, tiny_model("llama"), case))
    until(events, MOMENTS[case[-2]], lambda: copied(straight, tmp_path / "copy"))
    resumed = list(resume("first", folder=str(tmp_path / "copy")))
    assert isinstance(resumed[-1], RunFinished)
    assert only(Resumed, resumed)
    assert_same_run(straight, tmp_path / "copy/first")


def straight_and_copies(
    folder: Path, recipe: Recipe, moment: Moment = MOMENTS["at an evaluation"]
) -> Iterator[Path]:
    """The straight run's folder, then copies of it as it was at the moment."""
    straight = folder / "runs/first"
    until(train(recipe), moment, lambda: copied(straight, folder / "at-the-moment"))
    yield straight
    for number in itertools.count():
        yield copied(folder / "at-the-moment/first", folder / f"copy-{number}")


def go_on(run: Path, **options: Any) -> list[Event]:
    return list(resume("first", folder=str(run.parent), **options))


def without_last(run: Path, kind: type[Event]) -> None:
    """Takes the last line of a kind out of a journal."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    last = max(index for index, line in enumerate(lines) if f'"{kind.__name__}"' in line)
    del lines[last]
    (run / "events.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_a_run_that_died_again_and_again_is_the_straight_run(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"), steps=7, checkpoint_every=2)
    copies = straight_and_copies(
        tmp_path, recipe, lambda event: isinstance(event, StepDone) and event.step == 3
    )
    straight, run = next(copies), next(copies)
    for number, step in enumerate((3, 5, 5, 7)):
        events = resume("first", folder=str(run.parent))
        there = run

        def is_there(event: Event, step: int = step) -> bool:
            return isinstance(event, StepDone) and event.step == step

        to = tmp_path / f"again-{number}"
        until(events, is_there, lambda there=there, to=to: copied(there, to))  # type: ignore[misc]
        run = to / "first"
    go_on(run)
    assert_same_run(straight, run)


def test_a_run_that_was_asked_to_stop_is_the_straight_run_but_for_the_saved_state_there(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    list(train(make_recipe(tmp_path / "straight", tiny_model("llama"))))
    run = tmp_path / "stopped/runs/first"
    events = train(make_recipe(tmp_path / "stopped", tiny_model("llama")))
    until(
        events,
        lambda event: isinstance(event, StepDone) and event.step == 4,
        lambda: control.ask(run, "stop"),
    )
    go_on(run)
    straight = tmp_path / "straight/runs/first"
    for is_saving in (False, True):  # a checkpoint is told whenever it has reached the disk
        of_stopped, of_straight = (
            [event for event in counted(folder) if isinstance(event, CheckpointSaved) == is_saving]
            for folder in (run, straight)
        )
        told = [event for event in of_stopped if not (isinstance(event, CheckpointSaved) and event.step == 4)]
        assert told == of_straight
    assert_same(adapter_of(run), adapter_of(straight))


def test_the_line_of_a_checkpoint_that_a_kill_left_out_is_written_again(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    copies = straight_and_copies(
        tmp_path,
        make_recipe(tmp_path, tiny_model("llama")),
        lambda event: isinstance(event, CheckpointSaved) and event.step == 3,
    )
    straight, run = next(copies), next(copies)
    without_last(run, CheckpointSaved)
    go_on(run)
    assert_same_run(straight, run)


def test_a_run_that_died_between_its_adapter_and_its_last_line_ends_the_same(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    copies = straight_and_copies(
        tmp_path,
        make_recipe(tmp_path, tiny_model("llama")),
        lambda event: isinstance(event, RunFinished),
    )
    straight, run = next(copies), next(copies)
    without_last(run, RunFinished)
    events = go_on(run)
    assert not only(StepDone, events)
    assert_same_run(straight, run)


def test_the_highest_memory_is_that_of_all_processes(tmp_path: Path, tiny_model: TinyModel) -> None:
    rows = tmp_path / "train.jsonl"
    values = make_recipe(tmp_path, tiny_model("llama"), steps=6).model_dump()
    values["data"] |= {"order": "given", "packing": False}
    values["train"]["rows_per_step"] = values["memory"]["micro_batch"] = 1
    lines = rows.read_text(encoding="utf-8").splitlines()
    long = json.loads(lines[0])
    long["messages"][0]["content"] = "say 1 " * 9
    rows.write_text("\n".join([json.dumps(long), *lines[1:]]) + "\n", encoding="utf-8")
    copies = straight_and_copies(
        tmp_path,
        check_recipe(values, origin="the test"),
        lambda event: isinstance(event, StepDone) and event.step == 5,
    )
    straight, run = next(copies), next(copies)
    events = go_on(run)
    last = only(MemoryMeasured, events)[-1]
    assert last.step == 6, "measured in the second process"
    assert last.peak_bytes == only(MemoryMeasured, read_events(straight))[0].peak_bytes, "of the first step"
    assert_same_run(straight, run)


def test_what_was_warned_of_is_not_warned_of_again(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"))
    values = recipe.model_dump()
    rows = Path(values["data"]["sources"][0]["path"])
    first = rows.read_text(encoding="utf-8").splitlines()[0]
    rows.write_text(rows.read_text(encoding="utf-8") + f"{first}\n" * 3, encoding="utf-8")
    copies = straight_and_copies(tmp_path, check_recipe(values, origin="the test"))
    straight, run = next(copies), next(copies)
    assert only(Warned, counted(straight)), "a control: repeated rows are said"
    go_on(run)
    assert_same_run(straight, run)


def test_a_run_that_died_while_it_was_prepared_begins_as_it_was_asked_to(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    recipe = changed(make_recipe(tmp_path, tiny_model("llama")), "data", length=90)  # some are cut
    copies = straight_and_copies(tmp_path, recipe, lambda event: isinstance(event, DataReady))
    straight, run = next(copies), next(copies)
    assert not (run / "plan.json").exists(), "a control: it died before it was planned"
    assert any(isinstance(event, Warned) for event in counted(run)), "a control: warned already"
    go_on(run)
    assert_same_run(straight, run)


def test_a_run_that_never_began_and_lost_its_recipe_is_an_error(tmp_path: Path) -> None:
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (run / "events.jsonl").write_text(to_line(StageStarted(stage="hashing")) + "\n", encoding="utf-8")
    with pytest.raises(BadRun, match="never began") as refusal:
        go_on(run)
    assert "qadapt train" in refusal.value.cure


def test_a_run_that_died_before_its_first_line_is_begun_again_by_its_name(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    run = tmp_path / "runs/first"
    run.mkdir(parents=True)
    (run / ".lock").touch()
    (run / "recipe.yaml").write_text("version: 1", encoding="utf-8")
    assert isinstance(list(train(make_recipe(tmp_path, tiny_model("llama"), steps=1)))[-1], RunFinished)


def test_a_folder_with_anything_else_in_it_is_no_place_for_a_new_run(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    kept = tmp_path / "runs/first/letter.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("dear", encoding="utf-8")
    with pytest.raises(BadRun, match="There is a run named 'first'"):
        list(train(make_recipe(tmp_path, tiny_model("llama"))))
    assert kept.read_text(encoding="utf-8") == "dear"


def test_a_second_start_of_a_run_does_not_delete_the_first(tmp_path: Path, tiny_model: TinyModel) -> None:
    recipe = make_recipe(tmp_path, tiny_model("llama"))
    events = train(recipe)
    next(events)
    with pytest.raises(BadRun):
        list(train(recipe))
    assert isinstance(list(events)[-1], RunFinished)
