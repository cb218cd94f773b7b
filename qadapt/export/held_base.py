"""The numbers of a base as published, and as a run held them: a second computation, for the proof.

Blocks are cut out of the row-major tensor by their place, not by rows as in `nf4.py`, and a quantized number
is looked up and multiplied here; bitsandbytes is asked only for what it stored: codes and scales. The mean of
the scales is a sum whose last bit depends on the number of threads; `nudge` moves it by so many steps of
fp32, for exports made on another machine.

Legend: O output rows, I input columns of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from bitsandbytes.functional import (
    dequantize_blockwise,
    get_4bit_type,
    int8_vectorwise_quant,
    quantize_4bit,
    quantize_blockwise,
)
from torch import Tensor

from qadapt.adapters.facts import AdapterFacts
from qadapt.export.stored_tensors import StoredTensors
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_files import row_elements, rows_of

FLOATS = ("F32", "F16", "BF16")
_BLOCK, _SCALE_BLOCK = 64, 256
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PASS_ELEMENTS = 1 << 20
_INT8_STEPS = 127
_SMALLEST_SCALE = 1e-38
"""bitsandbytes' lowest scale of an incomplete last block."""


class HeldBase:
    """A base's tensors by rows.

    Args:
        stored: Its files.
        facts: How a run held it; None: only the published numbers are known.
        quantized: Names of the weights that were quantized, if any were.
    """

    def __init__(self, stored: StoredTensors, facts: AdapterFacts | None, quantized: frozenset[str]) -> None:
        self._stored = stored
        self._facts = facts
        self._quantized = quantized if facts is not None and facts.quantization != "none" else frozenset()
        levels = get_4bit_type("nf4", device="cpu")
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # (256, 2)
        self._pairs = pairs.view(torch.float64).view(-1)  # two numbers are moved as one
        self._largest_of = lru_cache(maxsize=2)(self._block_magnitudes)
        self._scales_of = lru_cache(maxsize=4)(self._computed_scales)

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors by name, as they are published."""
        return self._stored.entries

    @property
    def is_known_as_held(self) -> bool:
        """Whether the dequantized numbers can be computed."""
        return self._facts is not None

    def is_nudged(self, name: str) -> bool:
        """Whether the mean of its scales decides the numbers of a tensor."""
        facts = self._facts
        return (
            name in self._quantized
            and facts is not None
            and facts.quantization == "nf4"
            and facts.double_quant
        )

    def published(self, name: str, first: int, last: int) -> Tensor:
        """(last - first, I) rows in the type they are stored in."""
        return self._stored.rows(name, first, last)

    def held(self, name: str, first: int, last: int, *, nudge: int = 0) -> Tensor:
        """(last - first, I) rows in the type the run held them in, after their round trip if quantized."""
        assert self._facts is not None
        rows = self.published(name, first, last)
        if self._stored.entries[name].dtype not in FLOATS:
            return rows
        dtype = _DTYPES[self._facts.load_dtype]
        if name not in self._quantized:
            return rows.to(dtype)
        if self._facts.quantization == "int8":
            steps, largest, _ = int8_vectorwise_quant(rows.to(dtype).half())
            scaled: Tensor = steps.float() * (largest / _INT8_STEPS).unsqueeze(1)
            return scaled.to(dtype)
        return self._from_4_bits(name, first, last, nudge=nudge)

    def prepare(self, name: str, *, nudge: int = 0) -> None:
        """Computes what all rows of a tensor need, before threads ask for them."""
        if self.is_nudged(name):
            self._scales_of(name, nudge)

    def _from_4_bits(self, name: str, first: int, last: int, *, nudge: int) -> Tensor:
        assert self._facts is not None
        entry, dtype = self._stored.entries[name], _DTYPES[self._facts.load_dtype]
        columns = row_elements(entry)
        start, stop = first * columns, last * columns
        begin = start // _BLOCK * _BLOCK
        end = min(-(-stop // _BLOCK) * _BLOCK, rows_of(entry) * columns)
        top = begin // columns
        rows = self.published(name, top, -(-end // columns))
        blocks = rows.reshape(-1)[begin - top * columns : end - top * columns].to(dtype)
        codes, state = quantize_4bit(blocks, blocksize=_BLOCK, quant_type="nf4")
        scales = state.absmax
        if self._facts.double_quant:
            scales = self._scales_of(name, nudge)[begin // _BLOCK : -(-end // _BLOCK)]
        levels = self._pairs.index_select(0, codes.view(-1).int()).view(torch.float32)[: end - begin]
        whole = len(levels) // _BLOCK
        levels[: whole * _BLOCK].view(-1, _BLOCK).mul_(scales[:whole, None])
        levels[whole * _BLOCK :].mul_(scales[-1])
        return levels[start - begin : stop - begin].to(dtype).view(-1, columns)

    def _computed_scales(self, name: str, nudge: int) -> Tensor:
        """The scales of all blocks of a tensor after their own 8-bit round trip."""
        largest = self._largest_of(name)
        mean = largest.mean()
        for _ in range(abs(nudge)):
            mean = torch.nextafter(mean, mean.new_tensor(float("inf") * nudge))
        codes, state = quantize_blockwise(largest - mean, blocksize=_SCALE_BLOCK)
        restored: Tensor = dequantize_blockwise(codes, state) + mean
        return restored

    def _block_magnitudes(self, name: str) -> Tensor:
        """The largest magnitude of each block of a tensor, in fp32."""
        assert self._facts is not None
        entry, dtype = self._stored.entries[name], _DTYPES[self._facts.load_dtype]
        step = max(1, _PASS_ELEMENTS // row_elements(entry) // _BLOCK) * _BLOCK  # whole blocks whatever I is
        ends = ((first, min(first + step, rows_of(entry))) for first in range(0, rows_of(entry), step))
        return torch.cat([_largest(self.published(name, *span).to(dtype)) for span in ends])


def _largest(values: Tensor) -> Tensor:
    """The largest magnitude of each block, in fp32."""
    flat = values.reshape(-1)
    whole = flat.numel() // _BLOCK * _BLOCK
    found = flat[:whole].view(-1, _BLOCK).float().abs().amax(1)
    if whole == flat.numel():
        return found
    return torch.cat([found, flat[whole:].float().abs().amax().clamp(min=_SMALLEST_SCALE)[None]])
