"""The proof of an adapter that is exported as it is: its files are the run's, byte for byte.

Only the base may be named otherwise, without the folders it lies in. No number is computed, as none was
changed. Knows no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from qadapt.adapters.facts import FACTS_FILE, PEFT_FILES, own_files
from qadapt.adapters.versions import sha256_of
from qadapt.errors import BadModel
from qadapt.export.stored_tensors import StoredTensors
from qadapt.export.tensor_fault import MISSING, OTHER_FILE, Fault
from qadapt.export.tensor_proof import TensorProof

_BASES = {FACTS_FILE: "base", PEFT_FILES[1]: "base_model_name_or_path"}
"""Where files of an adapter name its base."""


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
            field = _BASES.get(name)
            if field is None or not _is_but_for_base(folder / name, adapter_folder / name, field=field):
                yield Fault(name, OTHER_FILE)


def _is_but_for_base(path: Path, run_path: Path, *, field: str) -> bool:
    """Whether two files say the same, and of a base in a folder one its name and the other its path."""
    try:
        shared, own = (json.loads(each.read_text(encoding="utf-8")) for each in (path, run_path))
        return bool(shared == {**own, field: Path(own[field]).name} and not own.get("revision"))
    except (ValueError, LookupError, TypeError):
        return False
