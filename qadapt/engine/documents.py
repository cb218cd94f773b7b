"""Attention within documents that lie one after another in one row: none sees another, no mask is made.

Registered by transformers' `AttentionInterface` without a mask function, so that the library builds no T x T
mask; the bounds travel as a keyword argument of the model to every layer. The model is switched to it for
packed micro-batches only (`isolating`): under this name a padding mask would be ignored, so everything else,
generation above all, keeps the attention that the model was loaded with. Which kernel runs is decided in
`plan/attention.py`. What is relied on: `set_attn_implementation`, and that `config._attn_implementation`
names what is in use (`tests/test_packing.py`).

Legend: T tokens of all documents, S of one, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel

from qadapt.engine.blocks import attend_in_blocks
from qadapt.engine.host import sent
from qadapt.engine.prefix import joined, other_rows, prefixes_of, without_front
from qadapt.engine.target import HAS_VARLEN, SAYS_GROUPS, TYPES, capability_for, goes_one_by_one
from qadapt.errors import Unsupported
from qadapt.plan.attention import attention_kernel, document_kernel
from qadapt.shape import ModelShape

if HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

NAME = "documents"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed micro-batch lie: document n has the tokens from bound n to n + 1."""

    bounds: tuple[int, ...]
    position_ids: Tensor  # (1, T), from 0 in each document
    starts: Tensor  # the bounds as int32, for kernels that take them so

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def behind(self, places: int) -> Documents:
        """The same with so many places in front of each document; nothing waits for a card."""
        bounds = tuple(bound + places * number for number, bound in enumerate(self.bounds))
        numbers = torch.arange(len(bounds), dtype=torch.int32, device=self.starts.device)
        return Documents(bounds, self.position_ids, self.starts + places * numbers)

    def to(self, device: torch.device) -> Documents:
        """The same on a device."""
        return Documents(self.bounds, sent(self.position_ids, device), sent(self.starts, device))


def documents_of(lengths: Sequence[int]) -> Documents:
    """The documents of these lengths, one after another."""
    sizes = torch.tensor(lengths)
    bounds = functional.pad(sizes.cumsum(0), (1, 0))
    places = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(sizes)
    return Documents(tuple(bounds.tolist()), places[None], bounds.to(torch.int32))


@contextmanager
def isolating(model: nn.Module) -> Iterator[None]:
    """While open, the model attends within documents; backward passes belong inside, for recomputation.

    Raises:
        Unsupported: The architecture does not take its attention from the library's interface.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    before = base.config._attn_implementation
    AttentionInterface.register(NAME, attend_documents)
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise Unsupported(
            f"Rows of {base.config.model_type} cannot be packed: its attention cannot be told their bounds.",
            cure="Set data.packing=false.",
        )
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def attend_documents(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document, given as `documents`; (1, T, H, D)."""
    documents: Documents = named["documents"]
    how = _How(
        scaling=named["scaling"],
        dropout=named.get("dropout", 0.0),
        window=named.get("sliding_window"),
        softcap=named.get("softcap"),
    )
    prefix, *others = prefixes_of(module)
    if others:
        raise other_rows(1 + len(others), 1)
    if prefix is None:
        return _attend(query, key, value, documents, how=how), None
    keys, values = prefix.in_front(query.dtype)  # (K, P, D)
    lengths, places = documents.lengths, keys.shape[1]
    nothing = query.new_zeros(query.shape[1], places, query.shape[3])
    pairs = (nothing, query), (keys, key), (values, value)
    query, key, value = (joined(front, of, lengths=lengths) for front, of in pairs)
    found = _attend(query, key, value, documents.behind(places), how=replace(how, places=places))
    return without_front(found, places=places, lengths=lengths), None


@dataclass(frozen=True)
class _How:
    """What a layer says of its attention; all see the first `places` of a document, whatever the window."""

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    places: int = 0

    def windowed(self, length: int) -> int | None:
        """The window, if a document is longer than it."""
        return self.window if self.window is not None and length - self.places > self.window else None


def _attend(query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, how: _How) -> Tensor:
    """Causal attention within each document, by the kernel of the device; (1, T, H, D)."""
    kernel = document_kernel(
        TYPES[query.dtype],
        capability=capability_for(query),
        head_width=query.shape[-1],
        has_softcap=how.softcap is not None,
        one_by_one=goes_one_by_one(query),
    )
    is_windowed = how.windowed(max(documents.lengths)) is not None
    if kernel == "varlen" and not how.dropout and not (how.places and is_windowed):
        groups = query.shape[1] // key.shape[1]
        if varlen_problem(query.device, query.dtype, head_width=query.shape[-1], groups=groups) is None:
            return _varlen(query, key, value, documents, how=how)
    if kernel == "blocks" and not how.dropout and not is_windowed:
        return attend_in_blocks(query, key, value, bounds=documents.bounds, scaling=how.scaling)
    attend = _scores if kernel == "scores" else _fused
    parts = zip(*(each.split(documents.lengths, dim=2) for each in (query, key, value)), strict=True)
    found = [attend(*part, how=how).transpose(1, 2) for part in parts]  # (1, S, H, D) each
    return found[0].contiguous() if len(found) == 1 else torch.cat(found, dim=1)


def _varlen(query: Tensor, key: Tensor, value: Tensor, documents: Documents, *, how: _How) -> Tensor:
    """All documents by one kernel; (1, T, H, D)."""
    longest = max(documents.lengths)
    window = how.windowed(longest)
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))  # (T, H, D)
    grouped: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if SAYS_GROUPS else {}
    found = varlen_attn(
        queries,
        keys,
        values,
        documents.starts,
        documents.starts,
        longest,
        longest,
        scale=how.scaling,
        window_size=(-1 if window is None else window - 1, 0),  # keys before the query's own
        **grouped,
    )
    assert isinstance(found, Tensor), "only the output was asked for"
    return found[None]


def _fused(query: Tensor, key: Tensor, value: Tensor, *, how: _How) -> Tensor:
    """One document by the fused kernel of the device; (1, H, S, D)."""
    window = how.windowed(query.shape[2])
    mask = None if window is None else _band(query.shape[2], window, query.device, places=how.places)
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and (mask is not None or _refuses_groups(query)):
        key, value = _repeated(query, key, value)
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=how.dropout,
        is_causal=mask is None,
        scale=how.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _refuses_groups(query: Tensor) -> bool:
    """Whether the device has a kernel without S x S scores only for as many key heads as query heads."""
    capability = capability_for(query)
    if capability is None:
        return False
    width, dtype = query.shape[-1], TYPES[query.dtype]
    return attention_kernel(capability, dtype, head_width=width, grouped=True, has_mask=False) == "math"


def _scores(query: Tensor, key: Tensor, value: Tensor, *, how: _How) -> Tensor:
    """One document with all its S x S scores, as the library's eager attention; (1, H, S, D)."""
    key, value = _repeated(query, key, value)
    scores = torch.matmul(query, key.transpose(2, 3)) * how.scaling
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    length = query.shape[2]
    seen = _band(length, how.windowed(length) or length, query.device, places=how.places)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    shares = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(functional.dropout(shares, how.dropout, training=how.dropout > 0), value)


def _band(length: int, window: int, device: torch.device, *, places: int) -> Tensor:
    """(S, S): whether a token sees another, itself and `window` - 1 before it, and the first places."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    seen[places:, places:].triu_(1 - window)
    return seen


def _repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    groups = query.shape[1] // key.shape[1]
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def kernel_problem(shape: ModelShape, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed rows of a model will not go through the kernel that is meant for a card; None if they do.

    To be asked once before planning, as it compares numbers on a card.

    Args:
        shape: The model.
        device: Where it trains.
        dtype: Of its products.
    """
    meant = document_kernel(
        TYPES[dtype],
        capability=capability_for(torch.empty(0, device=device)),
        head_width=shape.head_width,
        has_softcap=shape.attention_softcap is not None,
    )
    if meant != "varlen":
        return None
    groups = shape.heads // shape.kv_heads
    return varlen_problem(device, dtype, head_width=shape.head_width, groups=groups)


@lru_cache
def varlen_problem(device: torch.device, dtype: torch.dtype, *, head_width: int, groups: int) -> str | None:
    """Why the kernel for many documents at once cannot be trusted on a device; None if it can.

    On the very card, a few small documents of unequal length, forward and backward, beside the same one
    document at a time: whatever the kernel does wrong here, it would do wrong in training. On `meta` there
    are no numbers, and the kernel is taken to be right. In a thread of its own, whose hooks and modes are its
    own: asked first within a layer that recomputes, it would be taken for a part of that layer.

    Args:
        device: Where.
        dtype: Of the products.
        head_width: The model's.
        groups: Query heads of each of its key-value heads.
    """
    if not HAS_VARLEN:
        return "this torch has none"
    if device.type == "meta":
        return None
    try:
        with ThreadPoolExecutor(1) as apart:
            compared = partial(_difference, device, dtype, head_width=head_width, groups=groups)
            errors = [apart.submit(compared, window=window).result() for window in (None, 16)]
    except (RuntimeError, ValueError, TypeError) as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    if not all(map(math.isfinite, errors)):
        return "it gives values that are not finite"
    worst = max(errors)
    return None if worst <= 0.05 else f"it differs by {worst:.0%} from one document at a time"


def _difference(
    device: torch.device, dtype: torch.dtype, *, head_width: int, groups: int, window: int | None
) -> float:
    """The largest difference of output and gradients, as a share of the largest value; NaN if any is."""
    draw = torch.Generator().manual_seed(0)
    documents, how = documents_of((1, 37, 130, 2, 64)).to(device), _How(head_width**-0.5, window=window)
    query, key, value = inputs = [
        torch.randn(1, heads, documents.bounds[-1], head_width, generator=draw)
        .to(device, dtype)
        .requires_grad_()
        for heads in (2 * groups, 2, 2)
    ]

    def results(attend: Callable[[], Tensor]) -> list[Tensor]:
        found = attend()  # (1, T, H, D)
        weights = torch.linspace(-1, 1, found.numel(), device=device).view_as(found).to(dtype)
        return [found, *torch.autograd.grad((found * weights).sum(), inputs)]

    def one_by_one() -> Tensor:
        parts = zip(*(each.split(documents.lengths, dim=2) for each in inputs), strict=True)
        return torch.cat([_fused(*part, how=how).transpose(1, 2) for part in parts], dim=1)

    pairs = zip(
        results(lambda: _varlen(query, key, value, documents, how=how)), results(one_by_one), strict=True
    )
    shares = [(left - right).abs().max() / right.abs().max() for left, right in pairs]
    return torch.stack(shares).max().item()  # unlike Python's max, this one keeps NaN
