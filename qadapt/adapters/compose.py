"""The arithmetic of what adapters add to a weight, done on their factors: the weight's size never appears.

A change of low rank is b · a. Sums are exact by concatenation, and the rank adds up; the best change of a
smaller rank (Eckart and Young, 1936) comes from the singular values of a small core, which two QR
factorizations leave. Everything is fp64: what is lost by compressing or by writing can be measured to the
last digits that matter. Knows no files, no weights' names and no adapters with a magnitude (DoRA), whose
change depends on the base.

Legend: O output rows, I input columns of the weight, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pair:
    """The change b · a of one weight, in fp64."""

    a: Tensor  # (R, I)
    b: Tensor  # (O, R)

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


def joined(parts: Sequence[tuple[float, Pair]]) -> Pair:
    """Σ coefficient · change, exactly: the factors side by side.

    Changes with the same first factor share it, so a change taken from itself is zero to the bit, and the
    rank adds up only where it must.
    """
    firsts: list[Tensor] = []
    seconds: list[Tensor] = []
    for coefficient, pair in parts:
        scaled = pair.b * coefficient
        same = next((place for place, first in enumerate(firsts) if torch.equal(first, pair.a)), None)
        if same is None:
            firsts.append(pair.a)
            seconds.append(scaled)
        else:
            seconds[same] = seconds[same] + scaled
    return Pair(torch.cat(firsts), torch.cat(seconds, dim=1))


def compressed(pair: Pair, rank: int) -> Pair:
    """The change of at most this rank that is nearest in the Frobenius norm, its factors of equal weight."""
    outputs, inputs, core = _core(pair)
    left, values, right = torch.linalg.svd(core)
    roots = values[:rank].sqrt()
    kept = len(roots)
    return Pair(
        a=(roots.unsqueeze(1) * right[:kept]) @ inputs.T,  # (R, I)
        b=outputs @ (left[:, :kept] * roots),  # (O, R)
    )


def length(pair: Pair) -> float:
    """The Frobenius norm of a change."""
    return float(torch.linalg.matrix_norm(_core(pair)[2]))


def distance(pair: Pair, other: Pair) -> float:
    """The Frobenius norm of the difference of two changes of one weight."""
    return length(joined([(1.0, pair), (-1.0, other)]))


def _core(pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal columns (O, K) and (I, K'), and the (K, K') matrix between them that makes the change."""
    outputs, upper = torch.linalg.qr(pair.b)
    inputs, other = torch.linalg.qr(pair.a.T)
    return outputs, inputs, upper @ other.T
