"""A GGUF file becomes a model folder, once: tensor by tensor, a slice of rows in memory at a time.

transformers reads GGUF but not together with bitsandbytes, and dequantizes a whole model at once; so a file
is converted once into safetensors in the cache and everything else loads from there. Configuration and
tokenizer are read by transformers itself. Where a tensor lies, and what llama.cpp's converter did to its
values, stands in `gguf_layout.py`; here it is undone.

All tensors are written in one 16-bit type, which is also the `dtype` of config.json. It is float16: quantized
blocks have float16 scales, so float16 (11 bits) keeps more of block values than bfloat16 (8 bits). A file
that itself holds bfloat16 tensors, or a value that float16 cannot hold, makes it bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qadapt.cache import ignore, output_errors, require_free, staged
from qadapt.errors import BadModel, Unsupported
from qadapt.model.gguf_config import GGUF_FAMILIES, read_gguf_config, scalars, write_config, write_tokenizer
from qadapt.model.gguf_layout import GgufLayout, row_order
from qadapt.model.shards import TensorEntry, write_shards
from qadapt.stage import Report

if TYPE_CHECKING:
    import gguf
    from transformers import PretrainedConfig

_SHARD_BYTES = 2 * 1024**3
_SLICE_VALUES = 2 * 1024**2
_READ_BYTES = 4 * 1024**2
_READABLE = frozenset(
    {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
)
_NOT_QUANTIZED = ("F32", "F16", "BF16")
_CONVERTER_VERSION = 1
_NOT_WEIGHTS = ("rope_freqs.weight",)


class _FloatOverflow(Exception):
    """A value does not fit float16; never leaves this file."""


@dataclass(frozen=True)
class _Source:
    """A tensor of the folder, where it comes from, and what to undo on the way."""

    name: str
    shape: tuple[int, ...]
    tensor: gguf.ReaderTensor
    interleaved_heads: int | None
    is_plus_one: bool


def folder_from_gguf(path: Path, *, cache: Path, report: Report = ignore) -> Path:
    """The model folder in the cache that holds a GGUF file's model, converted the first time.

    Raises:
        BadModel: No whole GGUF file, a tensor missing or of a type that is not read, a value not finite.
        Unsupported: An architecture, or a part of one, that is not proven here.
        BadOutput: The cache is read-only or its disk too full.
    """
    sha256 = known_sha256(path, cache=cache, report=report)
    return converted_once(lambda: path, stem=path.stem, sha256=sha256, cache=cache, report=report)


def converted_once(
    find_file: Callable[[], Path], *, stem: str, sha256: str, cache: Path, report: Report = ignore
) -> Path:
    """The model folder of a GGUF file with a known hash; the file is only asked for if it must be converted.

    Raises:
        BadModel: See `folder_from_gguf`; so too the others.
    """
    target = cache / "models" / f"{stem[:60]}-{sha256[:16]}-v{_CONVERTER_VERSION}"
    if target.is_dir():
        return target
    path = find_file()
    reader = open_gguf(path)
    with staged(target) as folder:
        _convert(reader, path, folder=folder, report=report)
    return target


def known_sha256(path: Path, *, cache: Path, report: Report = ignore) -> str:
    """The file's sha256, remembered in the cache as long as size and time of the file stay the same."""
    stat = path.stat()
    stamp = [stat.st_size, stat.st_mtime_ns]
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    note = cache / "hashes" / f"{place}.json"
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        if noted["stamp"] == stamp:
            return str(noted["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not noted yet, or a damaged note: hash again
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            done += len(piece)
            report(f"hashing {path.name}", done, stat.st_size)
    with output_errors(cache):
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps({"stamp": stamp, "sha256": digest.hexdigest()}), encoding="utf-8")
        part.replace(note)
    return digest.hexdigest()


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Opens a GGUF file of a proven family whose tensor types can all be read.

    Raises:
        BadModel: No whole GGUF file, one part of several, or tensor types that are not read.
        Unsupported: The architecture is not proven here.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        family = scalars(reader).get("general.architecture", "missing")
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise BadModel(
            f"{path} is no whole GGUF file: {error}.",
            cure="Get the file again; a download may have been cut off.",
        ) from None
    if scalars(reader).get("general.type") == "adapter":
        raise BadModel(
            f"{path.name} is an adapter alone, for a GGUF file of its base: it is no model.",
            cure="Give the run or the adapter's own folder, or a GGUF file of the whole model "
            "(`qadapt export RUN --form gguf-q8_0`).",
        )
    if family not in GGUF_FAMILIES:
        raise Unsupported(
            f"{path.name} has the GGUF architecture {family!r}, which is not proven here.",
            cure=f"Proven are: {', '.join(GGUF_FAMILIES)}. Or give the model's safetensors folder.",
        )
    parts = scalars(reader).get("split.count", 1)
    if parts > 1:
        raise BadModel(
            f"{path.name} is one part of {parts}.", cure="Join them first: `llama-gguf-split --merge`."
        )
    odd = sorted({tensor.tensor_type.name for tensor in reader.tensors} - _READABLE)
    if odd:
        raise BadModel(
            f"{path.name} holds tensors of type {', '.join(odd)}, which is not read here.",
            cure="Give a GGUF of type F16, BF16, Q8_0 or Q4_K to Q6_K, or the 16-bit safetensors folder.",
        )
    return reader


def stored_type(path: Path) -> str | None:
    """The type that most values of a GGUF file have, if it is a quantized one.

    Raises:
        BadModel: See `open_gguf`; so too the others.
    """
    counts: Counter[str] = Counter()
    for tensor in open_gguf(path).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    [(name, _)] = counts.most_common(1)
    return None if name in _NOT_QUANTIZED else name


def _convert(reader: gguf.GGUFReader, path: Path, *, folder: Path, report: Report) -> None:
    size = path.stat().st_size
    report(f"reading the configuration in {path.name}", 0, size)
    config, shapes = read_gguf_config(reader, path)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    require_free(folder, total, purpose=f"Converting {path.name}")
    sources = _sources(reader, path, config=config, shapes=shapes)
    dtype = "BF16" if any(tensor.tensor_type.name == "BF16" for tensor in reader.tensors) else "F16"
    try:
        _write_weights(sources, dtype, path=path, folder=folder, report=report)
    except _FloatOverflow:
        dtype = "BF16"  # the same names and sizes: the files are written over
        _write_weights(sources, dtype, path=path, folder=folder, report=report)
    write_config(config, folder, dtype={"F16": "float16", "BF16": "bfloat16"}[dtype])
    report(f"reading the tokenizer in {path.name}", 0, size)
    write_tokenizer(path, folder)
    report(f"reading the tokenizer in {path.name}", size, size)


def _sources(
    reader: gguf.GGUFReader, path: Path, *, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]]
) -> list[_Source]:
    family = scalars(reader)["general.architecture"]
    layout = GgufLayout(
        family,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors if tensor.name not in _NOT_WEIGHTS}
    sources = []
    for name, shape in shapes.items():
        stored = layout.stored(name)
        tensor = tensors.pop(stored.name, None) if stored else None
        found = "missing" if tensor is None else tuple(reversed(tensor.shape.tolist()))
        if stored is None or found != shape:
            place = stored.name if stored else name
            raise BadModel(
                f"{path.name}: the tensor {place} is {found}; {shape} is needed for {name}.",
                cure="The file contradicts itself; get another, or give the model's safetensors folder.",
            )
        sources.append(_Source(name, shape, tensor, stored.interleaved_heads, stored.is_plus_one))
    if tensors:
        raise Unsupported(
            f"{path.name} holds tensors that a {family} model does not have: "
            f"{', '.join(sorted(tensors)[:3])}.",
            cure="Give the model's 16-bit safetensors folder.",
        )
    return sources


def _write_weights(
    sources: Sequence[_Source], dtype: str, *, path: Path, folder: Path, report: Report
) -> None:
    by_name = {source.name: source for source in sources}
    entries = [TensorEntry(source.name, dtype, source.shape) for source in sources]
    total, done = sum(entry.size_bytes for entry in entries), 0
    stage = f"converting {path.name}"
    report(stage, 0, total)

    def values(entry: TensorEntry) -> Iterator[memoryview]:
        return _sixteen_bit(by_name[entry.name], dtype, file_name=path.name)

    for entry in write_shards(folder, entries, values=values, shard_bytes=_SHARD_BYTES):
        done += entry.size_bytes
        report(stage, done, total)


def _sixteen_bit(source: _Source, dtype: str, *, file_name: str) -> Iterator[memoryview]:
    """The tensor's values, a slice of rows at a time: at most `_SLICE_VALUES` are dequantized at once."""
    import numpy as np
    import torch
    from gguf.quants import dequantize

    rows = source.shape[0]
    order = row_order(rows, source.interleaved_heads)
    step = max(1, _SLICE_VALUES // math.prod(source.shape[1:]))
    for start in range(0, rows, step):
        stored = source.tensor.data[order[start : start + step]]
        exact = dequantize(stored, source.tensor.tensor_type) - np.float32(source.is_plus_one)
        if not np.isfinite(exact).all():
            raise BadModel(
                f"{file_name}: the tensor {source.tensor.name} holds values that are not finite.",
                cure="The file is damaged; get it again.",
            )
        if dtype == "F16" and np.abs(exact).max(initial=0) > np.finfo(np.float16).max:
            raise _FloatOverflow
        rounded = torch.from_numpy(exact).to(torch.float16 if dtype == "F16" else torch.bfloat16)
        yield rounded.view(torch.uint8).numpy().reshape(-1).data
