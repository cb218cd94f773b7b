"""What a device takes and how fast it is, beside what was predicted; and the ladder where memory runs out.

Allocated bytes are compared with the dry run, of which they are within a few percent on every card seen so
far; reserved ones with their range; the context with the catalogue's. On a CPU the ledger counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from qadapt.data.tokens import Tokens
from qadapt.engine.ledger import Ledger
from qadapt.engine.out_of_memory import free_memory
from qadapt.events import Eased
from qadapt.hardware.cards import Card
from qadapt.hardware.probe import Device, probe
from qadapt.model.precision import DTYPES, capability_of
from qadapt.plan.allocator import RUN_NOISE, reserved_range
from qadapt.plan.estimate import estimate_step
from qadapt.plan.setting import Setting, auto_dtypes
from qadapt.plan.workspace import blas_workspace_bytes
from qadapt.selftest.check import Check, Found, tried
from qadapt.selftest.trainee import Size, Trainee, full_batch, random_rows
from qadapt.shape import find_config, shape_from_config
from qadapt.train.dryrun import DryRun, dry_run
from qadapt.train.memory import MemoryMeter, static_tensors
from qadapt.train.oom import Beginning, Ladder, Trial
from qadapt.train.spill import OUTSIDE_BYTES, card_memory, within_free_memory
from qadapt.train.step import StepResult, train_step
from qadapt.units import MIB, format_bytes

ALLOCATED_BAR, ALLOCATED_BYTES = 0.03, 8 * MIB
"""The larger of the two is how far a peak may be off."""
ROOM = 0.6
"""Of what a step takes above the model, where the ladder is tried."""
SAME = 2e-2
"""How far a gradient may be off whose rows were split and whose layers recomputed, in 16 bits; fp32 is far
closer."""
WARM_UP, REPEATS = 3, 10


@dataclass(frozen=True)
class Residual:
    """A step's peak as the closed form predicts it and as it was measured."""

    predicted_bytes: int
    measured_bytes: int


@dataclass(frozen=True)
class _Step:
    """Two steps as they were measured, beside the dry run; `reserved_bytes` is 0 on a CPU."""

    dry: DryRun
    allocated_bytes: int
    reserved_bytes: int
    seconds: float
    predicted_seconds: float | None

    def allocated(self) -> Found:
        off_bytes, bar_bytes = self.allocated_bytes - self.dry.peak.bytes, ALLOCATED_BAR * self.dry.peak.bytes
        said = f"{format_bytes(self.allocated_bytes)}, {off_bytes / self.dry.peak.bytes:+.2%} of the dry run"
        return said, abs(off_bytes) <= max(bar_bytes, ALLOCATED_BYTES)

    def reserved(self) -> Found:
        expected = reserved_range(self.dry.trace).widened(RUN_NOISE)
        wanted = f"{expected.low_bytes // MIB} to {expected.high_bytes // MIB} MiB expected"
        return f"{format_bytes(self.reserved_bytes)}, {wanted}", expected.holds(self.reserved_bytes)

    def time(self) -> Found:
        predicted = f"{self.predicted_seconds:.3f} s predicted" if self.predicted_seconds else "unpredicted"
        return f"{self.seconds:.3f} s, {predicted}", True


class Measures:
    """The measurements of one device; what they found stays here.

    Args:
        device: Which.
        card: The card, where it is one and known.
        size: Of the model that the steps are of.
    """

    def __init__(self, device: torch.device, *, card: Card | None, size: Size) -> None:
        self._device = device
        self._card = card
        self._size = size
        self.residual: Residual | None = None

    @property
    def setting(self) -> Setting:
        """The step that is measured: full rows, the device's own types."""
        if self._device.type == "cuda":
            compute, adapter = auto_dtypes("cuda", has_bf16=(capability_of(self._device) or 0) >= 8)
            return Setting(
                rows=2, length=1024, compute_dtype=compute, adapter_dtype=adapter, accumulates=False
            )
        return Setting(
            rows=2, length=64, compute_dtype="fp32", adapter_dtype="fp32", optimizer="adamw",
            accumulates=False, device="cpu",
        )  # fmt: skip

    def step_checks(self, folder: Path) -> Iterator[Check]:
        """Memory and time of a step; `folder` holds the model."""
        found: list[_Step] = []

        def allocated() -> Found:
            found.append(self._measured_step(folder))
            return found[0].allocated()

        yield tried("memory, allocated", allocated)
        for step in found:
            if self._device.type == "cuda":
                yield tried("memory, reserved", step.reserved)
            yield tried("second step", step.time)

    def other_checks(self, folder: Path) -> Iterator[Check]:
        """The ladder, and products; `folder` holds the model."""
        free_memory(self._device)
        yield tried("out-of-memory ladder", partial(self._ladder, folder))
        free_memory(self._device)
        names = ("bf16", "fp16", "fp32") if self._device.type == "cuda" else ("bf16", "fp32")
        for name in names:
            yield tried(f"product, {name}", partial(self._product, name))

    def _measured_step(self, folder: Path) -> _Step:
        """Two steps of the setting against the dry run of them."""
        config, setting = find_config(str(folder)), self.setting
        closed = estimate_step(shape_from_config(config.values, name="self-test"), setting, card=self._card)
        dry = dry_run(config.values, setting, capability=capability_of(self._device), steps=2)
        before_bytes = _before(self._device)
        trainee = Trainee(folder, setting, device=self._device)
        batch, meter = full_batch(setting, vocabulary=self._size.vocabulary), None
        for _ in range(2):
            meter = meter or MemoryMeter(trainee.model, trainee.optimizer)
            watching = meter.watching() if self._device.type == "cpu" else nullcontext()
            _wait(self._device)
            started = time.perf_counter()
            with watching:
                train_step(
                    trainee.model, trainee.optimizer, [batch], learning_rate=1e-4, clip_norm=1.0,
                    scaler=trainee.new_scaler(),
                )  # fmt: skip
            _wait(self._device)
            seconds = time.perf_counter() - started
        assert meter is not None
        measured_bytes = meter.measured()[1] - before_bytes
        self.residual = Residual(closed.peak_allocated_bytes, measured_bytes)
        reserved_bytes = torch.cuda.max_memory_reserved() if self._device.type == "cuda" else 0
        return _Step(dry, measured_bytes, reserved_bytes, seconds, closed.seconds_per_step)

    def _ladder(self, folder: Path) -> Found:
        """A step with too little room must give the gradient that it gives with room for all."""
        long = self.setting.length // 2
        rows = random_rows((long,) * 4 + (long // 4,) * 4, vocabulary=self._size.vocabulary)
        setting = replace(self.setting, rows=8, recompute="none")
        trainee = Trainee(folder, setting, device=self._device)
        with _counting(trainee) as working_bytes:
            expected = trainee.gradient(rows)
        room_bytes = round(ROOM * working_bytes())
        free_memory(self._device)
        eased: list[Eased] = []
        with _little_room(trainee, room_bytes) as around, tempfile.TemporaryDirectory() as place:
            gradient = _climbed(trainee, rows, around=around, eased=eased, run_folder=Path(place))
        off = float((gradient - expected).norm() / expected.norm())
        words = ", ".join(f"{event.knob} {event.value}" for event in eased)
        said = f"{words or 'nothing eased'} in {format_bytes(room_bytes)}; gradient {off:.1e} off"
        return said, bool(eased) and off <= SAME

    def _product(self, name: str) -> Found:
        """Dense products of a size that a 7B model has; a tenth of the catalogue's speed would be a fault."""
        rows, width = (4096, 4096) if self._device.type == "cuda" else (256, 512)
        left = torch.randn(rows, width, device=self._device).to(DTYPES[name])
        right = torch.randn(width, width, device=self._device).to(DTYPES[name])
        seconds = _seconds(lambda: left @ right, self._device)
        tera = 2 * rows * width * width / seconds / 1e12
        known = self._card.tflops if self._card is not None and name == self.setting.compute_dtype else None
        said = f"{tera:.3g} TFLOPS" + (f", {known:.3g} in the catalogue" if known else "")
        return said, known is None or tera >= 0.1 * known


def found_context(before: Device) -> Found:
    """What the driver took for this process besides what torch reserves, on a card that nobody else used.

    Args:
        before: The card as it was before this process touched it.
    """
    torch.cuda.synchronize()
    now = next(device for device in probe().devices if device.uuid == before.uuid)
    context_bytes = before.free_bytes - now.free_bytes - torch.cuda.memory_reserved()
    low, high = before.card.context_range_bytes
    said = f"{format_bytes(context_bytes)}, {low // MIB} to {high // MIB} MiB expected"
    return said, context_bytes <= high


def _before(device: torch.device) -> int:
    """What is allocated but for the workspaces of cuBLAS, which a thread keeps from its first product on."""
    if device.type != "cuda":
        return 0
    values = torch.ones(16, 16, device=device, requires_grad=True)
    (values @ values).sum().backward()
    del values
    free_memory(device)
    return torch.cuda.memory_allocated(device) - 2 * blas_workspace_bytes(capability_of(device))


@contextmanager
def _counting(trainee: Trainee) -> Iterator[Callable[[], int]]:
    """What a step takes above what was there: of what torch reserves, on a CPU of what the ledger sees."""
    device = trainee.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_reserved(device)
        yield lambda: torch.cuda.max_memory_reserved(device) - before_bytes
        return
    ledger = _ledger(trainee)
    with ledger:
        yield lambda: ledger.peak.bytes - sum(ledger.live.values())


def _ledger(trainee: Trainee, *, budget_bytes: int | None = None) -> Ledger:
    ledger = Ledger(budget_bytes=budget_bytes)
    for category, tensors in static_tensors(trainee.model, trainee.optimizer).items():
        ledger.hold(category, tensors)
    return ledger


@contextmanager
def _little_room(trainee: Trainee, room_bytes: int) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Leaves so much room above what is there; gives what each attempt is to run in.

    On a card the rest of it is taken, and the allocator capped at what is free as in a run; on a CPU the
    ledger raises what a card would.
    """
    device = trainee.device
    if device.type != "cuda":
        held = sum(_ledger(trainee).live.values())
        yield lambda: _ledger(trainee, budget_bytes=held + room_bytes)
        return
    with within_free_memory(device):
        free_bytes = card_memory(device).free_bytes - OUTSIDE_BYTES
        ballast = torch.empty(max(0, free_bytes - room_bytes), dtype=torch.uint8, device=device)
        try:
            yield nullcontext
        finally:
            del ballast
            free_memory(device)


def _climbed(
    trainee: Trainee,
    rows: list[Tokens],
    *,
    around: Callable[[], AbstractContextManager[object]],
    eased: list[Eased],
    run_folder: Path,
) -> Tensor:
    """The gradient of a step that the ladder is climbed for; the rungs into `eased`."""
    ladder = Ladder(trainee.model, trainee.optimizer, division=trainee.division, run_folder=run_folder)
    taken: list[Tensor] = []

    def find() -> StepResult | None:
        return trainee.find(ladder.training(rows))

    trial = Trial(find=find, apply=lambda _: taken.append(trainee.taken_gradient()), around=around)
    beginning = Beginning(trainee.device, None)
    events = ladder.climb_step(trial, step=1, rows=rows, beginning=beginning)
    eased.extend(event for event in events if isinstance(event, Eased))
    return taken[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(do: Callable[[], object], device: torch.device) -> float:
    for _ in range(WARM_UP):
        do()
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        do()
    _wait(device)
    return (time.perf_counter() - started) / REPEATS
