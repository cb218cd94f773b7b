"""New tokens: only their rows of embedding and head are trained; the tables themselves stay frozen.

PEFT can train rows, too (`trainable_token_indices`), and its format is what stands on disk; but its layer
copies the whole table in every forward pass and makes a gradient as large: by the dry run, three new tokens
add 1.5 GiB to a step of Llama-3.1-8B (1,024 tokens, 40 % of them learned), and what is here 3 MiB. Two
forward hooks touch the new rows alone: the embedding's output is replaced where a new token stands, and the
head's logits of the new tokens get what training changed. It is the same function of the same rows as PEFT's
(`tests/test_new_tokens.py` compares). A tied head shares the rows.

A new row starts as the mean of the rows that the model knows, which leaves the probabilities of the known
tokens nearly as they were (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models",
2021). The frozen table holds that start, so switching the adapter off gives the base before training.

Legend: B rows of the batch, T tokens, K positions that reach the head, D width, V vocabulary, N new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qadapt.adapters.effect import Effect
from qadapt.engine.table import scale_of
from qadapt.errors import BadAdapter, Unsupported
from qadapt.shape import table_rows

_WITHOUT = "Leave data.new_tokens out: tokens that are there already can mark things, too."
_CHUNK_ROWS = 4096
"""Rows that are summed at once: a table in fp32 would be twice as large as the table."""


class NewRows(nn.Module):
    """The trained rows of one table, a part of the module whose table it is.

    Args:
        start: (N, D) the rows before training.
        first: The id of the first new token; the others follow.
    """

    def __init__(self, start: Tensor, *, first: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)  # (N, D)
        self.ids = range(first, first + len(start))
        self.is_on = True

    def replace_embeddings(
        self, embedding: nn.Module, arguments: tuple[Tensor, ...], embedded: Tensor
    ) -> Tensor:
        """Hook of the embedding: rows of new tokens in place of the table's."""
        if not self.is_on:
            return embedded
        place = arguments[0] - self.ids.start  # (B, T)
        is_new = (place >= 0) & (place < len(self.ids))
        rows = functional.embedding(place.clamp(0, len(self.ids) - 1), self.weight.to(embedded.dtype))
        if (scale := scale_of(embedding)) is not None:
            rows = rows * scale.to(rows.dtype)
        # the table is frozen; PEFT may ask for a gradient all the same, which would keep a copy of it all
        return torch.where(is_new.unsqueeze(-1), rows, embedded.detach())  # (B, T, D)

    def add_logits(self, head: nn.Linear, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Hook of the head: the logits of new tokens get what their rows have changed by.

        Added in place, at indices: neither way does it copy the logits, as a slice or a replacement would.
        """
        if not self.is_on:
            return logits
        hidden = arguments[0]  # (B, K, D)
        start = head.weight[self.ids.start : self.ids.stop]
        change = self.weight.float() - start.float()
        # in fp16 the sum over all tokens that is the rows' gradient can overflow, whatever the loss scale
        dtype = torch.float32 if hidden.dtype is torch.float16 else hidden.dtype
        added = functional.linear(hidden.to(dtype), change.to(dtype)).to(logits.dtype)  # (B, K, N)
        ids = torch.arange(self.ids.start, self.ids.stop, device=logits.device)
        return logits.index_add_(-1, ids, added)  # (B, K, V)


def attach_new_rows(model: PreTrainedModel, ids: Sequence[int], *, dtype: torch.dtype) -> None:
    """Makes the rows of new tokens trainable, in a table with room for them.

    Args:
        model: The frozen base, with other adapters or without.
        ids: Of the new tokens, one after the other.
        dtype: Type of the trained rows.

    Raises:
        Unsupported: Embedding or head is of a kind whose rows cannot be trained alone, or the ids have gaps.
    """
    _tables(model)
    if list(ids) != list(range(ids[0], ids[0] + len(ids))):
        raise Unsupported(
            f"The tokenizer numbers the new tokens {list(ids)}, with gaps.",
            cure=_WITHOUT,
        )
    _make_room(model, ids)
    embedding, head = _tables(model)
    rows = _started(embedding, ids, dtype=dtype)
    embedding.register_forward_hook(rows.replace_embeddings)
    if head.weight is not embedding.weight:
        rows = _started(head, ids, dtype=dtype)
    head.register_forward_hook(rows.add_logits)


class RowsBeside(nn.Module):
    """Rows of new tokens beside a table that stays as it is, with room for them or without.

    Args:
        rows: (N, D).
        first: The id of the first new token; the others follow.
    """

    def __init__(self, rows: Tensor, *, first: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows, requires_grad=False)  # (N, D)
        self.ids = range(first, first + len(rows))
        self._place = torch.empty(0)

    def look_up_known(self, embedding: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hook before the embedding, which must not be asked for rows that its table has not."""
        assert isinstance(embedding, nn.Embedding)
        ids, *others = arguments  # (B, T)
        self._place = ids - self.ids.start
        return ids.clamp(max=embedding.num_embeddings - 1), *others

    def replace_embeddings(self, embedding: nn.Module, _: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        """Hook after it."""
        place = self._place  # (B, T)
        is_new = (place >= 0) & (place < len(self.ids))
        rows = functional.embedding(place.clamp(0, len(self.ids) - 1), self.weight.to(embedded.dtype))
        if (scale := scale_of(embedding)) is not None:
            rows = rows * scale.to(rows.dtype)
        return torch.where(is_new.unsqueeze(-1), rows, embedded)  # (B, T, D)

    def replace_logits(self, _: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        """Hook of the head: the new tokens' logits in place of the table's, and after its last."""
        new = functional.linear(arguments[0], self.weight.to(arguments[0].dtype))  # (B, K, N)
        before, after = logits[..., : self.ids.start], logits[..., self.ids.stop :]
        return torch.cat((before, new, after), dim=-1)


def row_effects(model: PreTrainedModel, rows: Mapping[str, Tensor], *, ids: Sequence[int]) -> list[Effect]:
    """What trained rows do at the embedding and the head of a base, whose tables are not touched.

    Args:
        model: The base.
        rows: Path of a table's module → its rows, (N, D), on the device that computes.
        ids: Of the new tokens, in order.

    Raises:
        Unsupported: Embedding or head is of a kind whose rows cannot be replaced alone, or the ids have gaps.
    """
    embedding, head = _tables(model)
    if list(ids) != list(range(ids[0], ids[0] + len(ids))) or ids[0] > embedding.num_embeddings:
        raise Unsupported(f"The new tokens have the ids {list(ids)}, with gaps.", cure=_WITHOUT)
    paths = {module: path for path, module in model.named_modules() if module in (embedding, head)}
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    if sorted(rows) != sorted(paths[table] for table in tables):
        raise BadAdapter(
            f"The adapter has rows of {', '.join(rows)}; this base's tables are "
            f"{', '.join(paths[table] for table in tables)}.",
            cure="Load it on the base that it was trained on.",
        )
    at_embedding, *others = (RowsBeside(rows[paths[table]], first=ids[0]) for table in tables)
    (at_head,) = others or (at_embedding,)
    looked_up = at_embedding.look_up_known
    return [
        Effect(embedding, "alone", at_embedding, before=looked_up, after=at_embedding.replace_embeddings),
        Effect(head, "alone", at_head, after=at_head.replace_logits),
    ]


def new_rows_of(model: nn.Module) -> dict[str, NewRows]:
    """Path of each table's module in the model → its trained rows; empty without new tokens."""
    return {
        name.rpartition(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, NewRows)
    }


@contextmanager
def without_new_rows(model: nn.Module) -> Iterator[None]:
    """While open, the new tokens have the rows they started from."""
    found = new_rows_of(model).values()
    for rows in found:
        rows.is_on = False
    try:
        yield
    finally:
        for rows in found:
            rows.is_on = True


def _tables(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    """The modules of embedding and head, whose `weight` is the table, (V, D)."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_known = type(embedding) is nn.Embedding or scale_of(embedding) is not None
    has_bias = "bias" in dict(head.named_parameters(recurse=False))
    if not is_known or type(head) is not nn.Linear or has_bias:
        kinds = f"{type(embedding).__name__} and {type(head).__name__}"
        raise Unsupported(
            f"New tokens need a plain embedding and a plain head; this model has {kinds}.", cure=_WITHOUT
        )
    assert isinstance(embedding, nn.Embedding)
    return embedding, head


def _make_room(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Lengthens the tables where they have no spare rows; what is added besides the new rows is zero."""
    before = _tables(model)[0].num_embeddings
    after = table_rows(before, ids[-1] + 1)
    if after == before:
        return
    with torch.random.fork_rng(devices=[]):  # the library draws numbers that are written over here
        model.resize_token_embeddings(after, mean_resizing=False)
    for module in _tables(model):
        module.weight.requires_grad_(False)
        module.weight[before:] = 0


def _started(module: nn.Embedding | nn.Linear, ids: Sequence[int], *, dtype: torch.dtype) -> NewRows:
    """The rows of a module's table, started in the table itself and as trained ones, as a part of it."""
    table = module.weight
    total = torch.zeros(table.shape[1], device=table.device)
    for chunk in table[: ids[0]].split(_CHUNK_ROWS):
        total += chunk.float().sum(0)
    table[ids[0] : ids[-1] + 1] = (total / ids[0]).to(table.dtype)
    rows = NewRows(table[ids[0] : ids[-1] + 1].to(dtype, copy=True), first=ids[0])
    module.add_module("new_rows", rows)
    return rows
