"""The front of a GGUF file, metadata and table of tensors, read in one pass; the tensors stay where they are.

Not by the `gguf` package's reader: it makes several objects of each entry of a vocabulary, which for 128,000
tokens took 23 s of a busy machine and 300 MiB. The tests read the same files with it. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows no models.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from qadapt.errors import BadModel
from qadapt.export.gguf_types import stored_bytes

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
"""A value of the metadata; a whole number is stored as uint32, a real one as float32."""
_VERSION = 3
_STRING, _ARRAY = 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `start` is its first byte in the file, `shape` has rows first, as in torch."""

    shape: tuple[int, ...]
    kind: str
    start: int

    @property
    def size_bytes(self) -> int:
        """Bytes of its values."""
        return stored_bytes(self.shape, self.kind)


@dataclass(frozen=True)
class Front:
    """What a file says before its numbers: metadata by key, and places of the tensors by name, in order."""

    values: Mapping[str, Value]
    tensors: Mapping[str, Place]


def read_front(path: Path) -> Front:
    """Reads the front of a file.

    Raises:
        BadModel: No whole GGUF file.
    """
    try:
        with path.open("rb") as file:
            front = _front(file)
    except (OSError, struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise _no_gguf(path, str(error)) from None
    end = max((place.start + place.size_bytes for place in front.tensors.values()), default=0)
    if path.stat().st_size < end:
        raise _no_gguf(path, f"it has {path.stat().st_size} bytes, its table promises {end}")
    return front


def is_same_value(found: Value | None, wanted: Value) -> bool:
    """Whether a value that was read is one that was to be written."""
    if found is None:
        return wanted in ("", [])  # the package writes no empty values
    if isinstance(wanted, float):
        return isinstance(found, float) and bool(np.float32(wanted) == np.float32(found))
    return found == (wanted if isinstance(wanted, (bool, int, str)) else list(wanted))


def _no_gguf(path: Path, why: str) -> BadModel:
    return BadModel(f"{path.name} is no whole GGUF file: {why}.", cure="Get or write the file again.")


def _front(file: BinaryIO) -> Front:
    magic, version = _number(file, "I"), _number(file, "I")
    if magic != gguf.GGUF_MAGIC or version != _VERSION:
        raise ValueError(f"it does not begin as one of version {_VERSION}")
    tensor_count, value_count = int(_number(file, "Q")), int(_number(file, "Q"))
    values = {_text(file): _value(file, int(_number(file, "I"))) for _ in range(value_count)}
    table = [_entry(file) for _ in range(tensor_count)]
    alignment = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its tensors are aligned to {alignment!r}")
    data = file.tell() + -file.tell() % alignment
    return Front(values, {name: Place(shape, kind, data + offset) for name, shape, kind, offset in table})


def _entry(file: BinaryIO) -> tuple[str, tuple[int, ...], str, int]:
    name = _text(file)
    widths = [int(_number(file, "Q")) for _ in range(int(_number(file, "I")))]
    kind = gguf.GGMLQuantizationType(int(_number(file, "I"))).name
    return name, tuple(reversed(widths)), kind, int(_number(file, "Q"))


def _value(file: BinaryIO, kind: int) -> Value:
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _number(file, _CODES[kind])
    inner, count = int(_number(file, "I")), int(_number(file, "Q"))
    if inner == _STRING:
        return [_text(file) for _ in range(count)]
    numbers = struct.Struct(f"<{count}{_CODES[inner]}")
    return list(numbers.unpack(file.read(numbers.size)))


def _number(file: BinaryIO, code: str) -> int | float:
    number: int | float = struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]
    return number


def _text(file: BinaryIO) -> str:
    length = int(_number(file, "Q"))
    text = file.read(length)
    if len(text) < length:
        raise ValueError("it ends inside a text")
    return text.decode("utf-8")
