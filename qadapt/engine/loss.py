"""The loss without logits: learned tokens only reach the head, and of those a chunk at a time.

A chunk's gradient is found in the forward pass, as soon as its logits are there: they are overwritten by it,
and it goes back through the head at once. Only the gradient of the head's input is kept. So there is never
more than one chunk of logits, in training and in evaluation. The idea: A. Hsu et al., "Liger Kernel"
(arXiv:2410.10989), and E. Wijmans et al., "Cut Your Losses" (arXiv:2411.09009); here in plain operations.

A head on the host comes in slices of the vocabulary (`sliced_loss.py`). Where it is not known what the
architecture does with the logits (`head.py`), the model's own forward pass makes all of them at once.

Legend: B rows, T tokens, K positions, N learned tokens, n those of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from qadapt.engine.adapted import Adapted
from qadapt.engine.documents import Documents
from qadapt.engine.head import Head, head_of
from qadapt.engine.host_head import HostHead
from qadapt.engine.sliced_loss import SlicedBlock
from qadapt.engine.target import capability_for
from qadapt.plan.host import BLOCK_TOKENS
from qadapt.plan.workspace import loss_piece

IGNORED = -100
"""The target that does not count, as of `F.cross_entropy`."""

_FP16_SCALE = 256.0
"""What the logits' gradient is multiplied by on its way through an fp16 head: without it the gradients of
improbable tokens would be zero, with more the sum over a vocabulary might overflow."""


@dataclass(frozen=True)
class Terms:
    """What may be added to the cross-entropy of a token; no recipe asks for any of it yet.

    Attributes:
        smoothing: Share of the target that is spread over the vocabulary (arXiv:1512.00567).
        z_weight: Of the squared log of the softmax's denominator (arXiv:2204.02311).
    """

    smoothing: float = 0.0
    z_weight: float = 0.0


def loss_sum(
    model: nn.Module,
    *,
    input_ids: Tensor,
    positions: Tensor,
    targets: Tensor,
    documents: Documents | None = None,
    chunk: int = 0,
) -> Tensor:
    """The summed cross-entropy of the learned tokens of a micro-batch, in fp32.

    Args:
        model: A causal language model, adapted or not.
        input_ids: (B, T), filled up at the end; attention is causal, so no mask is needed.
        positions: (K,) whose prediction is learned in at least one row.
        targets: (B, K) the next token, or `IGNORED`.
        documents: Where the documents of a packed row lie; the model must be `isolating` them.
        chunk: As of `summed_loss`.
    """
    packed = {} if documents is None else {"position_ids": documents.position_ids, "documents": documents}
    base = model.get_base_model() if isinstance(model, Adapted) else model
    head = head_of(cast(PreTrainedModel, base))
    if head is None:
        kept = {"logits_to_keep": positions, **packed}
        logits = model(input_ids=input_ids, use_cache=False, **kept).logits  # (B, K, V)
        return functional.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
    decoder = cast(PreTrainedModel, base).get_decoder()
    hidden = decoder(input_ids=input_ids, use_cache=False, **packed).last_hidden_state[:, positions]
    return summed_loss(hidden.flatten(0, 1), targets.flatten(), head=head, chunk=chunk)


def summed_loss(
    hidden: Tensor,
    targets: Tensor,
    *,
    head: Head,
    chunk: int = 0,
    weights: Tensor | None = None,
    terms: Terms | None = None,
) -> Tensor:
    """The summed cross-entropy of tokens, in fp32; differentiable once, by `hidden` and `head.trained`.

    Args:
        hidden: (N, D) what goes into the head.
        targets: (N,) the tokens to predict, or `IGNORED`.
        head: The head.
        chunk: Tokens whose logits are there at once; 0: all.
        weights: (N,) of each token's loss, fp32; default: 1. No recipe asks for others yet.
        terms: What is added to the cross-entropy; default: nothing.
    """
    work = _Work(targets, head, max(1, chunk or len(targets)), weights, terms or Terms())
    if not torch.is_grad_enabled():
        return work.find(hidden)
    found: Tensor = _SummedLoss.apply(hidden, work, *head.trained)  # type: ignore[no-untyped-call]
    return found


class _SummedLoss(torch.autograd.Function):
    """Finds loss and gradients in the forward pass; the backward pass only multiplies them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, work: _Work, *trained: Tensor) -> Tensor:
        loss, gradients = work.find_all(hidden)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *trained)]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        hidden, *trained = [(gradient * grad_output).to(dtype) for gradient, dtype in saved]
        return hidden, None, *trained


@dataclass(frozen=True)
class _Work:
    """The tokens of a micro-batch and how their loss is made."""

    targets: Tensor
    head: Head
    chunk: int
    weights: Tensor | None
    terms: Terms

    def find(self, hidden: Tensor) -> Tensor:
        """The loss alone."""
        loss = hidden.new_zeros((), dtype=torch.float32)
        for place in self._places():
            if self._is_sliced:
                loss += self._block(hidden[place], place).find()[0]
            else:
                self._overwrite(self.head.module(hidden[place]), place, loss, scale=None)
        return loss

    def find_all(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients: of hidden, in its type, and of what the head trains, in fp32.

        In fp16 a loss scale, which is not known yet, decides what is too small: fp32 there, too.
        """
        loss = hidden.new_zeros((), dtype=torch.float32)
        is_fp16 = hidden.dtype == torch.float16
        gradient = torch.empty_like(hidden, dtype=torch.float32 if is_fp16 else hidden.dtype)
        sums = [torch.zeros_like(each, dtype=torch.float32) for each in self.head.trained]
        for place in self._places():
            gradient[place], *others = self._go_back(hidden[place], place, loss)
            for total, each in zip(sums, others, strict=True):
                total += each
        if is_fp16:
            for each in (gradient, *sums):
                each /= _FP16_SCALE
        return loss, [gradient, *sums]

    def _go_back(self, hidden: Tensor, place: slice, loss: Tensor) -> tuple[Tensor, ...]:
        """A chunk: adds its loss, and gives the gradients of its (n, D) and of what is trained."""
        if self._is_sliced:
            block = self._block(hidden, place)
            found, log_total = block.find()
            loss += found
            return (block.go_back(log_total, scale=_scale_in(hidden.dtype)),)
        rows = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.head.module(rows)  # (n, V)
        gradient = self._overwrite(logits.detach(), place, loss, scale=_scale_in(logits.dtype))
        return torch.autograd.grad(logits, (rows, *self.head.trained), gradient)

    def _places(self) -> Iterator[slice]:
        size = BLOCK_TOKENS if self._is_sliced else self.chunk
        for first in range(0, len(self.targets), size):
            yield slice(first, first + size)

    @property
    def _is_sliced(self) -> bool:
        return isinstance(self.head.module, HostHead)

    def _block(self, hidden: Tensor, place: slice) -> SlicedBlock:
        targets, weights, terms = self.targets[place].unsqueeze(-1), self._weights(place), self.terms
        return SlicedBlock(hidden, targets, weights, self.head, self.chunk, terms.smoothing, terms.z_weight)

    def _weights(self, place: slice) -> Tensor:
        """Of each token's loss, (n, 1); 0 of one that does not count."""
        weights = (self.targets[place] != IGNORED).float()
        if self.weights is not None:
            weights *= self.weights[place]
        return weights.unsqueeze(-1)

    def _overwrite(self, logits: Tensor, place: slice, loss: Tensor, *, scale: float | None) -> Tensor:
        """Adds the loss of a chunk, and overwrites its logits (n, V) with `scale` times their gradient.

        On a CPU a piece at a time that stays in its caches. Without a scale no gradient is made, and what
        stands there then means nothing.
        """
        if capability_for(logits) is not None:
            return self._overwrite_rows(logits, place, loss, scale=scale)
        first = place.start
        for piece in logits.split(loss_piece(logits.shape[-1])):
            self._overwrite_rows(piece, slice(first, first + len(piece)), loss, scale=scale)
            first += len(piece)
        return logits

    def _overwrite_rows(self, logits: Tensor, place: slice, loss: Tensor, *, scale: float | None) -> Tensor:
        """The same for some rows at once: in fp32, and in place, as each copy would be as large as they."""
        values, tanh = self.head.after(logits, keeps_tanh=scale is not None)
        targets = self.targets[place].unsqueeze(-1)  # (n, 1), as all below
        chosen, weights = targets.clamp(min=0), self._weights(place)
        smoothing, z_weight = self.terms.smoothing, self.terms.z_weight

        highest = values.amax(-1, keepdim=True)
        losses = (smoothing - 1) * values.sub_(highest).gather(-1, chosen)
        if smoothing:
            losses -= smoothing * values.mean(-1, keepdim=True)
        total = values.exp_().sum(-1, keepdim=True)
        log_total = total.log() + highest
        losses += log_total - highest + z_weight * log_total.square()
        loss += (losses * weights).masked_fill_(weights == 0, 0).sum()
        if scale is None:
            return logits

        weights *= scale
        values.mul_(weights * (1 + 2 * z_weight * log_total) / total)
        values.scatter_add_(-1, chosen, (smoothing - 1) * weights)
        if smoothing:
            values.sub_(weights * (smoothing / values.shape[-1]))
        self.head.go_back(values, tanh)
        return values if values.dtype == logits.dtype else logits.copy_(values)


def _scale_in(dtype: torch.dtype) -> float:
    """What a gradient is multiplied by on its way through a head of a type."""
    return _FP16_SCALE if dtype == torch.float16 else 1.0
