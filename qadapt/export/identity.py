"""What decides the bytes of an export, as one hash: two calls that have the same one write the same files.

The base's files are told by name, size and time of change, which is cheap for 100 GB and never takes changed
files for the same; an adapter by all its bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch

from qadapt.adapters.versions import sha256_of
from qadapt.model.folder import weight_files

_LIBRARIES = ("qadapt", "torch", "bitsandbytes")


def identity_of(model_folder: Path, adapter_folders: Iterable[Path], *, choices: Mapping[str, object]) -> str:
    """The hash.

    Args:
        model_folder: The base.
        adapter_folders: In the order in which they are merged.
        choices: What else decides: form, base, sizes, weights of the adapters.

    Raises:
        BadModel: The base has no weights.
    """
    config = model_folder / "config.json"
    base = [(config.name, sha256_of(config))]
    for path in weight_files(model_folder, name=model_folder.name):
        stat = path.stat()
        base.append((path.name, f"{stat.st_size} {stat.st_mtime_ns}"))
    adapters = [
        [(path.name, sha256_of(path)) for path in sorted(folder.iterdir()) if path.is_file()]
        for folder in adapter_folders
    ]
    versions = {library: metadata.version(library) for library in _LIBRARIES}
    # the mean of the scales of 4-bit blocks depends on the number of threads in its last bit
    values = [base, adapters, dict(choices), versions, torch.get_num_threads()]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
