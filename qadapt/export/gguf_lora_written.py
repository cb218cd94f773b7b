"""What a LoRA file makes of its base in llama.cpp: the base's weights with the file's pairs added to them.

llama.cpp adds alpha / R · B · A to a weight, in the order in which it holds its rows; undone by
`model/gguf_layout.py`, that must be what the adapter makes of the base. Writes nothing.

Legend: O rows, I columns of a weight, R rank.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from qadapt.export.gguf_front import Front, Place, read_front
from qadapt.export.gguf_metadata import read_architecture
from qadapt.export.reference import Reference, View
from qadapt.export.tensor_fault import UNEXPECTED, Fault
from qadapt.model.gguf_layout import Stored, row_order
from qadapt.model.shards import TensorEntry

_BASE = View("original", strength=0.0)
_ROUNDING = 2.0**-22
"""Alpha, and what of the scale is in B, are float32: more than a merge rounds."""


class GgufLoraWritten:
    """The tensors of a base with a LoRA file on it, in float32 (`stored_tensors.Written`).

    Attributes:
        entries: Name → type and shape: those of the base.
        faults: Tensors of the file that are of no weight of the base, and metadata that llama.cpp would
            refuse.

    Args:
        path: The file.
        described: The base's folder, of which the configuration is read.
        base: The numbers of the base.

    Raises:
        BadModel: File or configuration cannot be read.
        Unsupported: It is of an architecture that is not written.
    """

    def __init__(self, path: Path, *, described: Path, base: Reference) -> None:
        front, architecture = read_front(path), read_architecture(described)
        self._path, self._base = path, base
        alpha = front.values.get("adapter.lora.alpha")
        self._alpha = alpha if isinstance(alpha, float) else math.nan
        self.entries = {name: TensorEntry(name, "F32", entry.shape) for name, entry in base.entries.items()}
        self._pairs: dict[str, tuple[Stored, Place, Place]] = {}
        left = set(front.tensors)
        for name in self.entries:
            stored = architecture.layout.stored(name)
            sides = () if stored is None else (f"{stored.name}.lora_a", f"{stored.name}.lora_b")
            if stored is not None and left.issuperset(sides):
                left.difference_update(sides)
                a, b = (front.tensors[side] for side in sides)
                self._pairs[name] = (stored, a, b)
        self.faults = tuple(Fault(name, UNEXPECTED) for name in sorted(left)) + _metadata_faults(
            front, architecture.name
        )

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """(last - first, I) rows of a weight with its pair."""
        rows = self._base.rows(name, first, last, view=_BASE).values.double()
        if name not in self._pairs:
            return rows.float()
        stored, a, b = self._pairs[name]
        order = row_order(b.shape[0], stored.interleaved_heads)[first:last]
        left, right = self._numbers(b)[order], self._numbers(a)  # (rows, R), (R, I)
        return rows.add(torch.from_numpy(left @ right), alpha=self._alpha / len(right)).float()

    def bound(self, name: str, exact: torch.Tensor, first: int) -> torch.Tensor | None:
        """The most that each number may differ from the exact one."""
        return exact.abs() * _ROUNDING if name in self._pairs else None

    def moved(
        self, name: str, values: torch.Tensor, *, exact: torch.Tensor, first: int
    ) -> torch.Tensor | None:
        """None: there are no steps."""
        return None

    def _numbers(self, place: Place) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        held = np.memmap(self._path, dtype="<f4", mode="r", offset=place.start, shape=place.shape)
        return held.astype(np.float64)


def _metadata_faults(front: Front, architecture: str) -> tuple[Fault, ...]:
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": architecture}
    found = {key: front.values.get(key) for key in wanted}
    return tuple(
        Fault(key, UNEXPECTED, f"{found[key]!r} instead of {value!r}")
        for key, value in wanted.items()
        if found[key] != value
    )
