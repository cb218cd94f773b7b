"""VeRA (arXiv:2310.11454) through PEFT: an update through two frozen random projections, two trained vectors.

All layers share the projections: a layer takes the first columns of A and the first rows of B,

    W + diag(b) B[:O] diag(d) A[:, :I],

and trains d (R,) and b (O,) alone. b starts at zero: the first forward pass equals the base's. R may be
larger than a layer is wide; its paper has 1,024 on layers of 768. PEFT's layers compute in the type of what
is trained and keep each layer's output; here a subclass does it in the type of the base and keeps R values
per token. Names, switching off and what stands on disk, the projections included, are PEFT's.

Legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, VeraConfig, get_peft_model
from peft.tuners.vera.layer import Linear as PeftLinear
from peft.tuners.vera.layer import VeraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.frozen import shared_projections
from qadapt.adapters.lora import chosen_layers, put_beside
from qadapt.engine.host import device_of
from qadapt.engine.linear import projected_linear

FIRST_INNER = 0.1
"""What d starts at, as in the paper."""


def attach_vera(
    model: PreTrainedModel, rank: int, targets: str | Sequence[str], *, dtype: torch.dtype, seed: int
) -> PeftModel:
    """The base with new vectors on the chosen layers, which alone are trainable.

    Args:
        model: The frozen base.
        rank: R.
        targets: Names of layers, or `all-linear`.
        dtype: Type of vectors and projections.
        seed: Of the projections.

    Raises:
        BadRecipe: A target matches no linear layer.
    """
    chosen = chosen_layers(model, targets)
    config = VeraConfig(
        r=rank,
        target_modules=list(chosen),
        projection_prng_key=seed,
        save_projection=True,  # whoever draws them elsewhere may get others
        d_initial=FIRST_INNER,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    put_beside(adapted, dtype=dtype)
    use_projected_layers(adapted)
    return adapted


def use_projected_layers(model: nn.Module) -> None:
    """Makes PEFT's layers one operation, and puts vectors and projections on the device, in one type."""
    layers = [module for module in model.modules() if isinstance(module, PeftLinear)]
    for layer in layers:
        layer.__class__ = ProjectedLinear
    if not layers:
        return
    like = next(iter(layers[0].vera_lambda_d.values()))
    for held in shared_projections(model).values():
        for name, projection in list(held.named_buffers()):
            held.register_buffer(name, projection.to(device_of(model), like.dtype))


class ProjectedLinear(PeftLinear):  # type: ignore[misc]
    """VeRA on a layer in 4 bits, 8 bits or 16."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        active = [name for name in self.active_adapters if name in self.vera_lambda_d]
        if self.disable_adapters or self.merged or len(active) != 1:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        vectors, parts = vectors_of(self, active[0]), parts_of(self, active[0])
        return projected_linear(x, self.get_base_layer(), vectors, projections=parts)


def vectors_of(layer: VeraLayer, name: str) -> tuple[Tensor, Tensor]:
    """The vectors d (R,) and b (O,) of a layer."""
    return layer.vera_lambda_d[name], layer.vera_lambda_b[name]


def parts_of(layer: VeraLayer, name: str) -> tuple[Tensor, Tensor]:
    """What a layer takes of the projections: (R, I) and (O, R)."""
    return layer.vera_A[name][:, : layer.in_features], layer.vera_B[name][: layer.out_features]
