"""The numbers of a merged model: W + scale · B · A in fp32, rounded once, in chunks of rows.

Rows of new tokens stand in place of a table's own, or after them.

W is the published weight, or what the run held of it: rounded to the type it was loaded in, and through 4-bit
or 8-bit storage where it was quantized. A chunk that fits the processor's cache goes through all of it before
the next one is read: memory stays at a few chunks whatever the tensor's size.

Legend: O output rows, I input columns of a weight, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from qadapt.errors import BadExport
from qadapt.export.adapter import Adapter, TokenRows, Update
from qadapt.export.int8 import int8_rows
from qadapt.export.nf4 import Rows, dequantized_rows, row_grid
from qadapt.export.threads import one_thread
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import TensorReader, row_elements, rows_of
from qadapt.model.tensor_values import TORCH_DTYPES, bytes_of, tensor_of

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
    """The merged tensors of a base and an adapter.

    Args:
        reader: The base's files.
        adapter: The adapter; each of its weights is in the base with the same shape.
        base: How the run held the base; none: the published weights count.
        tokens: Tables by name, with rows that replace theirs or come after them.
        chunk_bytes: Bytes of one chunk in fp32; at least 64 rows are taken together.
    """

    def __init__(
        self,
        reader: TensorReader,
        adapter: Adapter,
        *,
        base: BaseForm | None,
        tokens: Mapping[str, TokenRows],
        chunk_bytes: int,
    ) -> None:
        self._reader = reader
        self._adapter = adapter
        self._adapted = frozenset(adapter.weights)
        self._base = base
        self._tokens = tokens
        self._chunk_elements = chunk_bytes // 4
        names = "|".join(map(re.escape, base.quantized)) if base else ""
        self._quantized = re.compile(rf".*\.layers\.\d+\..*\.({names})\.weight") if names else None
        self._buffer = memoryview(b"")

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The bytes of a merged tensor, chunk by chunk; each is valid until the next is asked for.

        Args:
            entry: Name, type and shape of the tensor to write; longer than its source by rows of tokens.

        Raises:
            BadExport: A number is not finite, or too large for the type.
        """
        source = self._reader.entries[entry.name]
        chunk = self._chunk_rows(source)
        rows = self._base_rows(source, chunk)
        update = self._adapter.update(entry.name) if entry.name in self._adapted else None
        new = self._tokens.get(entry.name)
        if new is not None:
            rows = _with_token_rows(rows, rows_of(source), new)
        for first in range(0, rows_of(entry), chunk):
            last = min(first + chunk, rows_of(entry))
            with one_thread():
                merged = rows(first, last)
                if entry.dtype in FLOATS:
                    merged = merged.float()  # torch converts bf16 to fp16 many times faster by way of fp32
                    if update is not None:
                        merged = _updated(merged, update, first, last)
                    _check_range(entry, merged)
                    merged = merged.to(TORCH_DTYPES[entry.dtype])
            yield bytes_of(merged)

    def _chunk_rows(self, source: TensorEntry) -> int:
        columns = max(1, row_elements(source))
        grid = row_grid(columns)
        return max(1, self._chunk_elements // columns // grid) * grid

    def _base_rows(self, source: TensorEntry, chunk_rows: int) -> Rows:
        rows = partial(self._source_rows, source)
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

    def _source_rows(self, source: TensorEntry, first: int, last: int) -> torch.Tensor:
        columns = row_elements(source)
        kind = TORCH_DTYPES[source.dtype]
        needed = (last - first) * columns * kind.itemsize
        if len(self._buffer) < needed:
            self._buffer = memoryview(bytearray(needed))
        data = self._reader.read_rows(source.name, self._buffer, first=first, last=last)
        return tensor_of(data, source.dtype, (last - first, columns))


def _with_token_rows(rows: Rows, count: int, new: TokenRows) -> Rows:
    """The `count` rows of a table, in fp32, with rows of tokens; what is beyond both is zero."""

    def replaced(first: int, last: int) -> torch.Tensor:
        merged = torch.zeros(last - first, new.values.shape[1])
        if first < count:
            merged[: count - first] = rows(first, min(last, count))
        for token, value in zip(new.ids, new.values, strict=True):
            if first <= token < last:
                merged[token - first] = value
        return merged

    return replaced


def _updated(base: torch.Tensor, update: Update, first: int, last: int) -> torch.Tensor:
    """The rows with their update, in fp32; in the order of PEFT, so that not even the last bit differs."""
    change = (update.b[first:last] @ update.a).mul_(update.scale)  # (last - first, I)
    return change.add_(base)


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
