"""Projections of a few numbers: sums of Kronecker products, as Compacter has them (arXiv:2106.04647).

A weight of I inputs and O outputs is the sum of A_k ⊗ s_k t_kᵀ over k: the A_k, N by N, are shared by all
projections of a model; s_k, of I / N values, and t_k, of O / N, are its own (PHM layers, arXiv:2102.08597, of
rank 1). The weight is never made. With input x in blocks x_a and output y in blocks y_b:

    y_b = sum over k of t_k v_bk,    v_bk = sum over a of A_k[a, b] (s_k · x_a)

so N² values of each token are all that lies between. Knows neither layers nor files.

Legend: I inputs, O outputs, N `SUMMANDS`; k a summand, a a block of the input, b one of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from qadapt.adapters.side_car import Part
from qadapt.methods import SUMMANDS


class SharedFactors(Part):
    """The A_k, (k, a, b), which all projections of a model share."""

    is_shared = True

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.zeros(SUMMANDS, SUMMANDS, SUMMANDS))

    def start(self, draw: torch.Generator) -> None:
        """Numbers so large that a sum of N products is as large as one."""
        nn.init.normal_(self.factors, std=SUMMANDS**-0.5, generator=draw)


class HypercomplexProjection(nn.Module):
    """A projection that computes in the type of its input, whatever type it is trained in.

    Args:
        inputs: I, a multiple of N.
        outputs: O, a multiple of N.
        shared: What it shares with others.
    """

    def __init__(self, inputs: int, outputs: int, shared: SharedFactors) -> None:
        super().__init__()
        self.shared = shared
        self.left = nn.Parameter(torch.zeros(SUMMANDS, inputs // SUMMANDS))
        self.right = nn.Parameter(torch.zeros(SUMMANDS, outputs // SUMMANDS))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def start(self, draw: torch.Generator, *, at_zero: bool = False) -> None:
        """Draws a weight whose numbers vary as nn.Linear's do; or one of zero that learns as fast."""
        spread = 1.0 if at_zero else (3 * SUMMANDS * self.left.shape[1]) ** -0.25
        nn.init.normal_(self.left, std=spread, generator=draw)
        if not at_zero:
            nn.init.normal_(self.right, std=spread, generator=draw)

    def forward(self, values: Tensor, *, scale: float | None = None) -> Tensor:
        """(..., I) -> (..., O), times a scale, which the narrowest values are given."""
        factors = self.shared.factors.permute(2, 0, 1).unsqueeze(-1)  # (b, k, a, 1)
        first = (factors * self.left.unsqueeze(1)).reshape(SUMMANDS**2, -1)  # (b k, I)
        bias: Tensor = self.bias
        if scale is not None:
            first, bias = first * scale, bias * scale
        between = functional.linear(values, first.to(values.dtype))  # (..., b k)
        between = between.unflatten(-1, (SUMMANDS, SUMMANDS))
        outputs: Tensor = between @ self.right.to(values.dtype)  # (..., b, O / N)
        # in place: nobody else has it, and it is as wide as the model
        outputs += bias.to(values.dtype).view(SUMMANDS, -1)
        return outputs.flatten(-2)
