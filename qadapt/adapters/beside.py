"""Where modules stand beside a layer's two parts, and the hooks through which they are asked there.

Each adds f of something to what a part adds to the residual stream (after Gemma's second norm): of o, of
h + o or of h. Layers are not wrapped: hooks on their children, which run again when a layer is recomputed.
Knows no f.

Legend: B rows, T tokens, D width of the model; o what a part adds, h the stream that it is added to.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.effect import Effect
from qadapt.adapters.side_car import Part
from qadapt.errors import Unsupported
from qadapt.methods import Sees

Place = Literal["attention", "feed_forward"]


@dataclass(frozen=True)
class Places:
    """Children of a layer: what attention and feed-forward part add, and the norm before the latter."""

    attention: str
    feed_forward: str
    norm: str


_PLAIN = Places("self_attn", "mlp", "post_attention_layernorm")
_TWO_NORMS = Places("post_attention_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm")
PLACES: Mapping[str, Places] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _PLAIN),
    **dict.fromkeys(("gemma2", "gemma3_text"), _TWO_NORMS),
}
"""By `model_type`."""


class Beside(Part):
    """A module that stands beside a part of a layer; its `forward` is f.

    Args:
        sees: What enters it: o, h + o or h.
    """

    def __init__(self, sees: Sees) -> None:
        super().__init__()
        self.sees = sees
        self._stream: weakref.ref[Tensor] | None = None

    def see_stream(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Hook before the feed-forward part's norm; the layer itself holds the stream until it adds to it."""
        self._stream = weakref.ref(arguments[0])

    def change_output(self, _: nn.Module, arguments: object, output: Any) -> Any:
        """Hook of what makes o, alone or first of a tuple: o + f(...)."""
        if not self.is_on:
            return output
        if isinstance(output, tuple):
            return (self.added_to(output[0]), *output[1:])
        return self.added_to(output)

    def added_to(self, output: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        """What the part adds to the stream with the module."""
        entering = output
        if self.sees != "output":
            assert self._stream is not None, "the norm comes first"
            stream = self._stream()
            assert stream is not None, "the layer holds it"
            entering = stream + output if self.sees == "sum" else stream
        return output + cast(Tensor, self(entering))


def effects_beside(layer: nn.Module, part: Beside, places: Places, *, place: Place) -> list[Effect]:
    """What a module does at a place of a layer."""
    output = layer.get_submodule(places.attention if place == "attention" else places.feed_forward)
    effects = [Effect(output, "sequence", part, after=part.change_output)]
    if part.sees != "output":
        effects.append(Effect(layer.get_submodule(places.norm), "sequence", part, before=part.see_stream))
    return effects


def find_places(model: PreTrainedModel) -> Places:
    """Where the layers of a model add to their stream.

    Raises:
        Unsupported: That is not known of its architecture.
    """
    family = model.config.model_type
    if family not in PLACES:
        raise Unsupported(
            f"Bottleneck adapters on {family}: where its layers add to their stream is not known.",
            cure=f"Known are {', '.join(PLACES)}. Or set adapter.method=lora, which suits every decoder.",
        )
    return PLACES[family]
