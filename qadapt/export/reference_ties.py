"""What a proof expects of embedding and head where the base has one table for both.

The live model decides: an adapter of one of them leaves the other as it was, so they become two tables,
unless both get the very same. Rows of new tokens, and a table that was resized before training, are of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qadapt.export.reference_changes import Change, Layout


@dataclass(frozen=True)
class Ties:
    """What is expected.

    Attributes:
        changes: Of every tensor that is expected in the files.
        sources: Name → the base's tensor it begins as; an untied head begins as the embedding.
        is_tied: Whether both still are one table.
    """

    changes: Mapping[str, Change]
    sources: Mapping[str, str]
    is_tied: bool


def expected_ties(changes: Mapping[str, Change], names: Mapping[str, object], layout: Layout) -> Ties:
    """What becomes of the tables.

    Args:
        changes: What adapters change.
        names: The base's tensors.
        layout: The base's.
    """
    sources = {name: name for name in names}
    if not layout.is_tied:
        return Ties(changes, sources, is_tied=False)
    embedding, head = (changes.get(name, Change()) for name in (layout.embedding, layout.head))
    start = next((change.whole for change in (embedding, head) if change.is_start), None)
    if start is not None:
        embedding, head = (
            change if change.whole is not None else replace(change, whole=start, is_start=True)
            for change in (embedding, head)
        )
    if head.tokens is None:
        head = replace(head, tokens=embedding.tokens)
    is_tied = _are_same(embedding, head)
    if not is_tied:
        sources.setdefault(layout.head, layout.embedding)
    tables = {layout.embedding: embedding, layout.head: head}
    kept = {name: change for name, change in changes.items() if name not in tables}
    kept |= {name: change for name, change in tables.items() if name in sources and not change.is_nothing}
    return Ties(kept, sources, is_tied)


def _are_same(one: Change, other: Change) -> bool:
    """Whether tables that begin as one are changed alike."""
    if one.factor is not None or other.factor is not None or len(one.pairs) != len(other.pairs):
        return False
    tables = [(one.whole, other.whole)]
    for pair, more in zip(one.pairs, other.pairs, strict=True):
        if pair.scale != more.scale or pair.magnitude is not None or more.magnitude is not None:
            return False
        tables += [(pair.left, more.left), (pair.right, more.right)]
    if (one.tokens is None) != (other.tokens is None):
        return False
    if one.tokens is not None and other.tokens is not None:
        if one.tokens.ids != other.tokens.ids:
            return False
        tables.append((one.tokens.values, other.tokens.values))
    return all(_are_equal(*each) for each in tables)


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.shape == other.shape and torch.equal(one, other))
