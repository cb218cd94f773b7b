"""LoftQ (arXiv:2310.08659) on a quantized base: LoRA that starts as the best update for what quantizing lost.

LoftQ alternates: quantize the weight less the update, take the update from the error's principal part. After
the first round the base is the plain quantized one, which every adapter shares; later rounds would make a
base of its own for each. So here, as by default in PEFT, it is one round:

    W ≈ Q(W) + B₀ A₀,    B₀ A₀ the principal part of W - Q(W).

The first forward pass is not the base's but nearer to the unquantized model's. A₀ and B₀ are trained, and
what stands on disk is plain LoRA, for this quantization of this base: on the published weights, or quantized
in another way, it would mend an error that is not there (`AdapterFacts.mends_base`).

Legend: I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from qadapt.adapters.pissa import principal_part
from qadapt.engine.linear import dense_weight, is_quantized
from qadapt.methods import check_base

Originals = Callable[[str], Tensor]
"""Name of a weight of the base → the weight as it is in the model's files."""


@torch.no_grad()
def start_from_error(model: PeftModel, originals: Originals | None, *, seed: int) -> None:
    """Gives every LoRA layer the factors that are nearest to what its base has lost.

    Args:
        model: The base with LoRA; on `meta` nothing happens.
        originals: Where the published weights come from.
        seed: Of the randomized decompositions.

    Raises:
        BadRecipe: A layer of the base is not quantized.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path, layer in model.get_base_model().named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            base = layer.get_base_layer()
            check_base("loftq", "nf4" if is_quantized(base) else "none")
            if base.weight.is_meta:
                continue
            assert originals is not None, "only a dry run has no weights"
            quantized = dense_weight(base, torch.float32)
            error = originals(f"{path}.weight").to(quantized) - quantized  # (O, I)
            for name, scale in layer.scaling.items():
                down, up = principal_part(error, rank=layer.r[name], scale=scale)
                layer.lora_A[name].weight.copy_(down)
                layer.lora_B[name].weight.copy_(up)
