"""Compares the closed form with published measurements, row by row: `python tools/bench/estimate_rows.py --rows FILE`.

FILE holds one JSON object per line: a measurement with its model, method, types, batch and metric. Only rows whose
stack the closed form can describe are compared, allocated bytes with allocated bytes and tokens per second with
tokens per second; every other row is printed with the reason. Nothing is fitted to the rows.

How the two comparable stacks are described:
* plain transformers + PEFT after `prepare_model_for_kbit_training` on a T4: activations, embeddings, norms and head
  in fp32, every token supervised, the caller holds the logits, no gradients yet, AdamW with fp32 states;
* the same without quantization, in fp16 with fp32 adapters;
* A100 rows with bf16 and fused attention: bf16 everywhere but fp32 adapters used under autocast (so their inputs
  are kept in bf16), dropout 0.1; logits held, or none at all where the loss never makes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from qadapt.errors import QadaptError
from qadapt.hardware.cards import Card, find_card
from qadapt.plan.adapters import trainable
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape, find_shape
from qadapt.units import GIB

PLAIN = Setting(adapter_dtype="fp32", optimizer="adamw", accumulates=False, holds_logits=True)


def describe(row: dict[str, Any]) -> tuple[Setting, bool] | str:
    """The row's stack as a setting, and whether its adapters are used under autocast; or why there is none."""
    if row["tier"] != "A":
        return "tier B: the token count or the metric is not certain"
    if row["is_oom"]:
        return "an out-of-memory verdict, no peak"
    if row["peak_allocated_gib"] is None:
        return "only reserved or process bytes are published"
    targets = tuple(row["target_modules"] or ())
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    if not targets or not set(targets) <= known:
        return "adapter targets are not recorded in our words"
    changes: dict[str, Any] = {
        "rows": row["micro_batch"], "length": row["seq_len"], "rank": row["rank"], "targets": targets,
        "double_quant": bool(row["double_quant"]),
        "quantization": "nf4" if row["method"] == "qlora-nf4" else "none",
        "recompute": "all" if str(row["gradient_checkpointing"]).startswith("true") else "none",
    }  # fmt: skip
    if row["method"] not in ("qlora-nf4", "lora-fp16", "lora-bf16"):
        return f"method {row['method']}"
    if row["source"].startswith("fitcheck"):
        if not row["attention"].startswith("sdpa"):
            return "eager attention keeps T x T scores; not in the closed form"
        dtype = "fp32" if row["method"] == "qlora-nf4" else "fp16"
        return dataclasses.replace(PLAIN, compute_dtype=dtype, **changes), False
    if row["source"].startswith("foundation-model-stack"):
        if "fp32 upcast" in row["compute_dtype"] and "no fp32" not in row["compute_dtype"]:
            return "fp32 residual between bf16 layers: a mixed path"
        if "triton" in row["loss_kernel"]:
            return "fused loss on full logits: our loss has other copies"
        share = 0.0 if "linear CE" in row["loss_kernel"] else 1.0
        changes |= {
            "supervised_share": share,
            "dropout": 0.1,
            "compute_dtype": "bf16",
            "adapter_dtype": "bf16",
        }
        return dataclasses.replace(PLAIN, **changes), True
    return "another framework's step"


def allocated(shape: ModelShape, setting: Setting, *, card: Card | None, under_autocast: bool) -> Estimate:
    """The estimate; under autocast bf16 adapters stand for fp32 ones, whose static bytes are put in here."""
    estimate = estimate_step(shape, setting, card=card)
    if not under_autocast:
        return estimate
    values = trainable(shape, setting)
    categories = dict(estimate.categories)
    categories["adapters"] = 4 * values
    categories["optimizer"] = 8 * values
    return dataclasses.replace(estimate, categories=categories)


def main() -> None:
    """Prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--rows", type=Path, required=True, help="published measurements, one JSON object a line"
    )
    rows = [json.loads(line) for line in parser.parse_args().rows.read_text(encoding="utf-8").splitlines()]
    errors: dict[str, list[float]] = {}
    ratios: list[float] = []
    within = 0
    left_out: dict[str, int] = {}
    for row in rows:
        described = describe(row)
        try:
            shape = find_shape(str(row["model"]))
        except QadaptError:
            described = (
                described if isinstance(described, str) else "the model's shape is not among the known ones"
            )
        if isinstance(described, str):
            left_out[described] = left_out.get(described, 0) + 1
            continue
        setting, under_autocast = described
        gpu = row["gpu"].replace("Tesla", "").replace("-80GB", " 80GB SXM")
        card = find_card(gpu)
        estimate = allocated(shape, setting, card=card, under_autocast=under_autocast)
        published = row["peak_allocated_gib"]
        error = estimate.peak_allocated_bytes / GIB / published - 1
        group = f"{row['source'].split()[0].split(':')[0]} {row['method']}"
        errors.setdefault(group, []).append(error)
        speed = ""
        if row["tokens_per_s"] and estimate.seconds_per_step:
            ratio = setting.tokens / estimate.seconds_per_step / row["tokens_per_s"]
            ratios.append(ratio)
            speed = f"  tokens/s {row['tokens_per_s']:7.0f}, predicted x {ratio:.2f}"
        reserved = row["peak_reserved_gib"]
        if reserved:
            is_in = estimate.reserved_low_bytes <= reserved * GIB <= estimate.reserved_high_bytes
            within += is_in
            speed += f"  reserved {'inside' if is_in else 'outside'} the range"
        print(
            f"{row['id'][:34]:34} {shape.name[-24:]:24} {setting.rows:2} x {setting.length:4} {setting.compute_dtype}"
            f"  published {published:6.3f} GiB  predicted {estimate.peak_allocated_bytes / GIB:6.3f}"
            f"  {error:+6.1%}  at {estimate.peak_phase:5}{speed}"
        )
    print()
    for group, values in errors.items():
        sizes = sorted(abs(value) for value in values)
        print(f"{group}: {len(sizes)} rows, median {statistics.median(sizes):.1%}, worst {sizes[-1]:.1%}")
    if ratios:
        print(f"time: predicted over published speed, median {statistics.median(ratios):.2f}, "
              f"{min(ratios):.2f} to {max(ratios):.2f}")  # fmt: skip
    print(f"reserved: {within} rows inside the stated range")
    print("\nNot compared:")
    for reason, count in sorted(left_out.items(), key=lambda item: -item[1]):
        print(f"  {count:3} rows: {reason}")


if __name__ == "__main__":
    main()
