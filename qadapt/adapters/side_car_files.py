"""A side-car on disk: `side_car.json`, what must be known to make the modules, and `side_car.safetensors`.

Nothing is loaded that does not have exactly the names and shapes it must have, or has a number that is none.
Knows no method. Whether the folder appears whole is the caller's concern.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from qadapt.adapters.facts import SIDE_CAR_FILES
from qadapt.adapters.side_car import SideCar
from qadapt.errors import BadAdapter

TENSORS_FILE, SETTINGS_FILE = SIDE_CAR_FILES
VERSION = 1
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""In which adapters are kept."""
_AGAIN = "Take the adapter's files from where they were made."


def save_side_car(model: SideCar, folder: Path) -> None:
    """Writes both files into a folder that is there.

    Raises:
        OSError: The folder cannot be written.
        SafetensorError: Likewise.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.stored().items()}
    write_side_car(folder, settings=model.settings, tensors=tensors)


def write_side_car(folder: Path, *, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes settings and tensors into a folder that is there; as `save_side_car`."""
    save_file(dict(tensors), folder / TENSORS_FILE, {"format": "pt"})
    text = json.dumps({"version": VERSION, **settings}, indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def read_settings(folder: Path) -> dict[str, Any]:
    """What must be known to make a folder's modules.

    Raises:
        BadAdapter: The file cannot be read, or is of a later qadapt.
    """
    path = folder / SETTINGS_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}.", cure=_AGAIN) from None
    if not isinstance(values, dict) or values.get("version") != VERSION:
        found = values.get("version") if isinstance(values, dict) else None
        raise BadAdapter(
            f"{path} is of version {found}; this qadapt reads version {VERSION}.",
            cure="Take the adapter's files from where they were made, or a newer qadapt.",
        )
    return {name: value for name, value in values.items() if name != "version"}


def check_base(settings: Mapping[str, Any], base: Mapping[str, Any], folder: Path) -> None:
    """Refuses what was trained beside another base.

    Args:
        settings: Of a folder.
        base: What the base must have for a side-car to be its own, as this one has it.
        folder: Whose settings these are.

    Raises:
        BadAdapter: It is another base's.
    """
    for name, value in base.items():
        if settings.get(name) != value:
            raise BadAdapter(
                f"The adapter in {folder} is for a base whose {name} is {settings.get(name)}; this base's is "
                f"{value}.",
                cure="Load it on the base that it was trained on.",
            )


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a folder.

    Args:
        folder: Of a side-car.
        shapes: Name of every tensor there must be → its shape.

    Raises:
        BadAdapter: The file cannot be read, a tensor is missing, is one too many or has another shape, or a
            number is NaN or infinite.
    """
    path = folder / TENSORS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _check_names(path, found, shapes)
            # copies: on a CPU the tensors of a file are the file itself, which may be written anew
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except (OSError, SafetensorError) as error:
        raise BadAdapter(f"{path} cannot be read: {error}.", cure=_AGAIN) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES or not bool(torch.isfinite(tensor).all()):
            raise BadAdapter(f"{path} has a number in {name} that is none.", cure=_AGAIN)
    return tensors


def _check_names(
    path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    different = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if different:
        name = different[0]
        raise BadAdapter(
            f"{path} does not fit its settings: {name} has the shape {found.get(name)} and must have "
            f"{wanted.get(name)} ({len(different)} tensors differ).",
            cure=_AGAIN,
        )
