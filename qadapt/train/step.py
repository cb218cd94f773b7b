"""One optimizer step: the gradient of the mean loss over all learned tokens of its rows, and the update.

The micro-batches share one denominator, the learned tokens of the whole step, so how rows are split does not
change the gradient, beyond the rounding of sums (bf16 gradients are rounded after every micro-batch).
All that happens between two steps' weights is on this page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qadapt.data.batches import IGNORED, MicroBatch
from qadapt.engine.documents import isolating
from qadapt.engine.loss import loss_sum
from qadapt.errors import Diverged
from qadapt.train.optimizer import AdapterOptimizer


@dataclass(frozen=True)
class StepResult:
    """Mean loss before the update, norm of the gradient before clipping, and what went in."""

    loss: float
    gradient_norm: float
    tokens: int
    supervised_tokens: int


def train_step(
    model: nn.Module,
    optimizer: AdapterOptimizer,
    micro_batches: Sequence[MicroBatch],
    *,
    learning_rate: float,
    clip_norm: float | None,
    scaler: torch.amp.GradScaler | None,
) -> StepResult:
    """Applies one step.

    Args:
        model: The adapted model, in training mode.
        optimizer: Over its trained parameters; their gradients are empty before and after.
        micro_batches: The rows of the step, on any device.
        learning_rate: Of this step.
        clip_norm: Largest norm of the gradient; None leaves it.
        scaler: Loss scaling, for fp16 products only.

    Raises:
        Diverged: The loss or the gradient is not finite (with a scaler: only the loss); nothing was changed.
    """
    device = next(model.parameters()).device
    supervised_tokens = sum(batch.supervised_tokens for batch in micro_batches)
    loss = torch.zeros((), device=device)
    with _attention_for(model, micro_batches):  # recomputation attends in the backward pass, too
        for batch in micro_batches:
            part = _part(model, batch.to(device)) / supervised_tokens
            (part if scaler is None else scaler.scale(part)).backward()
            loss += part.detach()
    if scaler is not None:
        scaler.unscale_(optimizer.inner)
    parameters = list(optimizer.parameters.values())
    norm = nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf).item()
    tokens = sum(batch.tokens for batch in micro_batches)
    result = StepResult(loss.item(), norm, tokens, supervised_tokens)
    if math.isfinite(result.loss) and math.isfinite(norm):
        optimizer.step(learning_rate)
    elif scaler is None or not math.isfinite(result.loss):
        raise Diverged(
            f"Training diverged: the loss is {result.loss}, the norm of the gradient {norm}.",
            cure="Lower train.learning_rate, or look at the rows of this step; the last checkpoint is whole.",
        )
    if scaler is not None:  # after an overflow the step is skipped and the scale falls
        scaler.update()
    for parameter in parameters:
        parameter.grad = None
    return result


@torch.no_grad()
def evaluate_loss(model: nn.Module, micro_batches: Iterable[MicroBatch]) -> float:
    """The mean loss over all learned tokens; the model's training mode is left as it was."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, supervised_tokens = torch.zeros((), device=device, dtype=torch.float64), 0
    for batch in micro_batches:
        with _attention_for(model, [batch]):
            total += _part(model, batch.to(device))
        supervised_tokens += batch.supervised_tokens
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
        ignored=IGNORED,
        documents=batch.documents,
    )
