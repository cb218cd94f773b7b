"""The numbers of a merged model: what the run held of the base, changed by adapters, in fp32, rounded once.

The base's tensor is the published one, or what the run held of it: rounded to the type it was loaded in, and
through 4-bit or 8-bit storage where it was quantized. `changes.py` says what adapters make of it. A chunk of
rows that fits the processor's cache goes through all of it: memory stays at a few chunks whatever the
tensor's size.

Legend: O output rows, I input columns of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from qadapt.errors import BadExport
from qadapt.export.adapter import Adapter
from qadapt.export.changes import TokenRows, scaled, shifted, stored_rows, turned, updated, with_token_rows
from qadapt.export.int8 import int8_rows
from qadapt.export.nf4 import Rows, dequantized_rows, row_grid
from qadapt.export.threads import in_order
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import TensorReader, row_elements, rows_of
from qadapt.model.tensor_values import TORCH_DTYPES, bytes_of

FLOATS = ("F32", "F16", "BF16")
"""Types of the tensors that are converted; any other is copied as it is."""
_LOAD_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BaseForm:
    """How a run held its base: everything in `dtype`, the linear layers named in `quantized` in 4 or 8 bits.

    `quantization` is `nf4`, `int8` or `none`; `double_quant` is of 4 bits alone.
    """

    dtype: str
    quantization: str
    quantized: tuple[str, ...]
    double_quant: bool


class MergedRows:
    """The merged tensors of a base and its adapters; `merged_model.open_merged` puts them together.

    Args:
        reader: The base's files.
        adapters: They belong to this base. With more than one, each only adds to weights.
        base: How the run held the base; none: the published weights count.
        tokens: Tables by name, with rows that replace theirs or come after them.
        given: Tensors by name that stand in place of the base's.
        sources: Tensors that the base has under another name: an untied head begins as the embedding.
        chunk_bytes: Bytes of one chunk in fp32; at least `row_grid` rows are taken together.
    """

    def __init__(
        self,
        reader: TensorReader,
        adapters: Sequence[Adapter],
        *,
        base: BaseForm | None,
        tokens: Mapping[str, TokenRows],
        given: Mapping[str, Rows],
        sources: Mapping[str, str],
        chunk_bytes: int,
    ) -> None:
        self._reader = reader
        self._adapters = tuple(adapters)
        self._base = base
        self._tokens = tokens
        self._given = given
        self._sources = sources
        self._chunk_elements = chunk_bytes // 4
        names = "|".join(map(re.escape, base.quantized)) if base else ""
        self._quantized = re.compile(rf".*\.layers\.\d+\..*\.({names})\.weight") if names else None

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The bytes of a merged tensor, chunk by chunk, each in memory of its own.

        Args:
            entry: Name, type and shape of the tensor to write.

        Raises:
            BadExport: A number is not finite, or too large for the type.
        """
        rows, count, step = self.rounded(entry), rows_of(entry), self._chunk_rows(self._source(entry))

        def piece(first: int) -> memoryview:
            return bytes_of(rows(first, min(first + step, count)))

        yield from in_order(partial(piece, first) for first in range(0, count, step))

    def rounded(self, entry: TensorEntry) -> Rows:
        """The rows of a merged tensor in its type; of a quantized one they begin at a multiple of `row_grid`.

        Args:
            entry: As `values` takes it.

        Raises:
            BadExport: When rows are asked for, as `values` does.
        """
        source = self._source(entry)
        chunk_rows = self._chunk_rows(source)
        rows = self._held_rows(entry.name, source, chunk_rows)
        if entry.dtype not in FLOATS:
            return rows
        rows = self._changed(rows, entry, chunk_rows)

        def rounded(first: int, last: int) -> torch.Tensor:
            merged = rows(first, last).float()  # torch converts bf16 to fp16 far faster by way of fp32
            _check_range(entry, merged)
            return merged.to(TORCH_DTYPES[entry.dtype])

        return rounded

    def _source(self, entry: TensorEntry) -> TensorEntry:
        """What the base has for a tensor."""
        return self._reader.entries[self._sources.get(entry.name, entry.name)]

    def _changed(self, rows: Rows, entry: TensorEntry, chunk_rows: int) -> Rows:
        """The rows with what the adapters change."""
        name, module = entry.name, entry.name.rpartition(".")[0]
        updates = [adapter.update(name) for adapter in self._adapters if name in adapter.weights]
        columns = row_elements(self._source(entry))
        updates += [
            adapter.projected_update(name, columns) for adapter in self._adapters if name in adapter.projected
        ]
        if updates:
            rows = updated(rows, updates, count=rows_of(entry), chunk_rows=chunk_rows)
        for adapter in self._adapters:
            if name in adapter.turned:
                rows = turned(rows, adapter.rotation(name))
            if f"{module}.weight" in adapter.scaled:
                scaling = adapter.scaling(f"{module}.weight")
                is_of_inputs = scaling.shape[-1] != 1 and name.endswith(".bias")
                rows = rows if is_of_inputs else scaled(rows, scaling)
            if name in adapter.shifts:
                rows = shifted(rows, adapter.shift(name))
        return rows

    def _chunk_rows(self, source: TensorEntry) -> int:
        columns = max(1, row_elements(source))
        grid = row_grid(columns)
        return max(1, self._chunk_elements // columns // grid) * grid

    def _held_rows(self, name: str, source: TensorEntry, chunk_rows: int) -> Rows:
        """The rows of the base's tensor, or of what stands in its place."""
        if name in self._given:
            return self._given[name]
        rows = self._base_rows(source, chunk_rows)
        new = self._tokens.get(name)
        return rows if new is None else with_token_rows(rows, rows_of(source), new)

    def _base_rows(self, source: TensorEntry, chunk_rows: int) -> Rows:
        rows = stored_rows(self._reader, source.name)
        if self._base is None or source.dtype not in FLOATS:
            return rows
        dtype = _LOAD_DTYPES[self._base.dtype]
        if self._quantized is None or not self._quantized.fullmatch(source.name):
            return lambda first, last: rows(first, last).to(dtype)
        if self._base.quantization == "int8":
            return int8_rows(rows, dtype=dtype)
        return dequantized_rows(
            rows,
            shape=(rows_of(source), row_elements(source)),
            dtype=dtype,
            double_quant=self._base.double_quant,
            chunk_rows=chunk_rows,
        )


def _check_range(entry: TensorEntry, merged: torch.Tensor) -> None:
    low, high = (bound.item() for bound in merged.aminmax())
    largest = max(-low, high)
    limit = torch.finfo(TORCH_DTYPES[entry.dtype]).max
    if low != low or largest == float("inf"):
        raise BadExport(
            f"{entry.name} has a number that is {'NaN' if low != low else 'infinite'}.",
            cure="The base is damaged or the adapter diverged: export an earlier checkpoint.",
        )
    if largest > limit:
        raise BadExport(
            f"{entry.name} reaches {largest:.6g} in the merged model; {entry.dtype} ends at {limit:.6g}.",
            cure="Export with --form merged-bf16, which has the range of fp32.",
        )
