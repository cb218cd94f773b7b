"""The dry run: the step that will train, on tensors without memory, every allocation counted.

Not an imitation: base, adapters, recomputation, optimizer and step are the code that trains; only the weights
are `meta` tensors, and where a device would choose its own kernel `engine/target.py` puts it. On a CPU target
it equals the ledger of the real step to the byte (`tests/test_dryrun.py`). Needs a `config.json`, no weights.

What is not the very same: a fused AdamW step, which `meta` does not have, counts as what it takes, nothing;
loss scaling (fp16) is left out, a few bytes; of the micro-batches before only their gradients are there; how
a data-dependent question is answered (all is finite).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from qadapt.adapters.fusion import Member
from qadapt.adapters.lora import trainable
from qadapt.adapters.method import Adapter, attach
from qadapt.adapters.rates import rate_ratios
from qadapt.batch_shape import BatchShape, packed_shape
from qadapt.data.batches import MicroBatch
from qadapt.engine.arrangement import arrange
from qadapt.engine.attention import choose_attention
from qadapt.engine.documents import documents_of
from qadapt.engine.ledger import Ledger, Peak
from qadapt.engine.moments import watched
from qadapt.engine.target import Target, kernels_of, on_target, target_functions
from qadapt.model.placement import on_host, place
from qadapt.model.precision import DTYPES
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.attention import NEW_CARD
from qadapt.plan.packing import check_packable
from qadapt.plan.setting import ALLOCATION_BYTES, Setting
from qadapt.plan.trace import TraceEvent
from qadapt.plan.workspace import blas_workspace_bytes
from qadapt.train.companion import companion_of
from qadapt.train.memory import static_tensors
from qadapt.train.optimizer import AdapterOptimizer, make_optimizer
from qadapt.train.step import evaluate_loss, train_step


@dataclass(frozen=True)
class DryRun:
    """What a step took.

    `static` is what was there before it, by category; `phase_bytes` the highest moment of each phase; `trace`
    every allocation and release from the loading on, sizes as asked for; `host_bytes` the most that lay in
    the memory of the host beside the card.
    """

    peak: Peak
    static: dict[str, int]
    phase_bytes: dict[str, int]
    trace: tuple[TraceEvent, ...]
    host_bytes: int = 0


def dry_run(
    values: Mapping[str, Any],
    setting: Setting,
    *,
    capability: float | None = None,
    batch: BatchShape | None = None,
    steps: int = 1,
) -> DryRun:
    """Runs steps and an evaluation of a setting on `meta`.

    Args:
        values: Of the model's `config.json`.
        setting: The step. Its device decides whether a CPU or CUDA is meant.
        capability: Compute capability of the card, where CUDA is meant; None: as the closed form assumes.
        batch: The micro-batch; default: the setting's rows, learned tokens at their ends.
        steps: Optimizer steps in a row; more than one shows an allocator what comes back.

    Raises:
        QadaptError: The model cannot be built, an adapter does not suit it, or its rows cannot be packed.
    """
    if setting.packed:
        check_packable(str(values.get("model_type")))
    target = Target((capability or NEW_CARD) if setting.device == "cuda" else None, setting.one_by_one)
    batch = batch or batch_of(setting)
    experts = "eager" if batch.expert_tokens else None
    model = skeleton_model(values, setting, target=target, experts=experts)
    optimizer = _optimizer(model, setting)
    ledger = Ledger(step=ALLOCATION_BYTES[setting.device], inside=kernels_of(target), is_recording=True)
    _hold(ledger, model, optimizer, target)
    static = dict(ledger.live)
    micro_batches = [replace(_micro_batch(batch), loss_chunk=setting.loss_chunk)]
    watching = watched(ledger, model.get_base_model(), optimizer=optimizer.inner)
    _count_as_fused(ledger, optimizer.inner)
    on_device = on_target(target, is_packed=bool(batch.documents), expert_tokens=batch.expert_tokens)
    with watching, on_device, ledger:
        for _ in range(steps):
            if setting.accumulates:
                _leave_gradients(ledger, optimizer)
            train_step(model, optimizer, micro_batches, learning_rate=1e-4, clip_norm=1.0, scaler=None)
        evaluate_loss(model, micro_batches)
    return DryRun(ledger.peak, static, dict(ledger.phase_bytes), tuple(ledger.trace), ledger.host_peak_bytes)


def skeleton_model(
    values: Mapping[str, Any], setting: Setting, *, target: Target, experts: str | None = None
) -> PeftModel:
    """The adapted model of a setting on `meta`; `experts` as in `skeleton_base`."""
    base = skeleton_base(
        values,
        quantization=setting.quantization,
        double_quant=setting.double_quant,
        dtype=DTYPES[setting.compute_dtype],
        experts=experts,
    )
    if kept := on_host(setting.offload):
        place(base, kept, device=torch.device("meta"))
    arrange(
        base,
        recompute=setting.recompute,
        tiles=setting.mlp_tiles,
        offload=setting.offload,
        within=lambda: target_functions(target),
    )
    choose_attention(base, dtype=DTYPES[setting.compute_dtype], capability=target.capability)
    adapter = Adapter(
        setting.method,
        setting.rank,
        setting.rank,
        setting.dropout,
        setting.targets,
        setting.nonlinearity,
        [Member.of(each) for each in setting.fused],
    )
    rows = base.get_output_embeddings().out_features
    new_ids = range(rows - setting.new_tokens, rows)
    return attach(base, adapter, dtype=DTYPES[setting.adapter_dtype], seed=0, new_ids=new_ids).train()


def batch_of(setting: Setting) -> BatchShape:
    """The micro-batch a setting speaks of: rows of one length, the learned tokens at the same positions.

    Packed: documents of that length, the last one of what is left; if there may be more, the others are
    single tokens, which is the most that so many documents can take.
    """
    if setting.packed:
        whole = -(-setting.tokens // setting.length)
        single = min(max(0, setting.documents - whole), setting.length - 1)
        full, rest = divmod(setting.tokens - single, setting.length)
        lengths = (setting.length,) * full + (rest,) * (rest > 0) + (1,) * single
        return packed_shape(lengths, supervised_tokens=setting.supervised_tokens)
    positions = math.ceil(setting.length * setting.supervised_share)
    return BatchShape(setting.rows, setting.length, positions, setting.rows * positions)


def _optimizer(model: PeftModel, setting: Setting) -> AdapterOptimizer:
    parameters = trainable(model)
    ratios = rate_ratios(setting.method, parameters)
    kind, betas = setting.optimizer, (0.9, 0.99)
    optimizer = make_optimizer(parameters, kind=kind, betas=betas, weight_decay=0.0, ratios=ratios)
    optimizer.companion = companion_of(model)
    return optimizer


def _micro_batch(shape: BatchShape) -> MicroBatch:
    def numbers(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.int64, device="meta")

    return MicroBatch(
        input_ids=numbers(shape.rows, shape.length),
        positions=numbers(shape.positions),
        targets=numbers(shape.rows, shape.positions),
        tokens=shape.rows * shape.length,
        supervised_tokens=shape.supervised_tokens,
        documents=documents_of(shape.documents).to(torch.device("meta")) if shape.documents else None,
    )


def _count_as_fused(ledger: Ledger, optimizer: Optimizer) -> None:
    """Leaves out what AdamW, one operation after another on `meta`, makes for each tensor in passing."""

    def pause(*_: Any) -> None:
        ledger.is_paused = True

    def go_on(*_: Any) -> None:
        ledger.is_paused = False

    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.register_step_pre_hook(pause)
        optimizer.register_step_post_hook(go_on)


def _leave_gradients(ledger: Ledger, optimizer: AdapterOptimizer) -> None:
    """What an earlier micro-batch of the step has left behind."""
    for parameter in optimizer.parameters.values():
        parameter.grad = torch.empty_like(parameter)
        ledger.tell_apart("gradients", parameter.grad)


def _hold(ledger: Ledger, model: PeftModel, optimizer: AdapterOptimizer, target: Target) -> None:
    """What is there before the step: the model, the optimizer, and on CUDA the workspaces of cuBLAS."""
    with ledger.during("load"):
        for category, tensors in static_tensors(model, optimizer).items():
            ledger.hold(category, tensors)
        if target.capability is not None:
            for _ in ("forward", "backward"):
                ledger.keep("temporary", blas_workspace_bytes(target.capability))
