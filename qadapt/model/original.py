"""The published weights of a model, tensor by tensor, while something else is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from qadapt.model.tensor_files import open_model
from qadapt.model.tensor_values import tensor_of


@contextmanager
def original_weights(folder: Path) -> Iterator[Callable[[str], Tensor]]:
    """While open, gives a tensor of a model folder by its name, in memory of its own.

    Raises:
        BadModel: The folder's files are missing or damaged.
    """
    with open_model(folder) as reader:

        def weight(name: str) -> Tensor:
            entry = reader.entries[name]
            return tensor_of(reader.read(name), entry.dtype, entry.shape)

        yield weight
