"""The proof of an adapter that is exported as it is: its files are the run's, byte for byte.

No number is computed, as none was changed. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from qadapt.adapters.facts import FACTS_FILE, own_files
from qadapt.errors import BadModel
from qadapt.export.staging import sha256_of
from qadapt.export.stored_tensors import StoredTensors
from qadapt.export.tensor_fault import MISSING, OTHER_FILE, Fault
from qadapt.export.tensor_proof import TensorProof


def prove_copied(folder: Path, adapter_folder: Path) -> TensorProof:
    """Compares an exported adapter with a run's.

    Args:
        folder: The export.
        adapter_folder: The adapter of the run.

    Raises:
        BadModel: The run's own file is damaged.
    """
    try:
        with StoredTensors([adapter_folder / own_files(adapter_folder)[0]]) as stored:
            shapes = [entry.shape for entry in stored.entries.values()]
    except (SafetensorError, OSError) as error:
        raise BadModel(
            f"The adapter in {adapter_folder} cannot be read: {error}",
            cure="Take its files from a checkpoint of the run.",
        ) from None
    return TensorProof(
        tensors=len(shapes),
        elements=sum(map(math.prod, shapes)),
        near_ties=0,
        moved=0,
        worst_ulps=0,
        worst_at="",
        missing=(),
        unexpected=(),
        faults=tuple(_faults(folder, adapter_folder)),
    )


def _faults(folder: Path, adapter_folder: Path) -> Iterator[Fault]:
    for name in (*own_files(adapter_folder), FACTS_FILE):
        if not (folder / name).is_file():
            yield Fault(name, MISSING)
        elif sha256_of(folder / name) != sha256_of(adapter_folder / name):
            yield Fault(name, OTHER_FILE)
