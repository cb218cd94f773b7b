"""What a run takes, by category: the static ones counted from the tensors, the peak read from the system.

On CUDA the peak is the allocator's. On a CPU it is anonymous memory, sampled by a thread, above the level at
the start of the run: the pages of mapped weight files do not count, as they can be dropped at any time.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import psutil
import torch
from torch import Tensor, nn

from qadapt.plan.categories import STATIC
from qadapt.train.optimizer import AdapterOptimizer

WORKING = "working"
"""The one measured entry for all that a step allocates: boundaries, activations, loss and temporary
together."""

_SAMPLE_SECONDS = 0.02


class PeakMeter:
    """Measures the peak of a device's memory while it is open, above the level at its start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._highest = self._floor = 0 if device.type == "cuda" else anonymous_bytes()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> PeakMeter:
        if self._device.type == "cuda":
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """The highest level so far, above that at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        self._highest = max(self._highest, anonymous_bytes())
        return self._highest - self._floor

    def _sample(self) -> None:
        while not self._closed.wait(_SAMPLE_SECONDS):
            self._highest = max(self._highest, anonymous_bytes())


def anonymous_bytes() -> int:
    """Memory of this process that is no file's: RssAnon on Linux, the resident set elsewhere."""
    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return int(found[1]) * 1024
    return psutil.Process().memory_info().rss


def static_bytes(model: nn.Module, optimizer: AdapterOptimizer) -> dict[str, int]:
    """Bytes of everything that stays from step to step, by category.

    Gradients are counted at the size they have before the update, when all of them are there.
    """
    sizes = dict.fromkeys(STATIC, 0)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # only 4-bit parameters have one
        if state is not None:
            sizes["base_weights"] += parameter.nbytes
            sizes["quantization_constants"] += _constant_bytes(state)
        elif parameter.requires_grad:
            sizes["adapters"] += parameter.nbytes
            sizes["gradients"] += parameter.nbytes
        else:
            sizes["unquantized"] += parameter.nbytes
    sizes["unquantized"] += sum(buffer.nbytes for buffer in model.buffers())
    return sizes | {"optimizer": optimizer.state_bytes}


def _constant_bytes(state: object) -> int:
    held: list[Tensor] = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = getattr(state, "state2", None)
    return sum(value.nbytes for value in held) + (_constant_bytes(nested) if nested is not None else 0)


def measured(static: dict[str, int], peak_bytes: int) -> dict[str, int]:
    """The static categories, and all the rest of the peak as the step's working memory."""
    return static | {WORKING: max(0, peak_bytes - sum(static.values()))}
