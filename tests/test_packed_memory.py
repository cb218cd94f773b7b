"""What a packed micro-batch takes: the dry run is the real step, the closed form within its stated error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from bench.closed_form import BAR
from test_closed_form import ATTENTION, FULL, HALF, assert_near, compared
from test_dryrun import SETTING, config
from test_estimate import build, folders, shape_of

from qadapt.adapters.lora import trainable
from qadapt.batch_shape import BatchShape, packed_shape
from qadapt.data.batches import MicroBatch
from qadapt.engine.documents import documents_of
from qadapt.engine.ledger import Ledger
from qadapt.engine.moments import watched
from qadapt.engine.target import HAS_VARLEN, Target, kernels_of
from qadapt.hardware.cards import find_card
from qadapt.plan.attention import attention_of, document_kernel
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting
from qadapt.plan.workspace import attention_passing_bytes
from qadapt.shape import FAMILIES, find_shape
from qadapt.train.dryrun import batch_of, dry_run
from qadapt.train.memory import static_tensors
from qadapt.train.optimizer import make_optimizer
from qadapt.train.step import evaluate_loss, train_step

__all__ = ["folders"]  # a fixture
PACKED = dataclasses.replace(SETTING, packed=True)
UGLY = packed_shape((97, 30, 1, 2, 71, 150), supervised_tokens=106)
PHASES = ("forward", "loss", "recompute", "backward", "update", "evaluation", "evaluation loss")


def counted(folder: Path, setting: Setting, shape: BatchShape) -> Ledger:
    """The ledger of the real packed step and an evaluation."""
    model = build(folder, setting)
    optimizer = make_optimizer(trainable(model), kind=setting.optimizer, betas=(0.9, 0.99), weight_decay=0.0)
    batch = MicroBatch(
        input_ids=torch.randint(3, 1003, (1, shape.length)),
        positions=torch.arange(shape.positions),
        targets=torch.randint(3, 1003, (1, shape.positions)),
        tokens=shape.length,
        supervised_tokens=shape.positions,
        documents=documents_of(shape.documents),
    )
    ledger = Ledger(inside=kernels_of(Target()))
    with ledger.during("load"):
        for category, tensors in static_tensors(model, optimizer).items():
            ledger.hold(category, tensors)
    with watched(ledger, model.get_base_model(), optimizer=optimizer.inner), ledger:
        batches = [batch] * (1 + setting.accumulates)
        train_step(model, optimizer, batches, learning_rate=1e-4, clip_norm=1.0, scaler=None)
        evaluate_loss(model, [batch])
    return ledger


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("llama", {"recompute": 2, "accumulates": True}),
        ("llama", {"dropout": 0.1, "compute_dtype": "bf16", "targets": ("q_proj", "down_proj")}),
        ("mistral", {"recompute": "none"}),
        ("qwen2", {}),
        ("qwen3", {"compute_dtype": "bf16", "adapter_dtype": "bf16", "recompute": 1}),
        ("gemma2", {"quantization": "none"}),
        ("phi3", {"recompute": 1}),
    ],
)
def test_the_dry_run_is_the_real_packed_step_to_the_byte(
    family: str, changes: dict[str, Any], folders: dict[str, Path]
) -> None:
    setting = dataclasses.replace(PACKED, **changes)
    ledger, dry = counted(folders[family], setting, UGLY), dry_run(config(family), setting, batch=UGLY)
    assert dry.peak == ledger.peak
    left = 1024 if setting.accumulates else 0  # small numbers of the micro-batch before
    for phase in PHASES:
        assert dry.phase_bytes.get(phase, 0) == pytest.approx(ledger.phase_bytes.get(phase, 0), abs=left), (
            phase
        )


@pytest.mark.parametrize("recompute", ["all", "none", 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_closed_form_of_many_documents_is_the_dry_run_within_its_error(
    family: str, recompute: Any
) -> None:
    setting = dataclasses.replace(PACKED, recompute=recompute, documents=len(UGLY.documents))
    dry, estimate = dry_run(config(family), setting, batch=UGLY), estimate_step(shape_of(family), setting)
    assert estimate.peak_allocated_bytes == pytest.approx(dry.peak.bytes, rel=BAR)


@pytest.mark.parametrize(
    ("model", "card", "changes"),
    [
        ("SmolLM2-135M", "RTX 4060 8GB", {"rows": 3, "length": 777, "supervised_share": 0.1}),
        ("Llama-3.2-1B", "RTX 3090", {"rows": 4, "length": 512, "recompute": "none", "documents": 9}),
        ("Llama-3.2-1B", "T4", {"rows": 2, "length": 1500, "recompute": 2, "supervised_share": 0.05, **HALF}),
        ("Mistral-7B-v0.1", "RTX 3060 12GB", {"length": 4999, "dropout": 0.05, "supervised_share": 0.1}),
        ("Mistral-7B-v0.1", "T4", {"rows": 2, "length": 1024, "supervised_share": 0.1, **HALF}),
        ("Qwen2.5-0.5B", "RTX 5090", {"rows": 2, "adapter_dtype": "fp32", "targets": ATTENTION}),
        ("Qwen3-0.6B", "T4", {"rows": 2, "length": 512, "quantization": "none", **HALF}),
        ("gemma-2-2b", "A100 80GB", {"rows": 3, "length": 777, "supervised_share": 0.05}),
        ("Phi-3-mini-4k-instruct", "RTX 3090", {"rows": 3, "length": 512, "supervised_share": 0.02}),
        ("Phi-3-mini-4k-instruct", None, {"rows": 2, "length": 3000, "supervised_share": 0.05, **FULL}),
        ("Llama-3.2-1B", "RTX 3090", {"rows": 4, "length": 512, "documents": 9, "step_tokens": 1111}),
        ("Mistral-7B-v0.1", "T4", {"rows": 4, "length": 512, "recompute": 2, "step_tokens": 777, **HALF}),
        ("gemma-2-2b", "A100 80GB", {"rows": 5, "length": 600, "recompute": 1, "step_tokens": 1200}),
        ("Llama-3.2-1B", "RTX 3090", {"rows": 4, "length": 512, "documents": 9, "one_by_one": True}),
        ("Mistral-7B-v0.1", "H100 80GB SXM", {"length": 4999, "supervised_share": 0.1, "one_by_one": True}),
        ("SmolLM2-135M", "RTX 4060 8GB", {"rows": 3, "length": 777, "recompute": "none", "one_by_one": True}),
    ],
)
def test_the_closed_form_of_a_packed_micro_batch_is_the_dry_run(
    model: str, card: str | None, changes: dict[str, Any]
) -> None:
    found = compared(model, card, packed=True, **changes)
    assert_near(found)


def test_a_packed_micro_batch_is_as_full_as_its_rows_and_length_allow() -> None:
    few, many = batch_of(PACKED), batch_of(dataclasses.replace(PACKED, documents=8))
    assert few.documents == (117, 117, 117)
    assert many.documents == (117, 117, 112, 1, 1, 1, 1, 1)
    part = batch_of(dataclasses.replace(PACKED, documents=8, step_tokens=150))
    assert part.documents == (117, 27, 1, 1, 1, 1, 1, 1)
    assert few.positions == few.supervised_tokens == PACKED.supervised_tokens


@pytest.mark.parametrize(
    ("dtype", "capability", "head_width", "has_softcap", "kernel"),
    [
        ("bf16", 8.9, 128, False, "varlen"),
        ("fp16", 8.0, 64, False, "varlen"),
        ("fp32", 8.9, 128, False, "documents"),
        ("fp16", 7.5, 128, False, "documents"),
        ("bf16", 8.6, 208, False, "documents"),  # its backward leaves this width out there
        ("fp32", None, 128, False, "documents"),
        ("bf16", 8.9, 256, True, "scores"),
    ],
)
def test_the_kernel_of_documents_is_chosen_by_device_type_and_cap(
    dtype: str, capability: float | None, head_width: int, has_softcap: bool, kernel: str
) -> None:
    chosen = document_kernel(dtype, capability=capability, head_width=head_width, has_softcap=has_softcap)
    assert chosen == kernel
    fallback = document_kernel(
        dtype, capability=capability, head_width=head_width, has_softcap=has_softcap, one_by_one=True
    )
    assert fallback == ("documents" if kernel == "varlen" else kernel)


def test_many_documents_take_more_on_a_card_and_a_window_takes_no_mask_there() -> None:
    assert HAS_VARLEN, "the dry runs above were of it"
    shape, card = find_shape("Mistral-7B-v0.1"), find_card("RTX 4090")
    setting = Setting(rows=1, length=8192, supervised_share=0.01, packed=True)
    many = dataclasses.replace(setting, documents=65)
    taken = [
        attention_passing_bytes(shape, each, attention_of(shape, each, compute_capability=8.9))
        for each in (setting, many)
    ]
    assert taken[1] - taken[0] == 64 * 128 * 32 * (128 + 1) * 4
    packed = estimate_step(shape, setting, card=card)
    assert not attention_of(shape, setting, compute_capability=8.9).has_mask
    padded = estimate_step(shape, dataclasses.replace(setting, packed=False), card=card)
    assert padded.peak_allocated_bytes > packed.peak_allocated_bytes + 8192**2


FROZEN = {
    ("SmolLM2-135M", "RTX 4060 8GB"): 325_382_900,
    ("Mistral-7B-v0.1", "T4"): 6_209_728_628,
    ("gemma-2-2b", "A100 80GB"): 3_318_956_736,
    ("Phi-3-mini-4k-instruct", None): 3_325_765_472,
}
"""Model and card → peak bytes of 3 rows of 777 tokens; whoever changes what a step allocates renews them."""


def test_rows_that_are_filled_up_take_what_they_took() -> None:
    for (model, card), peak_bytes in FROZEN.items():
        setting = Setting(rows=3, length=777, device="cuda" if card else "cpu", supervised_share=0.1)
        found = estimate_step(find_shape(model), setting, card=find_card(card) if card else None)
        assert found.peak_allocated_bytes == peak_bytes, model
