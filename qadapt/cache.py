"""The cache on disk: where it lies, whether there is room, and folders that appear whole or not at all.

Knows nothing of models. What is written under `staged` has a temporary name until it is complete, then one
rename makes it visible (`durable.py`); so whatever carries a final name in the cache is whole, whoever was
interrupted. What a killed process leaves is cleared by the next one that works on the same target.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from qadapt.durable import flush_folder, flush_tree
from qadapt.errors import BadOutput, NoRoom
from qadapt.units import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's words for a full disk: no room, a quota, or the largest file it allows."""
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)
"""And for a place where nothing can be made."""
_SPARE_BYTES = 64 * 1024**2
_ABANDONED_SECONDS = 24 * 3600


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


def require_free(
    folder: Path, needed_bytes: int, *, purpose: str, or_else: str = "put the cache on a larger one"
) -> None:
    """Checks the disk before the first byte is written; a little stays spare.

    Args:
        folder: Where it will be written.
        needed_bytes: How much.
        purpose: What needs it, the subject of a sentence.
        or_else: What to do if that disk cannot be freed, as an instruction.

    Raises:
        NoRoom: Less is free than is needed.
    """
    free = free_bytes(folder)
    if needed_bytes + _SPARE_BYTES > free:
        raise NoRoom(
            f"{purpose} needs {format_bytes(needed_bytes)} in {folder}; {format_bytes(free)} are free there.",
            cure=f"Free {format_bytes(needed_bytes + _SPARE_BYTES - free)} on that disk, "
            f"{format_bytes(_SPARE_BYTES)} of which stay spare; or {or_else}.",
        )


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turns a read-only or full disk under `folder` into an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoRoom(f"The disk of {folder} is full.", cure="Free space there, then try again.") from None
        if error.errno in REFUSED:
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
        with working_folder(target.parent, stem=target.name[:40]) as folder:
            yield folder
            _publish(folder, target)


def _publish(folder: Path, target: Path) -> None:
    if target.exists():
        return
    flush_tree(folder)
    try:
        folder.replace(target)
    except OSError:
        if not target.is_dir():  # or another process was faster by a moment
            raise
    flush_folder(target.parent)


@contextmanager
def working_folder(parent: Path, *, stem: str) -> Iterator[Path]:
    """A temporary folder in an existing one, gone afterwards; those that dead processes left go first.

    Its name is hidden and says whose it is: stem, machine and process.

    Args:
        parent: Where it is made.
        stem: Names the work. Leftovers of the same stem are cleared.
    """
    _clear_leftovers(parent, stem=stem)
    folder = Path(tempfile.mkdtemp(prefix=f".{stem}-{_machine()}-{os.getpid()}-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear_leftovers(parent: Path, *, stem: str) -> None:
    """Deletes temporary folders whose process is dead, or which nobody has added to for a day.

    The second rule is for other machines that share the cache, and for a process number that is in use again.
    """
    import psutil  # only here, and `--help` needs none

    pattern = re.compile(rf"\.{re.escape(stem)}-(?:([0-9a-f]{{8}})-(\d+)-)?[a-z0-9_]{{8}}")
    for path in parent.iterdir():
        if match := pattern.fullmatch(path.name):
            is_dead = match[1] == _machine() and not psutil.pid_exists(int(match[2]))
            if is_dead or _age_seconds(path) > _ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _age_seconds(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its process has just finished
        return 0.0


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode()):08x}"
