"""Seconds of a micro-batch on a card: operations over TFLOPS, plus the weights' way through memory.

Source: the usual count of 2 operations per weight and token and pass (arXiv:2001.08361), PaLM's attention
term (arXiv:2204.02311) halved for causal attention. Assumption: products reach `EFFICIENCY` of the card's
matrix product speed, every pass over a 4-bit layer reads 0.5 bytes per weight, writes the 16-bit weight and
reads it again, and every chunk of the loss reads the head twice. Error: `TIME_SPAN`, by
`tools/bench/on_card.py`. An unknown card gives None rather than a guess. What comes from the host beside
computing costs time only where the bus is slower than the products; embeddings and slices of the head are
waited for.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from qadapt.hardware.cards import Card
from qadapt.plan.activations import MLP_NAMES
from qadapt.plan.adapters import trainable
from qadapt.plan.host import carried_bytes, looked_up_bytes, sliced_bytes, streamed_bytes
from qadapt.plan.knobs import micro_batches
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape

EFFICIENCY = 0.55
"""Share of the matrix product's speed that a whole step reaches: assumed, 0.3 to 0.75 are seen."""
TIME_SPAN = "on an H100, steps of 4 layers took 0.9 to 4.3 times as long, small ones the most"
"""Of 85 steps of `tools/bench/on_card.py`. Launches bind short rows; streamed layers took the longest."""
LAUNCH_SECONDS = 2e-3
"""Least time of one layer in one pass: the processor launching some hundred kernels. Assumed; it binds small
models (a published T4 host took about 3 ms)."""
BANDWIDTH_SHARE = 0.7
"""Share of the bandwidth that dequantization reaches: assumed."""
BUS_GB = 12.0
"""Thousand million bytes per second from pinned host memory and back: what PCIe 3.0 x16 and 4.0 x8 reach.
Assumed; half of it on 3.0 x8, twice as much on 4.0 x16."""
FP32_FACTOR = 4
"""How much slower fp32 products are than 16-bit ones on the cards of the catalogue: assumed."""


def passes(shape: ModelShape, setting: Setting) -> float:
    """Passes over each layer's weights: forward, input gradient, and the forward pass again if recomputed.

    An average over the layers where only some of them recompute, or nothing goes back to some.
    """
    dropped = setting.dropped_layers
    recomputed = max(0, setting.recomputed_layers(shape.layers) - dropped)
    return 2 + (recomputed - dropped) / shape.layers


class Work(NamedTuple):
    """What one micro-batch computes on; of an average one where rows are as they are.

    `tokens`, padding included; `pairs` of a token and another of its row or document, squares summed up;
    `head_tokens`, those that reach the head.
    """

    tokens: float
    pairs: float
    head_tokens: float


def work_of(setting: Setting) -> Work:
    """Full rows, as the setting has them."""
    return Work(setting.tokens, setting.length * setting.tokens, setting.supervised_tokens)


def operations(shape: ModelShape, setting: Setting, work: Work | None = None) -> float:
    """Floating-point operations of one micro-batch, by default of full rows; multiply and add are two."""
    work = work or work_of(setting)
    weights = shape.layers * sum(linear.weights for linear in shape.linears)
    query = shape.heads * shape.head_width
    count = passes(shape, setting)
    products = 2 * weights * work.tokens * count + 2 * _computed_again(shape, setting) * work.tokens
    scores = 2 * shape.layers * query * work.pairs * (count + 1)
    adapter = 2 * trainable(shape, setting) * work.tokens * (count + 1)
    head = 2 * _head_passes(setting) * shape.embedding_weights * work.head_tokens
    return products + scores + adapter + head


def _computed_again(shape: ModelShape, setting: Setting) -> int:
    """Weights of feed-forward parts that run forward twice for their pieces only, in layers that are kept."""
    kept = shape.layers - setting.recomputed_layers(shape.layers)
    return kept * _mlp_weights(shape) if setting.mlp_tiles > 1 else 0


def _mlp_weights(shape: ModelShape) -> int:
    return sum(linear.weights for linear in shape.linears if linear.name in (*MLP_NAMES, "down_proj"))


def _head_passes(setting: Setting) -> int:
    """Logits and their gradient; of a head on the host the logits twice."""
    return 3 if "head" in setting.offload else 2


def moved_bytes(shape: ModelShape, setting: Setting) -> float:
    """Bytes that dequantizing moves through the card's memory in one micro-batch, anew for each piece."""
    weights = shape.layers * sum(linear.weights for linear in shape.linears)
    weights += (setting.mlp_tiles - 1) * shape.layers * _mlp_weights(shape)
    written = 2 * setting.compute_bytes
    each = {"nf4": 0.5 + written, "int8": 1 + written, "none": setting.compute_bytes}
    per_weight = each[setting.quantization]
    return weights * per_weight * passes(shape, setting)


def head_bytes(shape: ModelShape, setting: Setting, work: Work | None = None) -> float:
    """Bytes of the head that a micro-batch reads on the card: every chunk's products read all of it."""
    tokens = (work or work_of(setting)).head_tokens
    chunks = max(1.0, tokens / setting.loss_chunk) if setting.loss_chunk else 1.0
    return _head_passes(setting) * chunks * shape.embedding_weights * setting.compute_bytes if tokens else 0.0


def micro_batch_seconds(
    shape: ModelShape, setting: Setting, card: Card | None, *, work: Work | None = None
) -> float | None:
    """Seconds of one micro-batch, by default of full rows; None where the card's speed is unknown."""
    if card is None or card.tflops is None or card.bandwidth_gb is None:
        return None
    work = work or work_of(setting)
    slower = FP32_FACTOR if setting.compute_dtype == "fp32" else 1
    computing = operations(shape, setting, work) * slower / (card.tflops * 1e12 * EFFICIENCY)
    moved = moved_bytes(shape, setting) + head_bytes(shape, setting, work)
    moving = moved / (card.bandwidth_gb * 1e9 * BANDWIDTH_SHARE)
    launching = shape.layers * passes(shape, setting) * LAUNCH_SECONDS
    beside = streamed_bytes(shape, setting) + carried_bytes(shape, setting)
    streaming = beside / (BUS_GB * 1e9)
    waited = looked_up_bytes(shape, setting) + sliced_bytes(shape, setting, work.head_tokens)
    waiting = waited / (BUS_GB * 1e9)
    return max(computing + moving, launching, streaming) + waiting


def micro_batch_count(setting: Setting, *, rows_per_step: int) -> int:
    """Micro-batches of a step; packed, of the fullest step that was looked at."""
    if setting.packed and setting.step_tokens:
        return -(-setting.step_tokens // (setting.rows * setting.length))
    return micro_batches(rows_per_step, setting.rows)


def step_seconds(
    shape: ModelShape, setting: Setting, *, rows_per_step: int, card: Card | None
) -> float | None:
    """Seconds of one optimizer step: its full micro-batches and the smaller last one; None if unknown.

    Packed, of the fullest step that was looked at, which may have far fewer tokens than full rows would.
    """
    if setting.packed and setting.step_tokens:
        whole, rest = divmod(setting.step_tokens, setting.rows * setting.length)
        parts = (setting, dataclasses.replace(setting, step_tokens=rest))
    else:
        whole, rest = divmod(rows_per_step, setting.rows)
        parts = (setting, dataclasses.replace(setting, rows=max(1, rest)))
    seconds = 0.0
    for count, part in zip((whole, 1 if rest else 0), parts, strict=True):
        if count:
            each = micro_batch_seconds(shape, part, card)
            if each is None:
                return None
            seconds += count * each
    return seconds


NOMINAL = Card("a nominal device", 0, tflops_spec=1.0, bandwidth_gb=100.0)
"""For comparing settings where no speed is known: only ratios of its seconds mean anything."""
