"""Bytes that come and go within an operation: what the step keeps is in `activations`.

Two halves. The closed form's: the moments of a layer, and of the loss. The kernels': what CUDA takes inside
an operation, where no dispatch mode can see it (`kernel_bytes`, asked by the dry run), and what cuBLAS keeps.
The kernels' figures are from PyTorch's sources (2.13 and the code just after it), not measured here;
published peaks of a T4 and an A100 score them (`tools/bench/estimator.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from qadapt.plan.activations import (
    adapter_input_bytes,
    mlp_bytes,
    norm_bytes,
    remade_bytes,
    scales_output,
)
from qadapt.plan.adapters import largest_tensor, trainable
from qadapt.plan.attention import BLOCK_QUERIES, Attention, block_heads
from qadapt.plan.bottleneck import bottleneck_bytes, bottleneck_passing_bytes, stands_beside
from qadapt.plan.fusion import attends, fusion_passing_bytes
from qadapt.plan.host import BLOCK_TOKENS, slice_rows
from qadapt.plan.norms import norm_copies, norm_value_bytes
from qadapt.plan.prefix import as_attended
from qadapt.plan.setting import Setting
from qadapt.plan.weights import dequantized_bytes
from qadapt.shape import Linear, ModelShape
from qadapt.units import MIB

FP32 = 4


def library_bytes(setting: Setting, *, compute_capability: float | None) -> int:
    """The workspaces of cuBLAS: one of the thread that goes forward, one of the thread that goes backward."""
    return 0 if setting.device == "cpu" else 2 * blas_workspace_bytes(compute_capability)


def mlp_passing_bytes(shape: ModelShape, setting: Setting, *, is_recomputed: bool) -> int:
    """What comes on top of the kept bytes of a layer at the widest moment of its feed-forward half.

    Backward, all with the layer's output gradient: the down projection's dequantized weight and the gradient
    of its input, or with dropout two of those; the products' two gradients besides. Forward, or recomputed:
    see `_forward_moments`.
    """
    if setting.mlp_tiles > 1:
        return _tiled_passing_bytes(shape, setting)
    down, up = _linear(shape, "down_proj"), _up(shape)
    c, tokens = setting.compute_bytes, setting.tokens
    wide, gradient = shape.mlp_width * tokens, shape.width * c * tokens
    product = adapter_input_bytes([down], setting) * tokens
    remade = 0 if is_recomputed else remade_bytes(shape, setting)  # comes with the down projection's turn
    through_down = wide * c + dequantized_bytes(down, setting)
    is_dropped = setting.dropout > 0 and setting.adapts(down)
    through, late = (2 if is_dropped else 1) * wide * c, 0 if product else remade  # else with its own turn
    moments = [through_down - late, through - late, 3 * wide * c - product]
    if setting.adapts(down) and setting.method in ("ia3", "oft"):  # one tensor more on the way
        moments.append(3 * wide * c)
    if shape.family == "phi3":  # the fused layer's weight is the largest; what it made is gone by then
        scaled = up.outputs * c * tokens if scales_output(up, setting) else 0
        moments.append(dequantized_bytes(up, setting) + gradient - wide * c - product - scaled)
    if setting.method == "dora" and setting.adapts(down):  # what it scaled is gone by then
        moments = [moment - gradient for moment in moments]
    if shape.family == "gemma2":  # what the norm after the feed-forward part kept is gone by then
        norm, counted = shape.width * norm_value_bytes(setting) * tokens, gradient * (setting.device == "cpu")
        first = norm_passing_bytes(shape, setting) - counted - remade
        moments = [first, *(moment - norm for moment in moments)]
    if stands_beside(setting):
        own, *moments = _beside_moments(shape, setting, moments)
        moments.append(own - remade)
    held = _held_gradient_bytes(shape, setting)
    if is_recomputed and "boundaries" in setting.offload and norm_copies(setting):
        held += shape.width * c * tokens  # the layer's input, which its norm keeps a copy of, is still there
    if not is_recomputed:  # the model's forward pass holds its embeddings, and what went into this layer
        # the first norm keeps what it is trained through
        is_kept = setting.trains_embeddings and not norm_copies(setting)
        is_embedding_free = setting.recomputed_layers(shape.layers) == 0 and not is_kept
        held = (norm_copies(setting) + is_embedding_free) * shape.width * c * tokens
    return max(
        gradient + max(moments), held + max(_forward_moments(shape, setting, is_recomputed=is_recomputed))
    )


def _beside_moments(shape: ModelShape, setting: Setting, moments: Sequence[int]) -> list[int]:
    """What passes as a half goes backward where an adapter stands beside it: its own moment comes first.

    Then what it kept is gone, and the gradients of the stream and of what is added to it are two tensors, up
    to the first operation.
    """
    gradient = shape.width * setting.compute_bytes * setting.tokens
    kept = bottleneck_bytes(shape, setting, "mlp")
    first, *others = (moment - kept for moment in moments)
    is_norm_between = shape.family == "gemma2" and setting.mlp_tiles > 1
    own = (fusion_passing_bytes if attends(setting) else bottleneck_passing_bytes)(shape, setting)
    return [own, first + (0 if is_norm_between else gradient), *others]


def _tiled_passing_bytes(shape: ModelShape, setting: Setting) -> int:
    """The feed-forward half going backward in pieces: the layer's gradient, that of its input, and one piece.

    Of the piece all that it would keep, and what passes then, but for its part of the layer's gradient.
    """
    piece = piece_of(setting)
    within = mlp_bytes(shape, piece) - norm_bytes(shape, piece)
    within += mlp_passing_bytes(shape, piece, is_recomputed=True)
    passing = shape.width * setting.compute_bytes * (2 * setting.tokens - piece.tokens) + within
    if not stands_beside(setting):
        return passing
    own, later = _beside_moments(shape, setting, [passing])
    return max(own + shape.width * setting.compute_bytes * setting.tokens, later)


def piece_of(setting: Setting) -> Setting:
    """The tokens that a feed-forward part or a norm takes at once, as a setting of its own."""
    tokens = -(-setting.tokens // setting.mlp_tiles)
    piece = dataclasses.replace(setting, rows=1, length=tokens, packed=False, mlp_tiles=1)
    return dataclasses.replace(piece, method="lora", targets=()) if stands_beside(setting) else piece


def _held_gradient_bytes(shape: ModelShape, setting: Setting) -> int:
    """Gradients that wait while a layer is computed again: up to the first operation that needs its values.

    That is the down projection with its adapter; without one, the product before it, with IA3 the product's
    scaling; in gemma2 the norm after it.
    """
    per_token = shape.width * setting.compute_bytes
    is_passed = setting.method == "ia3" or not setting.adapts(_linear(shape, "down_proj"))
    if shape.family != "gemma2" and is_passed and not stands_beside(setting):
        per_token += shape.mlp_width * setting.compute_bytes
    return per_token * setting.tokens


def _forward_moments(shape: ModelShape, setting: Setting, *, is_recomputed: bool) -> Sequence[int]:
    """The feed-forward half on its way forward, on top of all that the layer keeps.

    The up projection's weight dequantized; the down projection's; or its input, dropped. What the half keeps
    later than that is taken off. Computed again, a layer stops where its last value is kept: before the
    product of the down projection, whose result is there but empty, or does not exist without an adapter.
    """
    down, up = _linear(shape, "down_proj"), _up(shape)
    c, tokens = setting.compute_bytes, setting.tokens
    wide, hidden = shape.mlp_width * tokens, shape.width * c * tokens
    product = adapter_input_bytes([down], setting) * tokens
    residual = hidden if norm_copies(setting) else 0  # else a norm keeps it
    normed = 0 if adapter_input_bytes([up], setting) else hidden
    later = product + (up.outputs - shape.mlp_width) * tokens * c  # one layer for both: not activated yet
    later += up.outputs * tokens * c if scales_output(up, setting) else 0  # not scaled yet
    norm = shape.width * norm_value_bytes(setting) * tokens * (shape.family == "gemma2" and not is_recomputed)
    later += (beside := bottleneck_bytes(shape, setting, "mlp") + norm)
    moments = [dequantized_bytes(up, setting, is_forward=True) + residual + normed - later]
    is_whole = not is_recomputed or shape.family == "gemma2" or beside > 0
    if is_whole or setting.adapts(down):
        taken = 0 if setting.adapts(down) and setting.method not in ("ia3", "vera", "oft") else wide * c
        base = dequantized_bytes(down, setting, is_forward=True) if is_whole else 0
        moments.append(base + residual + normed + hidden + taken - beside)
    if setting.adapts(down) and setting.dropout > 0:
        moments.append(wide * c + residual + normed)
    return moments


def attention_passing_bytes(shape: ModelShape, setting: Setting, attention: Attention) -> int:
    """What comes on top of the attention half's kept bytes while its scores go backward.

    Fused: the residual's gradient, that of the output and those of queries, keys and values, and what the
    kernel takes inside. Eager attention with a soft cap: the fp32 gradients before and after the softmax, its
    cast let go. Scores made without fusing: the same two, and what the kernel of the softmax's gradient
    takes. Where documents of a packed row come one after another, their scores and kernels do, too.
    """
    attended = as_attended(setting, documents=attention.documents)
    passing = _scores_passing_bytes(shape, attended, attention)
    return passing - bottleneck_bytes(shape, setting, "attention")


def _scores_passing_bytes(shape: ModelShape, setting: Setting, attention: Attention) -> int:
    query, key_value = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    c, at_once = setting.compute_bytes, 1 if attention.is_joined else setting.rows
    scores = at_once * shape.heads * setting.length**2
    if attention.kernel == "eager":
        after = (
            c if setting.compute_dtype == "fp16" and setting.device == "cuda" else FP32
        )  # one kernel casts
        per_score = FP32 * (2 if setting.device == "cuda" else 1) + after - (c if c < FP32 else 0)
        # output and values, less one gradient; what the norm after them kept
        let_go = query * c + shape.width * norm_value_bytes(setting)
        return (shape.width * c - let_go) * setting.tokens + scores * per_score
    if attention.kernel == "math":
        let_go = adapter_input_bytes(
            [_linear(shape, "o_proj")], setting
        )  # the values go, too, as theirs come
        return 3 * FP32 * scores + (shape.width * c - let_go) * setting.tokens
    wide = query if attention.is_repeated else key_value
    gradients = (shape.width + 2 * query + 2 * wide) * c * setting.tokens
    if attention.kernel == "blocks":
        return gradients + _block_bytes(shape, setting)
    if setting.device == "cpu":
        return gradients
    return gradients + _kernel_bytes(shape, setting, attention, key_heads=wide // shape.head_width)


def _block_bytes(shape: ModelShape, setting: Setting) -> int:
    """Of `engine/blocks.py`: scores, shares and their gradients of a block; the fp32 sums of a document."""
    groups, length = shape.heads // shape.kv_heads, setting.length
    heads = min(shape.kv_heads, block_heads(groups, length))
    scores = heads * groups * min(BLOCK_QUERIES, length) * length
    return 4 * scores * setting.compute_bytes + 2 * shape.kv_heads * shape.head_width * length * FP32


def _kernel_bytes(shape: ModelShape, setting: Setting, attention: Attention, *, key_heads: int) -> int:
    """What CUDA's fused kernel takes inside as attention goes backward."""
    heads: list[tuple[int, ...]]
    if attention.documents and not attention.is_joined and attention.kernel == "flash":
        name = "_varlen_attn_backward"
        heads = [(setting.tokens, count, shape.head_width) for count in (shape.heads, key_heads)]
        heads += [(), (), (), (attention.documents + 1,)]
    else:
        name = f"_scaled_dot_product_{attention.kernel}_attention_backward"
        rows = 1 if attention.is_joined else setting.rows
        heads = [(rows, count, setting.length, shape.head_width) for count in (shape.heads, key_heads)]
    return kernel_bytes(
        name,
        [heads[0], *heads],
        value_bytes=setting.compute_bytes,
        capability=attention.capability,
    )


def norm_passing_bytes(shape: ModelShape, setting: Setting) -> int:
    """What comes on top of what a norm kept while it goes backward: five fp32 vectors of the model's width.

    The gradient scaled, the scale's own gradient spread over the width, and the square's: its base, twice it,
    and their product, read off the operations of transformers' RMSNorm. On a CPU what comes in and out, and
    some rows in fp32, their scaled gradient and the product of the two.
    """
    if setting.mlp_tiles > 1:  # the gradients, and a piece with its fp32 copy
        piece = 6 * shape.width * FP32 * piece_of(setting).tokens
        return 2 * shape.width * setting.compute_bytes * setting.tokens + piece
    if setting.device == "cpu":
        rows = min(setting.tokens, loss_piece(shape.width))
        return shape.width * (2 * setting.compute_bytes * setting.tokens + 3 * FP32 * rows)
    return 5 * shape.width * FP32 * setting.tokens


def logit_bytes(shape: ModelShape, setting: Setting) -> int:
    """The loss at its highest moment.

    What goes into the head for every learned token, and its gradient (fp32 in fp16); of one chunk the logits
    in the compute type and in fp32, of a soft cap the tanh besides; on a CPU those of a piece. In fp32, and
    where rows of new tokens are trained, the chunk's gradient before the head may come on top
    (`engine/loss.py`). A head on the host comes in slices instead.
    """
    if "head" in setting.offload:
        return _sliced_logit_bytes(shape, setting)
    c, learned, new = setting.compute_bytes, setting.supervised_tokens, setting.new_tokens
    chunk = min(setting.loss_chunk or learned, learned)
    waiting = FP32 if setting.compute_dtype == "fp16" else c
    kept = learned * shape.width * (c + waiting) + new * shape.width * FP32
    values = chunk * shape.vocabulary
    piece = min(chunk, loss_piece(shape.vocabulary)) if setting.device == "cpu" else chunk
    copies = piece * shape.vocabulary * ((c < FP32) + (shape.final_softcap is not None))
    change = new * (shape.width + chunk) * c
    back = chunk * (1 + (new > 0)) * shape.width * c + new * shape.width * c
    return kept + values * c + change + max(copies * FP32, back)


def _sliced_logit_bytes(shape: ModelShape, setting: Setting) -> int:
    """The same through slices of the vocabulary (`engine/sliced_loss.py`).

    For every learned token its hidden state and gradient; a block's gradient in fp32; a slice; of a chunk in
    it the logits in fp32, of a soft cap the tanh besides, and going back in the compute type, and what comes
    out.
    """
    c, learned = setting.compute_bytes, setting.supervised_tokens
    block = min(learned, BLOCK_TOKENS)
    chunk = min(setting.loss_chunk or block, block)
    rows = slice_rows(shape.vocabulary, shape.width, c)
    waiting = FP32 if setting.compute_dtype == "fp16" else c
    kept = shape.width * (learned * (c + waiting) + block * FP32 + rows * c)
    copies = (c < FP32) + (shape.final_softcap is not None)
    return kept + chunk * (rows * (c + copies * FP32) + shape.width * c)


def loss_piece(vocabulary: int) -> int:
    """Rows of logits whose loss a CPU finds at once: 4 MiB in fp32, which its caches hold."""
    return max(1, (1 << 20) // vocabulary)


def update_bytes(shape: ModelShape, setting: Setting) -> int:
    """What the optimizer's step takes on top.

    bf16 adapters get their updates as bf16 values of their own; of one tensor at a time four fp32 copies
    exist, and one in bf16: the last tensor's sum, also rounded, weight, lost part and their sum
    (`train/optimizer.py`).
    """
    if setting.adapter_dtype != "bf16":
        return 0
    return 2 * trainable(shape, setting) + (4 * FP32 + 2) * largest_tensor(shape, setting)


def _linear(shape: ModelShape, name: str) -> Linear:
    return next(linear for linear in shape.linears if linear.name == name)


def _up(shape: ModelShape) -> Linear:
    return _linear(shape, "gate_up_proj" if shape.family == "phi3" else "up_proj")


def blas_workspace_bytes(capability: float | None) -> int:
    """What cuBLAS takes from the caching allocator at a thread's first product, and keeps.

    PyTorch gives each thread a handle of its own, and each pair of handle and stream a workspace; the
    backward pass runs in a thread of the autograd engine. A training process therefore holds two. Source:
    `CUDABlas.cpp`, `CublasHandlePool.cpp` (`:4096:2:16:8`; 32 MiB on 9.x, 10.x and 12.x).
    """
    is_wide = capability is not None and capability >= 9
    return 32 * MIB if is_wide else 8_519_680


def kernel_bytes(op: str, shapes: Sequence[Sequence[int]], *, value_bytes: int, capability: float) -> int:
    """Bytes a CUDA kernel takes inside one operation, on top of its inputs and outputs; 0 if none are known.

    Only what no dispatch mode can see: attention. Dequantized weights, casts, masks of dropout, temporaries
    of `_foreach_` optimizers are operations of their own, or outputs.

    Args:
        op: The operation's name without namespace and overload.
        shapes: Shapes of its tensor arguments, in order. Attention: (B, H, T, D), keys (B, K, S, D); of
            documents: (T, H, D), keys (T, K, D), and the bounds of N documents, (N + 1,).
        value_bytes: Bytes of one value of the first tensor argument.
        capability: Compute capability of the card.
    """
    name = op.removeprefix("_scaled_dot_product")
    if name == "_varlen_attn_backward":
        (tokens, *query), documents = shapes[1], shapes[6][0] - 1
        return _varlen_backward_bytes(
            tokens, documents, query, key_heads=shapes[2][1], value_bytes=value_bytes
        )
    if name == "_flash_attention_backward":
        return _flash_backward_bytes(shapes[1], shapes[2], value_bytes=value_bytes)
    if name == "_efficient_attention_backward":
        return _efficient_backward_bytes(shapes[1], shapes[2], value_bytes=value_bytes, capability=capability)
    if name == "_softmax_backward_data":  # `SoftMax.cu`: the product of gradient and output, as a whole
        return math.prod(shapes[0]) * value_bytes
    if name == "_efficient_attention" and value_bytes < FP32 and shapes[0][3] > 128:
        rows, heads, length, width = shapes[0]  # `attention.cu`: an fp32 output, as it does not fit registers
        return rows * heads * length * width * FP32
    return 0


def _flash_backward_bytes(query: Sequence[int], key: Sequence[int], *, value_bytes: int) -> int:
    """`flash_api.cpp`: an fp32 accumulator for dq, the row sums, dk and dv for every query head."""
    rows, heads, length, width = query
    padded = _up_to(length, 128)
    accumulator = rows * padded * heads * _up_to(width, 32 if width <= 128 else 64) * FP32
    sums = rows * heads * padded * FP32
    expanded = 2 * rows * key[2] * heads * width * value_bytes if key[1] != heads else 0
    return accumulator + sums + expanded


def _varlen_backward_bytes(
    tokens: int, documents: int, query: Sequence[int], *, key_heads: int, value_bytes: int
) -> int:
    """`mha_varlen_bwd` of `flash_api.cpp`: as for rows, but each document is 128 tokens away from the next.

    Read in the kernel's source; whole steps of packed rows on an H100 took what it says, within 0.2 %.
    """
    heads, width = query
    apart = tokens + 128 * documents
    accumulator = apart * heads * _up_to(width, 32 if width <= 128 else 64) * FP32
    expanded = 2 * tokens * heads * width * value_bytes if key_heads != heads else 0
    return accumulator + apart * heads * FP32 + expanded


def _efficient_backward_bytes(
    query: Sequence[int], key: Sequence[int], *, value_bytes: int, capability: float
) -> int:
    """`attention_backward.cu` and `mem_eff_attention/kernel_backward.h`: the row sums, and one workspace.

    The workspace holds blocks of dq in fp32 and, where dk and dv do not fit registers (16 bits, heads wider
    than 128), blocks of those. The fp32 kernels get their row sums from a product as large as the output.
    """
    rows, heads, length, width = query
    is_half = value_bytes < FP32
    block = 128 if is_half and width > 64 else 64
    blocks = -(-length // block) * -(-width // 64)
    gradient_q = blocks * (16 + block * 64 * FP32)
    gradient_kv = 0
    if is_half and width > 128:
        splits = max(1, min(-(-key[2] // 64), 200 // (rows * heads)))
        gradient_kv = 2 * splits * 64 * _up_to(width, block) * FP32
    workspace = rows * heads * (gradient_q + gradient_kv)
    sums = rows * heads * length * FP32
    products = 0 if is_half else rows * heads * length * width * FP32 + sums
    return sums + max(products, workspace)


def _up_to(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
