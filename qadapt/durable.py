"""Files and folders that are on the disk whole or not at all, also after a power cut.

What is new has a hidden name until its bytes have reached the disk; then one rename shows it, and the
folder's own list of names is flushed, too. The order is the point: a system may write what was not flushed
late or never, and a rename before the bytes it shows (`ALICE`, OSDI 2014, counts how many programs got that
wrong). Knows nothing of what is written.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REFUSED_SECONDS = 5.0 if os.name == "nt" else 0.0
"""How long a rename may be refused."""
POLL_SECONDS = 0.05


def write_whole(path: Path, text: str) -> None:
    """Puts a text in its place, whole; a file that is there is replaced.

    Raises:
        OSError: The place cannot be written; what was there is as it was.
    """
    building = path.with_name(f".{path.name}.tmp")
    try:
        building.write_text(text, encoding="utf-8")
        flush_file(building)
        rename(building, path)
    except OSError:
        building.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Makes a folder and those it lies in, and none that it does not lie in: `..` goes up from what is there.

    Raises:
        OSError: It cannot be made; one that is there is fine.
    """
    if (way := missing_way(folder)) is not None:
        raise NotADirectoryError(errno.ENOTDIR, f"it goes up from {way}, which is no folder", str(folder))
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        flush_folder(made.parent)


def missing_way(path: Path) -> Path | None:
    """The first folder that a path goes up from (`..`) though it is not there; None if there is none."""
    ups = (place for place, part in enumerate(path.parts) if part == "..")
    return next((way for place in ups if not (way := Path(*path.parts[:place])).is_dir()), None)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A hidden, empty folder that becomes `target` if the block ends well, and vanishes otherwise.

    What a killed process left of an earlier one is cleared away first. One writer at a time.

    Raises:
        OSError: The place cannot be written; what was there is as it was.
    """
    building = target.with_name(f".{target.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    make_folder(building)
    try:
        yield building
        publish(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def publish(building: Path, target: Path) -> None:
    """Shows a finished folder under its name, after all of it has reached the disk.

    A folder that is there is put aside by a rename, so that at no moment half a folder has that name.
    """
    flush_tree(building)
    former = target.with_name(f".{target.name}.former")
    if target.exists():
        shutil.rmtree(former, ignore_errors=True)
        rename(target, former)
    try:
        rename(building, target)
    except OSError:
        if former.exists():
            rename(former, target)
        raise
    flush_folder(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def put_back(parent: Path) -> None:
    """Puts back what `publish` had put aside when its process was killed, where nothing took its place."""
    for former in parent.glob(".*.former"):
        target = former.with_name(former.name.removeprefix(".").removesuffix(".former"))
        if not target.exists():
            rename(former, target)


def rename(source: Path, target: Path) -> None:
    """Gives a file or a folder another name; what has that name is replaced, if it is a file.

    Windows refuses while a virus scanner or an indexer has a file in it open, which they do for a moment with
    all that is new: there it is tried again for some seconds.

    Raises:
        OSError: It cannot be renamed; all is as it was.
    """
    end = time.monotonic() + REFUSED_SECONDS
    while True:
        try:
            source.replace(target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
        time.sleep(POLL_SECONDS)


def flush_tree(folder: Path) -> None:
    """Returns when a folder and all in it have reached the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            flush_folder(path)
        else:
            flush_file(path)
    flush_folder(folder)


def flush_file(path: Path) -> None:
    """Returns when a file's bytes have reached the disk, whoever wrote them."""
    _flush(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)


def flush_folder(folder: Path) -> None:
    """Returns when the names in a folder have reached the disk."""
    if os.name != "posix":  # there a folder cannot be opened, and renames are journaled
        return
    try:
        _flush(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks flush no folders
            raise


def _flush(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
