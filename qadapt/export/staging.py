"""A new folder that appears whole or not at all.

Everything is written into a hidden folder beside the target and renamed at the end (`durable.py`); whatever
happens before leaves no trace, not even the folders it was to lie in. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qadapt.cache import output_errors, require_free
from qadapt.durable import make_folder, whole_folder
from qadapt.errors import BadOutput


@contextmanager
def new_folder(target: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A folder to write into; it becomes `target` if the block ends well, and vanishes otherwise.

    What an earlier call left behind because it was killed is cleared away first.

    Args:
        target: The folder to be; it must not exist.
        needed_bytes: What will be written, checked against the disk before the first byte.

    Raises:
        BadOutput: The target exists, or the place is read-only.
        NoRoom: The place is too full.
    """
    if target.exists():
        raise BadOutput(
            f"{target} exists already; an export never overwrites.",
            cure="Give another folder with --to, or remove this one.",
        )
    require_free(
        target.parent,
        needed_bytes,
        purpose=f"An export to {target.name}",
        or_else="give a folder on a larger one with --to",
    )
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with output_errors(target.parent):
            _make(target.parent)
            with whole_folder(target) as folder:
                yield folder
    finally:
        if not target.exists():
            _remove_empty(made)


def _make(folder: Path) -> None:
    try:
        make_folder(folder)
    except (FileExistsError, NotADirectoryError):
        raise BadOutput(
            f"{folder} cannot hold a folder: a part of that path is a file.",
            cure="Give another folder with --to.",
        ) from None


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, as long as they are empty."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()
