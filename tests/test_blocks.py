"""Attention by blocks of queries beside fp64, PyTorch's fused kernel, and one document at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qadapt.engine import blocks as engine
from qadapt.engine.blocks import attend_in_blocks
from qadapt.plan.attention import BLOCK_QUERIES, block_heads

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def heads(count: int, tokens: int, width: int, *, seed: int) -> Tensor:
    """(1, H, T, D) in the order of memory that a layer's projections give."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, tokens, count, width, generator=draw).to(torch.bfloat16)
    return rows.transpose(1, 2).requires_grad_()


def results(attend: Attend, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients in fp64."""
    found = attend(*inputs)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found).to(found.dtype)
    return [each.double() for each in (found, *torch.autograd.grad((found * weights).sum(), inputs))]


def one_by_one(bounds: Sequence[int]) -> Attend:
    """Every document by the library, its scores by its own kernel."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = [
            functional.scaled_dot_product_attention(
                *(each[:, :, first:end] for each in (query, key, value)), is_causal=True, enable_gqa=True
            )
            for first, end in pairwise(bounds)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    return attend


def in_blocks(bounds: Sequence[int], width: int) -> Attend:
    return lambda *inputs: attend_in_blocks(*inputs, bounds=bounds, scaling=width**-0.5)


def error(found: Tensor, right: Tensor) -> float:
    return ((found - right).norm() / right.norm()).item()


@pytest.mark.parametrize(
    ("lengths", "query_heads", "key_heads", "width"),
    [
        ((1, 2, BLOCK_QUERIES - 1, BLOCK_QUERIES, BLOCK_QUERIES + 1), 6, 2, 16),
        ((3 * BLOCK_QUERIES + 7, 5), 4, 4, 64),
        ((300,), 8, 1, 80),  # a scale that is no power of two
    ],
)
def test_output_and_gradients_are_as_near_to_fp64_as_the_library_s(
    lengths: tuple[int, ...], query_heads: int, key_heads: int, width: int
) -> None:
    bounds = (0, *accumulate(lengths))
    counts = (query_heads, key_heads, key_heads)
    inputs = [heads(count, bounds[-1], width, seed=seed) for seed, count in enumerate(counts)]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    right = results(one_by_one(bounds), exact)
    found, library = (results(way, inputs) for way in (in_blocks(bounds, width), one_by_one(bounds)))
    for ours, theirs, value in zip(found, library, right, strict=True):
        assert ours.shape == value.shape
        assert error(ours, value) < max(2.5 * error(theirs, value), 0.006)  # eager scores are bf16, too


def test_blocks_of_some_of_the_heads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = (0, 200, 330)
    inputs = [heads(count, 330, 32, seed=count) for count in (6, 3, 3)]
    all_at_once = results(in_blocks(bounds, 32), inputs)
    monkeypatch.setattr(engine, "block_heads", lambda groups, length: 2)
    for at_once, by_two in zip(all_at_once, results(in_blocks(bounds, 32), inputs), strict=True):
        assert torch.equal(at_once, by_two)


def test_what_another_document_holds_changes_no_bit() -> None:
    bounds = (0, 150, 290)
    inputs = [heads(count, 290, 32, seed=count) for count in (4, 2, 2)]
    before = results(in_blocks(bounds, 32), inputs)
    with torch.no_grad():
        for each in inputs:
            each[:, :, 150:] *= 3
    after = results(in_blocks(bounds, 32), inputs)
    assert torch.equal(before[0][:, :150], after[0][:, :150])
    assert not torch.equal(before[0][:, 150:], after[0][:, 150:])
    for left, right in zip(before[1:], after[1:], strict=True):
        assert torch.equal(left[:, :, :150], right[:, :, :150])


def test_a_token_sees_nothing_that_comes_after_it() -> None:
    bounds = (0, 300)
    inputs = [heads(count, 300, 32, seed=count) for count in (4, 2, 2)]
    before = attend_in_blocks(*inputs, bounds=bounds, scaling=0.2)
    with torch.no_grad():
        for each in inputs[1:]:
            each[:, :, 200:] = 50
    after = attend_in_blocks(*inputs, bounds=bounds, scaling=0.2)
    assert torch.equal(before[:, :200], after[:, :200])
    assert not torch.equal(before[:, 200:], after[:, 200:])


def test_a_block_stays_small_in_long_documents() -> None:
    assert block_heads(3, 512) * 3 * BLOCK_QUERIES * 512 <= 1 << 22
    assert block_heads(4, 1 << 20) == 1
