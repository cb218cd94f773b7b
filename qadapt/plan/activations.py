"""Bytes a forward pass leaves for the backward pass, read off the model's own operations.

The step this describes: transformers 5.23's decoder with fused LoRA layers (`engine/linear.py`), fused
attention without a mask (no T x T matrix), `torch.utils.checkpoint` per layer where layers are recomputed.
Known not to be exact: kernels may keep padded copies, and a family's attention with a soft cap is taken as
the eager one. `tests/test_estimate.py` compares with a real step's ledger. Legend, all per token: D width, H
query width, K key-value width, F feed-forward width, R rank, c bytes of an activation, a bytes of an adapter
value.
"""

from __future__ import annotations

from collections.abc import Sequence

from qadapt.methods import METHODS, SCALED_INPUTS
from qadapt.plan.attention import Attention, attention_core_bytes, mask_bytes, score_bytes
from qadapt.plan.bottleneck import bottleneck_bytes
from qadapt.plan.norms import FP32, norm_copies, norm_value_bytes
from qadapt.plan.prefix import as_attended, network_bytes
from qadapt.plan.ranks import trained_rank
from qadapt.plan.setting import Setting
from qadapt.shape import Linear, ModelShape

ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_NAMES = ("gate_proj", "up_proj", "gate_up_proj")


def boundary_bytes(shape: ModelShape, setting: Setting) -> int:
    """The input of one recomputed layer (arXiv:1604.06174)."""
    return setting.tensor_bytes(setting.tokens * shape.width, setting.compute_bytes)


def boundaries_there(setting: Setting, waiting: int, *, is_turn: bool) -> int:
    """How many inputs of recomputed layers are on the device, where so many have not gone backward yet.

    Offloaded: that of the layer whose turn it is, if its norm keeps no copy instead; on CUDA the next one,
    which is fetched meanwhile, or, before the first turn, the last one, which has only just been copied out.
    """
    if "boundaries" not in setting.offload:
        return waiting
    is_kept = is_turn and (setting.mlp_tiles > 1 or not norm_copies(setting))
    return min(waiting - is_turn, setting.device == "cuda") + is_kept


def attention_bytes(shape: ModelShape, setting: Setting, attention: Attention, *, is_recomputed: bool) -> int:
    """What the attention half of a layer keeps: norm, adapter inputs, queries, keys, values, output.

    Args:
        shape: The model.
        setting: The step.
        attention: The way attention takes.
        is_recomputed: Its input, a boundary, is not counted.
    """
    query, key_value = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    first = [linear for linear in shape.linears if linear.name in ATTENTION_NAMES]
    last = [linear for linear in shape.linears if linear.name == "o_proj"]
    kept = _wide_norm(shape, setting, is_kept_already=is_recomputed) + _adapter(first, setting)
    if shape.family == "qwen3":
        kept += _norm(query, setting, groups=shape.heads) + _norm(key_value, setting, groups=shape.kv_heads)
    # phi3's rotary part lays queries out so that Flash's output, laid out alike, is copied
    is_copied = shape.family == "phi3" and attention.kernel in ("flash", "cpu")
    attended = as_attended(setting, documents=attention.documents)
    core = attention_core_bytes(shape, setting, attention) * attended.tokens + network_bytes(setting)
    is_kept = attention.keeps_output and not is_copied and not attention.is_joined
    kept += _adapter(last, setting, is_kept_already=is_kept)
    if shape.family == "gemma2":
        kept += _wide_norm(shape, setting)
    beside = bottleneck_bytes(shape, setting, "attention") + _joined_bytes([*first, *last], setting)
    return kept * setting.tokens + core + score_bytes(shape, attended, attention) + beside


def mlp_bytes(shape: ModelShape, setting: Setting) -> int:
    """What the feed-forward half holds in its turn: norm, adapter inputs, gate, activated, up, the product.

    Before, a layer that is not recomputed has let go `remade_bytes`. Computed in pieces: norms and its input.
    """
    if setting.mlp_tiles > 1:
        norms = 2 if shape.family == "gemma2" else 1
        kept = norms * _wide_norm(shape, setting) + shape.width * setting.compute_bytes
        return kept * setting.tokens + bottleneck_bytes(shape, setting, "mlp")
    first = [linear for linear in shape.linears if linear.name in MLP_NAMES]
    last = [linear for linear in shape.linears if linear.name == "down_proj"]
    kept = _wide_norm(shape, setting) + _adapter(first, setting)
    kept += 3 * shape.mlp_width * setting.compute_bytes + _adapter(last, setting)
    if shape.family == "gemma2":
        kept += _wide_norm(shape, setting)
    joined = _joined_bytes([*first, *last], setting)
    return kept * setting.tokens + bottleneck_bytes(shape, setting, "mlp") + joined


def remade_bytes(shape: ModelShape, setting: Setting) -> int:
    """What a layer that keeps its activations makes again in its turn (`engine/gated.py`).

    That is the activated gate, and its product with up where something keeps it. In pieces: nothing.
    """
    if setting.mlp_tiles > 1:
        return 0
    last = [linear for linear in shape.linears if linear.name == "down_proj"]
    product = adapter_input_bytes(last, setting) - adapter_input_bytes(last, setting, is_kept_already=True)
    return (shape.mlp_width * setting.compute_bytes + product) * setting.tokens


def shared_bytes(shape: ModelShape, setting: Setting, attention: Attention) -> int:
    """What is there once for all layers: rotary tables, token numbers, which of them are new, masks."""
    places = setting.tokens if setting.packed else setting.length
    tables = 2 * places * shape.head_width * setting.compute_bytes
    numbers = 3 * setting.tokens * 8 + (setting.tokens * 9 if setting.trains_embeddings else 0)
    return tables + numbers + mask_bytes(shape, setting, attention)


def norm_bytes(shape: ModelShape, setting: Setting) -> int:
    """What one norm over the model's width keeps, for every token."""
    return setting.tokens * _wide_norm(shape, setting)


def first_input_bytes(shape: ModelShape, setting: Setting) -> int:
    """What the first layer need not keep: its norm, as nothing goes back to its input.

    With new tokens, whose embeddings are trained, or virtual ones, something does.
    """
    return 0 if setting.trains_embeddings else norm_bytes(shape, setting)


def _wide_norm(shape: ModelShape, setting: Setting, *, is_kept_already: bool = False) -> int:
    """Of a norm over the model's width; computed in pieces it keeps its input as it is."""
    if setting.mlp_tiles > 1:
        return 0 if is_kept_already else shape.width * setting.compute_bytes
    return _norm(shape.width, setting, is_kept_already=is_kept_already)


def _norm(width: int, setting: Setting, *, groups: int = 1, is_kept_already: bool = False) -> int:
    """RMSNorm computes in fp32: it keeps its input, or a copy in fp32, and a scale."""
    is_there = is_kept_already and not norm_copies(setting)
    return (0 if is_there else width * norm_value_bytes(setting)) + groups * FP32


def _adapter(linears: Sequence[Linear], setting: Setting, *, is_kept_already: bool = False) -> int:
    """What adapters on layers that share one input keep.

    LoRA: that input and the R values between A and B; DoRA besides the output before its rows are scaled.
    VeRA: the R values alone. OFT: that input alone. IA3: what it scales, be it input or output.
    """
    adapted = [linear for linear in linears if setting.adapts(linear)]
    scaled = [each.outputs for each in adapted if scales_output(each, setting)]
    rank = trained_rank(setting.method, setting.rank) * (2 if setting.method == "pissa" else 1)
    between = [rank for _ in adapted if METHODS[setting.method].size == "rank"]
    kept = setting.compute_bytes * (sum(scaled) + sum(between))
    return kept + adapter_input_bytes(linears, setting, is_kept_already=is_kept_already)


def _joined_bytes(linears: Sequence[Linear], setting: Setting) -> int:
    """Factors made of what is trained: PiSSA's of twice the rank, with its start; AdaLoRA's first, scaled."""
    adapted, each = [linear for linear in linears if setting.adapts(linear)], setting.adapter_value_bytes
    if setting.method == "adalora":
        rank = trained_rank(setting.method, setting.rank)
        return sum(setting.tensor_bytes(rank * linear.inputs, each) for linear in adapted)
    if setting.method != "pissa":
        return 0
    sides = [side for linear in adapted for side in (linear.inputs, linear.outputs)]
    return sum(setting.tensor_bytes(2 * setting.rank * side, each) for side in sides)


def scales_output(linear: Linear, setting: Setting) -> bool:
    """Whether an adapter multiplies a layer's output by what it has learned."""
    is_scaled = setting.method == "dora" or (setting.method == "ia3" and linear.name not in SCALED_INPUTS)
    return is_scaled and setting.adapts(linear)


def adapter_input_bytes(linears: Sequence[Linear], setting: Setting, *, is_kept_already: bool = False) -> int:
    """Per token: the input that fused layers share and keep, and with dropout a mask of a byte each."""
    is_idle = setting.method == "ia3"
    adapted = [
        each for each in linears if setting.adapts(each) and not (is_idle and scales_output(each, setting))
    ]
    if not adapted or setting.method == "vera":
        return 0
    masks = len(adapted) if setting.dropout > 0 else 0
    return adapted[0].inputs * (masks + (0 if is_kept_already else setting.compute_bytes))
