"""One optimizer step: the gradient of the mean loss over all learned tokens of its rows, and the update.

The micro-batches share one denominator, the learned tokens of the whole step, so how rows are split does not
change the gradient, beyond the rounding of sums (bf16 gradients are rounded after every micro-batch).
All that happens between two steps' weights is on this page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qadapt.data.batches import MicroBatch
from qadapt.engine.documents import isolating
from qadapt.engine.host import device_of
from qadapt.engine.loss import loss_sum
from qadapt.train.optimizer import AdapterOptimizer


@dataclass(frozen=True)
class StepResult:
    """Mean loss before the update, norm of the gradient before clipping, and what went in.

    The loss is that of the tokens alone; in the gradient is what a method adds to it (`companion.py`).

    `is_applied` is False where loss or norm is not finite: then the update is left out.
    """

    loss: float
    gradient_norm: float
    tokens: int
    supervised_tokens: int
    is_applied: bool


def never() -> bool:
    """The answer of a run that nobody asks to leave."""
    return False


def train_step(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    learning_rate: float,
    clip_norm: float | None,
    scaler: torch.amp.GradScaler | None,
) -> StepResult:
    """Finds the gradient of one step and applies it, unless it is not finite.

    Args:
        model: The adapted model, in training mode.
        optimizer: Over its trained parameters; their gradients are empty before and after.
        micro_batches: The rows of the step, on any device.
        learning_rate: Of this step.
        clip_norm: Largest norm of the gradient; None leaves it.
        scaler: Loss scaling, for fp16 products only.
    """
    result = find_gradient(model, optimizer, micro_batches, clip_norm=clip_norm, scaler=scaler)
    assert result is not None, "nobody asks to leave"
    apply_gradient(optimizer, result, learning_rate=learning_rate, scaler=scaler)
    return result


def find_gradient(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    clip_norm: float | None,
    scaler: torch.amp.GradScaler | None,
    is_leaving: Callable[[], bool] = never,
) -> StepResult | None:
    """The first half of `train_step`: the gradients of the parameters, clipped, and what to say about them.

    `is_leaving` is asked between micro-batches. If it says so, the gradients are dropped and None comes back;
    nothing was changed but the random state, which whoever calls puts back.
    """
    device = device_of(model)
    supervised_tokens = sum(batch.supervised_tokens for batch in micro_batches)
    loss = torch.zeros((), device=device)
    with _attention_for(model, micro_batches):  # recomputation attends in the backward pass, too
        for place, batch in enumerate(micro_batches):
            if place and is_leaving():
                drop_gradients(optimizer)
                return None
            part = _part(model, batch.to(device)) / supervised_tokens
            (part if scaler is None else scaler.scale(part)).backward()
            loss += part.detach()
    if scaler is not None:
        scaler.unscale_(optimizer.inner)
    optimizer.companion.add_gradients()
    parameters = list(optimizer.parameters.values())
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    # the one time that a card is waited for; the norm is there by then
    found, length = loss.item(), norm.item()
    tokens = sum(batch.tokens for batch in micro_batches)
    is_finite = math.isfinite(found) and math.isfinite(length)
    return StepResult(found, length, tokens, supervised_tokens, is_applied=is_finite)


def apply_gradient(
    optimizer: AdapterOptimizer,
    result: StepResult,
    *,
    learning_rate: float,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """The second half of `train_step`: the update, and no gradients after it."""
    companion = optimizer.companion
    if result.is_applied:
        companion.begin_update()
        optimizer.step(learning_rate)
        for name, where in companion.end_update():
            optimizer.clear(name, where)
    else:
        companion.skip_update()
    if scaler is not None:  # after an overflow the scale falls
        scaler.update()
    drop_gradients(optimizer)


def drop_gradients(optimizer: AdapterOptimizer) -> None:
    """Frees the gradients of the trained parameters."""
    for parameter in optimizer.parameters.values():
        parameter.grad = None


@torch.no_grad()
def evaluate_loss(model: nn.Module, micro_batches: Iterable[MicroBatch]) -> float:
    """The mean loss over all learned tokens; the model's training mode is left as it was."""
    device = device_of(model)
    was_training = model.training
    model.eval()
    total, supervised_tokens = torch.zeros((), device=device, dtype=torch.float64), 0
    try:
        for batch in micro_batches:
            with _attention_for(model, [batch]):
                total += _part(model, batch.to(device))
            supervised_tokens += batch.supervised_tokens
    finally:
        model.train(was_training)
    return total.item() / supervised_tokens


def _attention_for(model: nn.Module, batches: Sequence[MicroBatch]) -> AbstractContextManager[None]:
    """Documents apart, if the batches are packed (all are, or none); else the attention the model has."""
    return nullcontext() if batches[0].documents is None else isolating(model)


def _part(model: nn.Module, batch: MicroBatch) -> Tensor:
    return loss_sum(
        model,
        input_ids=batch.input_ids,
        positions=batch.positions,
        targets=batch.targets,
        documents=batch.documents,
        chunk=batch.loss_chunk,
    )
