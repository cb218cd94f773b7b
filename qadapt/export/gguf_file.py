"""One GGUF file, written front to back and read again: metadata and tensor table first, then the tensors.

The `gguf` package writes all but the tensors themselves, which it would want whole; here they come in pieces,
each tensor beginning at a multiple of 32 bytes. `gguf_front.py` reads it again. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows no models.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from qadapt.cache import output_errors, require_free
from qadapt.errors import BadExport
from qadapt.events import Event, StageAdvanced
from qadapt.export.gguf_front import Place, Value, is_same_value, read_front
from qadapt.export.gguf_types import ggml_type, stored_bytes
from qadapt.units import MIB

STAGE = "writing GGUF"
_METADATA_BYTES = 64 * MIB
_READ_BYTES = 4 * MIB


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a file.

    Attributes:
        name: In the file.
        shape: Rows first, as in torch.
        kind: Its type, such as `Q8_0`.
        pieces: Its bytes, in order; each piece is used before the next is asked for.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Callable[[], Iterable[memoryview]]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return stored_bytes(self.shape, self.kind)


def write_file(
    target: Path, architecture: str, *, tensors: Sequence[FileTensor], values: Mapping[str, Value]
) -> Generator[Event, None, None]:
    """Writes a file, yielding after every tensor, and reads it back.

    Args:
        target: The file to be.
        architecture: Of the model, in GGUF's words.
        tensors: What it holds, in order.
        values: The rest of its metadata.

    Raises:
        BadExport: What was read back is not what was written.
        BadOutput: The place is read-only.
        NoRoom: The disk is too full.
    """
    total, done = sum(tensor.size_bytes for tensor in tensors), 0
    needed = total + _METADATA_BYTES
    require_free(
        target.parent, needed, purpose=target.name, or_else="give a folder on a larger one with --to"
    )
    hashes: list[str] = []
    with output_errors(target.parent):
        _write_front(target, architecture, tensors=tensors, values=values)
        with target.open("ab") as file:
            _align(file)
            for tensor in tensors:
                hashes.append(_append(file, tensor))
                done += tensor.size_bytes
                yield StageAdvanced(stage=STAGE, done=done, total=total)
            file.flush()
            os.fsync(file.fileno())
    _read_back(target, tensors, hashes=hashes, values=values)


def _write_front(
    target: Path, architecture: str, *, tensors: Sequence[FileTensor], values: Mapping[str, Value]
) -> None:
    writer = gguf.GGUFWriter(target, architecture)
    for key, value in values.items():
        _add(writer, key, value)
    for tensor in tensors:
        kind = ggml_type(tensor.kind)
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _append(file: BinaryIO, tensor: FileTensor) -> str:
    """Writes a tensor and gives the sha256 of its bytes."""
    digest, written = hashlib.sha256(), 0
    for piece in tensor.pieces():
        written += file.write(piece)
        digest.update(piece)
    assert written == tensor.size_bytes, f"{tensor.name}: {written} of {tensor.size_bytes} bytes"
    _align(file)
    return digest.hexdigest()


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _read_back(
    target: Path, tensors: Sequence[FileTensor], *, hashes: Sequence[str], values: Mapping[str, Value]
) -> None:
    front = read_front(target)
    wrong = [key for key, value in values.items() if not is_same_value(front.values.get(key), value)]
    found = [(name, place.shape, place.kind) for name, place in front.tensors.items()]
    if found != [(tensor.name, tensor.shape, tensor.kind) for tensor in tensors]:
        wrong.append("the table of tensors")
    else:
        with target.open("rb") as file:
            places = zip(front.tensors.items(), hashes, strict=True)
            wrong += [name for (name, place), want in places if _hash(file, place) != want]
    if wrong:
        raise BadExport(
            f"{target.name} is not what was written: {wrong[0]} and {len(wrong) - 1} more differ.",
            cure="Export again; if it happens again, check the disk.",
        )


def _hash(file: BinaryIO, place: Place) -> str:
    digest = hashlib.sha256()
    file.seek(place.start)
    for first in range(0, place.size_bytes, _READ_BYTES):
        digest.update(file.read(min(_READ_BYTES, place.size_bytes - first)))
    return digest.hexdigest()
