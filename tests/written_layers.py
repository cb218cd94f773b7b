"""A decoder with adapters beside its weights, written out as the papers have it: what hooks are held against.

Legend: B rows, T tokens, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qadapt.adapters.side_car import SideCar
from qadapt.engine.recompute import decoder_layers

SCALE = 1.5
"""What tests multiply an adapter's output by."""
Changed = Callable[[str, Tensor, Tensor], Tensor]
"""What a part, such as `layers.1.attention`, adds with its adapters; from its output and the stream."""
FUNCTIONS = {"silu": functional.silu, "relu": torch.relu, "gelu": functional.gelu, "tanh": torch.tanh}


def written_adapter(
    part: Mapping[str, Tensor], factors: Tensor | None, activation: str, values: Tensor
) -> Tensor:
    """(B, T, D) what a bottleneck adapter adds, by its tensors as they are called on disk.

    `factors` are those that Compacter's layers share.
    """
    if "norm.weight" in part:
        values = functional.layer_norm(values, values.shape[-1:], part["norm.weight"], part["norm.bias"])
    inner = FUNCTIONS[activation](values @ _weight(part, factors, "down").T + part["down.bias"])
    return SCALE * (inner @ _weight(part, factors, "up").T + part["up.bias"])


def _weight(part: Mapping[str, Tensor], factors: Tensor | None, side: str) -> Tensor:
    """(outputs, inputs) of a projection; of Compacter as its paper has it, by Kronecker products."""
    if f"{side}.weight" in part:
        return part[f"{side}.weight"]
    assert factors is not None
    pairs = zip(factors, part[f"{side}.left"], part[f"{side}.right"], strict=True)
    return torch.stack([torch.kron(a, torch.outer(s, t)) for a, s, t in pairs]).sum(0).T


def beside(added: Callable[[str, Tensor], Tensor], *, sees: str) -> Changed:
    """What a part adds where the adapter of its name adds to that what it makes of what it sees.

    Those that see a part's output stand after attention, too; the others see the `sum` or the `stream`.
    """

    def changed(name: str, out: Tensor, stream: Tensor) -> Tensor:
        if name.endswith("attention") and sees != "output":
            return out
        return out + added(name, {"sum": stream + out, "stream": stream, "output": out}[sees])

    return changed


def write_out(model: SideCar, changed: Changed, *, has_two_norms: bool) -> None:
    """Gives decoder layers their formula with adapters in it; the hooks are switched off."""
    for part in model.parts.values():
        part.is_on = False

    def layer_forward(number: int, layer: Any) -> Any:
        def forward(stream: Tensor, **named: Any) -> Tensor:
            out = layer.self_attn(hidden_states=layer.input_layernorm(stream), **named)[0]
            if has_two_norms:
                out = layer.post_attention_layernorm(out)
            stream = stream + changed(f"layers.{number}.attention", out, stream)
            before = layer.pre_feedforward_layernorm if has_two_norms else layer.post_attention_layernorm
            out = layer.mlp(before(stream))
            if has_two_norms:
                out = layer.post_feedforward_layernorm(out)
            return stream + changed(f"layers.{number}.feed_forward", out, stream)

        return forward

    for number, layer in enumerate(decoder_layers(model.base)):
        layer.forward = layer_forward(number, layer)  # type: ignore[method-assign]
