"""Tensors on disk as everybody reads them: by the safetensors library, by rows, by an export's index.

Not through `model/tensor_files.py`, by which a merge reads: a proof shares no code with what it proves. The
library maps files, so what is read takes no memory of its own.

Legend: O rows, I elements of a row; a vector has O rows of one element, a scalar one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qadapt.export.tensor_fault import DAMAGED, MISSING, SWAPPED_FILES, UNEXPECTED, WRONG_FILE, Fault
from qadapt.model.shards import INDEX_NAME, SINGLE_NAME, TensorEntry
from qadapt.model.tensor_files import row_elements


class Written(Protocol):
    """What was written, under the names and shapes of the base.

    `faults` are those found before a number was read.
    """

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors by name."""

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What is wrong with the files themselves."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """(last - first, I) rows of a tensor."""

    def bound(self, name: str, exact: Tensor, first: int) -> Tensor | None:
        """The most that each number may differ from the exact one; None: by one rounding to its type."""

    def moved(self, name: str, values: Tensor, *, exact: Tensor, first: int) -> Tensor | None:
        """(n, I) which rows of a tensor, read as `values`, are not on the steps that the exact ones come to.

        None: its type has no steps of its own, or they are not known.
        """


class StoredTensors:
    """The tensors of some safetensors files. A context manager.

    Attributes:
        entries: Name → type, shape and size.
        homes: Name → the file it is in.

    Args:
        files: The files.

    Raises:
        SafetensorError: One is damaged.
        OSError: One cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, TensorEntry] = {}
        self.homes: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        with ExitStack() as stack:
            for path in files:
                file = stack.enter_context(safe_open(path, framework="pt"))
                self._open[path] = file
                for name in file.keys():  # noqa: SIM118  (no mapping)
                    view = file.get_slice(name)
                    self.entries[name] = TensorEntry(name, view.get_dtype(), tuple(view.get_shape()))
                    self.homes[name] = path
            self._files = stack.pop_all()

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """(last - first, I) rows of a tensor in its own type; the memory is the file's."""
        entry, file = self.entries[name], self._open[self.homes[name]]
        found: Tensor = file.get_slice(name)[first:last] if entry.shape else file.get_tensor(name)
        return found.reshape(last - first, row_elements(entry))

    def whole(self, name: str) -> Tensor:
        """All of a tensor, in its shape."""
        found: Tensor = self._open[self.homes[name]].get_tensor(name)
        return found

    def close(self) -> None:
        """Closes the files."""
        self._open.clear()
        self._files.close()

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ExportedFiles:
    """The weights of an exported model folder: `Written` of its files. A context manager.

    Nothing in the folder raises an error: what is wrong is a fault.

    Args:
        folder: It should hold `model.safetensors`, or an index and its shards.
    """

    def __init__(self, folder: Path) -> None:
        self._faults: list[Fault] = []
        placed = self._placed(folder)
        names = sorted(set(placed.values())) if placed else [SINGLE_NAME]
        self._files = StoredTensors(path for name in names if self._is_readable(path := folder / name))
        self._check_placed(placed)
        for path in sorted(folder.glob("*.safetensors")):
            if path.name not in names:
                self._faults.append(Fault(path.name, UNEXPECTED, "no index names this file"))

    @property
    def entries(self) -> Mapping[str, TensorEntry]:
        """The tensors by name."""
        return self._files.entries

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What is wrong with the files themselves."""
        return tuple(self._faults)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """(last - first, I) rows of a tensor."""
        return self._files.rows(name, first, last)

    def bound(self, name: str, exact: Tensor, first: int) -> Tensor | None:
        """None: each number is the exact one, rounded once."""
        return None

    def moved(self, name: str, values: Tensor, *, exact: Tensor, first: int) -> Tensor | None:
        """None: there are no steps."""
        return None

    def __enter__(self) -> ExportedFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def _placed(self, folder: Path) -> dict[str, str]:
        """Tensor → file by the index; empty if there is a single file, or no index that can be read."""
        path = folder / INDEX_NAME
        if (folder / SINGLE_NAME).is_file() or not path.is_file():
            return {}
        try:
            placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            return {str(tensor): str(name) for tensor, name in placed.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            self._faults.append(Fault(INDEX_NAME, DAMAGED, "it is no index of weights"))
            return {}

    def _is_readable(self, path: Path) -> bool:
        if not path.is_file():
            self._faults.append(Fault(path.name, MISSING))
            return False
        try:
            StoredTensors([path]).close()
        except (SafetensorError, OSError) as error:
            self._faults.append(Fault(path.name, DAMAGED, str(error)))
            return False
        return True

    def _check_placed(self, placed: Mapping[str, str]) -> None:
        strayed: dict[tuple[str, str], list[str]] = {}
        for tensor, name in placed.items():
            home = self._files.homes.get(tensor)
            if home is not None and home.name != name:
                strayed.setdefault((name, home.name), []).append(tensor)
        for (name, found), tensors in strayed.items():
            if (found, name) in strayed:
                self._faults.append(Fault(name, SWAPPED_FILES, f"with {found}", other=found))
            else:
                self._faults += [Fault(tensor, WRONG_FILE, f"{name}; it is in {found}") for tensor in tensors]
        unnamed = [tensor for tensor in self._files.homes if placed and tensor not in placed]
        self._faults += [Fault(tensor, WRONG_FILE, "none at all") for tensor in unnamed]
