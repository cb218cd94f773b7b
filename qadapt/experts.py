"""The routed experts of a mixture of experts, from its `config.json`: what 4 bits do not reach. No torch.

transformers 5 keeps the routed experts of a layer as two 3-D tensors (gate and up together, and down).
bitsandbytes quantizes linear layers only and skips them, so they stay in 16 bits while the rest of the model
shrinks. Shared experts are linear layers and are not counted here.
Measured: tests/test_known_models.py compares `weights` with the 3-D tensors that transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qadapt.architecture import size
from qadapt.units import format_bytes

_WIDTHS = {
    "mixtral": "intermediate_size",
    "olmoe": "intermediate_size",
    "qwen2_moe": "moe_intermediate_size",
    "qwen3_moe": "moe_intermediate_size",
}
"""Architecture → the field with an expert's feed-forward width; gate, up and down have no bias there."""


@dataclass(frozen=True)
class Experts:
    """The routed experts of a model.

    Attributes:
        count: Experts in one layer.
        per_token: How many of them one token goes through.
        weights: Of all experts in all layers; None where this architecture's layout is not known here.
    """

    count: int
    per_token: int | None
    weights: int | None

    @property
    def not_covered(self) -> str:
        """One sentence on what the experts do to an estimate."""
        chosen = "" if self.per_token is None else f", {self.per_token} per token"
        took = "" if self.weights is None else f" ({format_bytes(2 * self.weights)})"
        return (
            f"The routed experts ({self.count} per layer{chosen}) stay in 16 bits{took}: they are 3-D "
            "tensors, and bitsandbytes quantizes linear layers only."
        )


def routed_experts(config: Mapping[str, Any]) -> Experts | None:
    """The routed experts that a checked configuration describes, None for a dense model."""
    count = size(config, "num_experts")
    if not count:
        return None
    return Experts(count, size(config, "num_experts_per_tok"), _weights(config, count))


def _weights(config: Mapping[str, Any], count: int) -> int | None:
    family = str(config.get("model_type"))
    width, layers = size(config, "hidden_size"), size(config, "num_hidden_layers")
    inner = size(config, _WIDTHS[family]) if family in _WIDTHS else None
    if inner is None or width is None or layers is None:
        return None
    every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    routed = sum(layer not in dense and (layer + 1) % every == 0 for layer in range(layers))
    return routed * count * 3 * width * inner
