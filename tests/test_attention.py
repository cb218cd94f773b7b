"""Repeated keys and values: the same numbers, and no T x T scores where only they keep them away."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_estimate import CPU, shape_of, values_of
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qadapt.engine.attention import choose_attention
from qadapt.hardware.cards import find_card
from qadapt.plan.attention import attention_of, repeats_keys
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.train.dryrun import DryRun, dry_run

TURING = dataclasses.replace(
    CPU, device="cuda", compute_dtype="fp16", length=900, rows=1, supervised_share=0.1
)
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "phi3")
SCORES = 6 * 900 * 900


def make(family: str, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**values_of(family), **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def gradient(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    model(ids).logits.square().mean().backward()
    weight = model.get_decoder().layers[0].self_attn.o_proj.weight
    assert weight.grad is not None
    return weight.grad.clone()


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("window", [None, 20])
def test_repeated_keys_give_the_same_numbers(family: str, window: int | None) -> None:
    model = make(family, sliding_window=window) if family in ("mistral", "phi3") else make(family)
    ids = torch.randint(3, 1003, (2, 37))
    logits, expected = model(ids).logits, gradient(model, ids)
    choose_attention(model, dtype=torch.float16, capability=7.5)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)  # fp32
    torch.testing.assert_close(gradient(model, ids), expected, rtol=1e-4, atol=1e-7)


def test_repeated_keys_write_the_same_text_from_rows_of_unequal_length() -> None:
    model = make("llama").eval()
    ids, mask = torch.randint(3, 1003, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    write = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **write)
    choose_attention(model, dtype=torch.float16, capability=7.5)
    assert torch.equal(model.generate(ids, **write), expected)


@pytest.mark.parametrize(
    ("family", "dtype", "capability", "is_repeated"),
    [
        ("llama", "fp16", 7.5, True),
        ("llama", "fp32", 8.9, True),
        ("llama", "bf16", 8.9, False),
        ("llama", "bf16", 12.0, False),
        ("llama", "fp32", None, False),
        ("gemma2", "fp16", 7.5, False),  # its soft cap leaves only eager attention
    ],
)
def test_keys_are_repeated_only_where_nothing_else_avoids_scores(
    family: str, dtype: str, capability: float | None, is_repeated: bool
) -> None:
    assert repeats_keys(shape_of(family), dtype, compute_capability=capability) is is_repeated


def test_keys_of_every_query_head_need_no_repeating() -> None:
    alone = dataclasses.replace(shape_of("llama"), kv_heads=6)
    assert not repeats_keys(alone, "fp16", compute_capability=7.5)


def test_an_architecture_that_cannot_be_trained_is_left_as_it_is() -> None:
    model = make("olmo2")
    ids = torch.randint(3, 1003, (1, 9))
    expected = model(ids).logits
    choose_attention(model, dtype=torch.float16, capability=7.5)
    assert torch.equal(model(ids).logits, expected)


def test_rows_as_long_as_the_window_get_a_mask_and_the_efficient_kernel() -> None:
    windowed = dataclasses.replace(shape_of("mistral"), sliding_window=900)
    setting = dataclasses.replace(TURING, compute_dtype="bf16")
    longer = attention_of(windowed, setting, compute_capability=8.9)
    shorter = attention_of(windowed, dataclasses.replace(setting, length=899), compute_capability=8.9)
    assert (longer.kernel, longer.is_repeated, longer.has_mask) == ("efficient", True, True)
    assert (shorter.kernel, shorter.is_repeated, shorter.has_mask) == ("flash", False, False)


def on_card(setting: Setting, capability: float) -> DryRun:
    return dry_run({"model_type": "llama", **values_of("llama")}, setting, capability=capability)


def test_a_card_without_flash_attention_makes_no_square_scores() -> None:
    turing, ampere = on_card(TURING, 7.5), on_card(TURING, 8.6)
    assert turing.peak.bytes - ampere.peak.bytes < SCORES


def test_where_no_kernel_helps_the_closed_form_counts_scores_as_the_dry_run_does() -> None:
    shape = shape_of("llama")
    setting = dataclasses.replace(TURING, compute_dtype="bf16", recompute="none")  # no bf16 before 8.0
    assert attention_of(shape, setting, compute_capability=7.5).kernel == "math"
    dry, estimate = on_card(setting, 7.5), estimate_step(shape, setting, card=find_card("T4"))
    assert dry.peak.bytes > 3 * 4 * SCORES
    assert estimate.peak_allocated_bytes == pytest.approx(dry.peak.bytes, rel=0.02)
