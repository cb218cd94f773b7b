"""OFT (arXiv:2306.07280) through PEFT: each layer's inputs are rotated, block by block, by trained angles.

A product with a rotated weight is a product of rotated inputs (arXiv:2506.19847): the base's weight stays as
it is, in 4 bits, too. All angles start at zero, so the first forward pass is the base's to the bit. PEFT's
layers compute in the type of the angles; here a subclass does it in the type of the base
(`engine/rotation.py`). Names, switching off and what stands on disk are PEFT's. A stranger's adapter whose
rotations are made in another way (an exact inverse, other terms, shared or held blocks) has PEFT's layers.

Legend: I inputs, K blocks, S width of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import OFTConfig, PeftModel, get_peft_model
from peft.tuners.oft.layer import Linear as PeftLinear
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn
from transformers import PreTrainedModel

from qadapt.adapters.lora import chosen_layers, put_beside
from qadapt.engine.rotation import rotated_linear
from qadapt.methods import NEUMANN_TERMS, check_block


def attach_oft(
    model: PreTrainedModel, block: int, targets: str | Sequence[str], *, dtype: torch.dtype
) -> PeftModel:
    """The base with angles on the chosen layers, which alone are trainable.

    Args:
        model: The frozen base.
        block: S.
        targets: Names of layers, or `all-linear`.
        dtype: Type of the angles.

    Raises:
        BadRecipe: A target matches no linear layer, or a layer's inputs are no whole number of blocks.
    """
    chosen = list(chosen_layers(model, targets))
    check_block(block, _inputs(model, chosen))
    config = OFTConfig(r=0, oft_block_size=block, target_modules=chosen, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    put_beside(adapted, dtype=dtype)
    use_rotated_layers(adapted)
    return adapted


def use_rotated_layers(model: nn.Module) -> None:
    """Makes PEFT's layers one operation; the places of angles in a matrix, which each has, are one tensor.

    Layers whose rotations are not made as here stay PEFT's.
    """
    shared: dict[tuple[str, int], Tensor] = {}
    for module in model.modules():
        if isinstance(module, PeftLinear) and all(map(_is_made_as_here, module.oft_R.values())):
            module.__class__ = RotatedLinear
            for rotation in module.oft_R.values():
                for name in ("rows", "cols"):
                    places = rotation.get_buffer(name)
                    kept = shared.setdefault((name, rotation.block_size), places)
                    rotation.register_buffer(name, kept, persistent=False)


class RotatedLinear(PeftLinear):  # type: ignore[misc]
    """OFT on a layer in 4 bits, 8 bits or 16."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output."""
        active = [name for name in self.active_adapters if name in self.oft_R]
        if self.disable_adapters or self.merged or len(active) != 1:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        rotation = self.oft_R[active[0]]
        return rotated_linear(x, self.get_base_layer(), rotation.weight, block=rotation.block_size)


def _is_made_as_here(rotation: OFTRotationModule) -> bool:
    way = rotation.use_cayley_neumann, rotation.num_cayley_neumann_terms
    return way == (True, NEUMANN_TERMS) and not rotation.coft and not rotation.block_share


def _inputs(model: PreTrainedModel, chosen: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Linear) and name in chosen:
            found[name] = module.in_features
    return found
