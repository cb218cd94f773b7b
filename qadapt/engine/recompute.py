"""Activation checkpointing (arXiv:1604.06174): keep what enters a layer, compute the rest again."""

from __future__ import annotations

from transformers import PreTrainedModel


def recompute_all(model: PreTrainedModel) -> None:
    """Makes every decoder layer recompute its activations in the backward pass.

    The layers' own flag is used, not a wrapper: names stay, and evaluation is not slowed. Non-reentrant, so
    gradients reach the adapters although nothing before them is trained.
    """
    # transformers 5.20, the last for Python 3.10, knows it by its old name
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.disable_input_require_grads()  # a hook of the library that only the reentrant kind needs
