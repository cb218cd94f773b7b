"""How documents that lie one after another in a row are kept apart: which kernel, for which device and model.

The one place where that is decided: the step asks it for every layer (`engine/documents.py`), the plan for
its reasons and its bytes. No GPU of ours has run these kernels yet; on CUDA a run compares them with one
document at a time on the very card before it trains.
"""

from __future__ import annotations

from typing import Literal

from qadapt.plan.attention import attention_kernel

DocumentKernel = Literal["varlen", "documents", "scores"]
"""All documents in one kernel (`torch.nn.attention.varlen`); the device's fused kernel for one document after
another; or, as soft caps need it, one document after another with all its S x S scores."""

PACKABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3")
"""Architectures whose packed rows are shown to give the numbers of one document at a time, by `model_type`
(`tests/test_packing.py`). Not among them, and refused: those whose attention does not come from
transformers' interface (Falcon), and those that carry a state from token to token past it."""


def document_kernel(
    dtype: str, *, capability: float | None, head_width: int, has_softcap: bool
) -> DocumentKernel:
    """The kernel that attends within documents.

    Args:
        dtype: Of the products: "fp32", "bf16" or "fp16".
        capability: Compute capability of the card; None for a CPU.
        head_width: Width of one head.
        has_softcap: Whether scores have a soft cap, which no fused kernel knows.
    """
    if has_softcap:
        return "scores"
    if capability is None:
        return "documents"
    kernel = attention_kernel(capability, dtype, head_width=head_width, grouped=True, has_mask=False)
    return "varlen" if kernel == "flash" else "documents"
