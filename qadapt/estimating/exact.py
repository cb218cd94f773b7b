"""A question answered by the exact dry run: the very step without its memory, for any decoder.

The same `Answer` as the closed form's, so that screens and `--json` show both alike; beside it the trace,
from which the picture is drawn. What stays and what comes and goes is counted, to the byte, as a CPU run
counts it; what CUDA kernels take inside an operation comes from a table (`plan/workspace.py`), so that `±`
keeps a share for it. Imports torch and transformers: some seconds. `question.py` asks it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from qadapt.batch_shape import worst_routing
from qadapt.experts import routed_experts
from qadapt.hardware.calibration import Calibration
from qadapt.hardware.cards import CONTEXT_BYTES, CONTEXT_RANGE_BYTES, RUNTIME_BYTES, Card
from qadapt.hardware.target import Target
from qadapt.model.precision import DTYPES
from qadapt.model.skeleton import skeleton_base
from qadapt.plan.allocator import RUN_NOISE, replay, reserved_range
from qadapt.plan.answer import Answer
from qadapt.plan.estimate import KERNEL_ERROR, Estimate, disk_parts, estimate_step
from qadapt.plan.setting import Setting
from qadapt.plan.trace import TraceEvent
from qadapt.shape import ModelConfig, ModelShape
from qadapt.train.dryrun import DryRun, batch_of, dry_run

Ends = tuple[int, int]
"""The least and the most, in bytes."""


@dataclass(frozen=True)
class ExactAnswer:
    """What the dry run says.

    Attributes:
        answer: The answer; its estimate is `exact`.
        trace: Every allocation and release, from the loading on.
        static: Bytes by category before the step.
    """

    answer: Answer
    trace: tuple[TraceEvent, ...]
    static: Mapping[str, int]

    @property
    def estimate(self) -> Estimate:
        """The estimate alone."""
        return self.answer.estimate


def exact_answer(
    config: ModelConfig,
    setting: Setting,
    *,
    shape: ModelShape | None,
    target: Target,
    rows_per_step: int,
    calibration: Calibration | None,
) -> ExactAnswer:
    """Runs a step without memory and says what it took.

    Args:
        config: The model.
        setting: The step.
        shape: The model's shape, if it has a closed form: then the time is known, too.
        target: Where it would run.
        rows_per_step: Rows of one optimizer step.
        calibration: What earlier runs on this machine measured.

    Raises:
        QadaptError: The model cannot be built, or an adapter does not suit it.
    """
    capability = target.card.compute_capability if target.card else None
    run, routing = _routed(config, setting, capability=capability)
    outside = _outside(shape, setting, target.card) if shape else _outside_of_skeleton(config, setting, run)
    reserved = reserved_range(run.trace).widened(RUN_NOISE)
    gaps = replay(run.trace).fragmentation
    answer = Answer(
        name=config.name,
        parameters=outside.parameters,
        disk=outside.disk,
        estimate=_estimate(run, setting, card=target.card, outside=outside),
        target=target,
        rows_per_step=rows_per_step,
        calibration=calibration,
        module=run.peak.module,
        notes=_notes(config, setting, run, has_closed_form=shape is not None),
        routing_bytes=routing,
        gap_share=None if setting.device == "cpu" else gaps,
        reserved_range_bytes=None if setting.device == "cpu" else (reserved.low_bytes, reserved.high_bytes),
    )
    return ExactAnswer(answer, run.trace, run.static)


@dataclass(frozen=True)
class _Outside:
    """What the step's own memory does not say."""

    parameters: int
    disk: dict[str, int]
    host_bytes: int
    pinned_bytes: int
    seconds: float | None


def _outside(shape: ModelShape, setting: Setting, card: Card | None) -> _Outside:
    """By the closed form."""
    closed = estimate_step(shape, setting, card=card)
    host = closed.host_bytes - (closed.peak_allocated_bytes if setting.device == "cpu" else 0)
    disk = disk_parts(shape, setting)
    return _Outside(shape.parameters, disk, host, closed.pinned_bytes, closed.seconds_per_step)


def _outside_of_skeleton(config: ModelConfig, setting: Setting, run: DryRun) -> _Outside:
    """From the model as it is built: the two largest tensors lie in host memory while it is loaded.

    What is offloaded lies there, too; all of it but the table of the embeddings is pinned.
    """
    model = skeleton_base(config.values, quantization="none", double_quant=False, dtype=DTYPES["bf16"])
    sizes = sorted(parameter.numel() for parameter in model.parameters())
    adapter = run.static["adapters"]
    disk = {
        "checkpoints": 3 * (adapter + run.static["optimizer"]),
        "adapter": adapter,
        "merged-fp16": 2 * sum(sizes),
    }
    host = RUNTIME_BYTES[setting.device] + 2 * sum(sizes[-2:]) + run.host_bytes
    return _Outside(sum(sizes), disk, host, _pinned_bytes(model, setting, run), None)


def _pinned_bytes(model: PreTrainedModel, setting: Setting, run: DryRun) -> int:
    """What lies on the host without the table of the embeddings."""
    if not {"head", "boundaries", "layers"} & set(setting.offload):
        return 0
    table = model.get_input_embeddings().parameters() if "embeddings" in setting.offload else ()
    return run.host_bytes - setting.compute_bytes * sum(each.numel() for each in table)


def _estimate(run: DryRun, setting: Setting, *, card: Card | None, outside: _Outside) -> Estimate:
    is_cuda = setting.device == "cuda"
    context = card.context_bytes if card else CONTEXT_BYTES
    context_range = card.context_range_bytes if card else CONTEXT_RANGE_BYTES
    return Estimate(
        setting=setting,
        categories=dict(run.peak.categories),
        peak_phase=run.peak.phase,
        phase_bytes={
            name: amount for name, amount in run.phase_bytes.items() if name not in ("load", "outside")
        },
        context_bytes=context if is_cuda else 0,
        context_range_bytes=context_range if is_cuda else (0, 0),
        host_bytes=outside.host_bytes + (0 if is_cuda else run.peak.bytes),
        pinned_bytes=outside.pinned_bytes,
        disk_bytes=sum(outside.disk.values()),
        seconds_per_step=outside.seconds,
        relative_error=KERNEL_ERROR if is_cuda else 0.0,
        exact=True,
    )


def _routed(config: ModelConfig, setting: Setting, *, capability: float | None) -> tuple[DryRun, Ends | None]:
    """The dry run, and for a mixture of experts its peak from balanced to worst routing.

    Grouped products, which transformers takes in bf16, hold every token's share at once, as balanced experts
    do; the worst is experts one after another, all tokens to the same ones. In other types the products are
    not grouped and balanced experts would take minutes to run: the worst alone is told.
    """
    batch, experts = batch_of(setting), routed_experts(config.values)
    if experts is None or experts.per_token is None:
        return dry_run(config.values, setting, capability=capability, batch=batch), None
    tokens = worst_routing(tokens=setting.tokens, per_token=experts.per_token)
    worst_batch = dataclasses.replace(batch, expert_tokens=tokens)
    worst = dry_run(config.values, setting, capability=capability, batch=worst_batch)
    if setting.compute_dtype != "bf16":
        return worst, None
    balanced = dry_run(config.values, setting, capability=capability, batch=batch)
    higher = max(worst, balanced, key=lambda run: run.peak.bytes)
    return higher, (min(worst.peak.bytes, balanced.peak.bytes), higher.peak.bytes)


def _notes(config: ModelConfig, setting: Setting, run: DryRun, *, has_closed_form: bool) -> tuple[str, ...]:
    """What a reader would not expect of this model."""
    notes = []
    if not has_closed_form:
        notes.append(f"{config.family} has no closed form here: counted by the exact dry run")
    experts = routed_experts(config.values)
    if experts is not None:
        notes.append(f"{experts.not_covered} Training it is refused until they are")
        if setting.compute_dtype != "bf16":
            notes.append("counted with all tokens going to the same experts, the worst routing")
    elif setting.quantization == "nf4" and not run.static["quantization_constants"]:
        notes.append("the library quantizes no layer of this architecture: all of it stays in 16 bits")
    return tuple(notes)
