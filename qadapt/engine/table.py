"""The table of the input embeddings on the host: the lookup runs there, and only its result goes to the card.

It is frozen, so nothing comes back. Worth V D values of memory; costs a wait for the ids and a copy of (B, T,
D). The module stays what it is, its own `forward` alone is another. Known are plain tables and Gemma's, whose
embeddings are scaled by a number in a buffer. Knows no model.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from qadapt.engine.host import to_device, to_host


def can_be_on_host(embedding: nn.Module) -> bool:
    """Whether it is known what this kind of table does with its rows."""
    return type(embedding) is nn.Embedding or scale_of(embedding) is not None


def scale_of(embedding: nn.Module) -> Tensor | None:
    """What the embeddings of Gemma and the like are multiplied by, a buffer of theirs; None elsewhere."""
    return dict(embedding.named_buffers(recurse=False)).get("embed_scale")


def keep_on_host(embedding: nn.Embedding) -> None:
    """Moves a frozen table to the host, and looks up there from now on."""
    embedding.weight.data = to_host(embedding.weight.data)
    embedding.forward = partial(_look_up, embedding)  # type: ignore[method-assign]


def _look_up(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    rows = functional.embedding(to_host(ids), embedding.weight)  # ids (B, T)
    found, scale = to_device(rows, ids.device), scale_of(embedding)  # (B, T, D)
    return found if scale is None else found * scale.to(found.dtype)
