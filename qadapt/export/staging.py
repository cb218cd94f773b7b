"""A new folder that appears whole or not at all.

Everything is written into a hidden folder beside the target and renamed at the end; whatever happens before
leaves no trace. Knows nothing of models.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qadapt.cache import free_bytes, output_errors
from qadapt.errors import BadOutput
from qadapt.units import MIB, format_bytes

_SPARE_BYTES = 16 * MIB


@contextmanager
def new_folder(target: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into; it becomes `target` if the block ends well, and vanishes otherwise.

    What an earlier call left behind because it was killed is cleared away first.

    Args:
        target: The folder to be; it must not exist.
        needed_bytes: What will be written, checked against the disk before the first byte.

    Raises:
        BadOutput: The target exists, or the place is read-only or too full.
    """
    if target.exists():
        raise BadOutput(
            f"{target} exists already; an export never overwrites.",
            cure="Give another folder with --to, or remove this one.",
        )
    free = free_bytes(target.parent)
    if needed_bytes + _SPARE_BYTES > free:
        raise BadOutput(
            f"An export to {target} needs {format_bytes(needed_bytes)}; {format_bytes(free)} are free there.",
            cure="Free space on that disk, or give a folder on a larger one with --to.",
        )
    made = [folder for folder in target.parents if not folder.exists()]
    part = target.with_name(f".{target.name}.partial")
    try:
        with output_errors(target.parent):
            shutil.rmtree(part, ignore_errors=True)
            _make(part)
            yield part
            part.rename(target)
    finally:
        if not target.exists():
            shutil.rmtree(part, ignore_errors=True)
            _remove_empty(made)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        raise BadOutput(
            f"{folder.parent} cannot hold a folder: a part of that path is a file.",
            cure="Give another folder with --to.",
        ) from None


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, as long as they are empty."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
