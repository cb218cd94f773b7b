"""The categories that memory is counted in: the same words in the estimate, the run and on the screen."""

from __future__ import annotations

STATIC = (
    "base_weights",  # 4-bit codes, or 16-bit weights of the linear layers
    "quantization_constants",  # absmax and its own quantization
    "unquantized",  # embeddings, head, norms, biases
    "adapters",
    "gradients",  # of the adapters
    "optimizer",  # states and compensation
)
WORKING = (
    "recompute_boundaries",  # inputs of recomputed layers
    "activations",  # what layers keep for the backward pass
    "loss",  # logits and their gradient
    "temporary",  # dequantized weights, workspaces
)
CATEGORIES = STATIC + WORKING

TITLES = {
    "base_weights": "base weights",
    "quantization_constants": "quantization constants",
    "unquantized": "embeddings, head, norms",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "recompute_boundaries": "recompute boundaries",
    "activations": "activations",
    "loss": "loss",
    "temporary": "temporary",
}
