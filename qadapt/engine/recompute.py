"""Activation checkpointing (arXiv:1604.06174): keep what enters a layer, compute the rest again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from transformers import GradientCheckpointingLayer, PreTrainedModel

from qadapt.engine.boundaries import offload_boundaries, offloads_boundaries
from qadapt.plan.setting import Recompute


def set_recompute(
    model: PreTrainedModel,
    recompute: Recompute,
    *,
    within: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Makes decoder layers recompute their activations in the backward pass.

    The layers' own flag is used, not a wrapper: names stay, and evaluation is not slowed. Non-reentrant, so
    gradients reach the adapters although nothing before them is trained.

    Args:
        model: The base, before or after an adapter is attached.
        recompute: All layers, none, or how many of the first ones; the last ones keep their activations.
            Between two steps it may be raised.
        within: Makes a context that each recomputation runs in.
    """
    if recompute == "none":
        return
    # transformers 5.20, the last for Python 3.10, knows it by its old name
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": lambda: (nullcontext(), within())})
    model.disable_input_require_grads()  # a hook of the library that only the reentrant kind needs
    if offloads_boundaries(model):
        offload_boundaries(model)  # the layers' checkpoints are new
    if recompute == "all":
        return
    for layer in decoder_layers(model)[recompute:]:
        layer.gradient_checkpointing = False


def recomputed_layers(model: PreTrainedModel) -> tuple[int, int]:
    """How many layers recompute, of how many."""
    layers = decoder_layers(model)
    return sum(layer.gradient_checkpointing for layer in layers), len(layers)


def decoder_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The layers of a base, in the order in which they run."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
