"""The losses of the measured stacks: which copies of the logits live together decides gigabytes.

held               labels given to the model of transformers 5, the caller holds its outputs
float, shifted     transformers 4.46 to 4.48: an fp32 copy beside the model's logits, and a shifted copy of
                   that
as float, shifted  before 4.46, and Granite: the fp32 copy takes the logits' name; a shifted copy of it
fused ...          the same copies, but a fused cross-entropy that keeps nothing and writes its gradient in
                   place
none               no logits: the loss is fused with the head

In all but the first the outputs are let go before the backward pass, as `Trainer` does.
Sources: transformers `loss/loss_utils.py` and `models/granite`; fms-acceleration
`kernels/unsloth/cross_entropy_loss.py` (`FastForCausalLMLoss`) and `fused_ops/liger_ce`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Literal[
    "held", "float, shifted", "as float, shifted", "fused float, shifted", "fused as float, shifted", "none"
]
CHUNKS_OF = 16
"""Liger's fused loss: as many chunks as the vocabulary is wider than the model; 16 is the order of it."""


def loss_of(model: nn.Module, batch: Tensor, kind: Loss) -> tuple[Tensor, Any]:
    """The loss of a batch, and what the caller keeps until the step ends."""
    if kind == "held":
        outputs = model(input_ids=batch, labels=batch)
        return outputs.loss, outputs
    inner: Any = model.get_base_model()  # type: ignore[operator]
    hidden = inner.model(input_ids=batch)[0]  # (B, T, D)
    head = inner.get_output_embeddings()
    if kind == "none":
        return FusedLinearLoss.apply(hidden, head.weight), None
    logits = head(hidden)  # (B, T, V)
    scaling = getattr(inner.config, "logits_scaling", None)
    if scaling is not None:
        logits = logits / scaling
    if "as float" in kind:
        logits = logits.float()
        return _shifted(logits, batch, is_fused=kind.startswith("fused")), None
    return _shifted(logits.float(), batch, is_fused=kind.startswith("fused")), None


def _shifted(logits: Tensor, labels: Tensor, *, is_fused: bool) -> Tensor:
    shifted = logits[..., :-1, :].contiguous().view(-1, logits.shape[-1])
    targets = labels[..., 1:].contiguous().view(-1)
    if is_fused:
        return FusedLoss.apply(shifted, targets).sum() / torch.count_nonzero(targets != -100)
    return functional.cross_entropy(shifted, targets)


class FusedLoss(torch.autograd.Function):
    """What a fused cross-entropy takes: one number a token; the gradient is written over the logits."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor) -> Tensor:
        context.save_for_backward(logits, logits.new_empty(logits.shape[0], dtype=torch.float32), targets)
        return logits.new_empty(logits.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor, None]:
        return context.saved_tensors[0], None


class FusedLinearLoss(torch.autograd.Function):
    """What the loss fused with the head takes: the gradient of its input, and one chunk's logits."""

    @staticmethod
    def forward(context: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        gradient = torch.empty_like(hidden)
        tokens = hidden.numel() // hidden.shape[-1]
        chunk = hidden.new_empty(-(-tokens // CHUNKS_OF), weight.shape[0])
        del chunk
        context.save_for_backward(gradient)
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(context: Any, _: Tensor) -> tuple[Tensor, None]:
        return context.saved_tensors[0], None
