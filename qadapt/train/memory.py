"""What a run takes, by category: some of its steps under the ledger, the peak of all of them by the device.

On CUDA the peak is the allocator's own; on a CPU, whose allocator keeps no count, it is the ledger's, of the
steps that were watched. A watched step takes about a quarter more time (135M, CPU; `tools/bench/overhead.py`)
and no other number.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Int8Params
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from qadapt.adapters.frozen import frozen_of
from qadapt.adapters.lora import adapter_tensors
from qadapt.engine.host import device_of
from qadapt.engine.ledger import Ledger
from qadapt.engine.moments import watched
from qadapt.engine.target import Target, kernels_of
from qadapt.plan.categories import STATIC
from qadapt.plan.setting import ALLOCATION_BYTES
from qadapt.train.optimizer import AdapterOptimizer, held_tensors


class MemoryMeter:
    """Measures the memory of a model's steps.

    Args:
        model: The adapted model, on its device.
        optimizer: Over its trained parameters.
    """

    def __init__(self, model: PeftModel, optimizer: AdapterOptimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._device = device_of(model)
        self._peak_bytes = 0
        self._categories: dict[str, int] = {}
        self._before: tuple[dict[str, int], int] = {}, 0  # what earlier processes of the run measured
        reset_peak(self._device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, one step is counted by category."""
        is_cuda = self._device.type == "cuda"
        ledger = Ledger(
            step=ALLOCATION_BYTES["cuda" if is_cuda else "cpu"],
            inside=None if is_cuda else kernels_of(Target()),  # on CUDA the allocator's peak has them
            has_host_apart=is_cuda,
        )
        with ledger.during("load"):
            for category, tensors in static_tensors(self._model, self._optimizer).items():
                ledger.hold(category, tensors)
        watching = watched(ledger, self._model.get_base_model(), optimizer=self._optimizer.inner)
        with _without_collection(), watching, ledger:
            yield
        if ledger.peak.bytes > self._peak_bytes:
            self._peak_bytes, self._categories = ledger.peak.bytes, ledger.peak.categories

    def measured(self) -> tuple[dict[str, int], int]:
        """Bytes by category at the highest watched moment, and the peak; they sum up to it.

        On CUDA what the allocator counts above the ledger (kernels' workspaces, steps that were not watched)
        is `temporary`. Of a resumed run it is the highest moment of all its processes.
        """
        now = self._measured_here()
        return now if now[1] > self._before[1] else (dict(self._before[0]), self._before[1])

    def values(self) -> dict[str, Any]:
        """The highest moment as plain values for a checkpoint."""
        categories, peak_bytes = self.measured()
        return {"categories": categories, "peak_bytes": peak_bytes}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Takes over what `values` gave in an earlier process of the run."""
        self._before = dict(values["categories"]), int(values["peak_bytes"])

    def _measured_here(self) -> tuple[dict[str, int], int]:
        categories, peak_bytes = dict(self._categories), self._peak_bytes
        if self._device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(self._device) + self._optimizer.paged_bytes
            categories["temporary"] = max(0, categories.get("temporary", 0) + peak_bytes - self._peak_bytes)
        return categories, peak_bytes


@contextmanager
def _without_collection() -> Iterator[None]:
    """The ledger's many small objects must not bring Python to look through all others for unused ones.

    It would take about a second in every few watched steps; a step leaves nothing that it alone would find.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def reset_peak(device: torch.device) -> None:
    """Lets a card's allocator find its peak anew; on a CPU there is nothing to forget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def static_tensors(model: PeftModel, optimizer: AdapterOptimizer) -> dict[str, list[Tensor]]:
    """Every tensor that stays from step to step, by category; gradients, which come and go, are not here."""
    return base_tensors(model.get_base_model()) | {
        "adapters": list(adapter_tensors(model).values()),
        "optimizer": held_tensors(optimizer),
    }


def base_tensors(base: PreTrainedModel) -> dict[str, list[Tensor]]:
    """The frozen tensors of a base by category, with or without adapters attached."""
    found: dict[str, list[Tensor]] = {name: [] for name in STATIC[:3]}
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    ends = {id(parameter) for table in tables for parameter in table.parameters()}
    of_adapter = {id(tensor) for tensor in frozen_of(base).values()}
    for parameter in base.parameters():
        if parameter.requires_grad or id(parameter) in of_adapter:
            continue
        state = getattr(parameter, "quant_state", None)  # only 4-bit parameters have one
        if state is not None:
            found["quantization_constants"] += _constants(state)
        if isinstance(parameter, Int8Params):  # until their first product, which is none of the library's
            found["quantization_constants"].append(parameter.SCB)
        is_weight = parameter.ndim > 1 and id(parameter) not in ends
        found["base_weights" if is_weight else "unquantized"].append(parameter)
    found["unquantized"] += [buffer for buffer in base.buffers() if id(buffer) not in of_adapter]
    return found


def _constants(state: object) -> list[Tensor]:
    held: list[Tensor] = [value for value in vars(state).values() if isinstance(value, Tensor)]
    nested = getattr(state, "state2", None)
    return held + (_constants(nested) if nested is not None else [])
