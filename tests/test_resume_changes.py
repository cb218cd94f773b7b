"""What a run that goes on finds changed: recipe, rows, base, plan, versions, place; and who else is there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_resume import copied, counted, until
from test_train import adapter_of, assert_same, changed, make_recipe, only

from qadapt.data import row_cache
from qadapt.data.prepared import changed_files, gone_files
from qadapt.errors import BadData, BadOutput, BadRun
from qadapt.events import (
    CheckpointSaved,
    Event,
    MemoryMeasured,
    Planned,
    Resumed,
    RunFinished,
    RunStarted,
    StepDone,
    Warned,
)
from qadapt.exporting.export import export
from qadapt.hardware.claims import SharedCard
from qadapt.recipe import Recipe
from qadapt.recipe_file import dump_yaml, read_recipe
from qadapt.run import resume, train
from qadapt.run_folder import RunFolder
from qadapt.running import card as run_card
from qadapt.running import resumption
from qadapt.running.resumption import TakenUp, plan_anew
from qadapt.train.checkpoint import Checkpoint, find_checkpoints
from qadapt.train.loop import Loop
from qadapt.train.stored_plan import read_plan
from qadapt.units import GIB

if TYPE_CHECKING:
    from conftest import TinyModel


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Path:
    """A folder with rows, the run `straight`, and `begun`, as that was after its first checkpoint."""
    folder = tmp_path_factory.mktemp("begun")
    model = shutil.copytree(tiny_model("llama"), folder / "model")
    recipe = changed(make_recipe(folder, model), "run", name="straight")
    recipe = changed(recipe, "adapter", dropout=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "data_folder", lambda: folder / "cache")
        patch.setattr("qadapt.hardware.calibration.calibration_file", lambda: folder / "calibration.jsonl")
        events = until(
            train(recipe),
            lambda event: isinstance(event, CheckpointSaved) and event.step == 3,
            lambda: copied(folder / "runs/straight", folder / "copies"),
        )
    assert isinstance(events[-1], RunFinished)
    (folder / "copies/straight").rename(folder / "begun")
    return folder


@pytest.fixture
def run(begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run that stands at step 3 of 6, under a name and in a place that it did not begin in."""
    monkeypatch.setattr(row_cache, "data_folder", lambda: tmp_path / "cache")
    shutil.copytree(begun / "cache", tmp_path / "cache")
    return RunFolder(Path(shutil.copytree(begun / "begun", tmp_path / "moved/renamed")))


def go_on(run: RunFolder, **options: Any) -> list[Event]:
    return list(resume("renamed", folder=str(run.path.parent), **options))


def edit(run: RunFolder, change: Callable[[Recipe], Recipe]) -> None:
    run.recipe.write_text(dump_yaml(change(read_recipe(str(run.recipe)))), encoding="utf-8")


@pytest.fixture
def rows(begun: Path) -> Any:
    """The file of rows; put back after the test."""
    path = begun / "train.jsonl"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


def test_a_run_that_was_moved_and_renamed_goes_on_under_its_new_name(begun: Path, run: RunFolder) -> None:
    events = go_on(run)
    assert only(RunStarted, events)[0].name == "renamed"
    assert only(Resumed, events)[0].step == 3
    assert_same(adapter_of(run.path), adapter_of(begun / "runs/straight"))
    assert not only(Warned, events)


def test_a_changed_field_is_refused_with_both_its_values(run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "train", learning_rate=0.02, clip_norm=None))
    with pytest.raises(BadRun) as refusal:
        go_on(run)
    assert "train.learning_rate was 0.01 and is 0.02" in refusal.value.problem
    assert "train.clip_norm was 1.0 and is None" in refusal.value.problem
    assert "qadapt resume renamed --allow-change" in refusal.value.cure
    assert [event for event in counted(run.path) if isinstance(event, RunFinished)] == []


def test_an_allowed_change_is_recorded_and_stands_in_the_plan(begun: Path, run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "train", steps=7, learning_rate=0.02))
    events = go_on(run, allow_change=True)
    warned = only(Warned, events)
    assert len(warned) == 1
    assert "train.steps was 6 and is 7" in warned[0].message
    assert "--allow-change" in warned[0].cure
    assert [event.step for event in only(StepDone, events)] == [4, 5, 6, 7]
    assert read_plan(run.plan).steps == 7
    assert read_plan(run.plan).recipe["train"]["learning_rate"] == 0.02
    assert read_plan(run.plan).micro_batch == read_plan(begun / "begun/plan.json").micro_batch


def test_fewer_steps_than_were_done_are_refused_and_as_many_end_the_run(run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "train", steps=2))
    with pytest.raises(BadRun, match="has done 3 steps; its recipe comes to 2 now") as refusal:
        go_on(run, allow_change=True)
    assert "come to 3 or more" in refusal.value.cure
    assert read_plan(run.plan).steps == 6
    edit(run, lambda recipe: changed(recipe, "train", steps=3))
    events = go_on(run, allow_change=True)
    assert isinstance(events[-1], RunFinished) and events[-1].step == 3
    assert only(StepDone, events) == []


def test_a_plan_says_how_many_rows_filled_up_take_no_more_than_it_planned(run: RunFolder) -> None:
    plan = read_plan(run.plan)
    packed = replace(plan, packed=True, packed_tokens=1000, micro_batch=4)
    assert [packed.rows_at_once(longest) for longest in (300, 1000, 2000)] == [3, 1, 1]
    assert replace(plan, packed=False, micro_batch=4).rows_at_once(300) == 4


def test_a_change_that_was_allowed_once_needs_no_second_word(run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "train", learning_rate=0.02))
    events = resume("renamed", folder=str(run.path.parent), allow_change=True)
    next(event for event in events if isinstance(event, StepDone))
    events.close()  # type: ignore[attr-defined]
    again = go_on(run)
    assert isinstance(again[-1], RunFinished)
    assert not only(Warned, again)


def test_the_norm_of_bottlenecks_shapes_the_saved_state(run: RunFolder) -> None:
    plan = json.loads(run.plan.read_text(encoding="utf-8"))
    plan["recipe"]["adapter"] |= {"method": "pfeiffer", "nonlinearity": "relu"}
    run.write_json(run.plan, plan)
    edit(run, lambda recipe: changed(recipe, "adapter", method="pfeiffer", nonlinearity="layernorm-relu"))
    with pytest.raises(BadRun, match=r"only the old one: adapter\.nonlinearity was relu and is layernorm"):
        go_on(run, allow_change=True)


def test_a_field_that_shapes_the_saved_state_cannot_change(run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "adapter", rank=8))
    with pytest.raises(BadRun, match=r"saved state fits only the old one: adapter\.rank was 4 and is 8"):
        go_on(run, allow_change=True, replan=True)


def test_a_base_of_another_kind_cannot_take_the_saved_state_over(
    run: RunFolder, tiny_model: TinyModel
) -> None:
    wider, own = str(tiny_model("llama", width=128)), read_recipe(str(run.recipe)).model.source
    edit(run, lambda recipe: changed(recipe, "model", source=wider))
    before = run.plan.read_bytes()
    with pytest.raises(BadRun, match="saved state of the run renamed does not fit its base"):
        go_on(run, allow_change=True)
    assert find_checkpoints(run.path), "nothing is lost"
    assert run.plan.read_bytes() == before
    edit(run, lambda recipe: changed(recipe, "model", source=own))
    assert isinstance(go_on(run)[-1], RunFinished), "as the cure says"


def test_how_a_run_is_exported_or_paused_may_change_at_any_time(run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "export", form="merged-fp32"))
    assert isinstance(go_on(run)[-1], RunFinished)


def test_a_changed_memory_section_needs_a_new_plan(run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "memory", micro_batch=1))
    with pytest.raises(BadRun, match=r"memory\.micro_batch was 2 and is 1") as refusal:
        go_on(run, allow_change=True)
    assert "--replan" in refusal.value.cure


def test_a_new_plan_changes_how_steps_are_placed_and_not_what_they_compute(
    begun: Path, run: RunFolder
) -> None:
    edit(run, lambda recipe: changed(recipe, "memory", micro_batch=1, recompute="all"))
    (run.path / "rungs.json").write_text('{"version": 1, "rungs": []}', encoding="utf-8")
    events = go_on(run, replan=True)
    planned = only(Planned, events)
    assert [(plan.micro_batch, plan.recompute) for plan in planned] == [(1, "all")]
    assert not (run.path / "rungs.json").exists(), "they eased another plan"
    peaks = [measured.peak_bytes for measured in only(MemoryMeasured, events)]
    before = [measured.peak_bytes for measured in only(MemoryMeasured, counted(begun / "runs/straight"))]
    assert max(peaks) < max(before), "measured of the new plan, which takes less"
    assert (read_plan(run.plan).micro_batch, read_plan(run.plan).recompute) == (1, "all")
    assert only(Resumed, events)[0].step == 3
    straight = [event for event in counted(begun / "runs/straight") if isinstance(event, StepDone)]
    again = [event for event in counted(run.path) if isinstance(event, StepDone)]
    assert [event.step for event in again] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(straight, again, strict=True):
        assert (left.tokens, left.supervised_tokens, left.rows) == (
            right.tokens,
            right.supervised_tokens,
            right.rows,
        )
        assert left.loss == pytest.approx(right.loss, rel=1e-4)  # fp32, sums in another order


def test_a_new_plan_stays_new_for_the_process_after_one_that_died(begun: Path, run: RunFolder) -> None:
    edit(run, lambda recipe: changed(recipe, "memory", micro_batch=1, recompute="all"))
    events = resume("renamed", folder=str(run.path.parent), replan=True)
    next(event for event in events if isinstance(event, StepDone))
    events.close()  # type: ignore[attr-defined]
    (run.path / "rungs.json").write_text('{"version": 1, "rungs": []}', encoding="utf-8")
    peaks = [measured.peak_bytes for measured in only(MemoryMeasured, go_on(run))]
    before = [measured.peak_bytes for measured in only(MemoryMeasured, counted(begun / "runs/straight"))]
    assert max(peaks) < max(before), "not that of the plan before"
    assert (run.path / "rungs.json").exists(), "they eased this plan"


def test_a_new_plan_keeps_the_types_of_the_saved_state(run: RunFolder) -> None:
    before = read_plan(run.plan)
    go_on(run, replan=True)
    after = read_plan(run.plan)
    assert (after.adapter_dtype, after.optimizer, after.compute_dtype) == (
        before.adapter_dtype,
        before.optimizer,
        before.compute_dtype,
    )
    assert after.recipe == before.recipe


def test_a_saved_state_without_a_loss_scale_is_gone_on_with_by_scaled_steps(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a run of a CPU is planned anew for a card without bf16."""
    restore = Loop.restore

    def scaled(loop: Loop, checkpoint: Checkpoint) -> None:
        loop.scale_loss()
        restore(loop, checkpoint)

    monkeypatch.setattr(Loop, "restore", scaled)
    assert [event.step for event in only(StepDone, go_on(run, replan=True))] == [4, 5, 6]


def test_an_adapter_that_a_card_cannot_train_is_refused_with_a_way_that_works(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        resumption, "choose_compute_dtype", lambda choice, _: "fp16" if choice == "auto" else choice
    )
    recipe = changed(read_recipe(str(run.recipe)), "memory", compute_dtype="auto", device="cpu")
    plan = replace(read_plan(run.plan), device="cuda", adapter_dtype="bf16")
    taken = TakenUp(recipe, plan, material=None, is_to_plan=True)  # type: ignore[arg-type]
    with pytest.raises(BadRun, match="saved adapter is bf16, and products are fp16") as refusal:
        plan_anew(taken)
    assert "memory.compute_dtype=fp32" in refusal.value.cure
    wider = changed(recipe, "memory", compute_dtype="fp32")
    monkeypatch.setattr(resumption, "make_plan", lambda *_: plan)
    assert plan_anew(replace(taken, recipe=wider)).adapter_dtype == "bf16"


def test_changed_rows_are_refused_by_the_path_of_their_file(run: RunFolder, rows: Path) -> None:
    rows.write_text(rows.read_text(encoding="utf-8").replace("say 7", "say 8"), encoding="utf-8")
    with pytest.raises(BadRun) as refusal:
        go_on(run)
    assert f"rows ({rows} changed)" in refusal.value.problem
    assert "held_out" not in refusal.value.problem
    events = go_on(run, allow_change=True)
    assert any(str(rows) in event.message for event in only(Warned, events))
    assert isinstance(events[-1], RunFinished)


def test_a_changed_base_and_template_are_refused_by_name(begun: Path, run: RunFolder) -> None:
    model = begun / "model"
    template, config = model / "chat_template.jinja", model / "config.json"
    contents = template.read_text(encoding="utf-8"), config.read_text(encoding="utf-8")
    template.write_text(contents[0].replace("26 Jul 2024", "27 Jul 2024"), encoding="utf-8")
    config.write_text(json.dumps({**json.loads(contents[1]), "rms_norm_eps": 1e-5}), encoding="utf-8")
    try:
        with pytest.raises(BadRun) as refusal:
            go_on(run)
    finally:
        template.write_text(contents[0], encoding="utf-8")
        config.write_text(contents[1], encoding="utf-8")
    for text in (f"base ({model}", "template (", "rows (the same files give other rows now)", " and is "):
        assert text in refusal.value.problem, text


def test_deleted_rows_are_taken_from_what_was_prepared_of_them(
    begun: Path, run: RunFolder, rows: Path
) -> None:
    rows.unlink()
    events = go_on(run)
    (warned,) = only(Warned, events)
    assert str(rows) in warned.message
    assert "what was prepared of them" in warned.message
    assert_same(adapter_of(run.path), adapter_of(begun / "runs/straight"))


def test_deleted_rows_whose_prepared_ones_are_gone_too_are_an_error(run: RunFolder, rows: Path) -> None:
    rows.unlink()
    shutil.rmtree(row_cache.data_folder())
    with pytest.raises(BadData, match="are gone") as refusal:
        go_on(run)
    assert str(rows) in refusal.value.problem
    assert "Put the files back" in refusal.value.cure


def test_of_a_folder_of_rows_only_missing_files_are_made_up_for() -> None:
    def source(**hashes: str) -> list[dict[str, Any]]:
        files = [{"path": path, "sha256": digest} for path, digest in hashes.items()]
        return [{"path": "rows", "limit": None, "files": files}]

    stored = source(a="1", b="2")
    assert gone_files(stored, source(a="1")) == ["b"]
    assert gone_files(stored, stored) == []
    assert gone_files(stored, source(a="9")) == [], "what is left changed: that is not the same data"
    assert gone_files(stored, source(a="1", c="3")) == []
    assert gone_files(stored, [{**source(a="1")[0], "limit": 3}]) == []
    assert changed_files(stored, source(a="9", c="3")) == ["a changed", "b is gone", "c is new"]


def test_a_run_whose_rows_are_deleted_while_it_trains_does_not_notice(
    tmp_path: Path, tiny_model: TinyModel
) -> None:
    events = train(make_recipe(tmp_path, tiny_model("llama")))
    next(event for event in events if isinstance(event, StepDone))
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "held_out.jsonl").unlink()
    assert isinstance(list(events)[-1], RunFinished)


def test_a_lost_recipe_is_written_again_from_the_plan(begun: Path, run: RunFolder) -> None:
    run.recipe.unlink()
    (warned,) = only(Warned, go_on(run))
    assert "recipe.yaml was gone" in warned.message
    assert run.recipe.read_text(encoding="utf-8") == (begun / "begun/recipe.yaml").read_text(encoding="utf-8")
    assert_same(adapter_of(run.path), adapter_of(begun / "runs/straight"))


@pytest.mark.parametrize("text", ["model: [", "", "version: 1\nmodel: x\n"])
def test_a_damaged_recipe_says_what_to_do(run: RunFolder, text: str) -> None:
    run.recipe.write_text(text, encoding="utf-8")
    with pytest.raises(BadRun, match=r"recipe\.yaml") as refusal:
        go_on(run)
    assert "delete the file, and the run's own copy is used" in refusal.value.cure


@pytest.mark.parametrize("text", [None, "", '{"version": 1', "[]", '{"version": 1}'])
def test_a_lost_plan_of_a_run_that_began_is_an_error(run: RunFolder, text: str | None) -> None:
    run.plan.unlink()
    if text is not None:
        run.plan.write_text(text, encoding="utf-8")
    with pytest.raises(BadRun, match=r"plan\.json cannot be read"):
        go_on(run)
    assert find_checkpoints(run.path), "nothing is lost"


def test_other_versions_are_said_once(begun: Path, run: RunFolder) -> None:
    facts = json.loads(run.environment.read_text(encoding="utf-8"))
    torch = facts["packages"]["torch"]
    facts["packages"] |= {"torch": "2.9.1", "qadapt": "0.0.1"}
    facts["threads"] = 64
    run.write_json(run.environment, facts)
    events = resume("renamed", folder=str(run.path.parent))
    seen = [next(events)]
    while not isinstance(seen[-1], StepDone):
        seen.append(next(events))
    (warned,) = only(Warned, seen)
    assert f"torch was 2.9.1 and is {torch}" in warned.message
    assert "qadapt was 0.0.1 and is" in warned.message
    assert "threads was 64 and is 1" in warned.message
    events.close()  # type: ignore[attr-defined]
    assert not only(Warned, go_on(run))


# --- who else is there ------------------------------------------------------------------------------------

WORKER = """
import sys, time
from pathlib import Path
from qadapt.run_folder import RunFolder, working_on
with working_on(RunFolder(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_is_held_by_a_living_process_and_free_as_soon_as_that_is_killed(run: RunFolder) -> None:
    command = [sys.executable, "-c", WORKER, str(run.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            before = run.journal.read_bytes()
            with pytest.raises(BadRun, match="Another process works on the run renamed"):
                go_on(run)
            assert run.journal.read_bytes() == before
        finally:
            process.kill()
    assert isinstance(go_on(run)[-1], RunFinished)


def test_of_two_that_go_on_with_a_run_one_is_refused(run: RunFolder) -> None:
    first = resume("renamed", folder=str(run.path.parent))
    next(first)
    with pytest.raises(BadRun, match="Another process works on the run renamed"):
        go_on(run)
    assert isinstance(list(first)[-1], RunFinished)


def test_a_run_that_is_not_finished_is_not_exported(begun: Path, run: RunFolder) -> None:
    shutil.copytree(begun / "runs/straight/adapter", run.adapter)  # killed before its last line
    with pytest.raises(BadRun, match="The run renamed has not finished") as refusal:
        list(export("renamed", folder=str(run.path.parent)))
    assert "qadapt resume renamed" in refusal.value.cure


def test_a_run_on_a_read_only_disk_is_an_error(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).startswith(str(run.path)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(BadOutput, match="cannot be written to: Read-only file system") as refusal:
        go_on(run)
    assert str(run.path) in refusal.value.problem


def test_a_second_run_on_a_card_is_refused_before_it_is_planned(
    run: RunFolder, tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SharedCard("GPU-made-up", "Made-up RTX 9010", 8 * GIB)
    monkeypatch.setattr(run_card, "shared_card", lambda device: card)
    monkeypatch.setattr(run_card, "cache_folder", lambda: tmp_path / "user-cache")
    first = resume("renamed", folder=str(run.path.parent))
    next(event for event in first if isinstance(event, StepDone))
    second = make_recipe(tmp_path, tiny_model("llama"), steps=1)
    with pytest.raises(BadRun, match="Another run trains on this Made-up RTX 9010") as refusal:
        list(train(second))
    assert str(run.path) in refusal.value.problem
    assert not (tmp_path / "runs/first").exists()
    assert isinstance(list(first)[-1], RunFinished)
    assert isinstance(list(train(second))[-1], RunFinished)
