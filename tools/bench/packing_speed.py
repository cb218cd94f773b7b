"""Packing on short rows against filling up randomly drawn batches: real tokens per second, the same gradient.

    python tools/bench/packing_speed.py                   the demo model: five minutes on two quiet cores
    python tools/bench/packing_speed.py --tiny --rows 32  a tiny one: shows the gradient, not the speed

Rows of 80 tokens on average (exponentially distributed, 16 to 512), the second half of each learned. A step's
gradient is found by the package's `find_gradient` in two ways, in turn: the rows in the order they were
drawn, so many at a time, filled up to the longest of them; and all of them packed, in micro-batches of no
more tokens than the average of those. Exits with 1 if packing is less than twice as fast or the gradients
differ.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import Tensor

from qadapt.adapters.lora import Lora, attach_lora, trainable
from qadapt.data.batches import MicroBatch, collate, packed_batches
from qadapt.data.tokens import Tokens, tokens_of
from qadapt.model.load import load_base
from qadapt.quiet import quiet_libraries
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.step import drop_gradients, find_gradient

MEAN_TOKENS, SHORTEST, LONGEST = 80, 16, 512
BAR = 2.0
GRADIENT_BAR = 1e-4
"""Relative difference of all gradients together, fp32: sums are taken in another order."""


def drawn_rows(count: int, *, vocabulary: int, seed: int) -> list[Tokens]:
    """Random rows; what is cut off at both ends of the distribution hardly moves its mean."""
    random = np.random.RandomState(seed)
    lengths = np.clip(random.exponential(MEAN_TOKENS - SHORTEST, count) + SHORTEST, SHORTEST, LONGEST)
    return [
        tokens_of(
            random.randint(3, vocabulary, length).tolist(),
            [place >= length // 2 for place in range(length)],
            place=f"row {number}",
        )
        for number, length in enumerate(lengths.astype(int))
    ]


def two_ways(rows: Sequence[Tokens], *, size: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """The rows filled up, `size` at a time in the order given; and packed to as many tokens at a time."""
    filled_up = [collate(rows[first : first + size], pad_id=0) for first in range(0, len(rows), size)]
    mean = sum(batch.input_ids.numel() for batch in filled_up) // len(filled_up)
    return filled_up, packed_batches(rows, capacity=max(mean, *map(len, rows)))


def found(
    model: torch.nn.Module, optimizer: AdapterOptimizer, batches: Sequence[MicroBatch]
) -> tuple[Tensor, float]:
    """All gradients of a step as one vector, and the seconds it took."""
    began = time.perf_counter()
    result = find_gradient(model, optimizer, batches, clip_norm=None, scaler=None)
    seconds = time.perf_counter() - began
    assert result is not None
    gradient = torch.cat(
        [each.grad.flatten() for each in optimizer.parameters.values() if each.grad is not None]
    )
    drop_gradients(optimizer)
    return gradient, seconds


def compare(folder: Path, rows: int, *, size: int, repeats: int) -> bool:
    """Runs both ways in turn and prints what they come to."""
    base = load_base(
        folder, quantization="nf4", double_quant=True, dtype=torch.float32, device=torch.device("cpu")
    )
    model = attach_lora(base, Lora(rank=16, alpha=32), dtype=torch.float32, seed=0).train()
    for name, parameter in trainable(model).items():  # the second factor starts at zero: nothing to compare
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = make_optimizer(trainable(model), kind="adamw", betas=(0.9, 0.999), weight_decay=0.0)
    ways = two_ways(drawn_rows(rows, vocabulary=base.config.vocab_size, seed=0), size=size)
    tokens = sum(batch.tokens for batch in ways[0])
    for name, way in zip(("filled up", "packed"), ways, strict=True):
        print(f"{name}: {len(way)} passes, {sum(batch.input_ids.numel() for batch in way):,} tokens")
    ratios, apart = [], 0.0
    for repeat in range(repeats + 1):
        (one, padded), (other, packed) = (found(model, optimizer, way) for way in ways)
        apart = max(apart, ((one - other).norm() / one.norm()).item())
        if repeat:  # the first one warms up
            ratios.append(padded / packed)
            speeds = f"{tokens / padded:.0f} and {tokens / packed:.0f} real tokens/s"
            print(f"filled up and packed: {speeds}, {padded / packed:.2f} times as fast", flush=True)
    faster = statistics.median(ratios)
    print(f"{tokens / rows:.0f} tokens a row on average; packing is {faster:.2f} times as fast (bar {BAR})")
    print(f"gradients {apart:.1e} apart (bar {GRADIENT_BAR:.0e})")
    return faster >= BAR and apart <= GRADIENT_BAR


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=64, help="of a step")
    parser.add_argument("--size", type=int, default=16, help="rows filled up at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        if arguments.tiny:
            from tiny_model import make_tiny_model

            folder = make_tiny_model(Path(place), "llama")
        else:
            from qadapt.model.source import find_model

            folder = find_model("smollm2-135m").folder
        is_kept = compare(folder, arguments.rows, size=arguments.size, repeats=arguments.repeats)
    print("kept" if is_kept else "MISSED")
    return 0 if is_kept else 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
