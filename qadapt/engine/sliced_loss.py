"""The loss through slices of the vocabulary, of a head that lies on the host (`engine/host_head.py`).

The head comes twice for each block of tokens: first each slice's logits add to the sum that the softmax
divides by (the online softmax of M. Milakov and N. Gimelshein, arXiv:1805.02867), then they are made again,
become their gradient and go back through the slice. So there is never more of the head than a slice, and
never more logits than those of a chunk of tokens in it. What goes back is summed up in fp32.

Legend: N tokens of a block, n those of a chunk, D width, V vocabulary, v rows of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qadapt.engine.head import Head
from qadapt.engine.host_head import HostHead


@dataclass(frozen=True)
class SlicedBlock:
    """Tokens whose loss is found with one coming of the head, and their gradient with another.

    Attributes:
        hidden: (N, D) what goes into the head.
        targets: (N, 1) the tokens to predict; one that is in no slice has no logit.
        weights: (N, 1) of each token's loss, fp32.
        head: The head, its module on the host.
        chunk: Tokens whose logits in a slice are there at once.
        smoothing: As of `engine.loss.Terms`.
        z_weight: Likewise.
    """

    hidden: Tensor
    targets: Tensor
    weights: Tensor
    head: Head
    chunk: int
    smoothing: float
    z_weight: float

    def find(self) -> tuple[Tensor, Tensor]:
        """The summed loss, and the log of what each token's softmax divides by, (N, 1); both in fp32."""
        log_total = torch.full_like(self.weights, -torch.inf)
        wanted = torch.zeros_like(self.weights)  # what a target's logit and the mean of all add to -loss
        for piece in self._pieces():
            self._look(piece, log_total, wanted)
        losses = log_total - wanted + self.z_weight * log_total.square()
        return (losses * self.weights).masked_fill_(self.weights == 0, 0).sum(), log_total

    def go_back(self, log_total: Tensor, *, scale: float) -> Tensor:
        """`scale` times the gradient of hidden, (N, D), in fp32."""
        gradient = torch.zeros_like(self.hidden, dtype=torch.float32)
        for piece in self._pieces():
            values, tanh = self.head.after(self._logits(piece), keeps_tanh=True)
            self._overwrite(values, piece, log_total[piece.rows], self.weights[piece.rows] * scale)
            self.head.go_back(values, tanh)
            gradient[piece.rows] += values.to(piece.weight.dtype) @ piece.weight
            del values, tanh  # or they would lie beside the next ones
        return gradient

    def _look(self, piece: _Piece, log_total: Tensor, wanted: Tensor) -> None:
        """Adds a piece's logits to the sums of its tokens."""
        values, _ = self.head.after(self._logits(piece), keeps_tanh=False)
        at, is_here = self._targets_in(piece)
        wanted[piece.rows] += (1 - self.smoothing) * values.gather(-1, at).where(is_here, 0.0)
        if self.smoothing:
            wanted[piece.rows] += self._share * values.sum(-1, keepdim=True)
        highest = values.amax(-1, keepdim=True)
        log_part = values.sub_(highest).exp_().sum(-1, keepdim=True).log_().add_(highest)
        log_total[piece.rows] = torch.logaddexp(log_total[piece.rows], log_part)

    def _overwrite(self, values: Tensor, piece: _Piece, log_total: Tensor, weights: Tensor) -> None:
        """Overwrites a piece's logits after scale and cap with the gradient by them."""
        at, is_here = self._targets_in(piece)
        values.sub_(log_total).exp_().mul_(weights * (1 + 2 * self.z_weight * log_total))
        values.scatter_add_(-1, at, ((self.smoothing - 1) * weights).where(is_here, 0.0))
        if self.smoothing:
            values.sub_(weights * self._share)

    @property
    def _module(self) -> HostHead:
        assert isinstance(self.head.module, HostHead)
        return self.head.module

    @property
    def _share(self) -> float:
        """Of a token's target that smoothing gives to each of the vocabulary."""
        return self.smoothing / self._module.out_features

    def _pieces(self) -> Iterator[_Piece]:
        for place, weight in self._module.brought(self.hidden):
            for first in range(0, len(self.hidden), self.chunk):
                yield _Piece(slice(first, first + self.chunk), place, weight)

    def _logits(self, piece: _Piece) -> Tensor:
        return self._module.logits(self.hidden[piece.rows], piece.place, piece.weight)  # (n, v)

    def _targets_in(self, piece: _Piece) -> tuple[Tensor, Tensor]:
        """Where in a slice the targets of tokens are, as far as they are, and which are, (n, 1) each."""
        at, size = self.targets[piece.rows] - piece.place.start, len(piece.weight)
        return at.clamp(0, size - 1), (at >= 0) & (at < size)


@dataclass(frozen=True)
class _Piece:
    """A chunk of tokens in a slice: its rows of the block, its place in the vocabulary, its weight (v, D)."""

    rows: slice
    place: slice
    weight: Tensor
