"""Gated feed-forward parts (arXiv:2002.05202) that keep gate and up, and make their product again.

Autograd keeps four wide tensors of such a part: the gate, what the activation makes of it, up, and their
product, which enters the down projection. The second and the last follow from the others by one cheap
operation each, so layers that keep their activations let them go and make them again when they are needed
(as arXiv:2205.05198 chooses): a third of what such a layer keeps. The operations and their numbers are the
same, so the gradient is, to the bit. Layers that recompute have all of it again anyway.

Only an instance's `forward` is set, as in `tiles.py`, which goes first where it is set.

Legend: D width of the model, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import GradientCheckpointingLayer, PreTrainedModel

from qadapt.engine.recompute import decoder_layers
from qadapt.shape import ACTIVATIONS, FAMILIES, activation_name

_Maker = Callable[[], Tensor]


def set_gated(model: PreTrainedModel) -> None:
    """Has the feed-forward parts of an architecture that is known let go what they can make again."""
    named = activation_name(model.config.to_dict())
    if model.config.model_type not in FAMILIES or named not in ACTIVATIONS:
        return
    for layer in decoder_layers(model):
        module = cast(nn.Module, layer.mlp)
        if "forward" not in vars(module):
            module.forward = Gated(module, layer)


class Gated:
    """A feed-forward part's forward pass."""

    def __init__(self, module: nn.Module, layer: GradientCheckpointingLayer) -> None:
        self._module = cast(Any, module)
        self._layer = layer
        self._is_joined = hasattr(module, "gate_up_proj")

    def __call__(self, values: Tensor) -> Tensor:  # (..., D) -> (..., D)
        """What the module makes of its input."""
        is_recomputed = self._layer.gradient_checkpointing and self._layer.training
        if is_recomputed or not torch.is_grad_enabled():
            return cast(Tensor, type(self._module).forward(self._module, values))
        gate, up = self._gate_and_up(values)
        activate = self._module.activation_fn if self._is_joined else self._module.act_fn
        activated = activate(gate)
        if not activated.requires_grad:  # it may be kept for up alone, or not at all: no more is won
            product = activated * up
            del gate, up, activated
            return cast(Tensor, self._module.down_proj(product))
        again = _Again(activate, gate.detach(), up.detach())
        makers: dict[int, _Maker] = {}  # by the id of a storage that lives until all is packed
        count = activated.numel()  # what packs may live until the backward pass: it holds neither of the two

        def pack(tensor: Tensor) -> Tensor | _Maker:
            maker = makers.get(id(tensor.untyped_storage()))
            if maker is None or not tensor.is_contiguous() or tensor.numel() != count:
                return tensor if tensor.is_leaf else tensor.detach()
            return partial(_shaped, maker, tensor.shape)

        with saved_tensors_hooks(pack, _unpacked):
            makers[id(activated.untyped_storage())] = again.activated
            product = activated * up
            makers[id(product.untyped_storage())] = again.product
            return cast(Tensor, self._module.down_proj(product))

    def _gate_and_up(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(..., F) each."""
        if self._is_joined:
            return cast(tuple[Tensor, Tensor], self._module.gate_up_proj(values).chunk(2, dim=-1))
        return self._module.gate_proj(values), self._module.up_proj(values)


class _Again:
    """What makes the activated gate, and its product with up, from the two that are kept."""

    def __init__(self, activate: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> None:
        self._activate, self._gate, self._up = activate, gate, up
        self._made: Tensor | None = None

    def product(self) -> Tensor:
        """(..., F); it is needed first, and what it is made of next."""
        self._made = self._activate(self._gate)
        return self._made * self._up

    def activated(self) -> Tensor:
        """(..., F), of the gate."""
        made, self._made = self._made, None
        return self._activate(self._gate) if made is None else made


def _shaped(maker: _Maker, shape: torch.Size) -> Tensor:
    return maker().view(shape)


def _unpacked(packed: Tensor | _Maker) -> Tensor:
    return packed if isinstance(packed, Tensor) else packed()
