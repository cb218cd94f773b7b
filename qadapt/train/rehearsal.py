"""The rehearsal: before step 1, the rows that take the most memory go through everything once.

It is a run of one step by the very loop that trains (`loop.py`), in a folder of its own inside the run's: the
step with the most memory forward, backward and through the optimizer, the longest held-out rows through an
evaluation, one checkpoint, and a short answer to a real prompt. Then adapter, optimizer states and random
state come back from a copy on the host, and the folder is gone: the run that follows is the run it would have
been, bit for bit. What does not fit, or not on the disk, shows in the first minute instead of at 3 a.m.

Knows no recipe and no screen.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from qadapt import control
from qadapt.data.order import Order
from qadapt.data.packing import pack
from qadapt.data.prompt import PromptContract
from qadapt.data.rows import Rows, RowSet
from qadapt.data.tokens import Tokens
from qadapt.engine.host import device_of
from qadapt.engine.out_of_memory import RanOut, attempt, free_memory
from qadapt.errors import NoRoom
from qadapt.events import (
    CheckpointSaved,
    Eased,
    Evaluated,
    Event,
    Paused,
    Rehearsed,
    StageStarted,
    StepDone,
    Warned,
)
from qadapt.model.generate import generate
from qadapt.plan.estimate import peak_error_bytes
from qadapt.train.checkpoint import random_state, restore_random_state
from qadapt.train.loop import Loop
from qadapt.train.memory import reset_peak
from qadapt.train.optimizer import AdapterOptimizer
from qadapt.train.settings import LoopSettings
from qadapt.train.stored_plan import StoredPlan
from qadapt.units import format_bytes

MOST_STEPS = 500
"""Of packed rows so many steps are looked at for the fullest micro-batch."""
ANSWER_TOKENS = 16
"""How long the answer may be."""
PARTS = {StepDone: "step", Evaluated: "evaluation", CheckpointSaved: "checkpoint"}
"""Event that ends a part → the part's name."""


def rehearse(
    loop: Loop, plan: StoredPlan, *, contract: PromptContract, folder: Path
) -> Generator[Event, None, Rehearsed | None]:
    """Goes through everything once with the rows that take the most memory, and puts all back.

    Args:
        loop: The run's, before its first step.
        plan: What was predicted.
        contract: How the model is asked.
        folder: Made and removed again.

    Returns:
        What was measured, the last event, too. What the loop's ladder had to take is taken by the run's.
        None if the run is asked to leave meanwhile, which is left to its loop.

    Raises:
        DoesNotFit: Memory ran out on the ladder's last rung.
        BadOutput: A checkpoint cannot be written; `NoRoom` if the disk is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    short = _short_loop(loop, plan, folder)
    parts: dict[str, float] = {}
    try:
        with leaving_no_trace(loop.model, loop.optimizer):
            yield from _one_step(short, parts)
            measured_bytes = short.peak_bytes
            if not control.is_asked_to_leave(loop.run_folder):
                yield from _answer(short, contract, parts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        reset_peak(device_of(loop.model))
    loop.ladder.begin_with(short.ladder)
    if control.is_asked_to_leave(loop.run_folder):
        return None
    rehearsed = Rehearsed(
        predicted_peak_bytes=plan.predicted_peak_bytes,
        measured_peak_bytes=measured_bytes,
        longest_row_tokens=short.rows.longest,
        parts=parts,
    )
    yield from _warned(rehearsed, peak_error_bytes(plan.predicted, device=plan.device))
    yield rehearsed
    return rehearsed


@contextmanager
def leaving_no_trace(model: nn.Module, optimizer: AdapterOptimizer) -> Iterator[None]:
    """What happens inside leaves no trace in the adapter, its optimizer, torch's random state or the mode.

    The copy is of what is trained, on the host: nothing is added on the card.
    """
    device, was_training = device_of(model), model.training
    adapter = {name: _copy(parameter) for name, parameter in optimizer.parameters.items()}
    states = {name: _copy(value) for name, value in optimizer.tensors().items()}
    random = random_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in optimizer.parameters.items():
                parameter.grad = None
                parameter.copy_(adapter[name])
            optimizer.load(states)
        restore_random_state(random, device)
        model.train(was_training)


def fullest_step(rows: RowSet, order: Order, settings: LoopSettings) -> int:
    """The step (from 0) that is likely to take the most memory.

    Filled up it is the one with the longest row. Packed it is the one with the fullest micro-batch, of the
    first steps.
    """
    if not settings.packed:
        return order.longest_step(settings.steps)

    def fullest_tokens(step: int) -> int:
        lengths: list[int] = rows.lengths[order.rows_of_step(step)].tolist()
        bins = pack(lengths, settings.packed_tokens)
        return max(sum(lengths[index] for index in members) for members in bins)

    whole_pass = -(-order.pass_rows // order.rows_per_step)
    return max(range(min(settings.steps, whole_pass, MOST_STEPS)), key=fullest_tokens)


def _short_loop(loop: Loop, plan: StoredPlan, folder: Path) -> Loop:
    """One step of the run's loop, and an evaluation, over the rows with the most memory."""
    settings, held_out = loop.settings, loop.rows.held_out
    step = loop.order.rows_of_step(fullest_step(loop.rows.train, loop.order, settings))
    at_once = loop.order.rows_per_step if settings.packed else settings.micro_batch
    longest = np.argsort(-held_out.lengths, kind="stable")[:at_once].tolist()
    train = RowSet([loop.rows.train[index] for index in step])
    short = Loop(
        loop.model,
        loop.optimizer,
        rows=Rows(train, RowSet([held_out[at] for at in longest]), loop.rows.pad_id, (len(train),)),
        order=Order(train.lengths, rows_per_step=len(train), kind="given"),
        settings=replace(settings, steps=1, evaluate_every=None, patience=None, checkpoint_every=None),
        run_folder=folder,
    )
    short.pauses.leave_folder = loop.run_folder
    if plan.compute_dtype == "fp16":
        short.scale_loss(1.0)  # which overflows least: an update that is left out takes no memory
    return short


def _one_step(short: Loop, parts: dict[str, float]) -> Iterator[Event]:
    """Step, evaluation and checkpoint; their own events are of no run and stay here.

    The ladder's rungs are passed on: the run takes them from its first step. Where the disk is full a run
    waits for room; here, with nothing to lose yet, that is an error.
    """
    names = ["step", *(["evaluation"] if len(short.rows.held_out) else []), "checkpoint"]
    yield _stage(names[0])
    start = time.perf_counter()
    for event in short.events():
        if isinstance(event, Eased):
            yield event
        if isinstance(event, Paused):
            raise NoRoom(
                f"No checkpoint can be written: {event.reason}",
                cure="Free space there, or choose another folder with run.folder=...",
            )
        name = PARTS.get(type(event))
        if name is None:
            continue
        parts[name] = time.perf_counter() - start
        if name != names[-1]:
            yield _stage(names[names.index(name) + 1])
        start = time.perf_counter()


def _answer(short: Loop, contract: PromptContract, parts: dict[str, float]) -> Iterator[Event]:
    if contract.template is None:
        return
    yield _stage("answer")
    start = time.perf_counter()
    prompt = prompt_of(max(short.rows.train, key=len))
    answered = attempt(lambda: _generate(short.model, prompt, contract))
    if isinstance(answered, RanOut):
        free_memory(device_of(short.model))
        yield Warned(
            message=f"Memory ran out in a short answer to {len(prompt):,} tokens; training, which needs "
            "none, fits.",
            cure="`qadapt evaluate --answers` and chats need shorter questions than the longest row has.",
        )
    else:
        parts["answer"] = time.perf_counter() - start


def _generate(model: PeftModel, prompt: list[int], contract: PromptContract) -> list[list[int]]:
    return generate(
        model, [prompt], max_new_tokens=ANSWER_TOKENS, end_ids=contract.end_ids, pad_id=contract.pad_id
    )


def prompt_of(row: Tokens) -> list[int]:
    """The tokens of a row up to the last part that is learned; all of them if it is learned as a whole."""
    begins = np.flatnonzero(row.supervised[1:] & ~row.supervised[:-1]) + 1
    prompt: list[int] = row.ids[: int(begins[-1]) if len(begins) else None].tolist()
    return prompt


def _stage(name: str) -> StageStarted:
    shown = {"step": "the longest step", "evaluation": "an evaluation", "checkpoint": "a checkpoint"}
    return StageStarted(stage=f"rehearsing {shown.get(name, 'an answer')}")


def _warned(rehearsed: Rehearsed, tolerance_bytes: int) -> Iterator[Event]:
    """Less than predicted is no danger and is in the event; more than the estimate allows for is said."""
    predicted, measured = rehearsed.predicted_peak_bytes, rehearsed.measured_peak_bytes
    if measured > predicted + tolerance_bytes:
        yield Warned(
            message=f"The rehearsal took {format_bytes(measured)}, which is more than the predicted "
            f"{format_bytes(predicted)} and the {format_bytes(tolerance_bytes)} that this may be off.",
            cure="It fits now, and the next estimates on this machine allow for it. If other programs need "
            "the room, lower memory.budget.",
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
