"""How close a step comes to what its matrix products alone would take: the share of the GEMM roofline.

    python tools/bench/roofline.py             the rows of `peers.py`, about ten minutes on two quiet cores
    python tools/bench/roofline.py --conversations 2 --length 64 --repeats 1     a trial

The products that a step cannot do without (`step_products.py`) are timed one by one, at their very shapes and
in the step's type, then the step as the default plan runs it; in turn, the median counts. The share is the
one time over the other. Padding, recomputing, dequantizing and all that is no product count as waste. Then
one step goes under torch's profiler, and its time is told by what it was spent on. Exits with 1 below 60 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peers import add_task_options, finished, make_task
from side_qadapt import recipe_of
from step_products import (
    Adapted,
    Product,
    Products,
    attention_products,
    flops,
    head_products,
    linear_products,
)
from torch import Tensor

from qadapt.cache import cache_folder
from qadapt.collection import short_collections
from qadapt.data.batches import MicroBatch
from qadapt.data.tokens import Tokens
from qadapt.model.precision import DTYPES
from qadapt.running.material import order_of, prepare, resolved
from qadapt.running.model import adapt, loop_settings, optimizer_of, place_base
from qadapt.running.plan import make_plan
from qadapt.train.step import apply_gradient, find_gradient

BAR = 0.60
GROUPS = (
    ("dequantize", ("bitsandbytes::",)),
    ("attention", ("scaled_dot_product", "flash_attention", "softmax_backward")),
    ("products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "mkldnn")),
    ("optimizer", ("_foreach", "_fused_adam", "addcdiv", "addcmul", "lerp", "Optimizer.")),
    ("elementwise and copies", ("aten::",)),
    ("Python and autograd", ("",)),
)
"""What an operation's own time is counted to, by the first name that is part of its own."""


def group_of(operation: str) -> str:
    return next(group for group, names in GROUPS if any(name in operation for name in names))


@dataclass(frozen=True)
class Bench:
    """A step of the task, ready to be run, and its micro-batches."""

    model: Any
    optimizer: Any
    batches: Sequence[MicroBatch]
    dtype: torch.dtype
    rank: int

    def gradient(self) -> Any:
        return find_gradient(self.model, self.optimizer, self.batches, clip_norm=1.0, scaler=None)

    def step(self) -> float:
        began = time.perf_counter()
        found = self.gradient()
        apply_gradient(self.optimizer, found, learning_rate=1e-5, scaler=None)
        return time.perf_counter() - began

    def products(self, lengths: Sequence[Sequence[int]]) -> Products:
        """What the micro-batches need; `lengths` are the documents of each."""
        base = self.model.get_base_model()
        config, needed = base.config, Products()
        for batch, documents in zip(self.batches, lengths, strict=True):
            needed += linear_products(adapted_layers(self.model), sum(documents), rank=self.rank)
            needed += attention_products(
                documents,
                layers=config.num_hidden_layers,
                heads=config.num_attention_heads,
                head_width=config.hidden_size // config.num_attention_heads,
            )
            learned = batch.supervised_tokens
            needed += head_products(learned, width=config.hidden_size, vocabulary=config.vocab_size)
        return needed


def adapted_layers(model: Any) -> list[Adapted]:
    """The linear layers that carry an adapter; those that read the embedding need no gradient of it."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            reads_embedding = ".layers.0." in name and name.rpartition(".")[2] in (
                "q_proj",
                "k_proj",
                "v_proj",
            )
            found.append(Adapted(module.in_features, module.out_features, not reads_embedding))
    return found


def documents_of(batches: Sequence[MicroBatch], rows: Sequence[Tokens]) -> list[list[int]]:
    """The lengths of each micro-batch's documents, without padding; the longest rows are filled up first."""
    lengths = iter(sorted(map(len, rows), reverse=True))
    return [
        list(batch.documents.lengths)
        if batch.documents is not None
        else list(islice(lengths, len(batch.input_ids)))
        for batch in batches
    ]


def product_seconds(product: Product, dtype: torch.dtype) -> float:
    """The time of a product, its result written where something lies already; the better way to lie counts.

    A step has both: weights lie transposed in the forward pass and not in the backward pass.
    """
    one = torch.randn(product.batch, product.m, product.k, dtype=dtype)
    across = torch.randn(product.batch, product.k, product.n, dtype=dtype)
    result = torch.empty(product.batch, product.m, product.n, dtype=dtype)
    along = across.transpose(1, 2).contiguous().transpose(1, 2)
    seconds = min(_median_seconds(one, other, result) for other in (across, along))
    return seconds / (2 if product.is_causal else 1)


def _median_seconds(one: Tensor, other: Tensor, result: Tensor) -> float:
    multiply = torch.bmm
    if len(one) == 1:
        multiply, one, other, result = torch.mm, one[0], other[0], result[0]
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        multiply(one, other, out=result)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def make_bench(arguments: argparse.Namespace) -> tuple[Bench, Products, list[str]]:
    """The first step of the task as the default plan runs it, what it needs, and why it is planned so."""
    cache = cache_folder() / "peers"
    cache.mkdir(parents=True, exist_ok=True)
    task = replace(make_task(arguments, cache)[0], dtype=arguments.dtype)
    with tempfile.TemporaryDirectory() as place:
        recipe = resolved(recipe_of(replace(task, place=place)))
        material = finished(prepare(recipe, revision=None))
    plan = make_plan(recipe, material)
    base = finished(place_base(recipe, plan, material.files))
    model = finished(adapt(recipe, plan, base, material=material)).train()
    rows = [material.rows.train[index] for index in order_of(recipe, material.rows).rows_of_step(0)]
    batches = loop_settings(recipe, plan).division(material.rows)(rows)
    bench = Bench(
        model, optimizer_of(recipe, plan, model), batches, DTYPES[plan.compute_dtype], recipe.adapter.rank
    )
    needed = bench.products(documents_of(batches, rows))
    return bench, needed, [f"{plan.compute_dtype}, recompute {plan.recompute}", *plan.reasons]


def profiled(step: Callable[[], object]) -> dict[str, float]:
    """Seconds of a step by group; what no operation accounts for is Python's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
    spent: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        spent[group_of(event.key)] += event.self_cpu_time_total / 1e6
    spent["Python and autograd"] += max(0.0, seconds - sum(spent.values()))
    return spent


def tell_products(needed: Products, seconds: dict[Product, float]) -> None:
    """The products that take longest, and at what speed."""
    total = sum(seconds[product] * count for product, count in needed.items())
    print(
        f"{flops(needed) / 1e9:.1f} GFLOP needed, {total:.3f} s at {flops(needed) / total / 1e9:.0f} GFLOP/s:"
    )
    dearest = sorted(needed, key=lambda product: seconds[product] * needed[product], reverse=True)
    for product in dearest[:8]:
        speed = product.flops / seconds[product] / 1e9
        share = seconds[product] * needed[product] / total
        shape = f"({product.m}, {product.k}) x ({product.k}, {product.n})"
        print(f"  {shape} x {product.batch}, {needed[product]} times: {speed:.0f} GFLOP/s, {share:.0%}")
    fastest = max(product.flops / seconds[product] for product in needed)
    print(f"  at the speed of the fastest of them ({fastest / 1e9:.0f}): {flops(needed) / fastest:.3f} s")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="instead of the faster one, as measured")
    arguments = parser.parse_args()
    bench, needed, reasons = make_bench(arguments)
    print("\n".join(reasons))
    bench.step()  # the first one makes and warms things
    ideals, steps, seconds = list[float](), list[float](), dict[Product, float]()
    with short_collections():  # as around the steps of a run
        for _ in range(arguments.repeats):
            seconds = {product: product_seconds(product, bench.dtype) for product in needed}
            ideals.append(sum(seconds[product] * count for product, count in needed.items()))
            steps.append(bench.step())
            share = ideals[-1] / steps[-1]
            print(f"products {ideals[-1]:.3f} s, step {steps[-1]:.3f} s: {share:.0%}", flush=True)
    tell_products(needed, seconds)
    spent = profiled(bench.step)
    print("the step under the profiler:")
    for group, each in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {group}: {each:.3f} s, {each / sum(spent.values()):.0%}")
    share = statistics.median(ideal / took for ideal, took in zip(ideals, steps, strict=True))
    print(f"the fastest of the products by the fastest of the steps: {min(ideals) / min(steps):.0%}")
    print(f"share of the GEMM roofline: {share:.0%} (bar {BAR:.0%}): {'kept' if share >= BAR else 'MISSED'}")
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
