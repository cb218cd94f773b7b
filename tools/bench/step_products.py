"""The matrix products that a LoRA step cannot do without, and their FLOPs. Pure; knows shapes, no tensors.

Forward and the gradient of the input of every linear layer, not of its frozen weight; the two thin products
of each adapter, and the four of its gradients; attention within each document, the later half of the scores
not counted, backward with the scores kept; the head for learned tokens only. The first layer's input needs no
gradient, as the embedding is frozen. A product (m, k) x (k, n) has 2 m k n FLOPs.

Legend: N tokens of a micro-batch, S of a document, K at the head, R rank, H query heads, D head width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """(m, k) x (k, n), `batch` times at once; `is_causal`: half of it is needed."""

    m: int
    k: int
    n: int
    batch: int = 1
    is_causal: bool = False

    @property
    def flops(self) -> int:
        full = 2 * self.m * self.k * self.n * self.batch
        return full // 2 if self.is_causal else full


@dataclass(frozen=True)
class Adapted:
    """A linear layer with an adapter; whether its input needs a gradient."""

    inputs: int
    outputs: int
    needs_input_gradient: bool = True


Products = Counter[Product]


def linear_products(layers: Iterable[Adapted], tokens: int, *, rank: int) -> Products:
    """Of all adapted layers, forward and backward."""
    needed: Products = Counter()
    for layer in layers:
        wide, out = layer.inputs, layer.outputs
        needed[Product(tokens, wide, out)] += 1
        needed[Product(tokens, wide, rank)] += 1
        needed[Product(tokens, rank, out)] += 1
        needed[Product(tokens, out, rank)] += 1  # the gradient of the inner width
        needed[Product(rank, tokens, wide)] += 1  # of the first factor
        needed[Product(out, tokens, rank)] += 1  # of the second
        if layer.needs_input_gradient:
            needed[Product(tokens, out, wide)] += 1
            needed[Product(tokens, rank, wide)] += 1
    return needed


def attention_products(documents: Sequence[int], *, layers: int, heads: int, head_width: int) -> Products:
    """Scores and their sums over values, and the four products of their gradients."""
    needed: Products = Counter()
    for length in documents:
        scores = Product(length, head_width, length, heads, is_causal=True)
        sums = Product(length, length, head_width, heads, is_causal=True)
        needed[scores] += 2 * layers  # scores, and the gradient of the weights
        needed[sums] += 4 * layers  # results, and the gradients of values, queries and keys
    return needed


def head_products(learned: int, *, width: int, vocabulary: int) -> Products:
    """Logits, and the gradient of what goes into the head."""
    return Counter({Product(learned, width, vocabulary): 1, Product(learned, vocabulary, width): 1})


def flops(products: Products) -> int:
    return sum(product.flops * count for product, count in products.items())
