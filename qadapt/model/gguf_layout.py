"""Where a tensor of a model folder lies in a GGUF file, and what llama.cpp's converter does to its values.

One truth for both directions: `gguf_source.py` reads by it, `export/gguf.py` writes by it. The names come
from the `gguf` package. llama.cpp rotates neighbours (0, 1), (2, 3), ... of a head where transformers rotates
its two halves, so in architectures that rotate so the rows of q and k are interleaved; and gemma's norms,
which transformers applies as 1 + weight, are stored with the 1 in them.
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "smollm3": "smollm3", "qwen2": "qwen2", "qwen3": "qwen3",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3",
}  # fmt: skip
"""GGUF's word for an architecture by transformers' `model_type`."""

_INTERLEAVED = ("llama", "smollm3")
_PLUS_ONE = ("gemma2", "gemma3")


@dataclass(frozen=True)
class Stored:
    """A tensor in a GGUF file.

    `interleaved_heads` is the number of heads whose rows are interleaved, None if the rows are in order;
    `is_plus_one` says that 1 is added to the values.
    """

    name: str
    interleaved_heads: int | None
    is_plus_one: bool


class GgufLayout:
    """The tensors of one model by their names in transformers.

    Args:
        architecture: In GGUF's words, a value of `ARCHITECTURES`.
        layers: Decoder layers.
        heads: Query heads.
        kv_heads: Key heads.
    """

    def __init__(self, architecture: str, *, layers: int, heads: int, kv_heads: int) -> None:
        import gguf

        number = next(int(arch) for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        self._names = gguf.get_tensor_name_map(number, layers)
        self._heads = {"attn_q": heads, "attn_k": kv_heads} if architecture in _INTERLEAVED else {}
        self._is_plus_one = architecture in _PLUS_ONE

    def stored(self, name: str) -> Stored | None:
        """How a tensor is stored; None if the architecture has no place for it."""
        stem, _, suffix = name.rpartition(".")
        place = self._names.get_name(stem)
        if place is None:
            return None
        is_plus_one = self._is_plus_one and place.endswith("norm")
        return Stored(f"{place}.{suffix}", self._heads.get(place.rpartition(".")[2]), is_plus_one)


def row_order(rows: int, interleaved_heads: int | None) -> np.ndarray[Any, Any]:
    """Row i of the tensor for transformers is row `order[i]` of the stored one."""
    import numpy as np

    order: np.ndarray[Any, Any] = np.arange(rows)
    if interleaved_heads is not None:
        order = order.reshape(interleaved_heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return order
