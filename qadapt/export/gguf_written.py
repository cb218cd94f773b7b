"""The tensors of a GGUF file as a model folder has them: what a proof compares with the exact ones.

Dequantized by the `gguf` package and undone by `model/gguf_layout.py`, a range of rows at a time. Writes
nothing.

Legend: O rows, I elements of a row; a vector has O rows of one element.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch

from qadapt.export.gguf_front import Front, Place, is_same_value, read_front
from qadapt.export.gguf_metadata import Architecture, read_architecture
from qadapt.export.gguf_types import (
    allowed_error,
    ggml_type,
    is_quantized,
    is_searched,
    nearest_step_error,
)
from qadapt.export.llama_quantize import K_FORMS
from qadapt.export.tensor_fault import MISSING, UNEXPECTED, Fault
from qadapt.model.gguf_layout import Stored, row_order
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import rows_of

_PLUS_ONE_ROUNDING = 2.0**-23
"""What adding 1 and taking it away again costs a float32, relative to the sum."""
_SIXTEEN_BITS = ("F16", "BF16")
_BY_LLAMA_QUANTIZE = frozenset(int(gguf.LlamaFileType[f"MOSTLY_{kind}"]) for kind in K_FORMS.values())
"""Types of whole files, by their number in the metadata, that are made from a file in float16."""
_TWICE_ROUNDED = 3 * 2.0**-11
"""Of the largest number: what float16 in between moves a number, its block's scale and its lowest value."""


class GgufWritten:
    """The tensors of a GGUF file under their names in transformers, in float32 (`stored_tensors.Written`).

    Attributes:
        entries: Name → type and shape, of those that the file has.
        faults: Tensors that it should not have, metadata and rotary factors that are not the model's.

    Args:
        path: The file.
        described: A folder with the model's config.json.
        names: Names of the tensors that the model should have.

    Raises:
        BadModel: File or configuration cannot be read.
        Unsupported: It is of an architecture that is not written.
    """

    def __init__(self, path: Path, *, described: Path, names: Iterable[str]) -> None:
        architecture, front = read_architecture(described), read_front(path)
        self._path = path
        self._is_from_16_bits = front.values.get("general.file_type") in _BY_LLAMA_QUANTIZE
        left = set(front.tensors) - set(architecture.tensors)
        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, tuple[Stored, Place]] = {}
        for name in names:
            source = (
                "model.embed_tokens.weight" if architecture.is_tied and name == "lm_head.weight" else name
            )
            stored = architecture.layout.stored(source)
            if stored is None or stored.name not in front.tensors:
                continue
            left.discard(stored.name)
            place = front.tensors[stored.name]
            self._places[name] = (stored, place)
            self.entries[name] = TensorEntry(name, "F32", place.shape)
        self.faults = (
            *(Fault(name, UNEXPECTED) for name in sorted(left)),
            *_metadata_faults(front, architecture),
            *self._factor_faults(front, architecture),
        )

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """(last - first, I) rows of a tensor, dequantized."""
        stored, place = self._places[name]
        exact = gguf.quants.dequantize(self._held(name, first, last), ggml_type(place.kind))
        exact = exact - np.float32(stored.is_plus_one)
        return torch.from_numpy(exact.reshape(last - first, -1))

    def _held(self, name: str, first: int, last: int) -> npt.NDArray[np.uint8]:
        """(last - first, bytes of a row) as they lie in the file, in the order of the model's rows."""
        stored, place = self._places[name]
        count = rows_of(self.entries[name])
        order = row_order(count, stored.interleaved_heads)[first:last]
        shape = (count, place.size_bytes // count)
        return np.asarray(
            np.memmap(self._path, dtype=np.uint8, mode="r", offset=place.start, shape=shape)[order]
        )

    def bound(self, name: str, exact: torch.Tensor, first: int) -> torch.Tensor | None:
        """The most that each number may differ from the exact one; None: by one rounding to float32."""
        stored, place = self._places[name]
        if stored.is_plus_one:
            return (exact.abs() + 1) * _PLUS_ONE_ROUNDING
        if place.kind == "F32":
            return None
        values = exact.double().numpy()
        bound = torch.from_numpy(allowed_error(values, place.kind))
        if is_searched(place.kind):
            held = self._held(name, first, first + len(exact))
            bound = bound.minimum(torch.from_numpy(nearest_step_error(values, held, place.kind)))
        elif self._is_from_16_bits and place.kind != "F16":
            bound = bound + exact.abs().amax(1, keepdim=True) * _TWICE_ROUNDED
        return bound

    def moved(
        self, name: str, values: torch.Tensor, *, exact: torch.Tensor, first: int
    ) -> torch.Tensor | None:
        """(n, I) which numbers are not what the exact ones become in the type; None: that is not known.

        Scales of K-quants are searched for by llama.cpp alone; what else it quantizes, it does from 16 bits.
        """
        stored, place = self._places[name]
        if stored.is_plus_one or not (is_quantized(place.kind) or place.kind in _SIXTEEN_BITS):
            return None
        given = exact.half().float() if self._is_from_16_bits else exact.float()
        with np.errstate(over="ignore", invalid="ignore"):
            nearest = gguf.quants.quantize(given.numpy(), ggml_type(place.kind))
            again = gguf.quants.dequantize(nearest, ggml_type(place.kind))
        return values != torch.from_numpy(again)

    def _factor_faults(self, front: Front, architecture: Architecture) -> Iterator[Fault]:
        """Tensors that no model folder has, and so no merge."""
        for name, wanted in architecture.tensors.items():
            place = front.tensors.get(name)
            if place is None:
                yield Fault(name, MISSING)
            elif (place.kind, place.shape) != ("F32", wanted.shape) or not np.array_equal(
                np.fromfile(self._path, dtype="<f4", count=wanted.size, offset=place.start), wanted
            ):
                yield Fault(name, UNEXPECTED, "other rotary factors than the configuration's")


def _metadata_faults(front: Front, architecture: Architecture) -> Iterator[Fault]:
    for key, wanted in {"general.architecture": architecture.name, **architecture.values}.items():
        found = front.values.get(key)
        if not is_same_value(found, wanted):
            yield Fault(key, UNEXPECTED, f"{found!r} instead of {wanted!r}")
