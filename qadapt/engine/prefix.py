"""Keys and values in front of every document: what a layer's tokens see before themselves (prefix tuning).

They are put there inside the layer's attention, by transformers' own interface: tokens keep their positions,
a cache keeps tokens only, and a layer that is recomputed sees them again. Every token sees all of them, also
where a sliding window or a padding mask hides other tokens. Where no mask is made, queries of nothing stand
in front, too, so that causal kernels line up; what comes out for them is dropped. What a prefix is, is not
known here, nor who trains it.

Legend: B rows, H query heads, K key-value heads, P length of the prefix, T tokens, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from qadapt.engine.attention import NAME as REPEATED
from qadapt.engine.attention import attend_repeated
from qadapt.errors import Unsupported

CHILD = "prefix"
"""Name under which a layer's attention has its prefix as a child."""
_ENDING = "_prefixed"


@runtime_checkable
class Prefix(Protocol):
    """Keys and values of one layer that can be switched off."""

    is_on: bool

    def in_front(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values, (K, P, D) each, in a type."""


class Choice(nn.Module):
    """What stands where a prefix does, if several are at hand on one base.

    Attributes:
        rows: The prefix that all rows of a batch see, or one for each; None: none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[Prefix | None, ...] = (None,)


def other_rows(chosen: int, computed: int) -> Unsupported:
    """What is raised where a model computes another number of rows than something was chosen for."""
    return Unsupported(
        f"Adapters were chosen for {chosen} rows, and the model computes {computed} at once.",
        cure="Choose one for each row of the batch. Packed rows, and feed-forward parts computed in pieces, "
        "take one adapter for all.",
    )


def see_prefixes(model: PreTrainedModel) -> None:
    """Lets the attention of a model look for prefixes; without one it computes what it did, to the bit.

    Raises:
        Unsupported: The architecture does not take its attention from the library's interface.
    """
    before = model.config._attn_implementation
    if str(before).endswith(_ENDING):
        return
    name = f"{before}{_ENDING}"
    if before in _KNOWN:
        attend, mask = _KNOWN[before]
        AttentionInterface.register(name, partial(attend_prefixed, attend=attend))
        AttentionMaskInterface.register(name, mask)
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise Unsupported(
            f"Prefix tuning on {model.config.model_type}: its attention, {before}, cannot be given a prefix.",
            cure="Set adapter.method=lora, which suits every decoder.",
        )


def prefixes_of(module: nn.Module) -> tuple[Prefix | None, ...]:
    """The prefix that all rows see in a layer's attention, or one for each; None: none is on."""
    found = dict(module.named_children()).get(CHILD)
    if isinstance(found, Choice):
        return found.rows
    assert found is None or isinstance(found, Prefix)
    return (found if found is not None and found.is_on else None,)


def attend_prefixed(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, T and what a cache has, D)
    value: Tensor,
    attention_mask: Tensor | None,  # (B or 1, 1, T, as many as keys)
    *,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """Another attention with the module's prefixes in front; (B, T, H, D).

    Raises:
        Unsupported: Prefixes were chosen for another number of rows.
    """
    prefixes = prefixes_of(module)
    if len(prefixes) not in (1, len(query)):
        raise other_rows(len(prefixes), len(query))
    one = partial(_attend_behind, attend=partial(attend, module, **named))
    if len(set(prefixes)) == 1:
        return one(prefixes[0], query, key, value, attention_mask)
    found = torch.empty_like(query.transpose(1, 2))
    for prefix in dict.fromkeys(prefixes):
        rows = [row for row, each in enumerate(prefixes) if each is prefix]
        mask = None if attention_mask is None else attention_mask.expand(len(query), -1, -1, -1)[rows]
        found[rows] = one(prefix, query[rows], key[rows], value[rows], mask)[0]
    return found, None


def _attend_behind(
    prefix: Prefix | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """Attention of rows that see the same prefix, or none."""
    if prefix is None:
        return attend(query, key, value, mask)
    keys, values = (each.expand(len(query), -1, -1, -1) for each in prefix.in_front(query.dtype))
    places, tokens = keys.shape[2], query.shape[2]
    key, value = torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)
    if mask is None and tokens > 1:
        query = functional.pad(query, (0, 0, places, 0))
    if mask is not None:
        mask = functional.pad(mask, (places, 0), value=True if mask.dtype == torch.bool else 0.0)
    found, shares = attend(query, key, value, mask)
    return found[:, -tokens:], shares


def joined(front: Tensor, of: Tensor, *, lengths: Sequence[int]) -> Tensor:
    """(1, heads, T, D) of packed documents, each with (heads, P, D) in front of it."""
    parts = of.split(list(lengths), dim=2)
    return torch.cat([each for part in parts for each in (front[None], part)], dim=2)


def without_front(found: Tensor, *, places: int, lengths: Sequence[int]) -> Tensor:
    """(1, T, H, D) of packed documents without the so many places in front of each."""
    parts = found.split([places + length for length in lengths], dim=1)
    return torch.cat([part[:, places:] for part in parts], dim=1)


def attend_eagerly(
    module: nn.Module,
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, K, S, D)
    value: Tensor,  # (B, K, S, D)
    attention_mask: Tensor | None,  # to be added, (B, 1, T, S)
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """The library's eager attention, of which each architecture has its own; (B, T, H, D), and its shares."""
    groups, softcap = query.shape[1] // key.shape[1], named.get("softcap")
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * named["scaling"]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    shares = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    shares = functional.dropout(shares, p=named.get("dropout", 0.0), training=module.training)
    return torch.matmul(shares, value).transpose(1, 2).contiguous(), shares


_KNOWN: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "sdpa": (sdpa_attention_forward, sdpa_mask),
    REPEATED: (attend_repeated, sdpa_mask),
    "eager": (attend_eagerly, eager_mask),
}
"""Attention, and the masks made for it, by the library's names."""
