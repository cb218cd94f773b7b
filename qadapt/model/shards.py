"""safetensors files piece by piece: headers read without torch, files written tensor by tensor.

The format: eight bytes with the header's length, the header as JSON (name → dtype, shape, offsets), then the
raw bytes in that order; https://github.com/huggingface/safetensors. All sizes are known before the first byte
is written, so a file that was cut off is found by its length. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qadapt.durable import flush_file
from qadapt.errors import BadModel

_BYTES_OF = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
}
_LONGEST_HEADER_BYTES = 100_000_000
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file to be written: its name, dtype in safetensors' words, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * _BYTES_OF[self.dtype]


class Finished(Protocol):
    """The files of a folder that are on the disk, whole."""

    def has(self, name: str) -> bool:
        """Whether a file is one of them."""

    def add(self, name: str, sha256: str) -> None:
        """A file has become one of them. Called by another thread, one file at a time."""


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file by name, `__metadata__` left out; reads only the header.

    Raises:
        BadModel: The file is cut off, longer than its header says, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER_BYTES):
            raise _half_written(path, f"{size} bytes are less than its header alone")
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise BadModel(
                f"{path} is no safetensors file: its header cannot be read.",
                cure="Get the file again from where the model is published.",
            ) from None
    if size != 8 + length + end:
        raise _half_written(path, f"it has {size} bytes, its header promises {8 + length + end}")
    return header


def _half_written(path: Path, reason: str) -> BadModel:
    return BadModel(f"{path} is half-written: {reason}.", cure="Delete the file and get it again.")


def write_shards(
    folder: Path,
    entries: Sequence[TensorEntry],
    *,
    values: Callable[[TensorEntry], Iterable[memoryview]],
    shard_bytes: int,
    finished: Finished | None = None,
) -> Iterator[TensorEntry]:
    """Writes tensors one after the other, yielding each entry when it is written.

    One file `model.safetensors` if all fit in `shard_bytes`; otherwise numbered files and their index.

    Args:
        folder: Where to write; the caller makes it appear whole (`cache.staged`).
        entries: All tensors, in the order they are written.
        values: The bytes of a tensor, in pieces, asked for when its turn comes.
        shard_bytes: The most a file holds, unless one tensor alone is larger.
        finished: Files that are whole already and are not written again; it is told of each that becomes so.
    """
    groups = _groups(entries, shard_bytes)
    names = [SINGLE_NAME]
    if len(groups) > 1:
        names = [f"model-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    with ThreadPoolExecutor(1, "flushing") as apart:
        flushing: Future[None] | None = None
        for name, group in zip(names, groups, strict=True):
            if finished is not None and finished.has(name):
                yield from group
                continue
            sha256 = yield from _write_file(folder / name, group, values)
            if flushing is not None:
                flushing.result()
            flushing = apart.submit(_finish, folder / name, sha256, finished)
        if flushing is not None:
            flushing.result()
    if len(groups) > 1:
        index = {
            "metadata": {"total_size": sum(entry.size_bytes for entry in entries)},
            "weight_map": {
                entry.name: name for name, group in zip(names, groups, strict=True) for entry in group
            },
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(
    path: Path, entries: Sequence[TensorEntry], values: Callable[[TensorEntry], Iterable[memoryview]]
) -> Generator[TensorEntry, None, str]:
    """Writes one file; its sha256."""
    head = header_bytes(entries)
    digest = hashlib.sha256(head)
    with path.open("wb") as file:
        file.write(head)
        for entry in entries:
            written = 0
            for piece in values(entry):
                written += file.write(piece)
                digest.update(piece)
            assert written == entry.size_bytes, f"{entry.name}: {written} of {entry.size_bytes} bytes"
            yield entry
    return digest.hexdigest()


def _finish(path: Path, sha256: str, finished: Finished | None) -> None:
    flush_file(path)
    if finished is not None:
        finished.add(path.name, sha256)


def _groups(entries: Sequence[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    groups: list[list[TensorEntry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.size_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.size_bytes
    return groups


def header_bytes(entries: Sequence[TensorEntry]) -> bytes:
    """What a file begins with whose tensors' bytes follow in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size_bytes],
        }
        offset += entry.size_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
