"""Reading the tensors of a model folder, or of one safetensors file, by ranges of rows.

Seeks and reads into a buffer of the caller: unlike a memory map it leaves no pages behind, neither anonymous
nor file-backed, so what a reader of a 16 GB model takes is its buffer. `shards.py` is the writing side. Knows
bytes, not numbers: `tensor_values.py` makes tensors of them. Standard library only.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qadapt.errors import BadModel
from qadapt.model.folder import weight_files
from qadapt.model.shards import TensorEntry, read_header

_READ_BYTES = 1 << 30


class TensorReader:
    """The tensors of some safetensors files, open for reading by any thread. A context manager.

    Attributes:
        entries: Name → type, shape and size, in the order in which the tensors lie in the files.

    Args:
        files: The files; every name occurs in one of them.

    Raises:
        BadModel: A file is missing, half-written, no safetensors file, or repeats a tensor of another.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, TensorEntry] = {}
        self._places: dict[str, tuple[Any, int]] = {}
        self._place = threading.Lock()
        with ExitStack() as stack:
            for path in files:
                header = _header(path)
                file = stack.enter_context(path.open("rb", buffering=0))
                start = 8 + int.from_bytes(file.read(8), "little")
                for name in sorted(header, key=lambda name: header[name]["data_offsets"][0]):
                    self._add(path, name, header[name])
                    self._places[name] = (file, start + header[name]["data_offsets"][0])
            self._files = stack.pop_all()

    def _add(self, path: Path, name: str, values: dict[str, Any]) -> None:
        if name in self.entries:
            raise BadModel(
                f"{path} holds the tensor {name}, which another file of the model holds too.",
                cure="Remove weight files that are not of this model.",
            )
        try:
            entry = TensorEntry(name, values["dtype"], tuple(values["shape"]))
            needed, (first, last) = entry.size_bytes, values["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise BadModel(
                f"{path}: {name} is of a type that is not read here: {values}.",
                cure="Get weights in 16 or 32 bits, or the file again if it should have them.",
            ) from None
        if last - first != needed:
            raise BadModel(
                f"{path}: {name} has {last - first} bytes; its shape needs {needed}.",
                cure="The file is damaged; delete it and get it again.",
            )
        self.entries[name] = entry

    def read_rows(self, name: str, buffer: memoryview, *, first: int, last: int) -> memoryview:
        """Reads the rows from `first` up to, not including, `last` to the front of a buffer.

        Args:
            name: The tensor. A scalar has one row.
            buffer: Writable bytes, at least as many as the rows have.
            first: First row to read.
            last: The row after the last one.

        Returns:
            The part of the buffer that was filled.

        Raises:
            BadModel: The file became shorter after it was opened.
        """
        entry = self.entries[name]
        row_bytes = entry.size_bytes // rows_of(entry) if entry.size_bytes else 0
        assert 0 <= first <= last <= rows_of(entry)
        filled = buffer[: (last - first) * row_bytes]
        file, start = self._places[name]
        with self._place:
            file.seek(start + first * row_bytes)
            is_whole = _fill(file, filled)
        if not is_whole:
            raise BadModel(
                f"{file.name} ends inside the tensor {name}: the file was changed while it was read.",
                cure="Get the file again and leave it alone while qadapt reads it.",
            )
        return filled

    def read(self, name: str) -> memoryview:
        """All bytes of a tensor, in memory of its own."""
        entry = self.entries[name]
        return self.read_rows(name, memoryview(bytearray(entry.size_bytes)), first=0, last=rows_of(entry))

    def close(self) -> None:
        """Closes the files."""
        self._files.close()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fill(file: Any, buffer: memoryview) -> bool:
    """Reads from where a file stands; whether it had enough."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done : done + _READ_BYTES])
        if not count:
            return False
        done += count
    return True


def open_model(folder: Path, *, name: str | None = None) -> TensorReader:
    """Opens all weight files of a model folder.

    Args:
        folder: It holds `model.safetensors`, or an index and its shards.
        name: What to call the model in messages.

    Raises:
        BadModel: No weights, a missing or half-written file, an index that contradicts the files.
    """
    return TensorReader(weight_files(folder, name=name or folder.name))


def rows_of(entry: TensorEntry) -> int:
    """Length of the first dimension; a scalar has one row."""
    return entry.shape[0] if entry.shape else 1


def row_elements(entry: TensorEntry) -> int:
    """Elements of one row."""
    return math.prod(entry.shape[1:])


def _header(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return read_header(path)
    except OSError as error:
        raise BadModel(f"{path} cannot be read: {error.strerror}.", cure="Get the file again.") from None
