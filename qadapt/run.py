"""The composition root: a recipe in, an adapter out. Read this file first.

    recipe ─► base files ─► rows ─► plan ─► 4-bit base ─► adapter ─► steps ─► adapter folder

`train` and `resume` are generators of events; whoever iterates shows or keeps them. The recipe stops at
`running/material.py`, `running/plan.py` and `running/model.py`: what they call takes flat arguments. The
functions here are qadapt's Python surface, too (`qadapt.train`, ...). What becomes of the adapter is in
`exporting/export.py`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from qadapt import control
from qadapt.adapters.lora import save_adapter
from qadapt.cache import output_errors
from qadapt.data.prompt import CONTRACT_FILE, PromptContract
from qadapt.errors import BadRun
from qadapt.events import Event, Paused, RunFinished, StepDone, Stopped
from qadapt.model.precision import choose_device
from qadapt.pause_rules import parse_pause_rules
from qadapt.plan.setting import LOSS_CHUNK
from qadapt.quiet import quiet_libraries
from qadapt.recipe import Recipe
from qadapt.recipe_file import dump_yaml
from qadapt.run_folder import RunFolder, create_run, discard_run, find_run, working_on
from qadapt.running.card import holding_card
from qadapt.running.material import Material, order_of, prepare, resolved
from qadapt.running.model import adapt, loop_settings, optimizer_of, place_base
from qadapt.running.plan import make_plan
from qadapt.running.records import adapter_facts, remember_peak, started, store
from qadapt.running.resumption import (
    Consent,
    Earlier,
    has_begun,
    plan_anew,
    recipe_never_begun,
    take_up,
)
from qadapt.running.saved_states import go_to_best, restore, take_over
from qadapt.train.attended import attended
from qadapt.train.evaluation import Evaluation, answer_rows, evaluate_below, evaluate_rows
from qadapt.train.guards import guards_of
from qadapt.train.loop import Loop
from qadapt.train.rehearsal import rehearse as rehearse_loop
from qadapt.train.samples import Samples
from qadapt.train.stored_plan import StoredPlan, read_plan
from qadapt.trained.adapter import find_trained
from qadapt.trained.loading import Tuned
from qadapt.trained.measuring import rows_to_evaluate
from qadapt.view.journal import Journal, effective, read_events

ROWS_AT_ONCE = 4
"""In an evaluation for which no run planned how many fit; fewer where memory runs out."""


def train(recipe: Recipe) -> Iterator[Event]:
    """Trains a recipe to its last step; every event is in the run's journal before it is yielded.

    Raises:
        QadaptError: Something cannot be done; a run that failed before its first step leaves no folder
        behind.
    """
    run = create_run(Path(recipe.run.folder), recipe.run.name)
    is_kept = False
    with working_on(run):
        try:
            with Journal(run.journal) as journal:
                for event in journal.record(_new_run(resolved(recipe), run)):
                    is_kept = is_kept or isinstance(event, StepDone | Paused | Stopped)
                    yield event
        finally:
            if not is_kept:
                discard_run(run)


def rehearse(recipe: Recipe) -> Iterator[Event]:
    """Prepares a run and rehearses it (`train/rehearsal.py`), and leaves no run behind.

    What it measured is remembered for the next plans on this machine.

    Raises:
        QadaptError: Something cannot be done, as in `train`; `DoesNotFit` where memory ran out.
    """
    for left in Path(recipe.run.folder).glob(".rehearsal-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):  # its process was killed
            discard_run(RunFolder(left))
    hidden = Path(recipe.run.folder) / f".rehearsal-{os.getpid()}"
    run = create_run(hidden, recipe.run.name)
    try:
        with working_on(run):
            yield from _new_run(resolved(recipe), run, is_rehearsal=True)
    finally:
        discard_run(RunFolder(hidden))


def _new_run(
    recipe: Recipe, run: RunFolder, *, earlier: Earlier | None = None, is_rehearsal: bool = False
) -> Iterator[Event]:
    quiet_libraries()
    with output_errors(run.path):
        run.write(run.recipe, dump_yaml(recipe))  # a process that dies while it prepares leaves what is asked
    preparing = prepare(recipe, revision=recipe.model.revision)
    material = yield from (preparing if earlier is None else earlier.unsaid(preparing))
    with holding_card(recipe, run):
        plan = make_plan(recipe, material)
        store(run, plan, material)
        yield started(recipe, plan, run)
        yield plan.event()
        if is_rehearsal:
            loop = yield from _placed(recipe, plan, run, material=material)
            yield from _rehearsal(recipe, plan, run, loop=loop, contract=material.contract)
            return
        steps = _steps(recipe, plan, run, material=material, earlier=earlier)
        yield from steps if earlier is None else earlier.unsaid(steps)


def resume(
    name: str, *, folder: str = "runs", replan: bool = False, allow_change: bool = False
) -> Iterator[Event]:
    """Goes on with a run that stopped, was killed or lost power, from its newest checkpoint or its start.

    The stored plan is executed; nothing is planned or measured anew.

    Args:
        name: Name or path of the run.
        folder: Where the runs are.
        replan: Plan anew for the machine as it is now, with the `memory` section as it is now; random state,
            the rows of each step and the steps that are done stay.
        allow_change: Go on with a recipe, base, template or rows that changed; what changed is recorded.

    Raises:
        BadRun: There is no such run, it has finished, another process works on it, or recipe, base, template
        or rows changed and may not; or another run trains on its card.
    """
    run = find_run(name, folder)
    with working_on(run):
        control.take(run.path)  # what an earlier process did not live to do; later ones are for this one
        earlier = Earlier(effective(read_events(run.path)))
        if earlier.has_finished:
            cure = f"`qadapt export {name}` writes the merged model."
            raise BadRun(f"The run {name} has finished.", cure=cure)
        shutil.rmtree(run.rehearsal, ignore_errors=True)  # likewise of an earlier process
        with Journal(run.journal) as journal:
            yield from journal.record(_resumed_run(run, earlier, Consent(replan, allow_change)))


def _resumed_run(run: RunFolder, earlier: Earlier, consent: Consent) -> Iterator[Event]:
    quiet_libraries()
    if not has_begun(run, earlier):
        yield from _new_run(recipe_never_begun(run), run, earlier=earlier)
        return
    taken = yield from take_up(run, earlier, consent)
    with holding_card(taken.recipe, run):
        plan = plan_anew(taken) if taken.is_to_plan else taken.plan
        earlier = replace(earlier, is_planned_anew=taken.is_to_plan)
        yield started(taken.recipe, plan, run)
        yield plan.event()
        yield from earlier.unsaid(_steps(taken.recipe, plan, run, material=taken.material, earlier=earlier))


def _steps(
    recipe: Recipe, plan: StoredPlan, run: RunFolder, *, material: Material, earlier: Earlier | None
) -> Generator[Event, None, None]:
    start = time.monotonic()
    loop = yield from _placed(recipe, plan, run, material=material, earlier=earlier)
    if earlier is not None:
        yield from restore(loop, run, plan=plan, earlier=earlier)
    if recipe.train.rehearse and (earlier is None or earlier.owes_rehearsal(plan, loop.progress.step)):
        yield from _rehearsal(recipe, plan, run, loop=loop, contract=material.contract)
    for event in loop.events():
        yield event
        if isinstance(event, Stopped):
            return
    _remember(recipe, plan, run, loop=loop, measured_bytes=loop.peak_bytes)
    facts = adapter_facts(recipe, plan, material)
    best = yield from go_to_best(loop, run)
    contract = material.contract

    def write() -> tuple[Event, ...]:
        save_adapter(
            loop.model,
            run.adapter,
            facts=facts,
            tokenizer=contract.tokenizer,
            beside={CONTRACT_FILE: contract.facts()},
        )
        return ()

    yield from loop.when_room(write)
    yield RunFinished(
        step=loop.progress.step,
        adapter=str(run.adapter),
        best_step=best,
        best_loss=loop.progress.best_loss if best == loop.progress.best_step else None,
        seconds=time.monotonic() - start,
    )


def _placed(
    recipe: Recipe, plan: StoredPlan, run: RunFolder, *, material: Material, earlier: Earlier | None = None
) -> Generator[Event, None, Loop]:
    """Base, adapter and optimizer in memory, and the loop over them before its first step."""
    base = yield from place_base(recipe, plan, material.files)
    model = yield from adapt(recipe, plan, base, material=material)
    if earlier is not None:
        take_over(run, plan, material, model=model, is_planned_anew=earlier.is_planned_anew)
    torch.manual_seed(recipe.train.seed)
    loop = Loop(
        model,
        optimizer_of(recipe, plan, model),
        rows=material.rows,
        order=order_of(recipe, material.rows),
        settings=loop_settings(recipe, plan),
        run_folder=run.path,
    )
    if plan.compute_dtype == "fp16":
        loop.scale_loss()
    if recipe.train.sample_prompts:
        loop.ask_samples(Samples(model, material.contract, recipe.train.sample_prompts))
    rules = parse_pause_rules(recipe.run.pause_when)
    loop.pauses.guards = guards_of(rules, device=choose_device(plan.device), run_folder=run.path)
    return loop


def _rehearsal(
    recipe: Recipe, plan: StoredPlan, run: RunFolder, *, loop: Loop, contract: PromptContract
) -> Iterator[Event]:
    rehearsed = yield from rehearse_loop(loop, plan, contract=contract, folder=run.rehearsal)
    if rehearsed is not None:
        _remember(recipe, plan, run, loop=loop, measured_bytes=rehearsed.measured_peak_bytes)


def _remember(recipe: Recipe, plan: StoredPlan, run: RunFolder, *, loop: Loop, measured_bytes: int) -> None:
    """Keeps what the plan's setting took; where memory ran out it took at least what was measured."""
    if not loop.ladder.is_taken or measured_bytes > plan.predicted_peak_bytes:
        remember_peak(recipe, plan, run, measured_bytes=measured_bytes)


def load(name: str, *, folder: str = "runs", store: str = "adapters", device: str = "auto") -> Tuned:
    """Loads an adapter and its base, as they were trained, those of a run placed as they were in the end.

    Args:
        name: A run by name or path, an adapter's folder, or a name, tag or version of the store.
        folder: Where the runs are.
        store: Where the store is.
        device: Where to; `auto`, `cpu` or `cuda`.

    Raises:
        BadAdapter: A version of the store is damaged, or the name stands for more than one adapter.
        BadRun: There is nothing of that name, or a run has not finished.
        DoesNotFit: Memory ran out.
    """
    quiet_libraries()
    return find_trained(name, folder=folder, store=store).load(choose_device(device))


def evaluate(
    name: str,
    *,
    data: Path | None = None,
    answers: int = 0,
    max_new_tokens: int = 256,
    folder: str = "runs",
    store: str = "adapters",
) -> Evaluation:
    """Measures an adapter on rows.

    Args:
        name: As `load` takes it; so too folder and store.
        data: A file of rows; None: the rows that its run held out.
        answers: Let the model answer so many rows, too; those that ask nothing are passed over.
        max_new_tokens: Longest answer in tokens.
        folder: Where the runs are.
        store: Where the store is.

    Raises:
        BadAdapter: A version of the store is damaged, or the name stands for more than one adapter.
        BadRun: There is nothing of that name, a run has not finished, no rows were held out, or they changed.
        BadData: The file or a row of it cannot be used.
    """
    quiet_libraries()
    trained = find_trained(name, folder=folder, store=store)
    tuned = trained.load(choose_device("auto"))
    chosen = rows_to_evaluate(
        trained.recipe,
        tuned.contract,
        data=data,
        fingerprint=trained.rows,
        conversations=answers,
        in_front=trained.in_front,
    )
    plan = None if trained.run is None else read_plan(trained.run.plan)
    division = {
        "size": ROWS_AT_ONCE if plan is None else plan.rows_at_once(chosen.longest),
        "pad_id": tuned.contract.pad_id,
        "loss_chunk": (plan.loss_chunk if plan else 0) or LOSS_CHUNK,
    }
    loss, base_loss = evaluate_rows(tuned.model, chosen.rows, **division)
    return Evaluation(
        rows=len(chosen.rows),
        supervised_tokens=chosen.rows.supervised_tokens,
        loss=loss,
        base_loss=base_loss,
        answers=answer_rows(tuned.model, tuned.contract, chosen.conversations, max_new_tokens=max_new_tokens),
        notes=chosen.notes,
        attended=attended(tuned.model, chosen.rows),
        below=evaluate_below(tuned.model, chosen.rows, **division),
    )
