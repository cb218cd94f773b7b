"""What becomes of embedding and head: rows of new tokens, resized tables, and a tie that adapters break.

A tied head is the embedding. An adapter of one of them alone, or another one for each, makes two tables of
it: then the model is written untied, for overwriting either would change the other. Knows names, shapes and
rows, and computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qadapt.errors import BadExport, BadRun, Unsupported
from qadapt.export.adapter import Adapter
from qadapt.export.adapter_names import AS_IT_IS, EMBEDDING, HEAD
from qadapt.export.changes import TokenRows
from qadapt.export.folder import TOKENIZER, Vocabulary
from qadapt.export.nf4 import Rows
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import TensorReader, row_elements, rows_of

_COMPARED_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Given:
    """A tensor of an adapter that stands in place of the base's."""

    shape: tuple[int, ...]
    rows: Rows


@dataclass(frozen=True)
class Tables:
    """What is written as embedding and head.

    Attributes:
        tokens: Tables by name, with rows that replace theirs or come after them.
        given: All tensors by name that stand in place of the base's.
        sources: Tensors that the base's files have under another name: a tied head.
        is_untied: Whether a head of its own is written, where the base has none.
    """

    tokens: Mapping[str, TokenRows]
    given: Mapping[str, Given]
    sources: Mapping[str, str]
    is_untied: bool


def merged_tables(adapters: Sequence[Adapter], reader: TensorReader, *, is_tied: bool) -> Tables:
    """What adapters make of the tables.

    Args:
        adapters: One, or several that only add to weights.
        reader: The base's files.
        is_tied: Whether the base's head is its embedding, whatever its files hold.

    Raises:
        Unsupported: A tied table has rows of new tokens and another adapter.
    """
    given = {
        name: Given(entry.shape, adapter.given_rows(name))
        for adapter in adapters
        for name, entry in adapter.given.items()
    }
    tokens = {name: rows for adapter in adapters for name, rows in adapter.rows.items()}
    if not is_tied:
        return Tables(tokens, given, {}, is_untied=False)
    for adapter in adapters:
        _refuse_both(adapter)
    starts = [name for adapter in adapters for name in adapter.starts]
    for name, other in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
        if name in starts and other not in given:  # the base of one is the base of both
            given[other] = given[name]
    if HEAD not in tokens and EMBEDDING in tokens:
        tokens[HEAD] = tokens[EMBEDDING]
    return Tables(
        tokens,
        given,
        {} if HEAD in reader.entries else {HEAD: EMBEDDING},
        is_untied=not all(_are_alike(adapter) for adapter in adapters),
    )


def vocabulary_of(
    tables: Tables, adapter_folder: Path, *, before: Mapping[str, TensorEntry], after: Sequence[TensorEntry]
) -> Vocabulary | None:
    """What new tokens change beside the weights; None if there are none.

    Args:
        tables: The tables as they are written.
        adapter_folder: Where the tokenizer is that knows them.
        before: The base's tensors.
        after: The tensors that are written.

    Raises:
        BadExport: Embedding and head would not have the same number of rows.
        BadRun: The tokenizer is missing.
    """
    rows = {entry.shape[0] for entry in after if entry.name in (EMBEDDING, HEAD)}
    if not tables.tokens and rows == {before[name].shape[0] for name in (EMBEDDING, HEAD) if name in before}:
        return None
    if len(rows) > 1:
        raise BadExport(
            f"The adapter has rows of new tokens for one of {EMBEDDING} and {HEAD} only.", cure=AS_IT_IS
        )
    if not any((adapter_folder / name).is_file() for name in TOKENIZER):
        raise BadRun(
            f"The adapter has new tokens, and {adapter_folder} no tokenizer that knows them.",
            cure="Save the tokenizer that it was trained with beside it.",
        )
    return Vocabulary(rows.pop(), tokenizer=adapter_folder)


def _refuse_both(adapter: Adapter) -> None:
    changed = {EMBEDDING, HEAD} & {*adapter.weights, *adapter.given, *adapter.scaled}
    if changed and {EMBEDDING, HEAD} & set(adapter.rows):
        raise Unsupported(
            f"The adapter in {adapter.folder} has rows of new tokens for a tied table and changes "
            f"{changed.pop()}, too, which are not merged together.",
            cure=AS_IT_IS,
        )


def _are_alike(adapter: Adapter) -> bool:
    """Whether embedding and head stay the same table."""
    for names in (adapter.weights, adapter.whole, adapter.scaled):
        if (EMBEDDING in names) != (HEAD in names):
            return False
    if HEAD in adapter.rows and not _same_tokens(adapter.rows.get(EMBEDDING), adapter.rows[HEAD]):
        return False
    if HEAD in adapter.whole and not _same_rows(adapter):
        return False
    return HEAD not in adapter.weights or _same_updates(adapter)


def _same_tokens(one: TokenRows | None, other: TokenRows) -> bool:
    return one is not None and one.ids == other.ids and torch.equal(one.values, other.values)


def _same_updates(adapter: Adapter) -> bool:
    one, other = adapter.update(EMBEDDING), adapter.update(HEAD)
    if one.magnitude is not None or one.scale != other.scale:
        return False
    return torch.equal(one.a, other.a) and torch.equal(one.b, other.b)


def _same_rows(adapter: Adapter) -> bool:
    entry = adapter.given[EMBEDDING]
    if entry.shape != adapter.given[HEAD].shape:
        return False
    one, other = adapter.given_rows(EMBEDDING), adapter.given_rows(HEAD)
    count, step = rows_of(entry), max(1, _COMPARED_ELEMENTS // row_elements(entry))
    ranges = ((first, min(first + step, count)) for first in range(0, count, step))
    return all(torch.equal(one(first, last), other(first, last)) for first, last in ranges)
