"""The adapter methods behind their names: how each is attached to a base, and loaded again.

A method that PEFT has is trained in PEFT's own parameters and stands on disk as a plain PEFT folder, which
`lora.save_adapter` writes. What is known of a method without tensors is in `methods.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from qadapt.adapters.adalora import attach_adalora
from qadapt.adapters.bottleneck import KINDS, Bottleneck, attach_bottleneck
from qadapt.adapters.facts import is_side_car
from qadapt.adapters.fusion import FUSION, Member, attach_fusion
from qadapt.adapters.ia3 import attach_ia3, use_typed_layers
from qadapt.adapters.loftq import Originals, start_from_error
from qadapt.adapters.lora import VARIANTS, Lora, attach_lora, load_lora
from qadapt.adapters.oft import attach_oft, use_rotated_layers
from qadapt.adapters.prefix import PREFIX_KINDS, attach_prefix
from qadapt.adapters.prompt import PROMPT_KINDS, attach_prompt
from qadapt.adapters.side_car import SideCar
from qadapt.adapters.side_cars import load_side_car
from qadapt.adapters.stack import attach_stack
from qadapt.adapters.triplets import use_triplet_layers
from qadapt.adapters.vera import attach_vera, use_projected_layers
from qadapt.errors import Unsupported
from qadapt.methods import METHODS, Method, Nonlinearity, activation_of, dropped_layers, has_norm


@dataclass(frozen=True)
class Adapter:
    """What is trained, as a recipe's adapter section has it.

    `members` is what a fusion attends over, or the one adapter that a bottleneck stands on; `steps` how many
    the run has, over which AdaLoRA gives ranks up.
    """

    method: Method
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    nonlinearity: Nonlinearity = "auto"
    members: Sequence[Member] = ()
    steps: int = 1000


def attach(
    model: PreTrainedModel,
    adapter: Adapter,
    *,
    dtype: torch.dtype,
    seed: int,
    new_ids: Sequence[int] = (),
    originals: Originals | None = None,
) -> PeftModel:
    """The base with a new adapter, which alone is trainable, and the rows of new tokens.

    The first forward pass equals the base's, but for what stands in front of the text, and for LoftQ; of a
    fusion it is that of the mean of its adapters, and of what stands on an adapter that of this one.

    Args:
        model: The frozen base.
        adapter: The adapter.
        dtype: Type of what is trained.
        seed: Of what starts at random.
        new_ids: Ids of new tokens, in order.
        originals: The published weights by name, which LoftQ starts from.

    Raises:
        BadRecipe: A target matches no linear layer, or the rank is larger than the narrowest one, or the
            method starts from what quantizing took from the base, and nothing did.
        Unsupported: The method trains no rows of new tokens; or see `attach_new_rows`.
    """
    method = adapter.method
    if new_ids and not METHODS[method].has_new_tokens:
        raise Unsupported(
            f"data.new_tokens: with {METHODS[method].title} no rows of new tokens are trained.",
            cure="Leave data.new_tokens out, or set adapter.method=lora.",
        )
    if method in VARIANTS:
        lora = Lora(adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, variant=method)
        adapted = attach_lora(model, lora, dtype=dtype, seed=seed, new_ids=new_ids)
        if method == "loftq":
            start_from_error(adapted, originals, seed=seed)
        return adapted
    if method == "adalora":
        lora = Lora(adapter.rank, adapter.alpha, adapter.dropout, adapter.targets)
        return attach_adalora(model, lora, steps=adapter.steps, dtype=dtype, seed=seed)
    if method == "vera":
        return attach_vera(model, adapter.rank, adapter.targets, dtype=dtype, seed=seed)
    if method == "oft":
        return attach_oft(model, adapter.rank, adapter.targets, dtype=dtype)
    if METHODS[method].is_beside:
        return _attach_beside(model, adapter, dtype=dtype, seed=seed)
    assert method == "ia3"
    return attach_ia3(model, adapter.targets, dtype=dtype)


def _attach_beside(model: PreTrainedModel, adapter: Adapter, *, dtype: torch.dtype, seed: int) -> PeftModel:
    """The base with an adapter beside its weights."""
    method = adapter.method
    if method in KINDS:
        scale, dropout = adapter.alpha / adapter.rank, adapter.dropout
        bottleneck = Bottleneck(
            method,
            adapter.rank,
            activation_of(method, adapter.nonlinearity),
            scale=scale,
            norm=has_norm(adapter.nonlinearity),
            dropout=dropout,
            first_layer=dropped_layers(method, adapter.targets),
        )
        if adapter.members:
            return attach_stack(model, bottleneck, adapter.members[0], dtype=dtype, seed=seed)
        return attach_bottleneck(model, bottleneck, dtype=dtype, seed=seed)
    if method == FUSION:
        return attach_fusion(model, adapter.members, dtype=dtype, seed=seed)
    if method in PROMPT_KINDS:
        return attach_prompt(model, method, adapter.rank, dtype=dtype, seed=seed)
    assert method in PREFIX_KINDS
    return attach_prefix(model, method, adapter.rank, dtype=dtype, seed=seed)


def load_adapter(model: PreTrainedModel, folder: Path, *, is_trainable: bool = False) -> PeftModel:
    """The base with the adapter of a folder, of whatever method, in the type it was saved in."""
    if is_side_car(folder):
        return load_side_car(model, folder, is_trainable=is_trainable)
    adapted = load_lora(model, folder, is_trainable=is_trainable)
    use_typed_layers(adapted)
    use_projected_layers(adapted)
    use_rotated_layers(adapted)
    use_triplet_layers(adapted)
    return adapted


def adapted_layers(model: PeftModel) -> int:
    """How many layers of a base have an adapter, or how many adapters stand beside them."""
    if isinstance(model, SideCar):
        return sum(not part.is_shared and not part.is_below for part in model.parts.values())
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())
