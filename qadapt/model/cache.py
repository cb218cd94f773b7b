"""The cache on disk: where it lies, whether there is room, and folders that appear whole or not at all.

Knows nothing of models. What is written under `staged` has a temporary name until it is complete, then one
rename makes it visible; so whatever carries a final name in the cache is whole, whoever was interrupted.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from qadapt.errors import BadOutput
from qadapt.units import format_bytes

_SPARE_BYTES = 64 * 1024**2


def ignore(stage: str, done_bytes: int, total_bytes: int) -> None:
    """The report that nobody reads."""


def cache_folder() -> Path:
    """Where downloads and converted models are kept: the user's cache folder of this system."""
    return Path(platformdirs.user_cache_dir("qadapt", appauthor=False))


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds, or will hold, `folder`."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def require_free(folder: Path, needed_bytes: int, *, purpose: str) -> None:
    """Checks the disk before the first byte is written; a little stays spare.

    Raises:
        BadOutput: Less is free than is needed.
    """
    free = free_bytes(folder)
    if needed_bytes + _SPARE_BYTES > free:
        raise BadOutput(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}; {format_bytes(free)} are free there.",
            cure=f"Free {format_bytes(needed_bytes + _SPARE_BYTES - free)} on that disk, "
            "or put the cache on a larger one.",
        )


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turns a read-only or full disk under `folder` into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BadOutput(
                f"The disk of {folder} is full.", cure="Free space there, then try again."
            ) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise BadOutput(
                f"{folder} cannot be written: {error.strerror}.",
                cure="Make it writable for this user, or choose another folder.",
            ) from None
        raise


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` if all goes well, and vanishes otherwise.

    If another process has completed `target` meanwhile, its result is kept.

    Raises:
        BadOutput: The place is read-only or full.
    """
    with output_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}-", dir=target.parent))
        try:
            yield folder
            if not target.exists():
                folder.replace(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
