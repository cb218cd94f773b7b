"""The closed form, and the speed it predicts, against published measurements.

Only rows whose stack the closed form can describe are compared, allocated bytes with allocated bytes, tokens
per second with tokens per second; the others are counted with the reason. Nothing is fitted to the rows. The
exact comparison is `published.py`; both are parts of `estimator.py`.

How the comparable stacks are described:
* plain transformers + PEFT after `prepare_model_for_kbit_training`, T4: activations, embeddings, norms and
  head in fp32, every token supervised, the caller holds the logits, no gradients yet, AdamW with fp32 states;
* the same without quantization, in fp16 with fp32 adapters;
* A100 rows in bf16 with fused attention: fp32 adapters used under autocast (their inputs are kept in bf16),
  dropout 0.1; logits held, or none at all where the loss never makes them.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qadapt.errors import QadaptError
from qadapt.hardware.cards import Card, find_card
from qadapt.plan.adapters import trainable
from qadapt.plan.estimate import Estimate, estimate_step
from qadapt.plan.setting import Setting
from qadapt.shape import ModelShape, find_shape
from qadapt.units import GIB

TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
PLAIN = Setting(adapter_dtype="fp32", optimizer="adamw", accumulates=False, holds_logits=True)


def reason_against(row: dict[str, Any]) -> str | None:
    """Why a row cannot be compared at all."""
    targets = set(row["target_modules"] or ())
    if row["tier"] != "A":
        return "tier B: the token count or the metric is not certain"
    if row["is_oom"]:
        return "an out-of-memory verdict, no peak"
    if row["peak_allocated_gib"] is None:
        return "only reserved or process bytes are published"
    if not targets or not targets <= TARGETS:
        return "adapter targets are not recorded in our words"
    if row["method"] not in ("qlora-nf4", "lora-fp16", "lora-bf16"):
        return f"method {row['method']}"
    return None


def describe(row: dict[str, Any]) -> tuple[Setting, bool] | str:
    """The row's stack as a setting, and whether its adapters run under autocast; or why there is none."""
    reason = reason_against(row)
    if reason is not None:
        return reason
    changes: dict[str, Any] = {
        "rows": row["micro_batch"], "length": row["seq_len"], "rank": row["rank"],
        "targets": tuple(row["target_modules"]), "double_quant": bool(row["double_quant"]),
        "quantization": "nf4" if row["method"] == "qlora-nf4" else "none",
        "recompute": "all" if str(row["gradient_checkpointing"]).startswith("true") else "none",
    }  # fmt: skip
    if row["source"].startswith("fitcheck"):
        if not row["attention"].startswith("sdpa"):
            return "eager attention keeps T x T scores; not in the closed form"
        dtype = "fp32" if row["method"] == "qlora-nf4" else "fp16"
        return dataclasses.replace(PLAIN, compute_dtype=dtype, **changes), False
    if row["source"].startswith("foundation-model-stack"):
        return describe_a100(row, changes)
    return "another framework's step"


def describe_a100(row: dict[str, Any], changes: dict[str, Any]) -> tuple[Setting, bool] | str:
    """The A100 rows: bf16, fused attention, with the stock loss or with none on logits."""
    if row["compute_dtype"].startswith("fp32 upcast"):
        return "fp32 residual between bf16 layers: a mixed path"
    if "triton" in row["loss_kernel"]:
        return "fused loss on full logits: our loss has other copies"
    share = 0.0 if "linear CE" in row["loss_kernel"] else 1.0
    types = {"compute_dtype": "bf16", "adapter_dtype": "bf16"}
    return dataclasses.replace(PLAIN, supervised_share=share, dropout=0.1, **types, **changes), True


def allocated(shape: ModelShape, setting: Setting, *, card: Card | None, under_autocast: bool) -> Estimate:
    """The estimate; under autocast bf16 adapters stand for fp32 ones, whose static bytes are put in here.

    The stacks' FlashAttention takes a sliding window without a mask.
    """
    estimate = estimate_step(dataclasses.replace(shape, sliding_window=None), setting, card=card)
    if not under_autocast:
        return estimate
    values = trainable(shape, setting)
    categories = dict(estimate.categories)
    categories["adapters"] = 4 * values
    categories["optimizer"] = 8 * values
    return dataclasses.replace(estimate, categories=categories)


@dataclasses.dataclass
class Score:
    """What the comparison comes to."""

    errors: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    speeds: list[float] = dataclasses.field(default_factory=list)
    reserved: list[bool] = dataclasses.field(default_factory=list)
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)


def compare(row: dict[str, Any], score: Score) -> str | None:
    """One line about a row, or None where it is left out."""
    described = describe(row)
    if not isinstance(described, str):
        try:
            shape = find_shape(str(row["model"]))
        except QadaptError:
            described = "the model's shape is not among the known ones"
    if isinstance(described, str):
        score.left_out[described] = score.left_out.get(described, 0) + 1
        return None
    setting, under_autocast = described
    card = find_card(row["gpu"].replace("-80GB", " 80GB SXM"))
    estimate = allocated(shape, setting, card=card, under_autocast=under_autocast)
    published, predicted = row["peak_allocated_gib"], estimate.peak_allocated_bytes / GIB
    error = predicted / published - 1
    score.errors.setdefault(f"{row['gpu']} {row['method']}", []).append(error)
    notes = ""
    if row["tokens_per_s"] and estimate.seconds_per_step:
        score.speeds.append(setting.tokens / estimate.seconds_per_step / row["tokens_per_s"])
        notes += f"  speed x {score.speeds[-1]:.2f}"
    if row["peak_reserved_gib"]:
        reserved = row["peak_reserved_gib"] * GIB
        score.reserved.append(estimate.reserved_low_bytes <= reserved <= estimate.reserved_high_bytes)
        notes += f"  reserved {'inside' if score.reserved[-1] else 'outside'}"
    return (
        f"{row['id'][-28:]:28} {shape.name[-24:]:24} {setting.rows:2} x {setting.length:4}"
        f" {setting.compute_dtype}  published {published:6.3f} GiB  predicted {predicted:6.3f}"
        f"  {error:+6.1%}  at {estimate.peak_phase:5}{notes}"
    )


def report(path: Path) -> Iterable[str]:
    """The comparison, line by line; `path` holds one JSON object a line."""
    score = Score()
    for line in path.read_text(encoding="utf-8").splitlines():
        text = compare(json.loads(line), score)
        if text is not None:
            yield text
    yield ""
    for group, errors in score.errors.items():
        sizes = [abs(error) for error in errors]
        middle = statistics.median(sizes)
        yield f"closed form, {group}: {len(sizes)} rows, median {middle:.1%}, worst {max(sizes):.1%}"
    if score.speeds:
        low, middle, high = min(score.speeds), statistics.median(score.speeds), max(score.speeds)
        yield f"speed, predicted over published: median {middle:.2f}, {low:.2f} to {high:.2f}"
    yield f"reserved bytes: {sum(score.reserved)} of {len(score.reserved)} rows inside the stated range"
    yield ""
    yield "Not compared:"
    for reason, count in sorted(score.left_out.items(), key=lambda item: -item[1]):
        yield f"  {count:3} rows: {reason}"
