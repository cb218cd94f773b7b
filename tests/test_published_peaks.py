"""Public measurements of `max_memory_allocated` against a dry run of the measured stack.

Nothing is fitted. The whole comparison, row by row: `tools/bench/estimator.py --rows FILE`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from published import Described, describe, percentile, report, score

from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.shape import find_shape
from qadapt.units import GIB


def test_what_stays_of_mistral_is_what_was_measured() -> None:
    """NF4 with double quantization, 16-bit embeddings and head: 3.842 GiB (the published intercept's
    part)."""
    estimate = estimate_step(find_shape("Mistral-7B-v0.1"), Setting())
    resident = ("base_weights", "quantization_constants", "unquantized")
    assert sum(estimate.categories[name] for name in resident) / GIB == pytest.approx(3.842, abs=0.002)


T4: dict[str, Any] = {
    "id": "a", "source": "fitcheck 0", "model": "HuggingFaceTB/SmolLM2-135M", "method": "lora-fp16",
    "double_quant": False, "rank": 32, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "micro_batch": 2, "seq_len": 512,
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
