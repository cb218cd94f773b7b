"""The closed form against the dry run: known models, their layers cut, on a CPU and on cards.

Whole models, sampled by the hundred: `tools/bench/closed_form.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from bench.closed_form import BAR, Compared, Point, points, summary

from qadapt.hardware.cards import find_card
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.shape import FAMILIES, find_config, find_shape
from qadapt.train.dryrun import dry_run

LAYERS = 3
FULL = {"compute_dtype": "fp32", "adapter_dtype": "fp32"}
HALF = {"compute_dtype": "fp16", "adapter_dtype": "fp32", "optimizer": "adamw"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
BESIDE: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("Mistral-7B-v0.1", "RTX 3060 12GB", {"length": 4096, "supervised_share": 0.1}),
    ("Llama-3.2-1B", "T4", {"length": 3000, "recompute": 2, "supervised_share": 0.05, **HALF}),
    ("gemma-2-2b", "A100 80GB", {"length": 777, "recompute": "none", "supervised_share": 0.05}),
    ("Phi-3-mini-4k-instruct", "RTX 3090", {"length": 512, "supervised_share": 0.02}),
    ("Qwen3-0.6B", "RTX 4060 8GB", {"rows": 2, "length": 777, "supervised_share": 0.02, "mlp_tiles": 4}),
)
"""Steps on which bottlenecks and fusions are tried."""


def compared(model: str, card: str | None, **changes: Any) -> Compared:
    shape = dataclasses.replace(find_shape(model), layers=LAYERS)
    values = {**find_config(model).values, "num_hidden_layers": LAYERS}
    values.pop("layer_types", None)
    setting = Setting(device="cuda" if card else "cpu", **changes)
    target = find_card(card) if card else None
    dry = dry_run(values, setting, capability=target.compute_capability if target else None)
    return Compared(Point(shape, setting, target), estimate_step(shape, setting, card=target), dry)


def assert_near(found: Compared) -> None:
    for part in ("peak", "working"):
        assert abs(found.errors[part]) <= BAR, "\n".join(found.lines())


@pytest.mark.parametrize(
    ("model", "card", "changes"),
    [
        ("SmolLM2-135M", "RTX 4060 8GB", {"rows": 3, "length": 777, "supervised_share": 0.1}),
        ("SmolLM2-360M", None, {"length": 300, "recompute": "none", "supervised_share": 0.05, **FULL}),
        ("Llama-3.2-1B", "T4", {"length": 3000, "recompute": 2, "supervised_share": 0.05, **HALF}),
        ("Mistral-7B-v0.1", "RTX 3060 12GB", {"length": 4096, "dropout": 0.05, "supervised_share": 0.1}),
        ("Qwen2.5-0.5B", "RTX 5090", {"length": 2048, "adapter_dtype": "fp32", "targets": ATTENTION}),
        ("Qwen3-0.6B", "T4", {"rows": 2, "length": 512, "dropout": 0.05, "quantization": "none", **HALF}),
        ("gemma-2-2b", "A100 80GB", {"length": 777, "recompute": "none", "supervised_share": 0.05}),
        ("gemma-2-2b", "T4", {"length": 1000, "supervised_share": 0.05, **HALF}),
        ("gemma-2-2b", None, {"length": 200, "double_quant": False, "supervised_share": 0.05, **FULL}),
        ("Phi-3-mini-4k-instruct", "RTX 3090", {"length": 512, "rank": 64, "supervised_share": 0.02}),
        ("Phi-3-mini-4k-instruct", "H100 80GB SXM", {"length": 3000, "targets": ("qkv_proj",), **FULL}),
    ],
)
def test_the_closed_form_is_the_dry_run_within_three_percent(
    model: str, card: str | None, changes: dict[str, Any]
) -> None:
    assert_near(compared(model, card, **changes))


def test_the_peak_is_at_the_dry_runs_moment() -> None:
    wide = compared("SmolLM2-135M", "RTX 4060 8GB", length=512)
    narrow = compared("SmolLM2-135M", "RTX 4060 8GB", length=512, supervised_share=0.01)
    assert (wide.estimate.peak_phase, wide.dry.peak.phase) == ("loss", "loss")
    assert narrow.estimate.peak_phase == "layer"
    assert narrow.dry.peak.phase in ("recompute", "backward")


def test_the_sample_is_the_same_for_a_seed_and_goes_through_every_family() -> None:
    first, again, other = (list(points(12, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert {point.shape.family for point in first} == set(FAMILIES)
    assert {point.card is None for point in first} == {True, False}


def test_the_summary_names_the_worst_point() -> None:
    near = compared("SmolLM2-135M", "RTX 4060 8GB", length=512)
    more = {name: 2.5 * count for name, count in near.estimate.categories.items()}
    far = dataclasses.replace(near, estimate=dataclasses.replace(near.estimate, categories=more))
    assert any("worst: +1" in line and "MISSED" in line for line in summary([near, far]))
    assert any("met" in line for line in summary([near]))
