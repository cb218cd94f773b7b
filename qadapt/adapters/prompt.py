"""Virtual tokens on a frozen decoder: trained vectors in front of every row, and nothing else is changed.

* `prompt`: the vectors themselves (prompt tuning, arXiv:2104.08691), which start as embeddings of frequent
  tokens, as in the paper;
* `ptuning`: what a small network makes of trained inputs (P-tuning, arXiv:2103.10385); its authors have an
  LSTM before its two layers, which PEFT leaves out unless asked. Once trained, the vectors alone are kept.

The vectors stand where rows have the ids of `engine/front.py`, in place of what the table would give, as if
they were embeddings: they have positions, a cache keeps them, and each document of a packed row has its own.
The decoder that is called with rows without such ids (`model(input_ids=...)`, the library's `generate`) gets
them put in, behind left padding, and gives logits of its own tokens only. With vectors (not ids) as inputs
the model is its base.

Legend: B rows, T tokens, P virtual tokens, D width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qadapt.adapters.bottleneck import Projection
from qadapt.adapters.effect import Effect
from qadapt.adapters.side_car import Part, SideCar
from qadapt.adapters.side_car_files import check_base, read_settings, read_tensors
from qadapt.engine.front import by_name, inserted
from qadapt.engine.host import device_of
from qadapt.errors import BadAdapter
from qadapt.methods import ENCODER_WIDTH, front_ids

PromptKind = Literal["prompt", "ptuning"]
PROMPT_KINDS: tuple[PromptKind, ...] = get_args(PromptKind)
COMMON_TOKENS = 5000
"""Vectors start as embeddings of the most frequent tokens, so many as the paper has; low ids are frequent."""
_MOST = 1_000_000
_CHILD = "front"


class Vectors(nn.Module):
    """Vectors that are trained themselves, (P, D)."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)

    def forward(self) -> Tensor:
        """(P, D)."""
        return self.weight


class Encoder(nn.Module):
    """Vectors as a network of two layers makes them, in the type that it is trained in.

    Args:
        count: P.
        width: D.
        draw: Of its start, which is as nn.Embedding's and nn.Linear's.
    """

    def __init__(self, count: int, width: int, draw: torch.Generator) -> None:
        super().__init__()
        self.inputs = nn.Parameter(torch.empty(count, width))
        self.inner = Projection(width, ENCODER_WIDTH)
        self.outer = Projection(ENCODER_WIDTH, width)
        nn.init.normal_(self.inputs, generator=draw)
        for layer in (self.inner, self.outer):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=draw)
            bound = 1 / math.sqrt(layer.weight.shape[1])
            nn.init.uniform_(layer.bias, -bound, bound, generator=draw)

    def forward(self) -> Tensor:
        """(P, D)."""
        return cast(Tensor, self.outer(functional.relu(self.inner(self.inputs))))


class PromptPart(Part):
    """The virtual tokens of a model.

    Args:
        source: Makes the vectors, (P, D).
        count: P.
    """

    def __init__(self, source: nn.Module, count: int) -> None:
        super().__init__()
        self.source = source
        self.virtual_tokens = count
        self._ids: Tensor | None = None
        self._cut = 0  # so many logits at the front are of virtual tokens

    def stored(self) -> dict[str, Tensor]:
        """The vectors alone."""
        with torch.no_grad():
            return {"vectors": self.source()}

    def see_ids(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hook before the embedding, whose table has no rows for virtual tokens."""
        if not self.is_on:
            return None
        self._ids = arguments[0]
        return arguments[0].clamp(min=0), *arguments[1:]

    def replace(self, _: nn.Module, __: tuple[Any, ...], embedded: Tensor) -> Tensor:
        """Hook after the embedding: the vectors in place of (B, T, D) where virtual tokens stand."""
        ids, self._ids = self._ids, None
        if ids is None:
            return embedded
        place = -1 - ids  # (B, T)
        vectors = functional.embedding(place.clamp(min=0), self.source().to(embedded.dtype))
        return torch.where((ids < 0).unsqueeze(-1), vectors, embedded.detach())

    def put_in_front(
        self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hook before the causal model: virtual tokens in rows that have none, and what goes with them."""
        self._cut = 0
        named = by_name(arguments, named)
        ids: Tensor | None = named.get("input_ids")
        if not self.is_on or ids is None:
            return None
        mask, cache = named.get("attention_mask"), named.get("past_key_values")
        read = 0 if cache is None else int(cache.get_seq_length())
        if read:
            return (), self._goes_on(named, mask, tokens=read + ids.shape[1])
        if ids.is_meta or bool((ids < 0).any()):  # a dry run's rows have theirs
            return None
        count = self.virtual_tokens
        front = torch.tensor(front_ids(count), device=ids.device)
        at = ids.new_zeros(len(ids)) if mask is None else (mask.cumsum(1) == 0).sum(1)  # behind padding
        named["input_ids"] = inserted(ids, front, at)
        if mask is not None:
            named["attention_mask"] = inserted(mask, torch.ones_like(front), at)
        if (places := named.get("position_ids")) is not None:
            places = places.expand(len(ids), -1) + count
            named["position_ids"] = inserted(places, torch.arange(count, device=ids.device), at)
        kept = named.get("logits_to_keep", 0)
        if isinstance(kept, Tensor):
            named["logits_to_keep"] = kept + count
        elif not kept:  # all of them are made
            self._cut = count
        return (), named

    def _goes_on(self, named: dict[str, Any], mask: Tensor | None, *, tokens: int) -> dict[str, Any]:
        """Arguments that know of the virtual tokens in the cache, if they do not know of them."""
        if mask is None or mask.shape[1] + self.virtual_tokens != tokens:
            return named
        more = mask.new_ones(len(mask), self.virtual_tokens)
        named["attention_mask"] = torch.cat((mask, more), dim=1)
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + self.virtual_tokens
        return named

    def cut_front(self, *given: Any) -> Any:
        """Hook after the causal model, whose output is given last: logits of the rows' own tokens."""
        output, cut, self._cut = given[-1], self._cut, 0
        if cut:
            output.logits = output.logits[:, cut:]
        return output


def attach_prompt(
    model: PreTrainedModel, kind: PromptKind, count: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> SideCar:
    """The base with new virtual tokens, which alone are trainable.

    Args:
        model: The base; its parameters are frozen.
        kind: How they are trained.
        count: P.
        dtype: Type of what is trained.
        seed: Of the tokens whose embeddings they start from, or of the network.
    """
    draw = torch.Generator().manual_seed(seed)
    source = Encoder(count, _width(model), draw) if kind == "ptuning" else Vectors(_start(model, count, draw))
    part = PromptPart(source, count)
    part.to(device_of(model), dtype)
    return _attached(model, kind, part)


def load_prompt(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> SideCar:
    """The base with the virtual tokens of a folder, in the type they were saved in; trained further as such.

    Raises:
        BadAdapter: The folder's files are damaged, or are of virtual tokens for another base.
    """
    part = _read(model, folder)
    part.requires_grad_(is_trainable)
    return _attached(model, read_settings(folder)["kind"], part)


def prompt_effects(model: PreTrainedModel, folder: Path) -> list[Effect]:
    """What the virtual tokens of a folder do at a base and its embedding, not attached: for `swap.py`.

    Raises:
        BadAdapter: As `load_prompt`.
    """
    part = _read(model, folder).requires_grad_(False)
    return [
        Effect(model.get_input_embeddings(), "alone", part, before=part.see_ids, after=part.replace),
        Effect(model, "alone", part, enter=part.put_in_front, leave=part.cut_front),
    ]


def prompt_shapes(settings: Mapping[str, Any], folder: Path) -> dict[str, tuple[int, ...]]:
    """Name of the tensor that virtual tokens with a folder's settings have → its shape.

    Raises:
        BadAdapter: The settings describe no virtual tokens.
    """
    sizes = settings.get("tokens"), settings.get("model_width")
    is_known = settings.get("kind") in PROMPT_KINDS and all(type(size) is int for size in sizes)
    if not (is_known and all(0 < cast(int, size) < _MOST for size in sizes)):
        raise BadAdapter(
            f"The settings of the adapter in {folder} describe no virtual tokens: {dict(settings)}.",
            cure="Take the adapter's files from where they were made.",
        )
    return {"tokens.vectors": cast(tuple[int, int], sizes)}


def _read(model: PreTrainedModel, folder: Path) -> PromptPart:
    settings = read_settings(folder)
    shapes = prompt_shapes(settings, folder)
    check_base(settings, _of_base(model), folder)
    [vectors] = read_tensors(folder, shapes).values()
    return PromptPart(Vectors(vectors.to(device_of(model))), len(vectors))


def _attached(model: PreTrainedModel, kind: PromptKind, part: PromptPart) -> SideCar:
    model.requires_grad_(False)
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(part.see_ids)
    embedding.register_forward_hook(part.replace)
    model.add_module(_CHILD, part)  # not of the embedding: what that trains, a tied head trains
    model.register_forward_pre_hook(part.put_in_front, with_kwargs=True)
    model.register_forward_hook(part.cut_front, with_kwargs=True)
    settings = {"kind": kind, "tokens": part.virtual_tokens, **_of_base(model)}
    return SideCar(model, {"tokens": part}, settings=settings)


@torch.no_grad()
def _start(model: PreTrainedModel, count: int, draw: torch.Generator) -> Tensor:
    """(P, D) embeddings of drawn tokens."""
    embedding = model.get_input_embeddings()
    table = cast(Tensor, embedding.weight)
    ids = torch.randint(min(COMMON_TOKENS, len(table)), (1, count), generator=draw)
    embedded: Tensor = embedding(ids.to(device_of(model)))
    return embedded[0]


def _of_base(model: PreTrainedModel) -> dict[str, Any]:
    """What a base must have for virtual tokens to be its own."""
    return {"model_width": _width(model), "model_type": model.config.model_type}


def _width(model: PreTrainedModel) -> int:
    return int(model.config.hidden_size)
