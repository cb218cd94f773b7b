"""The closed form: what a step takes, by category, at its highest moment. No torch, milliseconds.

Three moments are compared, and the highest one is the estimate (`peak_phase`):

    loss     everything kept for the backward pass, and one chunk of logits
    layer    the same without logits, and the final norm or a layer going backward, recomputed
             first if need be
    update   adapters, gradients, states and the optimizer's own temporaries; no activations

An evaluation with the same micro-batch stays below the loss moment: nothing is kept, nothing goes backward.
Packed rows are evaluated in micro-batches no fuller than the planned one (`train/loop.py`).

The static categories are exact to the byte. What comes and goes agrees with the dry run within
`CLOSED_ERROR`, which agrees with a real step on a CPU to the byte (`tests/test_dryrun.py`); published peaks
of cards are in `tools/bench/estimator.py`. Reserved bytes are a range: published ratios of reserved to
allocated bytes, rows with fused attention, go up to 1.25.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qadapt.hardware.cards import CONTEXT_BYTES, CONTEXT_RANGE_BYTES, RUNTIME_BYTES, Card
from qadapt.methods import METHODS, has_norm
from qadapt.plan.activations import (
    attention_bytes,
    boundaries_there,
    boundary_bytes,
    first_input_bytes,
    mlp_bytes,
    norm_bytes,
    remade_bytes,
    shared_bytes,
)
from qadapt.plan.adapters import adapter_bytes, optimizer_bytes, saved_bytes, start_bytes
from qadapt.plan.attention import Attention, attention_of
from qadapt.plan.bottleneck import (
    bottleneck_bytes,
    is_after_attention,
    mask_bytes,
    reached,
    shared_stream_bytes,
    stands_beside,
)
from qadapt.plan.categories import STATIC
from qadapt.plan.fusion import attends, idle_bytes
from qadapt.plan.host import filed_bytes, pinned_bytes, table_bytes
from qadapt.plan.setting import Setting, check_setting
from qadapt.plan.speed import micro_batch_seconds
from qadapt.plan.stack import below_idle_bytes
from qadapt.plan.weights import base_weight_bytes, quantization_constant_bytes, unquantized_bytes
from qadapt.plan.workspace import (
    attention_passing_bytes,
    library_bytes,
    logit_bytes,
    mlp_passing_bytes,
    norm_passing_bytes,
    update_bytes,
)
from qadapt.shape import ModelShape
from qadapt.units import MIB

CLOSED_ERROR = 0.03
"""Of what comes and goes, either way: the closed form against the dry run. Of 300 sampled steps the worst was
off by 2.3 %, of 300 others by 1.6 % (`tools/bench/closed_form.py`)."""
KERNEL_ERROR = 0.02
"""On CUDA, of what comes and goes, either way: what kernels take inside, from a table. Of 54 steps on an H100
the dry run was off by 0.09 % of the peak in the median, 1.6 % at worst (`tools/bench/on_card.py`); the worst
of 32 published T4 peaks by 1.1 % (`tools/bench/estimator.py`)."""
KEPT_ON_CPU = 0.7
"""On a CPU, of what comes and goes: what the system's allocator keeps of freed blocks besides. Seen once: a
process of 2.56 GiB at 1.62 GiB of live tensors, at the end of the demo's run."""
UNSEEN_BYTES = 32 * MIB
"""On CUDA, either way: small workspaces that published peaks show (16 to 40 MiB) and nothing here counts."""
RESERVED_RATIOS = (1.0, 1.25)
"""Reserved over allocated bytes: never below; published ratios with fused attention go up to 1.25."""
SLACK_BYTES = 20 * MIB
"""What the allocator cannot avoid: one segment of its large pool begun."""


@dataclass(frozen=True)
class Estimate:
    """What one micro-batch of a setting takes, in bytes.

    `seconds_per_step` is of one micro-batch, None where the device's speed is unknown.
    """

    setting: Setting
    categories: dict[str, int]
    peak_phase: str
    phase_bytes: dict[str, int]
    context_bytes: int
    context_range_bytes: tuple[int, int]
    host_bytes: int
    pinned_bytes: int
    disk_bytes: int
    seconds_per_step: float | None
    relative_error: float = CLOSED_ERROR
    exact: bool = False

    @property
    def peak_allocated_bytes(self) -> int:
        """Allocated bytes at the highest moment."""
        return sum(self.categories.values())

    @property
    def reserved_low_bytes(self) -> int:
        """The least the allocator is likely to hold."""
        return self._reserved(RESERVED_RATIOS[0])

    @property
    def reserved_high_bytes(self) -> int:
        """The most the allocator is likely to hold with memory to spare; it shrinks under pressure."""
        return self._reserved(RESERVED_RATIOS[1])

    def _reserved(self, ratio: float) -> int:
        ratio = 1.0 if self.setting.device == "cpu" else ratio
        return round(self.peak_allocated_bytes * ratio)

    @property
    def needed_bytes(self) -> int:
        """Context, allocated bytes and unavoidable slack: what is compared with what is free."""
        slack = SLACK_BYTES if self.setting.device == "cuda" else 0
        return self.context_bytes + self.peak_allocated_bytes + slack

    @property
    def error_bytes(self) -> int:
        """How far `needed_bytes` may be off: the working bytes' share, and the context's range."""
        working = self.peak_allocated_bytes - sum(self.categories[name] for name in STATIC)
        context = self.context_range_bytes[1] - self.context_bytes
        unseen = UNSEEN_BYTES if self.setting.device == "cuda" else 0
        kept = KEPT_ON_CPU if self.setting.device == "cpu" else 0.0
        return round(working * max(self.relative_error, kept)) + unseen + context

    def fits(self, budget_bytes: int) -> bool:
        """Whether it fits even if the estimate is off by its stated error."""
        return self.needed_bytes + self.error_bytes <= budget_bytes


def peak_error_bytes(categories: Mapping[str, int], *, device: str) -> int:
    """How far the allocated bytes of a step's peak may be from its estimate, either way.

    Args:
        categories: The estimate's bytes at the peak.
        device: `cpu` or `cuda`.
    """
    working = sum(size for name, size in categories.items() if name not in STATIC)
    if device == "cuda":
        return round(working * (CLOSED_ERROR + KERNEL_ERROR)) + UNSEEN_BYTES
    return round(working * CLOSED_ERROR)


def estimate_step(shape: ModelShape, setting: Setting, *, card: Card | None = None) -> Estimate:
    """Estimates one micro-batch.

    Args:
        shape: The model.
        setting: The step.
        card: Where it runs, for the workspace and the time; unknown speeds give no time.

    Raises:
        BadRecipe: See `check_setting`.
    """
    check_setting(shape, setting)
    capability = card.compute_capability if card else None
    library = library_bytes(setting, compute_capability=capability)
    attention = attention_of(shape, setting, compute_capability=capability)
    moments = _moments(shape, setting, attention, library=library)
    totals = {phase: sum(categories.values()) for phase, categories in moments.items()}
    peak_phase = max(totals, key=lambda phase: totals[phase])
    is_cuda = setting.device == "cuda"
    peak = moments[peak_phase]
    context = card.context_bytes if card else CONTEXT_BYTES
    context_range = card.context_range_bytes if card else CONTEXT_RANGE_BYTES
    pinned = pinned_bytes(shape, setting)
    host = RUNTIME_BYTES[setting.device] + _loading_bytes(shape) + table_bytes(shape, setting) + pinned
    return Estimate(
        setting=setting,
        categories=peak,
        peak_phase=peak_phase,
        phase_bytes=totals,
        context_bytes=context if is_cuda else 0,
        context_range_bytes=context_range if is_cuda else (0, 0),
        host_bytes=host + (0 if is_cuda else totals[peak_phase]),
        pinned_bytes=pinned,
        disk_bytes=sum(disk_parts(shape, setting).values()),
        seconds_per_step=micro_batch_seconds(shape, setting, card),
        relative_error=CLOSED_ERROR + (KERNEL_ERROR if is_cuda else 0.0),
    )


@dataclass(frozen=True)
class _Layer:
    """What a layer keeps; what it holds at the highest moment of its way back, and what passes then.

    `idle_bytes` of what it keeps the very first layer does not, as nothing goes back that far.
    """

    kept_bytes: int
    widest_bytes: int
    passing_bytes: int
    idle_bytes: int


def _moments(
    shape: ModelShape, setting: Setting, attention: Attention, *, library: int
) -> dict[str, dict[str, int]]:
    adapter, update = adapter_bytes(shape, setting), update_bytes(shape, setting)
    static = {
        "base_weights": base_weight_bytes(shape, setting),
        "quantization_constants": quantization_constant_bytes(shape, setting),
        "unquantized": unquantized_bytes(shape, setting),
        "adapters": adapter + start_bytes(shape, setting),
        "gradients": adapter if setting.accumulates else 0,
        "optimizer": optimizer_bytes(shape, setting),
    }
    shape, setting = reached(shape, setting)
    kept, recomputed = (_layer(shape, setting, attention, is_recomputed=each) for each in (False, True))
    shared = shared_bytes(shape, setting, attention)
    at_loss = {
        "recompute_boundaries": _boundaries_before(shape, setting),
        "activations": shared + _kept_layers_bytes(shape, setting, kept) + norm_bytes(shape, setting),
        "loss": logit_bytes(shape, setting),
    }
    gradients = (static["gradients"], adapter)
    at_layer, passing = _at_widest_layer(shape, setting, gradients, kept=kept, recomputed=recomputed)
    at_layer["activations"] += shared
    return {
        "loss": {**static, **at_loss, "temporary": library},
        "layer": {**static, **at_layer, "loss": 0, "temporary": library + passing},
        "update": {
            **static,
            "gradients": adapter,
            "recompute_boundaries": 0,
            "activations": 0,
            "loss": 0,
            "temporary": library + update,
        },
    }


def _at_widest_layer(
    shape: ModelShape, setting: Setting, gradients: tuple[int, int], *, kept: _Layer, recomputed: _Layer
) -> tuple[dict[str, int], int]:
    """What is held at the highest moment of the layers' way back, and what passes within it.

    The final norm comes first, with all that was kept. From the last layer to the first, gradients come as
    kept activations and boundaries go, evenly: one end of the kept layers or of the recomputed ones is the
    highest. `gradients` are those that earlier micro-batches left, and those of a whole pass.
    """
    layers, count = shape.layers, setting.recomputed_layers(shape.layers)
    boundary, (earlier, whole) = boundary_bytes(shape, setting), gradients
    all_kept = _kept_layers_bytes(shape, setting, kept) + norm_bytes(shape, setting)
    before = _boundaries_before(shape, setting)
    at_norm = {"gradients": earlier, "recompute_boundaries": before, "activations": all_kept}
    moments = [(at_norm, norm_passing_bytes(shape, setting))]
    for layer, last, first in ((kept, layers - 1, count), (recomputed, count - 1, 0)):
        for place in (last, first) if first <= last else ():
            held = layer.widest_bytes + kept.kept_bytes * max(0, place - count)
            if place and not count:
                held -= layer.idle_bytes
            waiting = boundaries_there(setting, min(place + 1, count), is_turn=place < count)
            at_layer = {
                "gradients": earlier or whole * (layers - 1 - place) // layers,
                "recompute_boundaries": waiting * boundary,
                "activations": held,
            }
            moments.append((at_layer, layer.passing_bytes))
    return max(moments, key=lambda moment: sum(moment[0].values()) + moment[1])


def _boundaries_before(shape: ModelShape, setting: Setting) -> int:
    """Inputs of recomputed layers that are on the device before the first layer goes backward."""
    count = setting.recomputed_layers(shape.layers)
    return boundaries_there(setting, count, is_turn=False) * boundary_bytes(shape, setting)


def _kept_layers_bytes(shape: ModelShape, setting: Setting, layer: _Layer) -> int:
    """What the kept layers keep."""
    recomputed = setting.recomputed_layers(shape.layers)
    kept = (shape.layers - recomputed) * layer.kept_bytes
    return kept if recomputed else kept - layer.idle_bytes


def _layer(shape: ModelShape, setting: Setting, attention: Attention, *, is_recomputed: bool) -> _Layer:
    """One layer; its highest moment is in its feed-forward half, or in its attention."""
    half = attention_bytes(shape, setting, attention, is_recomputed=is_recomputed)
    kept = half + mlp_bytes(shape, setting)
    both = (kept, mlp_passing_bytes(shape, setting, is_recomputed=is_recomputed))
    alone = (half, attention_passing_bytes(shape, setting, attention))
    remade = 0 if is_recomputed else remade_bytes(shape, setting)
    return _Layer(kept - remade, *max(both, alone, key=sum), idle_bytes=_idle_bytes(shape, setting, half))


def _idle_bytes(shape: ModelShape, setting: Setting, half: int) -> int:
    """What comes before the first trained value: its norm (`first_input_bytes`), or all but the adapters."""
    if not stands_beside(setting):
        return first_input_bytes(shape, setting)
    before = half - bottleneck_bytes(shape, setting, "attention")
    before += 0 if has_norm(setting.nonlinearity) else mask_bytes(shape, setting)
    before += idle_bytes(shape, setting) if attends(setting) else 0
    before += below_idle_bytes(shape, setting, "attention")
    if is_after_attention(setting):
        return before
    before += below_idle_bytes(shape, setting, "mlp")
    before += mlp_bytes(shape, setting) - remade_bytes(shape, setting)
    before -= bottleneck_bytes(shape, setting, "mlp")
    return before - shared_stream_bytes(shape, setting)


def _loading_bytes(shape: ModelShape) -> int:
    """The two largest source tensors, which lie in host memory while the base is loaded."""
    linear = max(linear.weights for linear in shape.linears)
    two_largest = sorted((shape.embedding_weights, 0 if shape.tied else shape.embedding_weights, linear))[1:]
    return 2 * sum(two_largest)


def disk_parts(shape: ModelShape, setting: Setting, *, checkpoints: int = 3) -> dict[str, int]:
    """Bytes a run writes: saved states (the two newest and the best), adapter, a merged fp16 model, if any.

    While a CPU's step puts boundaries away, they lie in the temporary folder.
    """
    adapter = adapter_bytes(shape, setting) + start_bytes(shape, setting)
    filed = filed_bytes(shape, setting)
    return {
        "checkpoints": checkpoints * (adapter + optimizer_bytes(shape, setting)),
        "adapter": saved_bytes(shape, setting),
        **({} if METHODS[setting.method].is_beside else {"merged-fp16": 2 * shape.parameters}),
        **({"boundaries": filed} if filed else {}),
    }
