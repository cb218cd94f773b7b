"""Changes of a weight with most of their numbers left out: pruned by magnitude, dropped at random, by sign.

Pruning and TIES keep the largest numbers (Yadav et al., arXiv:2306.01708), DARE a random share of them,
scaled up to the same mean (Yu et al., arXiv:2311.03099). A weight of a change counts where signs are elected,
too; in PEFT it does not. What comes out has no low rank any more: it is a matrix computed a chunk of rows at
a time, and `low_rank` finds factors for it by subspace iteration (Halko, Martinsson and Tropp,
arXiv:0909.4061), which only multiplies with it. Memory is a few chunks, and the error is measured against the
matrix itself. Knows no files.

Legend: O output rows, I input columns of the weight, R rank, K columns of the subspace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qadapt.adapters.compose import Pair

_CHUNK_ELEMENTS = 1 << 20
_OVERSAMPLED = 8
_ITERATIONS = 4
"""With them the error is within a hundredth of the best one's, also for the flat spectra that DARE makes."""
_HALF_BITS = 16


@dataclass(frozen=True)
class Matrix:
    """A matrix in fp32 that is never whole.

    Attributes:
        rows: The rows from the first to the last asked for; asked for as `chunks` does only.
        shape: (O, I).
    """

    rows: Callable[[int, int], Tensor]
    shape: tuple[int, int]

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, always in the same pieces, each with its place."""
        count, columns = self.shape
        step = max(1, _CHUNK_ELEMENTS // columns)
        for first in range(0, count, step):
            last = min(first + step, count)
            yield slice(first, last), self.rows(first, last)


def change(pair: Pair, scale: float) -> Matrix:
    """The change b · a, multiplied by a scale."""
    a, b = pair.a.float(), pair.b.float()
    return Matrix(lambda first, last: (b[first:last] @ a).mul_(scale), (b.shape[0], a.shape[1]))


def trimmed(matrix: Matrix, density: float) -> Matrix:
    """The share `density` of its numbers that is largest in magnitude (equals a few more), else zero."""
    kept = max(1, int(density * matrix.shape[0] * matrix.shape[1]))
    least = _largest(matrix, kept)

    def rows(first: int, last: int) -> Tensor:
        found = matrix.rows(first, last)
        return found.where(found.abs() >= least, 0)

    return Matrix(rows, matrix.shape)


def dropped(matrix: Matrix, density: float, *, key: str) -> Matrix:
    """Each of its numbers, divided by `density`, with that probability; zero elsewhere.

    Args:
        matrix: The matrix.
        density: In (0, 1].
        key: Decides which numbers are kept, the same ones each time.
    """

    def rows(first: int, last: int) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{key} {first}".encode()).digest()[:7], "big")
        found = matrix.rows(first, last)
        drawn = torch.rand(found.shape, generator=torch.Generator().manual_seed(seed))
        return found.div_(density).where(drawn < density, 0)

    return Matrix(rows, matrix.shape)


def summed(matrices: Sequence[Matrix]) -> Matrix:
    """Their sum."""
    return Matrix(lambda first, last: _stacked(matrices, first, last).sum(0), matrices[0].shape)


def elected(matrices: Sequence[Matrix]) -> Matrix:
    """For each number the sign of the sum, and the mean of those that have it; zero where the sum is."""

    def rows(first: int, last: int) -> Tensor:
        found = _stacked(matrices, first, last)
        sign = found.sum(0).sign()
        agrees = (found.sign() == sign) & (sign != 0)
        return (found * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    return Matrix(rows, matrices[0].shape)


def low_rank(matrix: Matrix, rank: int) -> Pair:
    """A change of at most this rank near a matrix, its factors of equal weight.

    The same one each time; nearest where R and a few more columns hold all of the matrix.
    """
    width = min(rank + _OVERSAMPLED, *matrix.shape)
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(matrix.shape[1], width, generator=generator)  # (I, K)
    for _ in range(_ITERATIONS):
        outputs = torch.linalg.qr(_times(matrix, inputs))[0]  # (O, K)
        inputs = torch.linalg.qr(_transposed_times(matrix, outputs))[0]
    left, values, right = torch.linalg.svd(_times(matrix, inputs).double(), full_matrices=False)
    roots = values[:rank].sqrt()
    kept = len(roots)
    return Pair(
        a=(roots.unsqueeze(1) * right[:kept]) @ inputs.double().T,  # (R, I)
        b=left[:, :kept] * roots,  # (O, R)
    )


def lengths(matrix: Matrix, pair: Pair) -> tuple[float, float]:
    """The Frobenius norms of a matrix and of what it differs from a change by."""
    whole, lost = 0.0, 0.0
    for place, rows in matrix.chunks():
        exact = rows.double()
        whole += float(exact.square().sum())
        lost += float((exact - pair.b[place] @ pair.a).square().sum())
    return float(whole**0.5), float(lost**0.5)


def _times(matrix: Matrix, inputs: Tensor) -> Tensor:
    return torch.cat([rows @ inputs for _, rows in matrix.chunks()])  # (O, K)


def _transposed_times(matrix: Matrix, outputs: Tensor) -> Tensor:
    total = torch.zeros(matrix.shape[1], outputs.shape[1])  # (I, K)
    for place, rows in matrix.chunks():
        total.addmm_(rows.T, outputs[place])
    return total


def _stacked(matrices: Sequence[Matrix], first: int, last: int) -> Tensor:
    return torch.stack([matrix.rows(first, last) for matrix in matrices])


def _largest(matrix: Matrix, count: int) -> float:
    """The `count`-th largest magnitude; found by its upper bits and then its lower ones, in two passes.

    The bits of numbers in fp32 that are not negative are in the order of the numbers.
    """
    found = 0
    for is_upper in (True, False):
        counts = torch.zeros(1 << _HALF_BITS, dtype=torch.int64)
        for _, rows in matrix.chunks():
            bits = rows.abs().flatten().view(torch.int32)
            upper = bits >> _HALF_BITS
            halves = upper if is_upper else bits[upper == found] & ((1 << _HALF_BITS) - 1)
            counts += torch.bincount(halves, minlength=1 << _HALF_BITS)
        at_least = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(at_least, count))
        count -= int(at_least[place - 1]) if place else 0
        found = (found << _HALF_BITS) + (1 << _HALF_BITS) - 1 - place
    return float(torch.tensor(found, dtype=torch.int32).view(torch.float32))
