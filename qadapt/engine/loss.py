"""The loss without logits: learned tokens only reach the head, and of those a chunk at a time.

A chunk's gradient is found in the forward pass, as soon as its logits are there: they are overwritten by it,
and it goes back through the head at once. Only the gradient of the head's input is kept. So there is never
more than one chunk of logits, in training and in evaluation. The idea: A. Hsu et al., "Liger Kernel"
(arXiv:2410.10989), and E. Wijmans et al., "Cut Your Losses" (arXiv:2411.09009); here in plain operations.

The head's own module is called, so it may be of any type: 16 or 32 bits, int8, NF4, with hooks that train
rows of new tokens. What an architecture does with the logits after it is known by its name (`head_of`); where
it is not, the model's own forward pass makes all logits at once.

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
from qadapt.engine.target import capability_for
from qadapt.plan.workspace import loss_piece

IGNORED = -100
"""The target that does not count, as of `F.cross_entropy`."""

PLAIN = frozenset({
    "bloom", "exaone4", "falcon", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "gpt_oss", "llama",
    "ministral3", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Architectures whose logits are what the head gives."""
SCALED = {
    **dict.fromkeys(("gemma2", "gemma3_text"), "final_logit_softcapping"),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared"), "logits_scaling"),
    **dict.fromkeys(("cohere", "cohere2"), "logit_scale"),
}
"""Architecture → the field of its configuration that says what happens to them."""

_FP16_SCALE = 256.0
"""What the logits' gradient is multiplied by on its way through an fp16 head: without it the gradients of
improbable tokens would be zero, with more the sum over a vocabulary might overflow."""


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states: module, then scale, then cap: `softcap * tanh(logits / softcap)`.

    `trained` are the parameters that the module computes with and that need gradients.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    trained: tuple[nn.Parameter, ...] = ()


@dataclass(frozen=True)
class Terms:
    """What may be added to the cross-entropy of a token; no recipe asks for any of it yet.

    Attributes:
        smoothing: Share of the target that is spread over the vocabulary (arXiv:1512.00567).
        z_weight: Of the squared log of the softmax's denominator (arXiv:2204.02311).
    """

    smoothing: float = 0.0
    z_weight: float = 0.0


def head_of(model: PreTrainedModel) -> Head | None:
    """A model's head; None if it is not known what its architecture does with the logits."""
    kind = str(model.config.model_type)
    if kind not in (*PLAIN, *SCALED):
        return None
    module, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # of a tied head the new rows are the embedding's, too
    tables = (module, embedding) if module.weight is embedding.weight else (module,)
    trained = tuple(each for table in tables for each in table.parameters() if each.requires_grad)
    if kind in PLAIN:
        return Head(module, trained=trained)
    value = model.config.to_dict()[SCALED[kind]]
    if SCALED[kind] == "final_logit_softcapping":
        return Head(module, softcap=value, trained=trained)
    return Head(module, scale=1 / value if SCALED[kind] == "logits_scaling" else value, trained=trained)


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
        rows = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.head.module(rows)  # (n, V)
        scale = _FP16_SCALE if logits.dtype == torch.float16 else 1.0
        gradient = self._overwrite(logits.detach(), place, loss, scale=scale)
        return torch.autograd.grad(logits, (rows, *self.head.trained), gradient)

    def _places(self) -> Iterator[slice]:
        for first in range(0, len(self.targets), self.chunk):
            yield slice(first, first + self.chunk)

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
        values, tanh = logits.float(), None  # in fp32 the logits themselves
        if self.head.scale != 1:
            values.mul_(self.head.scale)
        if self.head.softcap is not None:
            values.div_(self.head.softcap).tanh_()
            tanh = None if scale is None else values.clone()
            values.mul_(self.head.softcap)
        targets = self.targets[place].unsqueeze(-1)  # (n, 1), as all below
        chosen, smoothing, z_weight = targets.clamp(min=0), self.terms.smoothing, self.terms.z_weight
        weights = (targets != IGNORED).float()
        if self.weights is not None:
            weights *= self.weights[place].unsqueeze(-1)

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
        if tanh is not None:
            values.mul_(tanh.square_().neg_().add_(1))
        if self.head.scale != 1:
            values.mul_(self.head.scale)
        return values if values.dtype == logits.dtype else logits.copy_(values)
