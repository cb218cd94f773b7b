"""The tensors of a 4-bit checkpoint as a model has them: what a proof compares with the exact ones.

Read through safetensors and dequantized by bitsandbytes, one tensor at a time. Writes nothing.

Legend: O rows, I input columns of a weight, B block of 64 values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type, quantize_4bit

from qadapt.errors import BadModel
from qadapt.export.quantized import BLOCK, STATE
from qadapt.export.stored_tensors import ExportedFiles
from qadapt.export.tensor_fault import Fault
from qadapt.model.shards import TensorEntry

_SCALE_STEP = 0.0075
"""Half of the widest step of 8-bit scales, as a share of the largest: 0.9 / 64 / 2 (arXiv:2110.02861)."""
_ROUNDING = 0.006
"""Of a block's largest value: what rounding weights and scale to 16 bits moves a quantized value."""


class QuantizedWritten:
    """The tensors of a 4-bit checkpoint under their names in the model (`stored_tensors.Written`).

    Attributes:
        entries: Name → type and shape; a quantized weight has those it was quantized from.
        faults: What is wrong with the files themselves.

    Args:
        files: The checkpoint.
        dtype: What was not quantized has this type, `BF16` or `F16`.
    """

    def __init__(self, files: ExportedFiles, *, dtype: str) -> None:
        self._files, self._dtype = files, dtype
        names = [name.removesuffix(f".{STATE}") for name in files.entries if name.endswith(f".{STATE}")]
        self._parts = {name: _parts_of(files, name) for name in names}
        hidden = {part for parts in self._parts.values() for part in parts}
        self._held: tuple[str, torch.Tensor, float] = ("", torch.empty(0), 0.0)
        self.entries = {
            name: self._entry(name, entry) for name, entry in files.entries.items() if name not in hidden
        }

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What is wrong with the files themselves."""
        return self._files.faults

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """(last - first, I) rows of a tensor, dequantized."""
        if name not in self._parts:
            return self._files.rows(name, first, last)
        return self._dequantized(name)[0][first:last]

    def bound(self, name: str, exact: torch.Tensor, first: int) -> torch.Tensor | None:
        """How far the nearest of the 16 levels is, and what scales and rounding add; None: one rounding."""
        if name not in self._parts:
            return None
        columns = exact.shape[1]
        width = BLOCK if columns % BLOCK == 0 else columns
        blocks = exact.double().reshape(-1, width)  # (blocks, B)
        scale = blocks.abs().amax(1, keepdim=True)
        levels = get_4bit_type("nf4", device="cpu").double()
        middles = (levels[1:] + levels[:-1]) / 2
        nearest = levels[torch.bucketize(blocks / scale.clamp(min=1e-38), middles)] * scale
        largest = self._dequantized(name)[1]
        allowed = (nearest - blocks).abs() + _ROUNDING * scale + _SCALE_STEP * largest
        bound: torch.Tensor = allowed.reshape(exact.shape)
        return bound

    def moved(
        self, name: str, values: torch.Tensor, *, exact: torch.Tensor, first: int
    ) -> torch.Tensor | None:
        """(n, I) which numbers are of another level than the exact ones; None: rows begin inside a block."""
        columns = exact.shape[1]
        if name not in self._parts or columns % BLOCK:
            return None
        rounded = exact.float().to(values.dtype).reshape(1, -1)
        nearest, _ = quantize_4bit(rounded, blocksize=BLOCK, quant_type="nf4")
        start = first * columns // 2
        stored = self._whole(name).reshape(-1)[start : start + nearest.numel()]
        return (_codes(stored) != _codes(nearest)).view(exact.shape)

    def _entry(self, name: str, entry: TensorEntry) -> TensorEntry:
        if name not in self._parts:
            return entry
        return replace(entry, dtype=self._dtype, shape=tuple(self._state(name).shape or ()))

    def _state(self, name: str) -> QuantState:
        held = {part: self._whole(part) for part in self._parts[name]}
        try:
            return QuantState.from_dict(held, device=torch.device("cpu"))
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
            raise BadModel(
                f"What the file says of the 4 bits of {name} is damaged.", cure="Get the file again."
            ) from None

    def _dequantized(self, name: str) -> tuple[torch.Tensor, float]:
        """A weight (O, I) and its largest magnitude; the last one asked for is kept."""
        if self._held[0] != name:
            rows, columns = self.entries[name].shape
            state = self._state(name)
            # as one long row: see `nf4.py`
            count = rows * columns
            state.shape = torch.Size((1, count + count % 2))
            weight = dequantize_4bit(self._whole(name), state).view(-1)[:count].view(rows, columns)
            self._held = (name, weight, float(weight.abs().max()))
        return self._held[1], self._held[2]

    def _whole(self, name: str) -> torch.Tensor:
        entry = self._files.entries[name]
        return self._files.rows(name, 0, entry.shape[0]).reshape(entry.shape)


def _codes(packed: torch.Tensor) -> torch.Tensor:
    """(n,) the numbers of the levels, of which two lie in a byte."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)


def _parts_of(files: ExportedFiles, name: str) -> tuple[str, ...]:
    return tuple(part for part in files.entries if part.startswith(f"{name}."))
