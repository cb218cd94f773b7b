"""Causal attention within documents in bf16 on a CPU: a block of queries at a time, by plain products.

PyTorch's fused kernel of the CPU cuts a document into so small products that a bf16 one spends most of its
time around them. Here the query heads of a key head are the rows of one product, scores of a block and its
keys pass through one softmax, and the backward pass makes them again (as arXiv:2205.14135 does); only
queries, keys and values are kept, and no T x T scores ever exist. Scores are rounded to bf16 as in
transformers' eager attention; what is summed over blocks is summed in fp32. Compared with fp64 and with the
fused kernel by tests/test_blocks.py. Neither windows, soft caps nor dropout: those go the other ways of
`documents.py`.

Legend: T tokens of all documents, S of one, H query heads, K key-value heads, G = H / K, D head width;
C key heads, N queries and E keys of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qadapt.plan.attention import BLOCK_QUERIES, block_heads


def attend_in_blocks(
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    *,
    bounds: Sequence[int],
    scaling: float,
) -> Tensor:
    """Causal attention within each document, which are the tokens between two bounds; (1, T, H, D)."""
    found: Tensor = _Blocks.apply(query, key, value, tuple(bounds), scaling)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class _Block:
    """C key heads from `heads`, queries from `first` to `end` of the document that starts at `start`."""

    heads: slice
    start: int
    first: int
    end: int

    def queries(self, of: Tensor) -> Tensor:
        """(K, G, T, D) → (C, G x N, D): the rows of the block's products."""
        return of[self.heads, :, self.first : self.end].flatten(1, 2)

    def keys(self, of: Tensor) -> Tensor:
        """(K, T, D) → (C, E, D): all that its queries see, laid out once for all its products."""
        return of[self.heads, self.start : self.end].contiguous()

    def unfolded(self, rows: Tensor, width: int) -> Tensor:
        """(C, G x N, D) → (C, G, N, D)."""
        return rows.view(rows.shape[0], -1, self.end - self.first, width)

    def scores(self, queries: Tensor, keys: Tensor, later: Tensor, *, scaling: float) -> Tensor:
        """(C, G x N, E), what comes later at minus infinity."""
        scores = _product(queries, keys.mT, scaling)
        own = self.unfolded(scores, scores.shape[-1])[..., self.first - self.start :]
        own += later[: self.end - self.first, : self.end - self.first]
        return scores


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scaling: float
    ) -> Tensor:
        context.save_for_backward(query, key, value)
        context.bounds, context.scaling = bounds, scaling
        queries, keys, values = _by_key_head(query, key), key[0], value[0]
        later = _later(bounds, query)
        found = query.new_empty(queries.shape[2], *queries.shape[:2], queries.shape[3])  # (T, K, G, D)
        for block in _blocks(bounds, queries):
            scores = block.scores(block.queries(queries), block.keys(keys), later, scaling=scaling)
            rows = block.unfolded(torch.bmm(scores.softmax(-1), block.keys(values)), found.shape[-1])
            found[block.first : block.end, block.heads] = rows.permute(2, 0, 1, 3)
        return found.view(1, found.shape[0], -1, found.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value = context.saved_tensors
        queries, keys, values = _by_key_head(query, key), key[0], value[0]
        gradients = _by_key_head(gradient.transpose(1, 2), key)
        to_query, to_key, to_value = (torch.empty_like(each) for each in (query, key, value))
        to_queries, later = _by_key_head(to_query, key), _later(context.bounds, query)
        for start, end in pairwise(context.bounds):
            sums = keys.new_zeros(2, len(keys), end - start, keys.shape[-1], dtype=torch.float32)
            for block in _blocks((start, end), queries):
                rows, seen = block.queries(queries), block.keys(keys)
                shares = block.scores(rows, seen, later, scaling=context.scaling).softmax(-1)
                given = block.queries(gradients)
                to_shares = torch.bmm(given, block.keys(values).mT)
                to_scores = torch.ops.aten._softmax_backward_data(to_shares, shares, -1, shares.dtype)
                to_rows = _product(to_scores, seen, context.scaling)
                to_queries[block.heads, :, block.first : block.end] = block.unfolded(to_rows, rows.shape[-1])
                to_keys = _product(to_scores.mT, rows, context.scaling)
                to_values = torch.bmm(shares.mT, given)
                for total, part in zip(sums, (to_keys, to_values), strict=True):
                    total[block.heads, : block.end - start] += part
            to_key[0, :, start:end], to_value[0, :, start:end] = sums
        return to_query, to_key, to_value, None, None


def _blocks(bounds: Sequence[int], queries: Tensor) -> Iterator[_Block]:
    heads, groups = queries.shape[:2]
    for start, stop in pairwise(bounds):
        at_once = block_heads(groups, stop - start)
        for head in range(0, heads, at_once):
            for first in range(start, stop, BLOCK_QUERIES):
                yield _Block(slice(head, head + at_once), start, first, min(first + BLOCK_QUERIES, stop))


def _by_key_head(heads: Tensor, key: Tensor) -> Tensor:
    """(1, H, T, D) → (K, G, T, D), a view."""
    found: Tensor = heads[0].unflatten(0, (key.shape[1], -1))
    return found


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The batched product times a number, rounded once."""
    shape = left.shape[0], left.shape[1], right.shape[2]
    return torch.baddbmm(left.new_empty(1).expand(shape), left, right, beta=0, alpha=scale)


def _later(bounds: Sequence[int], like: Tensor) -> Tensor:
    """(N, N) for the largest block: minus infinity where a key comes after the query, else 0."""
    length = min(BLOCK_QUERIES, max(end - start for start, end in pairwise(bounds)))
    return like.new_full((length, length), -math.inf).triu_(1)
