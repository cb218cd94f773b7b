"""Saved states: whole or not at all, found damaged, dropped by rule, written beside the training."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_train import adapter_of, assert_same, make_recipe, only
from torch import Tensor

from qadapt import cache
from qadapt.errors import BadOutput, BadRun, DoesNotFit, NoRoom
from qadapt.events import CheckpointSaved, Continued, Evaluated, Event, Paused, Resumed, RunFinished, Warned
from qadapt.run import resume, train
from qadapt.run_folder import RunFolder
from qadapt.train import checkpoint, loop, pauses, saver
from qadapt.train.checkpoint import (
    FILES,
    MANIFEST,
    Checkpoint,
    find_checkpoints,
    find_damage,
    load_checkpoint,
    load_newest,
    save_checkpoint,
    step_of,
)
from qadapt.train.saver import Saver

if TYPE_CHECKING:
    from conftest import TinyModel

Damage = Callable[[Path], object]


def state(step: int, **values: Any) -> Checkpoint:
    """A small saved state of every kind of tensor there is in one."""
    return Checkpoint(
        step=step,
        adapter={"a": torch.full((3, 5), float(step), dtype=torch.bfloat16)},
        optimizer={"m": torch.arange(7, dtype=torch.uint8), "n": torch.tensor(step), "e": torch.empty(0)},
        random={"cpu": torch.get_rng_state()},
        values={"progress": {"step": step}, **values},
    )


def tensors_of(made: Checkpoint) -> dict[str, Tensor]:
    return {f"{group}/{name}": each for group, held in made.groups.items() for name, each in held.items()}


def steps_kept(run: Path) -> list[int]:
    return [step_of(folder) for folder in find_checkpoints(run)]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Damage] = {
    "missing": Path.unlink,
    "truncated": cut,
    "bit flipped": flip_a_bit,
    "empty": lambda path: path.write_bytes(b""),
}


# What is found, and what is not taken


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = state(3)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved))
    assert (loaded.step, loaded.values) == (saved.step, saved.values)
    assert_same(tensors_of(loaded), tensors_of(saved))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_damaged_file_is_found_and_the_one_before_is_taken(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, state(step))
    folder = find_checkpoints(tmp_path)[-1]
    DAMAGES[damage](folder / name)
    assert find_damage(folder) is not None
    with pytest.raises(BadRun):
        load_checkpoint(folder)
    taken, problems = load_newest(tmp_path)
    assert taken is not None
    assert taken.step == 1
    assert len(problems) == 1
    assert "step-000002" in problems[0]


def test_every_byte_of_a_checkpoint_counts_or_changes_nothing(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state(1))
    expected = load_checkpoint(folder)
    for name in (*FILES, MANIFEST):
        content = (folder / name).read_bytes()
        for at in range(0, len(content), 1 if name == MANIFEST else max(len(content) // 20, 1)):
            changed = bytearray(content)
            changed[at] ^= 1 << at % 8
            (folder / name).write_bytes(changed)
            if find_damage(folder) is None:
                assert_same(tensors_of(load_checkpoint(folder)), tensors_of(expected))
                assert name == MANIFEST, "all other bytes are covered by a hash"
        (folder / name).write_bytes(content)
    assert find_damage(folder) is None, "a control"


def test_a_manifest_that_names_fewer_files_is_no_manifest(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state(1))
    facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for manifest in ({**facts, "files": {}}, {**facts, "version": 9}, [], {}, {**facts, "more": 1}):
        (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        assert find_damage(folder) is not None, manifest


def test_a_renamed_checkpoint_is_not_taken_for_another_step(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(1))
    save_checkpoint(tmp_path, state(2)).rename(tmp_path / "checkpoints/step-000009")
    taken, problems = load_newest(tmp_path)
    assert taken is not None
    assert taken.step == 1
    assert "it is of step 2" in problems[0]


def test_what_else_lies_in_the_folder_does_no_harm(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state(1))
    (folder / ".DS_Store").write_bytes(b"x")
    shutil.copytree(folder, folder.with_name("step-000001 (copy)"))
    (folder.parent / "step-000007").write_text("a file", encoding="utf-8")
    taken, problems = load_newest(tmp_path)
    assert taken is not None
    assert (taken.step, problems) == (1, [])


def test_a_checkpoint_of_another_run_is_refused_and_stays(tmp_path: Path) -> None:
    runs = [RunFolder(tmp_path / name) for name in "ab"]
    for run in runs:
        run.path.mkdir()
        run.identify(run.path.name)
        save_checkpoint(run.path, state(1))
    foreign = shutil.copytree(
        save_checkpoint(runs[1].path, state(2)), runs[0].path / "checkpoints/step-000002"
    )
    with pytest.raises(BadRun, match="of another run") as refused:
        load_newest(runs[0].path)
    assert "Move it away" in refused.value.cure
    assert Path(foreign).is_dir()
    (tmp_path / "a").rename(tmp_path / "c")
    shutil.rmtree(tmp_path / "c/checkpoints/step-000002")
    assert load_newest(tmp_path / "c")[0] is not None, "a run may be moved and renamed"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE])
def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, state(1))

    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "_facts", refuse)
    with pytest.raises(BadRun, match="cannot be read") as refused:
        load_newest(tmp_path)
    assert "readable for this user" in refused.value.cure and "move it away" in refused.value.cure


def test_a_process_killed_while_it_replaced_a_checkpoint_lost_none(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, state(1))
    folder.rename(folder.with_name(".step-000001.former"))
    taken, _ = load_newest(tmp_path)
    assert taken is not None
    assert taken.step == 1


def test_the_same_step_is_saved_again_if_its_state_is_another(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, state(1, best=None))
    written = (first / MANIFEST).stat().st_mtime_ns
    assert (save_checkpoint(tmp_path, state(1, best=None)) / MANIFEST).stat().st_mtime_ns == written
    assert load_checkpoint(save_checkpoint(tmp_path, state(1, best=1))).values["best"] == 1
    assert [path.name for path in first.parent.iterdir()] == [first.name]


# Which stay


def save_steps(run: Path, count: int, *, best: int | None = None, **kept: Any) -> list[Event]:
    saver = Saver(run, **kept)
    events = [event for step in range(1, count + 1) for event in saver.save(state(step), best_step=best)]
    return events + saver.wait()


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ({"keep": 1}, [9]),
        ({"keep": 2, "best": 4}, [4, 8, 9]),
        ({"keep": 1, "keep_every": 3}, [3, 6, 9]),
        ({"keep": 2, "keep_every": 4, "best": 1}, [1, 4, 8, 9]),
    ],
)
def test_the_newest_the_best_and_every_so_manyth_stay(
    tmp_path: Path, kept: dict[str, int], left: list[int]
) -> None:
    events = save_steps(tmp_path, 9, **kept)
    assert steps_kept(tmp_path) == left
    assert [event.step for event in only(CheckpointSaved, events)] == list(range(1, 10))


def test_an_old_one_goes_only_after_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 2, keep=1)

    def fail(*_: object) -> None:
        assert steps_kept(tmp_path) == [2]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "_flush_journal", fail)
    saver = Saver(tmp_path, keep=1)
    saver.save(state(3), best_step=None)
    with pytest.raises(BadOutput, match="Input/output error"):
        saver.wait()
    assert saver.wait() == [], "said once"
    assert steps_kept(tmp_path) == [2]


def test_an_old_one_that_cannot_be_removed_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1, keep=1)
    remove = shutil.rmtree

    def held_open(path: Path, **options: Any) -> None:
        if Path(path).name == "step-000001":
            raise PermissionError(13, "in use")
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", held_open)
    events = save_steps(tmp_path, 2, keep=1)
    assert "step-000001 cannot be removed" in only(Warned, events)[0].message
    monkeypatch.setattr(shutil, "rmtree", remove)
    save_steps(tmp_path, 3, keep=1)
    assert steps_kept(tmp_path) == [3]


# Beside the training


def test_the_state_is_copied_before_save_returns_and_there_is_one_copy_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, at_once, most = threading.Event(), [], 0
    write = checkpoint._write_files

    def slow(*arguments: Any) -> None:
        nonlocal most
        at_once.append(1)
        most = max(most, len(at_once))
        may_write.wait()
        write(*arguments)
        at_once.pop()

    monkeypatch.setattr(checkpoint, "_write_files", slow)
    saver, made = Saver(tmp_path, keep=9), state(1)
    assert saver.save(made, best_step=1) == []
    made.adapter["a"].zero_()
    made.values["progress"]["step"] = 7
    assert saver.finished() == []
    threading.Timer(0.1, may_write.set).start()
    events = saver.save(state(2), best_step=1)  # waits for the first
    assert [(event.step, event.is_best) for event in only(CheckpointSaved, events)] == [(1, True)]
    assert only(CheckpointSaved, saver.wait())[0].step == 2
    assert most == 1
    loaded = load_checkpoint(find_checkpoints(tmp_path)[0])
    assert_same(loaded.adapter, state(1).adapter)
    assert loaded.values["progress"]["step"] == 1


def test_without_memory_for_a_copy_the_state_is_written_before_save_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(saver, "_copied_group", too_large)
    events = Saver(tmp_path, keep=1).save(state(1), best_step=None)
    assert [event.step for event in only(CheckpointSaved, events)] == [1]
    assert load_newest(tmp_path)[0] is not None


@pytest.mark.parametrize("error", [None, GeneratorExit, RuntimeError])
def test_leaving_waits_for_the_save_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    flush = checkpoint._flush_journal

    def slow(run: Path) -> None:
        threading.Event().wait(0.1)
        flush(run)

    monkeypatch.setattr(checkpoint, "_flush_journal", slow)
    try:
        with Saver(tmp_path, keep=1) as saver:
            saver.save(state(1), best_step=None)
            if error is not None:
                raise error
    except (GeneratorExit, RuntimeError):
        pass
    assert steps_kept(tmp_path) == [1]


def test_an_interpreter_that_ends_meanwhile_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    text = f"""
import sys, threading, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(checkpoint.__file__).parents[2])]!r}
from pathlib import Path
from qadapt.train import checkpoint
from qadapt.train.saver import Saver
flush = checkpoint._flush_journal
checkpoint._flush_journal = lambda run: (threading.Event().wait(0.3), flush(run))
made = checkpoint.Checkpoint(1, {{"a": torch.ones(2)}}, {{}}, {{}}, {{}})
Saver(Path({str(tmp_path)!r}), keep=1).save(made, best_step=None)
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 3
    assert load_newest(tmp_path)[0] is not None


def test_saving_beside_the_training_or_not_gives_the_same_to_the_bit(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for name, in_background in (("beside", True), ("between", False)):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(loop, "Saver", partial(Saver, in_background=in_background))
        recipe = make_recipe(
            tmp_path / name, tiny_model("llama"), steps=4, checkpoint_every=1, keep_checkpoints=9
        )
        events = list(train(recipe))
        assert [event.step for event in only(CheckpointSaved, events)] == [1, 2, 3, 4]
        made[name] = tmp_path / name / "runs/first"
    assert_same(adapter_of(made["beside"]), adapter_of(made["between"]))
    for left, right in zip(*(find_checkpoints(run) for run in made.values()), strict=True):
        assert_same(tensors_of(load_checkpoint(left)), tensors_of(load_checkpoint(right)))


# Saved by time


def test_a_recipe_without_a_rule_is_saved_by_time_and_ends_with_the_same_bits(
    tmp_path: Path, straight: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    recipe = make_recipe(tmp_path, tiny_model("llama"), evaluate_every=None)
    events = train(recipe)
    saved = [event.step for event in events if isinstance(event, CheckpointSaved)]
    assert saved == [1, 2, 3, 4, 5, 6, 6], "before the evaluation at the end, too"
    assert_same(adapter_of(tmp_path / "runs/first"), adapter_of(straight / "first"))


def test_a_process_killed_in_a_long_evaluation_evaluates_again_and_trains_nothing_again(
    tmp_path: Path, straight: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: object) -> float:
        raise KeyboardInterrupt

    recipe = make_recipe(tmp_path, tiny_model("llama"), evaluate_every=None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "SAVE_SECONDS", 0)
        patch.setattr(loop.Loop, "_held_out_loss", killed)
        list(train(recipe))
    events = list(resume("first", folder=str(tmp_path / "runs")))
    assert only(Resumed, events)[0].step == 6
    assert [event.step for event in only(Evaluated, events)] == [6]
    assert_same(adapter_of(tmp_path / "runs/first"), adapter_of(straight / "first"))


def test_a_step_whose_evaluation_does_not_fit_is_saved(
    tmp_path: Path, straight: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_: object) -> float:
        raise MemoryError

    recipe = make_recipe(tmp_path, tiny_model("llama"), evaluate_every=None)
    with monkeypatch.context() as patch, pytest.raises(DoesNotFit, match="in the evaluation") as ended:
        patch.setattr(loop.Loop, "_held_out_loss", too_large)
        list(train(recipe))
    assert "--allow-change" in ended.value.cure
    assert steps_kept(tmp_path / "runs/first") == [6]
    list(resume("first", folder=str(tmp_path / "runs")))
    assert_same(adapter_of(tmp_path / "runs/first"), adapter_of(straight / "first"))


@pytest.mark.parametrize("step", [3, 6])
def test_a_save_in_the_background_that_fails_once_costs_nothing(
    step: int, tmp_path: Path, straight: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a virus scanner that has a file open, or a network disk that is gone for a moment."""
    failed: list[int] = []

    def save(run_folder: Path, saved: Checkpoint) -> Path:
        if saved.step == step and not failed:
            failed.append(step)
            raise BadOutput("The checkpoint cannot be written.", cure="Make the folder writable.")
        return save_checkpoint(run_folder, saved)

    monkeypatch.setattr(saver, "save_checkpoint", save)
    list(train(make_recipe(tmp_path, tiny_model("llama"), checkpoint_every=1)))
    assert failed == [step]
    assert steps_kept(tmp_path / "runs/first")[-1] == 6
    assert_same(adapter_of(tmp_path / "runs/first"), adapter_of(straight / "first"))


def test_a_fast_run_without_a_rule_is_saved_at_its_end_only(tmp_path: Path, tiny_model: TinyModel) -> None:
    events = list(train(make_recipe(tmp_path, tiny_model("llama"), evaluate_every=None)))
    assert [event.step for event in only(CheckpointSaved, events)] == [6]


# A run that goes on


def stopped_after(recipe: Any, step: int) -> Path:
    """The folder of a run that was closed when the checkpoint after `step` was there."""
    events = train(recipe)
    for event in events:
        if isinstance(event, CheckpointSaved) and event.step == step:
            break
    events.close()  # type: ignore[attr-defined]
    return Path(recipe.run.folder) / recipe.run.name


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> Iterator[Path]:
    """A run that nothing happened to, and beside it one that stopped, to be copied."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("straight")
        patch.setattr("qadapt.hardware.calibration.calibration_file", lambda: folder / "calibration.jsonl")
        patch.setattr("qadapt.data.row_cache.data_folder", lambda: folder / "cache")
        torch.set_num_threads(1)
        recipe = make_recipe(folder, tiny_model("llama"), checkpoint_every=1, keep_checkpoints=3)
        list(train(recipe))
        run = recipe.run.model_copy(update={"name": "stopped"})
        stopped_after(recipe.model_copy(update={"run": run}), 4)
    return folder / "runs"


def resumed_copy(straight: Path, folder: Path, *, damaged: dict[str, str]) -> list[Event]:
    """Events of a copy of the stopped run that goes on, its newest checkpoint damaged."""
    shutil.copytree(straight / "stopped", folder / "stopped")
    newest = find_checkpoints(folder / "stopped")[-1]
    for name, damage in damaged.items():
        DAMAGES[damage](newest / name)
    return list(resume("stopped", folder=str(folder)))


@pytest.mark.parametrize(("name", "damage"), [*zip([*FILES, MANIFEST], [*DAMAGES, "truncated"], strict=True)])
def test_a_run_with_a_damaged_checkpoint_ends_as_the_straight_one(
    straight: Path, tmp_path: Path, name: str, damage: str
) -> None:
    newest = steps_kept(straight / "stopped")[-1]
    events = resumed_copy(straight, tmp_path, damaged={name: damage})
    assert any(f"step-{newest:06d}" in warned.message for warned in only(Warned, events))
    assert only(Resumed, events)[0].step == newest - 1
    assert isinstance(events[-1], RunFinished)
    assert_same(adapter_of(tmp_path / "stopped"), adapter_of(straight / "first"))
    assert all(find_damage(folder) is None for folder in find_checkpoints(tmp_path / "stopped"))


def test_a_run_without_a_whole_checkpoint_starts_again_and_says_so(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "stopped", tmp_path / "stopped")
    folders = find_checkpoints(tmp_path / "stopped")
    for folder in folders:
        flip_a_bit(folder / "optimizer.safetensors")
    events = list(resume("stopped", folder=str(tmp_path)))
    damaged = [each for each in only(Warned, events) if "is damaged" in each.message]
    assert len(damaged) == len(folders)
    assert {each.cure for each in damaged} == {"The run's start is used."}
    assert only(Resumed, events)[0].step == 0
    assert_same(adapter_of(tmp_path / "stopped"), adapter_of(straight / "first"))


def test_a_run_that_starts_again_keeps_what_it_saves_from_then_on(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight / "stopped", tmp_path / "stopped")
    for folder in find_checkpoints(tmp_path / "stopped"):
        flip_a_bit(folder / "optimizer.safetensors")
    events = resume("stopped", folder=str(tmp_path))
    for event in events:
        if isinstance(event, CheckpointSaved) and event.step == 2:
            break
    events.close()  # type: ignore[attr-defined]
    taken, problems = load_newest(tmp_path / "stopped")
    assert taken is not None
    assert taken.step >= 2
    assert problems == []


def test_what_lies_there_of_later_steps_drops_no_new_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(8))
    save_checkpoint(tmp_path, state(9))
    save_steps(tmp_path, 2, keep=1)
    assert steps_kept(tmp_path) == [2, 8, 9]


def test_a_process_killed_after_it_fell_back_falls_back_again(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(straight / "stopped", tmp_path / "stopped")
    run = tmp_path / "stopped"
    good, newest = find_checkpoints(run)[-2:]
    flip_a_bit(newest / "adapter.safetensors")
    remove = shutil.rmtree

    def killed_halfway(path: Path, **options: Any) -> None:
        if Path(path) == newest:
            (newest / "state.json").unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed_halfway)
    with pytest.raises(KeyboardInterrupt):
        list(resume("stopped", folder=str(tmp_path)))
    monkeypatch.setattr(shutil, "rmtree", remove)
    taken, problems = load_newest(run)
    assert taken is not None
    assert taken.step == step_of(good)
    assert len(problems) == 1
    assert not (run / "adapter").exists()


# A full disk


def test_too_little_room_is_found_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1, keep=1)
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 1000)
    with pytest.raises(NoRoom, match="The checkpoint after step 2 needs") as refused:
        Saver(tmp_path, keep=1).save(state(2), best_step=None)
    assert "then `qadapt resume`" in refused.value.cure
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_without_room_keeps_nothing_from_being_said_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    saver = Saver(tmp_path, keep=9, in_background=in_background)
    said = saver.save(state(1), best_step=None)
    while not steps_kept(tmp_path):
        threading.Event().wait(0.01)
    with monkeypatch.context() as patch, pytest.raises(NoRoom):
        patch.setattr(cache, "free_bytes", lambda folder: 1000)
        saver.save(state(2), best_step=None)
    said += saver.save(state(2), best_step=None, is_awaited=True)
    assert [event.step for event in only(CheckpointSaved, said)] == [1, 2]


def test_an_awaited_save_that_fails_halfway_keeps_nothing_from_being_said_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver(tmp_path, keep=9)
    saver.save(state(1), best_step=None)
    while not steps_kept(tmp_path):
        threading.Event().wait(0.01)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(NoRoom):
        patch.setattr(checkpoint, "_flush_journal", full)
        saver.save(state(2), best_step=None, is_awaited=True)
    assert [event.step for event in only(CheckpointSaved, saver.finished())] == [1]


def test_a_disk_that_fills_up_meanwhile_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    """The system itself refuses, in a process of its own: no file may be larger than 3,000 bytes there."""
    text = f"""
import resource, sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(checkpoint.__file__).parents[2])]!r}
from pathlib import Path
from qadapt.errors import NoRoom
from test_checkpoint import state
from qadapt.train.saver import Saver
saver = Saver(Path({str(tmp_path)!r}), keep=1)
saver.save(state(1), best_step=None)
saver.wait()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
saver.save(state(2), best_step=None)
try:
    saver.wait()
except NoRoom as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
print([path.name for path in Path({str(tmp_path / "checkpoints")!r}).iterdir()])
saver.save(state(3), best_step=None)
saver.wait()
"""
    if sys.platform == "win32":  # no such limit there
        return
    said = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout
    assert "step-000002 cannot be written: [Errno 27] File too large" in said
    assert "Make room" in said
    assert "['step-000001']" in said
    assert steps_kept(tmp_path) == [3]


def test_a_run_waits_for_room_that_its_thread_did_not_find_and_saves_what_it_has_then(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, tries = checkpoint._write_files, []

    def full_for_a_while(folder: Path, *rest: Any) -> None:
        tries.append(folder.name)
        write(folder, *rest)
        if 2 <= len(tries) <= 4:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_files", full_for_a_while)
    monkeypatch.setattr(pauses, "RETRY_SECONDS", 0.01)
    recipe = make_recipe(
        tmp_path, tiny_model("llama"), checkpoint_every=1, keep_checkpoints=9, rehearse=False
    )
    events = list(train(recipe))
    assert "No space left on device" in only(Paused, events)[0].reason
    assert only(Continued, events)
    run = tmp_path / "runs/first"
    assert steps_kept(run)[-1] == 6
    assert all(find_damage(folder) is None for folder in find_checkpoints(run))
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(checkpoint, "_write_files", write)
    list(train(make_recipe(tmp_path / "b", tiny_model("llama"))))
    assert_same(adapter_of(run), adapter_of(tmp_path / "b/runs/first"))
