"""What a run takes, by category: the static ones counted from the tensors, the peak read from the system.

On CUDA the peak is the allocator's. On a CPU it is anonymous memory, sampled by a thread, above the level at
the start of the run: the pages of mapped weight files do not count, as they can be dropped at any time.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import psutil
import torch
from peft import PeftModel
from torch import Tensor

from qadapt.plan.categories import STATIC
from qadapt.train.optimizer import AdapterOptimizer, held_tensors

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


def static_tensors(model: PeftModel, optimizer: AdapterOptimizer) -> dict[str, list[Tensor]]:
    """Every tensor that stays from step to step, by category; gradients, which come and go, are not here."""
    found: dict[str, list[Tensor]] = {name: [] for name in STATIC if name != "gradients"}
    base = model.get_base_model()
    ends = (base.get_input_embeddings().weight, base.get_output_embeddings().weight)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # only 4-bit parameters have one
        if state is not None:
            found["quantization_constants"] += _constants(state)
        if parameter.requires_grad:
            found["adapters"].append(parameter)
        elif parameter.ndim > 1 and not any(parameter is end for end in ends):
            found["base_weights"].append(parameter)
        else:
            found["unquantized"].append(parameter)
    found["unquantized"] += model.buffers()
    found["optimizer"] += held_tensors(optimizer)
    return found


def static_bytes(model: PeftModel, optimizer: AdapterOptimizer) -> dict[str, int]:
    """Bytes of everything that stays from step to step, by category.

    Gradients are counted at the size they have before the update, when all of them are there.
    """
    sizes = {name: _stored_bytes(tensors) for name, tensors in static_tensors(model, optimizer).items()}
    return sizes | {"gradients": sizes["adapters"]}


def _stored_bytes(tensors: Iterable[Tensor]) -> int:
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _constants(state: object) -> list[Tensor]:
    held: list[Tensor] = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = getattr(state, "state2", None)
    return held + (_constants(nested) if nested is not None else [])


def measured(static: dict[str, int], peak_bytes: int) -> dict[str, int]:
    """The static categories, and all the rest of the peak as the step's working memory."""
    return static | {WORKING: max(0, peak_bytes - sum(static.values()))}
