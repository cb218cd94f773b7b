"""Public measurements of `max_memory_allocated` against the closed form and a dry run of the measured stack.

Nothing is fitted. The whole comparison, row by row: `tools/bench/estimator.py --rows FILE`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from published import Described, describe, percentile, report, score

from qadapt.hardware.cards import find_card
from qadapt.plan.adapters import trainable
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.shape import find_shape
from qadapt.units import GIB

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PLAIN = Setting(
    optimizer="adamw", adapter_dtype="fp32", accumulates=False, holds_logits=True, targets=ATTENTION
)
ON_T4 = dataclasses.replace(PLAIN, compute_dtype="fp32", double_quant=False, rank=32)
"""transformers + PEFT after `prepare_model_for_kbit_training`: activations, embeddings and head in fp32."""
HALF_ON_T4 = dataclasses.replace(PLAIN, quantization="none", compute_dtype="fp16", rank=32)
ON_A100 = dataclasses.replace(PLAIN, adapter_dtype="bf16", dropout=0.1, length=4096)
"""bf16 under autocast: fp32 adapters whose inputs are kept in bf16; their static bytes are put in below."""
MISTRAL = dataclasses.replace(find_shape("Mistral-7B-v0.1"), sliding_window=None)
"""Measured with FlashAttention, which takes a sliding window without a mask."""


@pytest.mark.parametrize(
    ("model", "setting", "published_gib"),
    [
        ("TinyLlama-1.1B-Chat-v1.0", dataclasses.replace(ON_T4, rows=2, length=1024), 2.4723),
        ("TinyLlama-1.1B-Chat-v1.0", dataclasses.replace(ON_T4, rows=12, length=1024), 9.1521),
        ("Qwen2.5-1.5B-Instruct", dataclasses.replace(ON_T4, rows=2, length=1024), 6.6676),
        ("Mistral-7B-Instruct-v0.3", dataclasses.replace(ON_T4, rank=16, length=1024), 5.9143),
        ("SmolLM2-135M", dataclasses.replace(ON_T4, rows=2, length=512), 1.0389),
        ("SmolLM2-1.7B", dataclasses.replace(HALF_ON_T4, rows=4, length=1024), 6.3757),
        ("SmolLM2-135M", dataclasses.replace(HALF_ON_T4, length=4096), 3.0743),
    ],
)
def test_peaks_on_a_t4_are_met_within_two_percent(model: str, setting: Setting, published_gib: float) -> None:
    estimate = estimate_step(find_shape(model), setting, card=find_card("T4"))
    assert estimate.peak_allocated_bytes / GIB == pytest.approx(published_gib, rel=0.02)


@pytest.mark.parametrize(
    ("setting", "published_gib"),
    [
        (dataclasses.replace(ON_A100, rows=4), 15.2493),
        (dataclasses.replace(ON_A100, rows=4, supervised_share=0.0), 12.1398),
        (dataclasses.replace(ON_A100, rows=16, supervised_share=0.0), 36.5221),
        (dataclasses.replace(ON_A100, rows=8, supervised_share=0.0, quantization="none"), 30.1686),
    ],
)
def test_peaks_of_mistral_on_an_a100_are_met_within_two_and_a_half_percent(
    setting: Setting, published_gib: float
) -> None:
    shape = MISTRAL
    estimate = estimate_step(shape, setting, card=find_card("A100 80GB"))
    bf16_adapters = estimate.categories["adapters"] + estimate.categories["optimizer"]
    peak = estimate.peak_allocated_bytes - bf16_adapters + 12 * trainable(shape, setting)
    assert peak / GIB == pytest.approx(published_gib, rel=0.025)


def test_a_token_of_mistral_costs_what_was_measured() -> None:
    """717.5 KiB a token with full logits: boundaries, 14 bytes per logit, a few vectors (two points,
    A100)."""
    shape = MISTRAL
    few, many = (estimate_step(shape, dataclasses.replace(ON_A100, rows=rows)) for rows in (4, 8))
    slope = (many.peak_allocated_bytes - few.peak_allocated_bytes) / (4 * 4096)
    assert slope / 1024 == pytest.approx(717.5 - 8, rel=0.001)


def test_what_stays_of_mistral_is_what_was_measured() -> None:
    """NF4 with double quantization, 16-bit embeddings and head: 3.842 GiB (the published intercept's
    part)."""
    estimate = estimate_step(find_shape("Mistral-7B-v0.1"), ON_A100)
    resident = ("base_weights", "quantization_constants", "unquantized")
    assert sum(estimate.categories[name] for name in resident) / GIB == pytest.approx(3.842, abs=0.002)


# The dry run of the measured stack


T4: dict[str, Any] = {
    "id": "a", "source": "fitcheck 0", "model": "HuggingFaceTB/SmolLM2-135M", "method": "lora-fp16",
    "double_quant": False, "rank": 32, "target_modules": list(ATTENTION), "micro_batch": 2, "seq_len": 512,
    "gradient_checkpointing": "true (HF, non-reentrant)", "optimizer": "torch AdamW fp32 states (not paged)",
    "attention": "sdpa pinned", "gpu": "Tesla T4 16GB", "is_oom": False, "tier": "A",
    "peak_allocated_gib": 1.0029, "peak_reserved_gib": 1.0449, "process_gib": 1.1825,
}  # fmt: skip
EAGER = T4 | {
    "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "method": "qlora-nf4", "attention": "eager",
    "micro_batch": 1, "seq_len": 1024, "peak_allocated_gib": 1.9731, "peak_reserved_gib": None,
}  # fmt: skip
A100 = T4 | {
    "source": "foundation-model-stack/fms-acceleration:granite.csv", "model": "ibm/PowerLM-3b", "rank": 16,
    "method": "qlora-nf4", "double_quant": True, "micro_batch": 4, "seq_len": 4096, "gpu": "A100-80GB",
    "framework": "accelerated-peft-bnb", "compute_dtype": "bf16, no fp32 upcast", "attention": "flash2",
    "loss_kernel": "full logits CE (HF, fp32 upcast)", "peak_allocated_gib": 14.1111,
    "peak_reserved_gib": None,
}  # fmt: skip


@pytest.mark.parametrize("row", [T4, EAGER, A100])
def test_a_dry_run_of_the_measured_stack_meets_its_peak_within_a_third_of_a_percent(
    row: dict[str, Any],
) -> None:
    described = describe(row)
    assert isinstance(described, Described)
    scored = score(row, described)
    assert scored.error is not None
    assert abs(scored.error) < 0.0033, f"{scored.error:+.2%}"
    assert scored.fits
    assert scored.inside is not False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": "a blog"}, "another framework"),
        ({"source": None}, "another framework"),
        ({"model": "somebody/Unheard-9B"}, "neither a folder"),
        ({"target_modules": None}, "adapter targets"),
        ({"target_modules": ["c_attn"]}, "adapter targets"),
        ({"rank": "unrecorded"}, "no count"),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer"),
        ({"optimizer": "bnb AdamW8bit"}, "optimizer"),
        ({"optimizer": None}, "optimizer"),
        ({"attention": None}, "attention"),
        ({"method": "lora-8bit"}, "method"),
        ({"gpu": "Abacus"}, "Abacus"),
        ({"source": "foundation-model-stack", "loss_kernel": None}, "loss"),
    ],
)
def test_what_cannot_be_described_is_told_with_the_reason(changes: dict[str, Any], words: str) -> None:
    reason = describe(T4 | changes | ({"method": "lora-bf16"} if "loss_kernel" in changes else {}))
    assert isinstance(reason, str)
    assert words in reason


def test_the_table_names_each_row_and_counts_the_reasons(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "first"}, T4 | {"id": "second", "source": "a blog"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    lines = list(report(path))
    assert [line.split()[0] for line in lines[:2]] == ["first", "second"]
    assert lines[-1].startswith("    2 rows: another framework")


def test_a_model_larger_than_its_card_is_out_of_memory_without_a_run() -> None:
    row = A100 | {"model": "mistralai/Mixtral-8x7B-Instruct-v0.1", "method": "lora-bf16", "is_oom": True}
    described = describe(row)
    assert isinstance(described, Described)
    assert not score(row, described).fits


@pytest.mark.parametrize(("share", "expected"), [(0.5, 2), (0.75, 3), (0.95, 4), (1.0, 4)])
def test_a_percentile_is_a_value_that_occurs(share: float, expected: int) -> None:
    assert percentile([4, 1, 3, 2], share) == expected
