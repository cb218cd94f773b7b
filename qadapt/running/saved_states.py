"""A run's loop goes back to a saved state: where it goes on from, or the best one in the end."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from qadapt.adapters.lora import adapter_tensors
from qadapt.errors import BadRun
from qadapt.events import Event, Resumed, Warned
from qadapt.run_folder import RunFolder
from qadapt.running.material import Material
from qadapt.running.records import store
from qadapt.running.resumption import Earlier
from qadapt.train.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    drop_newer,
    find_damage,
    load_checkpoint,
    load_newest,
)
from qadapt.train.loop import Loop
from qadapt.train.oom import FILE_NAME as RUNGS_FILE
from qadapt.train.stored_plan import StoredPlan, read_plan


def take_over(
    run: RunFolder, plan: StoredPlan, material: Material, *, model: nn.Module, is_planned_anew: bool
) -> None:
    """Stores the plan that a run goes on with, where it is another one and the model fits what was saved.

    The rungs that eased a plan go with it.

    Raises:
        BadRun: What was saved does not fit; the run is as it was.
        BadOutput: The folder is read-only or full.
    """
    is_other = plan != read_plan(run.plan)
    if is_other:
        checkpoint, _ = load_newest(run.path)
        if checkpoint is not None:
            check_fits(run, checkpoint, adapter_tensors(model))
            _check_steps(run, checkpoint, plan)
    if is_planned_anew:  # before the new plan is there: a rung of another one may mean much less
        (run.path / RUNGS_FILE).unlink(missing_ok=True)
    if is_other:
        store(run, plan, material)


def _check_steps(run: RunFolder, checkpoint: Checkpoint, plan: StoredPlan) -> None:
    if checkpoint.step > plan.steps:
        raise BadRun(
            f"The run {run.name} has done {checkpoint.step:,} steps; its recipe comes to {plan.steps:,} now.",
            cure=f"Have it come to {checkpoint.step:,} or more (train.steps in {run.recipe}); with just so "
            "many the run ends as it stands.",
        )


def restore(loop: Loop, run: RunFolder, *, plan: StoredPlan, earlier: Earlier) -> Iterator[Event]:
    """Goes back to the newest whole checkpoint, or to the start.

    Raises:
        BadRun: A checkpoint cannot be read, is of another run, or does not fit the base.
        BadOutput: A damaged one cannot be removed.
    """
    checkpoint, problems = load_newest(run.path)
    used = "The run's start is used." if checkpoint is None else f"Step {checkpoint.step:,} is used."
    for problem in problems:
        yield Warned(message=problem, cure=used)
    if checkpoint is None:
        drop_newer(run.path, -1)  # none is whole: they must not stand before those to come
    else:
        if earlier.saved_by_another(plan):  # whose memory is measured from here on
            values = {name: value for name, value in checkpoint.values.items() if name != "memory"}
            checkpoint = replace(checkpoint, values=values)
        check_fits(run, checkpoint, adapter_tensors(loop.model))
        loop.restore(checkpoint)
        saved = loop.saved(checkpoint_folder(run.path, checkpoint.step))
        if not earlier.has_saved(saved):  # killed between the checkpoint and its line
            yield saved
    yield Resumed(step=loop.progress.step)


def go_to_best(loop: Loop, run: RunFolder) -> Generator[Event, None, int]:
    """Goes back to the adapter of the best evaluation, if there were any, and says of which step it is."""
    progress = loop.progress
    if progress.best_step is None or progress.best_step == progress.step:
        return progress.step
    folder = checkpoint_folder(run.path, progress.best_step)
    damage = find_damage(folder)
    if damage is not None:
        yield Warned(message=damage, cure="It was the best; the last step is kept instead.")
        return progress.step
    loop.restore_adapter(load_checkpoint(folder))
    return progress.best_step


def check_fits(run: RunFolder, checkpoint: Checkpoint, parameters: Mapping[str, Tensor]) -> None:
    """Looks whether a saved adapter has the names and the shapes of the one that takes it over.

    Raises:
        BadRun: It has not: the base is of another kind.
    """
    saved = {name: tensor.shape for name, tensor in checkpoint.adapter.items()}
    if saved != {name: parameter.shape for name, parameter in parameters.items()}:
        raise BadRun(
            f"The saved state of the run {run.name} does not fit its base as it is now.",
            cure=f"Put the base back as it was (model in {run.recipe}), or start a new run with run.name=...",
        )
