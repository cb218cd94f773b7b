"""The merged model as a checkpoint in 4 bits: what `transformers` with bitsandbytes loads as it is.

Each linear layer of the decoder is merged, rounded to 16 bits and quantized as bitsandbytes does it (NF4 with
double quantization, arXiv:2305.14314), one tensor in memory at a time; everything else stays in 16 bits.
Tensors and config.json are named as that library saves them. The numbers of `quant_state` are JSON of a
length that is not known before; spaces after it make it one, so that files can be written front to back.

This is a new quantization of a merged weight: close to what was trained, not equal to it. The merged forms
and the adapter beside its base are nearer.

Legend: O output rows, I input columns of a weight.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import quantize_4bit
from transformers import BitsAndBytesConfig

from qadapt.events import Event, StageStarted
from qadapt.export.folder import exported
from qadapt.export.merged_model import Adapters, MergedModel, open_merged, weighted
from qadapt.export.writing import Merging, Writing, write_model
from qadapt.model.shards import TensorEntry
from qadapt.model.tensor_values import bytes_of, tensor_of

FORM = "bnb-4bit"
STAGE = "merging and quantizing"
DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "BF16"}
"""16-bit type of what is not quantized, by the type that the base was trained on in."""
_LINEAR = re.compile(r".*\.layers\.\d+\..*\.weight")
BLOCK = 64
"""Values that share a scale."""
STATE = "quant_state.bitsandbytes__nf4"
"""What follows a weight's name in that of the tensor with its numbers."""
_NESTED_BLOCK = 256
_STATE_BYTES = 256


def quantize(
    *,
    model_folder: Path,
    adapter_folder: Adapters,
    target: Path,
    base: str,
    load_dtype: str,
    writing: Writing | None = None,
) -> Iterator[Event]:
    """Merges an adapter into its base and writes the result in 4 bits, yielding its progress.

    Nothing is at `target` until everything is.

    Args:
        model_folder: The base, unquantized.
        adapter_folder: As `merge` takes it.
        target: The folder to be; it must not exist.
        base: Weights to merge on, `dequantized` or `original`.
        load_dtype: Type the base was trained on in, `bf16`, `fp16` or `fp32`: the 16-bit type of what is not
            quantized; bf16 for fp32.
        writing: As `merge` takes it.

    Raises:
        QadaptError: As `merge`.
    """
    started = time.monotonic()
    writing = writing or Writing()
    dtype = DTYPES[load_dtype]
    yield StageStarted(stage=STAGE)
    merging = Merging(
        model_folder,
        weighted(adapter_folder),
        base=base,
        form=FORM,
        dtype=dtype,
        stage=STAGE,
        config={"quantization_config": quantization_config(dtype)},
    )
    with open_merged(
        model_folder, merging.adapters, base=base, dtype=dtype, chunk_bytes=writing.chunk_bytes
    ) as merged:
        tensors = QuantizedTensors(merged)
        yield from write_model(target, merging, merged=merged, tensors=tensors, writing=writing)
    yield exported(target, form=FORM, base=base, started=started)


class QuantizedTensors:
    """The tensors of a 4-bit checkpoint of a merged model.

    Attributes:
        entries: Names, types and shapes, in the order of the base's files.

    Args:
        merged: The merged tensors, in 16 bits.
    """

    def __init__(self, merged: MergedModel) -> None:
        self._merged = merged
        self._sources: dict[str, TensorEntry] = {}
        self._held: tuple[str, Mapping[str, torch.Tensor]] = ("", {})
        self.entries: list[TensorEntry] = []
        for entry in merged.entries:
            is_linear = len(entry.shape) == 2 and _LINEAR.fullmatch(entry.name)
            parts = _parts_of(entry) if is_linear else [entry]
            self._sources |= {part.name: entry for part in parts}
            self.entries += parts

    def values(self, entry: TensorEntry) -> Iterator[memoryview]:
        """The bytes of a tensor."""
        source = self._sources[entry.name]
        if source is entry:
            yield from self._merged.values(entry)
        else:
            yield bytes_of(self._quantized(source)[entry.name])

    def _quantized(self, source: TensorEntry) -> Mapping[str, torch.Tensor]:
        """The parts of a weight by name; those of the last one asked for are kept."""
        if self._held[0] != source.name:
            self._held = (source.name, _parts(source.name, self._weight(source)))
        return self._held[1]

    def _weight(self, source: TensorEntry) -> torch.Tensor:
        data, filled = bytearray(source.size_bytes), 0
        for piece in self._merged.values(source):
            data[filled : filled + len(piece)] = piece
            filled += len(piece)
        return tensor_of(data, source.dtype, source.shape)  # (O, I)


def _parts_of(entry: TensorEntry) -> list[TensorEntry]:
    """What a weight becomes; all sizes follow from its own."""
    count = math.prod(entry.shape)
    blocks = math.ceil(count / BLOCK)
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {
        "": ("U8", (math.ceil(count / 2), 1)),
        ".absmax": ("U8", (blocks,)),
        ".nested_absmax": ("F32", (math.ceil(blocks / _NESTED_BLOCK),)),
        ".nested_quant_map": ("F32", (256,)),
        ".quant_map": ("F32", (16,)),
        f".{STATE}": ("U8", (_STATE_BYTES,)),
    }
    return [TensorEntry(entry.name + end, dtype, shape) for end, (dtype, shape) in sizes.items()]


def _parts(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    parts: dict[str, torch.Tensor] = state.as_dict(packed=True)
    numbers = parts[STATE]
    assert len(numbers) <= _STATE_BYTES, f"{len(numbers)} bytes of numbers"
    spaces = torch.full((_STATE_BYTES - len(numbers),), ord(" "), dtype=torch.uint8)
    parts[STATE] = torch.cat([numbers, spaces])
    return {name: packed, **{f"{name}.{part}": value for part, value in parts.items()}}


def quantization_config(dtype: str) -> dict[str, Any]:
    """What config.json says about the weights.

    Args:
        dtype: `BF16` or `F16`, in which products run.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype={"BF16": "bfloat16", "F16": "float16"}[dtype],
    )
    values: dict[str, Any] = config.to_dict()
    return values
