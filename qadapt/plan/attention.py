"""Which way attention takes on a target, and what it keeps for the backward pass.

Three questions: does a mask reach it (rows longer than a sliding window), do keys and values reach it once
per query head, and which kernel does PyTorch choose. transformers hands grouped queries on as they are where
no mask is given (`enable_gqa`); the memory-efficient kernel refuses them, and the T x T one is left. There
`engine/attention.py` repeats keys and values, so that the memory-efficient kernel takes them.

Source of the choice: PyTorch's `sdp_utils.cpp` (2.13), transformers' `integrations/sdpa_attention.py` (5.23).
Compared with the dry run, op by op, by `tools/bench/closed_form.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qadapt.plan.prefix import has_prefix
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape

FP32 = 4
NEW_CARD = 8.9
"""Compute capability that an unknown card is taken to have."""

AttentionKernel = Literal["flash", "efficient", "math"]
DocumentKernel = Literal["varlen", "blocks", "documents", "scores"]
"""All documents of a packed row in one kernel (`torch.nn.attention.varlen`); one after another by blocks of
queries, on a CPU; by the fused kernel of the device; or, as soft caps need it, with all their scores."""
BLOCK_QUERIES = 128
"""Queries of each head in a block (`engine/blocks.py`); of 32 to 256 the fastest."""
_BLOCK_VALUES = 4 << 20
"""Scores that a block has at most, if it need not be more for one key head."""


@dataclass(frozen=True)
class Attention:
    """The way a step's attention takes.

    Attributes:
        kernel: CUDA's flash, memory-efficient or T x T kernel; the CPU's fused one, or blocks of queries; or,
            where scores have a soft cap, the eager operations of transformers.
        is_repeated: Keys and values reach it once per query head.
        has_mask: A mask of T x T values reaches it.
        capability: Compute capability; 0 on a CPU.
        documents: Documents in a packed row, each of which sees itself alone; 0 where rows are filled up.
        is_joined: It attends to one document after another, and joins what comes out.
    """

    kernel: AttentionKernel | Literal["cpu", "blocks", "eager"]
    is_repeated: bool
    has_mask: bool
    capability: float
    documents: int = 0
    is_joined: bool = False

    @property
    def keeps_output(self) -> bool:
        """Whether the kernel keeps its output, as the fused ones do."""
        return self.kernel not in ("math", "eager", "blocks")


def attention_of(shape: ModelShape, setting: Setting, *, compute_capability: float | None) -> Attention:
    """The way a step's attention takes; an unknown card is taken to be new."""
    is_grouped, capability = shape.kv_heads < shape.heads, compute_capability or NEW_CARD
    if setting.packed:
        return _packed_attention(shape, setting, capability=None if setting.device == "cpu" else capability)
    has_mask = shape.sliding_window is not None and setting.length >= shape.sliding_window
    if shape.attention_softcap is not None:
        return Attention("eager", is_grouped, has_mask, 0)
    if setting.device == "cpu":
        return Attention("cpu", is_grouped and has_mask, has_mask, 0)
    is_repeated = has_mask or repeats_keys(shape, setting.compute_dtype, compute_capability=capability)
    kernel = attention_kernel(
        capability,
        setting.compute_dtype,
        head_width=shape.head_width,
        grouped=is_grouped and not is_repeated,
        has_mask=has_mask,
    )
    return Attention(kernel, is_grouped and is_repeated, has_mask, capability)


def _packed_attention(shape: ModelShape, setting: Setting, *, capability: float | None) -> Attention:
    """The way of documents in a packed row, as `engine/documents.py` goes it."""
    count, is_grouped = max(setting.rows, setting.documents), shape.kv_heads < shape.heads
    chosen = document_kernel(
        setting.compute_dtype,
        capability=capability,
        head_width=shape.head_width,
        has_softcap=shape.attention_softcap is not None,
        one_by_one=setting.one_by_one,
    )
    has_mask = shape.sliding_window is not None and setting.length > shape.sliding_window
    if chosen == "varlen" and not (has_mask and has_prefix(setting)):
        assert capability is not None
        return Attention("flash", False, False, capability, count)
    is_joined = count > 1
    if chosen == "scores":
        return Attention("eager", is_grouped, has_mask, 0, count, is_joined)
    if chosen == "blocks" and not has_mask:
        return Attention("blocks", False, False, 0, count)
    if capability is None:
        return Attention("cpu", is_grouped and has_mask, has_mask, 0, count, is_joined)
    is_repeated = has_mask or repeats_keys(shape, setting.compute_dtype, compute_capability=capability)
    kernel = attention_kernel(
        capability,
        setting.compute_dtype,
        head_width=shape.head_width,
        grouped=is_grouped and not is_repeated,
        has_mask=has_mask,
    )
    return Attention(kernel, is_grouped and is_repeated, has_mask, capability, count, is_joined)


def document_kernel(
    dtype: str, *, capability: float | None, head_width: int, has_softcap: bool, one_by_one: bool = False
) -> DocumentKernel:
    """The kernel that attends within the documents of a packed row: the one place where that is decided.

    The step asks it for every layer (`engine/documents.py`), the plan for its reasons and its bytes. On CUDA
    a run compares `varlen` with one document at a time on the very card before it is planned, and leaves it
    if they differ.

    Args:
        dtype: Of the products: "fp32", "bf16" or "fp16".
        capability: Compute capability of the card; None for a CPU.
        head_width: Width of one head.
        has_softcap: Whether scores have a soft cap, which no fused kernel knows.
        one_by_one: Whether the card, or its torch, cannot use the kernel for all at once.
    """
    if has_softcap:
        return "scores"
    if capability is None:
        return "blocks" if dtype == "bf16" else "documents"
    kernel = attention_kernel(capability, dtype, head_width=head_width, grouped=True, has_mask=False)
    return "varlen" if kernel == "flash" and not one_by_one else "documents"


def block_heads(groups: int, length: int) -> int:
    """Key-value heads whose queries are in one block of a document; at least 1.

    Args:
        groups: Query heads of each.
        length: Tokens of the document.
    """
    return max(1, _BLOCK_VALUES // (groups * BLOCK_QUERIES * length))


def repeats_keys(shape: ModelShape, compute_dtype: str, *, compute_capability: float | None) -> bool:
    """Whether keys and values are to be repeated on a card, None being a CPU.

    True where grouped queries alone keep attention from a kernel without T x T scores: on cards before
    compute capability 8.0, and in fp32.
    """
    if compute_capability is None or shape.attention_softcap is not None or shape.kv_heads == shape.heads:
        return False
    grouped, repeated = (
        attention_kernel(
            compute_capability, compute_dtype, head_width=shape.head_width, grouped=grouped, has_mask=False
        )
        for grouped in (True, False)
    )
    return grouped == "math" and repeated != "math"


def attention_kernel(
    capability: float, dtype: str, *, head_width: int, grouped: bool, has_mask: bool
) -> AttentionKernel:
    """Which kernel `scaled_dot_product_attention` takes on CUDA while training, without dropout.

    Source: PyTorch's `sdp_utils.cpp`. Flash needs compute capability 8.0, 16 bits, no mask; on 8.6 to 8.9 and
    12.x its backward leaves out head widths of 193 to 224. The memory-efficient one takes fp32 and masks and
    works from 5.0 on, but refuses grouped queries (`enable_gqa`) in every release up to 2.13; grouped queries
    without Flash therefore go to the one that makes T x T scores. On 9.0 and 10.0 newer releases may prefer
    cuDNN's kernel, whose workspace nobody has published: it is taken for Flash here.

    Args:
        capability: Compute capability of the card: 7.5, 8.6, ...
        dtype: The values' type: "fp32", "bf16" or "fp16".
        head_width: Width of one head.
        grouped: Fewer key-value heads than query heads reach the call (it is given `enable_gqa`).
        has_mask: The call has a mask tensor; `is_causal` is none.
    """
    is_half = dtype != "fp32"
    if capability >= 8 and is_half and not has_mask and head_width <= 256:
        is_consumer = 8.6 <= capability < 9 or capability >= 12
        if not (is_consumer and 192 < head_width <= 224):
            return "flash"
    alignment = 8 if is_half else 4 if capability >= 8 else 1
    is_known = dtype != "bf16" or capability >= 8
    if is_known and not grouped and head_width % alignment == 0:
        return "efficient"
    return "math"


def attention_core_bytes(shape: ModelShape, setting: Setting, attention: Attention) -> int:
    """Per token, kept by attention itself: queries, keys, values, output and the fp32 log-sum of each head.

    Eager operations and blocks keep no output and no log-sum. Where T x T scores are made without fusing:
    scaled queries and keys, and values, in fp32 and repeated per query head
    (`_scaled_dot_product_attention_math`).
    """
    query, key_value = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    c = setting.compute_bytes
    if attention.kernel == "eager":
        return 3 * query * c
    if attention.kernel == "math":
        return 3 * query * FP32
    if attention.is_repeated:
        return 4 * query * c + shape.heads * FP32
    is_view = shape.family == "phi3" and not has_prefix(setting)  # of q, k and v
    values = query + 2 * key_value if is_view else key_value
    if attention.kernel == "blocks":
        return (query + key_value + values) * c
    return (2 * query + key_value + values) * c + shape.heads * FP32


def score_bytes(shape: ModelShape, setting: Setting, attention: Attention) -> int:
    """The T x T matrices that a layer keeps; in a packed row of each document, of `length` at most.

    Eager with a soft cap: the fp32 softmax, its tanh and a cast. Scores made without fusing: the softmax.
    Fused with a mask: the mask as numbers to be added, which every call makes anew.
    """
    squares, c = setting.tokens * setting.length, setting.compute_bytes
    if attention.kernel == "eager":
        return squares * shape.heads * (c + FP32 + (0 if c == FP32 else c))
    if attention.kernel == "math":
        return squares * shape.heads * FP32
    return squares * c if attention.has_mask else 0


def mask_bytes(shape: ModelShape, setting: Setting, attention: Attention) -> int:
    """Masks that stay for all layers: eager attention's two, in numbers; else one of booleans for all rows.

    Layers that are not recomputed keep only what they made of it (`score_bytes`). Documents of a packed row
    have theirs made anew in every layer.
    """
    if attention.documents:
        return 0
    squares = setting.length**2
    if attention.kernel == "eager":
        return 2 * setting.rows * squares * setting.compute_bytes
    return squares if attention.has_mask and setting.recomputed_layers(shape.layers) else 0
